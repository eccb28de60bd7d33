"""RLHF, the rival of Table 2, by TRL: the same prompts, base model and reward model as CLHA's.

    pip install .[rlhf]
    python rlhf.py --model BASE --train_data train.jsonl --reward_model RM --output_dir out/rlhf

The paper's RLHF is PPO (Ouyang et al., 2022). Here it is RLOO (Ahmadian et al., 2024, arXiv:2402.14740):
REINFORCE, whose baseline is the mean reward of the other replies to the same prompt. The model samples
its own replies: of the records only the prompts are read. With a low --kl_beta it learns to please its judge.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import clha
import evaluate
import program
import reward
from program import HelpFormatter, load_tokenizer, loading, refuse
from records import InputError, new_folder, read_records, write_jsonl


def prompt_text(dialogue: reward.Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt, or of its last tokens if it is long: TRL takes text, no ids."""
    ids = tokenizer(text := clha.render(dialogue)).input_ids
    kept = clha.cut_prompt(ids, clha.Config.max_prompt_length, tokenizer.bos_token_id)
    return text if kept == ids else tokenizer.decode(kept, skip_special_tokens=True)


def reward_function(model: reward.RewardModel) -> Callable[..., list[float]]:
    """The reward model as TRL calls it: with the sampled texts, and the columns of the data by name."""

    def rewards(completions: list[str], dialogue: list[reward.Messages], **_: Any) -> list[float]:
        return model.score(dialogue, [evaluate.cut_reply(text) for text in completions])

    return rewards


def train(args: argparse.Namespace) -> None:
    """Trains by RLOO; leaves output_dir/final, a Hugging Face folder, and TRL's log as metrics.jsonl."""
    try:
        import trl  # its PPO is gone (huggingface/trl#7020), and took no reward function either
        from datasets import Dataset
    except ImportError:
        raise InputError("needs TRL: pip install .[rlhf]") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("runs as one process, without torchrun")
    program.check_ranges(args)
    program.check_out(args.output_dir, "folder")
    final = Path(args.output_dir, "final")
    if final.exists():
        raise InputError(f"{final.parent}: holds a finished run (final/); choose another --output_dir")
    tokenizer = load_tokenizer(args.model)
    dialogues = [record["prompt"] for record in read_records(args.train_data)]
    if not 1 <= args.batch_size <= len(dialogues):
        raise InputError(f"--batch_size {args.batch_size}: must be 1 to {len(dialogues)} (prompts)")
    gpu = torch.cuda.is_available()
    config = trl.RLOOConfig(
        args.output_dir, max_steps=args.max_steps or -1, num_train_epochs=1, seed=args.seed,
        per_device_train_batch_size=args.batch_size * args.num_generations, beta=args.kl_beta,
        num_generations=args.num_generations, max_completion_length=args.max_new_tokens,
        learning_rate=args.learning_rate, bf16=gpu, gradient_checkpointing=gpu, use_cpu=not gpu,
        save_strategy="no", report_to="none", disable_tqdm=not sys.stderr.isatty())  # fmt: skip
    judge = reward_function(reward.load_reward_model(args.reward_model, config.device))
    with loading(args.model):  # weights in fp32 as in clha.py, even if it computes in bf16
        settings = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(args.model, **settings)
    program.refuse_missing(args.model, info)
    data = Dataset.from_list([{"prompt": prompt_text(d, tokenizer), "dialogue": d} for d in dialogues])
    trainer = trl.RLOOTrainer(model, judge, config, data, processing_class=tokenizer)
    trainer.train()
    with new_folder(final) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink()  # a pickle that needs TRL
        write_jsonl(final.with_name("metrics.jsonl"), trainer.state.log_history)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags; learning rate and KL price are TRL's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--model", required=True, help="language model to align: a folder or a hub name")
    parser.add_argument("--train_data", required=True, help="records, JSON lines, scored or not")
    parser.add_argument("--reward_model", required=True, help="the one that scored CLHA's data")
    parser.add_argument("--output_dir", required=True, help="gets metrics.jsonl and final/")
    parser.add_argument("--max_steps", type=int, default=0, help="0: one pass over the prompts")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts a step")
    parser.add_argument("--num_generations", type=int, default=4, help="replies sampled for each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of a reply")
    parser.add_argument("--learning_rate", type=float, default=1e-6, help="at the start; falls to 0")
    parser.add_argument("--kl_beta", type=float, default=0.05, help="price of a nat from the base model")
    parser.add_argument("--seed", type=int, default=42, help="of the data order and the sampling")
    return parser.parse_args(argv)


if __name__ == "__main__":
    program.run(lambda: train(parse_args(sys.argv[1:])))
