"""RLHF, the online rival of Table 2, by TRL: the same prompts, base model and reward model as CLHA's.

    pip install .[rlhf]
    python -m study.rlhf --model BASE --train_data train.jsonl --reward_model RM --output_dir out/rlhf

The paper's RLHF is PPO (Ouyang et al., 2022). Here it is RLOO (Ahmadian et al., 2024, arXiv:2402.14740):
REINFORCE whose baseline is the mean reward of the other responses to the same prompt. (TRL's PPO is gone,
huggingface/trl#7020, and took no reward function.) The model samples its own responses: only the records'
prompts are read. With a low --kl_beta it learns to game the reward model.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import clha
import evaluate
import reward
from clha import InputError, Turn


def prompt_text(prompt: list[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt, or of its last tokens if it is long: TRL takes text, not ids."""
    text = clha.render(prompt)
    ids = tokenizer(text).input_ids
    kept = clha.cut_prompt(ids, clha.Config.max_prompt_length, tokenizer.bos_token_id)
    if kept == ids:
        return text
    return tokenizer.decode(kept, skip_special_tokens=True)


def reward_function(model: reward.RewardModel) -> Callable[..., list[float]]:
    """The reward model as TRL calls it: with the sampled texts, and the columns of the data by name."""

    def rewards(completions: list[str], dialogue: list[list[Turn]], **_: Any) -> list[float]:
        return model.score(dialogue, [evaluate.cut_response(text) for text in completions])

    return rewards


def rloo_config(trl: ModuleType, args: argparse.Namespace) -> Any:
    """TRL's settings of a run; the learning rate is constant, as the study's other runs have it."""
    gpu = torch.cuda.is_available()
    return trl.RLOOConfig(
        args.output_dir,
        max_steps=args.max_steps or -1,
        num_train_epochs=1,
        seed=args.seed,
        per_device_train_batch_size=args.batch_size * args.num_generations,
        beta=args.kl_beta,
        num_generations=args.num_generations,
        max_completion_length=args.max_new_tokens,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        bf16=gpu,
        gradient_checkpointing=gpu,
        use_cpu=not gpu,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every,
        save_only_model=True,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )


def train(args: argparse.Namespace) -> None:
    """Trains by RLOO; leaves output_dir/final, a Hugging Face folder, and TRL's log as metrics.jsonl."""
    try:
        import trl
    except ImportError:
        raise InputError("needs TRL: pip install .[rlhf]") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("runs as one process, without torchrun")
    reward.check_numbers(args)
    if args.num_generations < 2:
        raise InputError(f"--num_generations {args.num_generations}: must be 2 or more")
    reward.check_output(args.output_dir, "folder")
    final = Path(args.output_dir, "final")
    if final.exists():
        raise InputError(f"{args.output_dir}: holds a finished run (final/); choose another --output_dir")
    tokenizer = clha.load_tokenizer(args.model)
    prompts = [record["prompt"] for record in clha.iter_records(args.train_data)]
    if not 1 <= args.batch_size <= len(prompts):
        raise InputError(f"--batch_size {args.batch_size}: must be 1 to {len(prompts)} (prompts)")
    config = rloo_config(trl, args)
    reward_model = reward.load_reward_model(args.reward_model, config.device)
    # Weights in fp32 as in clha.py, even if it computes in bf16.
    model = clha.load(AutoModelForCausalLM, args.model, dtype=torch.float32, output_loading_info=True)
    rows = [{"prompt": prompt_text(prompt, tokenizer), "dialogue": prompt} for prompt in prompts]
    trainer = trl.RLOOTrainer(
        model, reward_function(reward_model), config, Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    reward.write_jsonl(final.with_name("metrics.jsonl"), trainer.state.log_history)
    for saved in final.parent.glob("checkpoint-*"):
        saved.rename(saved.with_name(saved.name.replace("checkpoint", "step")))  # as clha.py names them
    with reward.whole(final) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink()  # a pickle that needs TRL


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; the defaults of learning rate and KL weight are TRL's."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--model", required=True, help="language model to align: a folder or a hub name")
    flag("--train_data", required=True, help="records, JSON lines, scored or not")
    flag("--reward_model", required=True, help="the one that scored CLHA's data")
    flag("--output_dir", required=True, help="receives metrics.jsonl and final/")
    flag("--max_steps", type=int, default=0, help="0: one pass over the prompts")
    flag("--batch_size", type=int, default=32, help="prompts per step")
    flag("--num_generations", type=int, default=4, help="responses sampled for each prompt")
    flag("--max_new_tokens", type=int, default=128, help="tokens of a response")
    flag("--learning_rate", type=float, default=1e-6, help="constant over the run")
    flag("--save_every", type=int, default=0, help="steps between model folders OUTPUT_DIR/step-N; 0: none")
    flag("--kl_beta", type=float, default=0.05, help="weight of the KL to the base model")
    flag("--seed", type=int, default=42, help="of the data order and the sampling")
    return parser.parse_args(argv)


if __name__ == "__main__":
    clha.run(lambda: train(parse_args(sys.argv[1:])))
