"""Reward models: load one, score replies with it, train one (Eq. 1 of the paper).

    python reward.py score --model MODEL --data train.jsonl --out scored.jsonl    add "rewards" to each record
    torchrun --nproc_per_node 8 reward.py score ...                               ... each process its share
    python reward.py train --model BASE --data pairs.jsonl --out reward_model     train on "chosen" labels

MODEL is an Open-Assistant reward model (in the paper OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5 for
training and OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1 for evaluation), one made by `reward.py train`, or
any Hugging Face sequence-classification model with one output.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, PreTrainedModel

import clha
import fast
import program
from program import HelpFormatter, load_tokenizer, loading, refuse
from records import InputError, Record, fingerprint, new_folder, read_records, write_in_parts

Messages = list[dict[str, str]]

# ------------------------------------------------------------------------------------------------------------
# Loading


class OpenAssistantRewardModel(transformers.GPTNeoXPreTrainedModel):
    """Open-Assistant's reward model: GPT-NeoX, and a linear `out_proj` with bias on the last token's state.

    transformers' own GPT-NeoX classifier names its head otherwise, so it would load these checkpoints with a
    random head.
    """

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


@dataclass
class RewardModel:
    """A reward model, its tokenizer, and how it wants a dialogue written."""

    model: PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    text: Callable[[Messages, str], str]  # prompt and response -> all of the text, with its special tokens
    add_special_tokens: bool  # whether the tokenizer adds its own (BOS) to that text
    max_length: int  # tokens; a longer text loses its beginning
    pack_tokens: int  # tokens of one forward pass

    @torch.inference_mode()
    def score(self, prompts: list[Messages], responses: list[str]) -> list[float]:
        """The reward of each response to its prompt, in the given order.

        A prompt is computed once for all its responses, wherever they stand in the list. Raises InputError if
        a reward is not finite.
        """
        self.model.eval()
        scores, texts = [math.nan] * len(prompts), self.encode(prompts, responses)
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):  # an encoder sees the reply from the prompt: nothing to share
            groups.setdefault(json.dumps(prompt) if head(self.model) else str(i), []).append(i)
        queries = [(members, share_prefix([texts[i] for i in members])) for members in groups.values()]
        for part in chunks(queries, self.pack_tokens):
            values = self.rewards([query for _, query in part]).tolist()
            for (members, _), row in zip(part, values, strict=True):
                for i, value in zip(members, row, strict=False):  # rows are as long as the longest query's
                    scores[i] = value
        for response, score in zip(responses, scores, strict=True):
            if not math.isfinite(score):
                raise InputError(f"{self.model.name_or_path}: gives {response[:40]!r} the reward {score}")
        return scores

    def encode(self, prompts: list[Messages], responses: list[str]) -> list[list[int]]:
        """The token ids of each prompt with its response, cut from the left."""
        texts = [self.text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        rows = self.tokenizer(texts, add_special_tokens=self.add_special_tokens).input_ids if texts else []
        return [clha.cut_prompt(ids, self.max_length, self.tokenizer.bos_token_id) for ids in rows]

    def rewards(self, queries: list[clha.Example]) -> Tensor:
        """Rewards (B, l) of B queries in float32: the head at the last token of each reply of a pack."""
        if layer := head(self.model):
            flex = fast.uses_flex(self.model, "auto", self.max_length)
            fill_to = fast.filled(sum(map(clha.size, queries))) if flex else 0
            batch = clha.pack(queries, self.model.device, fill_to)
            hidden = clha.forward_pack(self.model.base_model, batch).last_hidden_state[0]  # (N, d)
            return layer(hidden[batch["last"]])[..., 0].float()  # (B, l, d) -> (B, l)
        rows = [query["prompt_ids"] + query["response_ids"][0] for query in queries]
        padded = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        return self.model(**padded).logits.float()  # (B, 1)


def head(model: PreTrainedModel) -> torch.nn.Module | None:
    """The layer that makes a reward of a decoder's last state; None for an encoder, which has none."""
    return getattr(model, "score", None) or getattr(model, "out_proj", None)


def share_prefix(texts: list[list[int]]) -> clha.Example:
    """Texts as one query: its prompt is what all of them begin with, short of the last token of any."""
    columns = zip(*(ids[:-1] for ids in texts), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {
        "prompt_ids": texts[0][:common],
        "response_ids": [ids[common:] for ids in texts],
        "rewards": None,
        "chosen": 0,
    }


def chunks(
    queries: list[tuple[list[int], clha.Example]], tokens: int
) -> Iterator[list[tuple[list[int], clha.Example]]]:
    """Queries, shortest first, in parts of at most `tokens` tokens even when padded to their longest."""
    part: list[tuple[list[int], clha.Example]] = []
    for query in sorted(queries, key=lambda query: clha.size(query[1])):
        if part and (len(part) + 1) * clha.size(query[1]) > tokens:
            yield part
            part = []
        part.append(query)
    if part:
        yield part


def load_reward_model(
    path: str, device: str | torch.device | None = None, max_length: int = 1024, pack_tokens: int = 0
) -> RewardModel:
    """Loads a reward model from a folder or the hub; float32 on a CPU, bfloat16 on a GPU.

    Raises InputError if the folder is none, has weights missing (a head above all), or more than one output.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
    with loading(path):
        config, _ = transformers.PretrainedConfig.get_config_dict(path)
        # A config that says nothing: AutoTokenizer would refuse Open-Assistant's unknown model type.
        silent = {"config": transformers.PretrainedConfig(), "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **silent)
        if open_assistant := config.get("model_type") == "gpt_neox_reward_model":
            settings["config"] = GPTNeoXConfig.from_dict(config)
        kind = OpenAssistantRewardModel if open_assistant else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(path, **settings)
    if open_assistant:
        text = partial(oasst_text, eos=tokenizer.eos_token)
    elif tokenizer.chat_template:
        text = partial(chat_text, tokenizer)
        text([{"role": "user", "content": "How?"}], "So.")  # a template that takes nothing is refused now
    else:
        text = partial(hh_text, eos=tokenizer.eos_token or "")
    if not open_assistant and model.config.num_labels != 1:
        raise InputError(f"{path}: has {model.config.num_labels} outputs; a reward model has one")
    program.refuse_missing(path, info)
    program.refuse_vocabulary(path, tokenizer, model.config)
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    pack_tokens = pack_tokens or (8192 if device.type == "cuda" else 1024)
    adds_bos = not open_assistant and not tokenizer.chat_template  # elsewhere the text has all it needs
    return RewardModel(model.to(device), tokenizer, text, adds_bos, max_length, pack_tokens)


def oasst_text(prompt: Messages, response: str, eos: str) -> str:
    """A dialogue as Open-Assistant's models read it: a tag before each turn and EOS after it, no blanks."""
    tags = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}
    turns = [*prompt, {"role": "assistant", "content": response}]
    return "".join(f"{tags[turn['role']]}{turn['content']}{eos}" for turn in turns)


def hh_text(prompt: Messages, response: str, eos: str) -> str:
    """A dialogue as clha.py and `reward.py train` write it: HH-RLHF's text, ended by EOS."""
    return f"{clha.render(prompt)} {response}{eos}"


def chat_text(tokenizer: transformers.PreTrainedTokenizerBase, prompt: Messages, response: str) -> str:
    """A dialogue in the chat template that a model brings along."""
    turns = [*prompt, {"role": "assistant", "content": response}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:  # most often it wants no system turn, or other roles in turn
        said = f"its chat template takes no {turns[:2]}: {error}"
        raise InputError(f"{tokenizer.name_or_path}: {said}") from error


# ------------------------------------------------------------------------------------------------------------
# Scoring


def score_records(model: RewardModel, records: list[Record]) -> list[Record]:
    """The records with "rewards" added."""
    prompts = [record["prompt"] for record in records for _ in record["responses"]]
    values = iter(model.score(prompts, [reply for record in records for reply in record["responses"]]))
    return [record | {"rewards": [next(values) for _ in record["responses"]]} for record in records]


def write_scores(model: RewardModel, records: list[Record], out: Path) -> None:
    """Writes the records with "rewards" added, by all processes together; goes on where it was stopped."""
    settings = [fingerprint(model.model.name_or_path), model.max_length]
    processes = dist.get_world_size() if dist.is_initialized() else 1

    def work(share: list[Record], _: int) -> list[Record]:
        return score_records(model, share)

    write_in_parts(out, records, settings, work, 512 * processes, "score")


def reward_gaps(records: list[Record]) -> Tensor:
    """|r_i - r_j| of every pair of replies of every record, as one vector."""
    rewards = [torch.tensor(record["rewards"], dtype=torch.float32) for record in records]
    return torch.cat([torch.pdist(row[:, None], p=1) for row in rewards])


def summary(records: list[Record]) -> str:
    """Rewards and reward gaps as a few lines of Markdown: what `min_reward_gap` would keep."""
    rewards = torch.tensor([float(r) for record in records for r in record["rewards"]])
    gaps = reward_gaps(records)
    above = sum(max(record["rewards"]) > 0 for record in records) / len(records)
    agree = sum(record["rewards"][record.get("chosen", 0)] == max(record["rewards"]) for record in records)
    thresholds = (0, 0.1, 0.25, 0.5, 1, 2, 3)
    return "\n".join(
        [
            f"{len(records):,} queries, rewards {rewards.mean():.3f} +- {rewards.std():.3f}; the best is "
            f"above 0 in {above:.1%} of them, and it is the chosen one in {agree / len(records):.1%}\n",
            "| reward gap | " + " | ".join(f"> {t:g}" for t in thresholds) + " |",
            "| --- |" + " --- |" * len(thresholds),
            "| pairs | " + " | ".join(f"{(gaps > t).float().mean():.1%}" for t in thresholds) + " |",
        ]
    )


def plot_gaps(records: list[Record], path: str) -> None:
    """Draws the histogram of reward gaps with the default threshold, as a picture file."""
    pyplot = import_pyplot()
    gaps, threshold = reward_gaps(records), clha.Config.min_reward_gap
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist(gaps.numpy(), bins=60, color="tab:blue")
    axes.axvline(
        threshold,
        color="tab:red",
        label=f"min_reward_gap {threshold:g}: {(gaps > threshold).float().mean():.0%} of pairs kept",
    )
    axes.set(xlabel="reward gap of a pair", ylabel="pairs", xlim=(0, None))
    axes.legend()
    save_picture(figure, path)


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. Raises InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(path: str) -> None:
    """Raises InputError where no picture can be made at `path`: of its suffix, or at all."""
    suffixes = import_pyplot().figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lower()[1:] not in suffixes:
        raise InputError(f"--plot {path}: the name must end in one of {', '.join(sorted(suffixes))}")
    program.check_out(path, "file")


def save_picture(figure: Any, path: str) -> None:
    """Saves a figure, in a folder that is made if it is not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------------------
# Training


def reward_loss(rewards: Tensor, chosen: Tensor, present: Tensor, norm_penalty: float) -> Tensor:
    """Eq. 1, the mean over a query's (chosen, other) pairs, plus norm_penalty x its mean squared reward.

    rewards, present (B, l), chosen (B,) -> (B,). Eq. 1 knows only differences; the penalty draws rewards to a
    mean of zero, so that "above zero", the gate of Eq. 7, means better than the usual reply.
    """
    gaps = clha.pick(rewards, chosen)[:, None] - rewards  # (B, l)
    others = present.scatter(1, chosen[:, None], False)
    ranking = -(F.logsigmoid(gaps) * others).sum(1) / others.sum(1)
    return ranking + norm_penalty * (rewards.square() * present).sum(1) / present.sum(1)


def train(args: argparse.Namespace) -> None:
    """Trains a reward model from a language model on the "chosen" labels; leaves a Hugging Face folder."""
    torch.manual_seed(args.seed)
    program.check_out(args.out, "new")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model)
    records = read_records(args.data, need=["chosen"])
    with loading(args.model):
        settings = {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True}
        settings["trust_remote_code"] = False
        model, info = AutoModelForSequenceClassification.from_pretrained(args.model, **settings)
    if head(model) is None or set(info["missing_keys"]) - {"score.weight"}:
        raise InputError(f"{args.model}: not a whole language model to train a reward model from")
    has_pad = tokenizer.pad_token_id is not None
    model.config.pad_token_id = tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id
    text = partial(hh_text, eos=tokenizer.eos_token)
    pack_tokens = args.pack_tokens or (8192 if device.type == "cuda" else 1024)
    reward_model = RewardModel(model.to(device), tokenizer, text, True, args.max_length, pack_tokens)

    queries = [
        share_prefix(reward_model.encode([record["prompt"]] * len(record["responses"]), record["responses"]))
        | {"chosen": record["chosen"]}
        for record in tqdm(records, desc="tokens", disable=None)
    ]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out, training = order[: len(order) // 20], order[len(order) // 20 :]  # 5 % tell the accuracy
    steps = round(args.epochs * len(training) / args.batch_size)
    if not held_out or not steps:
        raise InputError(f"{args.data}: too few records ({len(records)}) for --batch_size {args.batch_size}")
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, round(0.05 * steps), steps)
    bar = tqdm(range(steps), desc="reward model", disable=None)
    for step in bar:
        places = range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = [queries[training[place % len(training)]] for place in places]
        total = 0.0
        for part in clha.deal([clha.size(query) for query in batch], pack_tokens, 1):
            examples = [batch[i] for i in part]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                rewards = reward_model.rewards(examples)
            losses = reward_loss(rewards, *labels(examples, device), args.norm_penalty)
            loss = losses.sum() / args.batch_size
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")

    model.eval()
    right, pairs, rewards = 0, 0, []
    with torch.inference_mode():
        for i in held_out:
            row = reward_model.rewards([queries[i]])[0]  # (l,)
            right += (row[queries[i]["chosen"]] > row).sum().item()
            pairs += len(row) - 1
            rewards += row.tolist()
    # A unit of reward becomes its standard deviation, so that min_reward_gap means the same for every model.
    scale = torch.tensor(rewards).std()
    head(model).weight.data /= scale
    mean = torch.tensor(rewards).mean() / scale
    report = {"accuracy": right / pairs, "pairs": pairs, "mean_reward": mean.item(), "scale": scale.item()}
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(report | vars(args), indent=2, default=str) + "\n")
    print(
        f"accuracy {right / pairs:.3f} on {pairs} held-out pairs, mean reward {mean:.3f} (in units of its "
        f"standard deviation, {scale:.3f} before); saved in {args.out}"
    )


def labels(queries: list[clha.Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of B queries: the index of each chosen reply (B,), and which of the l places hold a reply (B, l)."""
    width = max(len(query["response_ids"]) for query in queries)
    present = [[i < len(query["response_ids"]) for i in range(width)] for query in queries]
    chosen = [query["chosen"] for query in queries]
    return torch.tensor(chosen, device=device), torch.tensor(present, device=device)


# ------------------------------------------------------------------------------------------------------------
# The command line


def score(args: argparse.Namespace) -> None:
    """Adds "rewards" to the records of a file and says how they are distributed."""
    rank, _, device = clha.init_process()
    program.check_out(args.out, "file")
    records = read_records(args.data)
    if args.plot:
        check_plot(args.plot)  # rather refused now than after hours of scoring
    model = load_reward_model(args.model, device, args.max_length, args.pack_tokens)
    write_scores(model, records, Path(args.out))
    if rank == 0:
        scored = read_records(args.out)
        print(f"{summary(scored)}\n\nwritten to {args.out}")
        if args.plot:
            plot_gaps(scored, args.plot)


def main() -> None:
    """Parses the command line and runs `score` or `train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = partial(commands.add_parser, formatter_class=HelpFormatter, description=__doc__)
    scoring = add_command("score", help='add "rewards" to records')
    training = add_command("train", help="train a reward model with Eq. 1")
    for command in (scoring, training):
        command.error = refuse
        command.add_argument("--data", required=True, help="records, JSON lines")
        command.add_argument("--pack_tokens", type=int, default=0, help="of a pass; 0: by device")
    scoring.set_defaults(run=score)
    scoring.add_argument("--model", required=True, help="reward model: a folder or a hub name")
    scoring.add_argument("--out", required=True, help='the records with "rewards", JSON lines')
    scoring.add_argument("--plot", default="", help="picture of the reward gaps, such as gaps.png")
    scoring.add_argument("--max_length", type=int, default=1024, help="tokens; the rest is cut at the left")
    training.set_defaults(run=train)
    training.add_argument("--model", required=True, help="language model to start from, folder or hub name")
    training.add_argument("--out", required=True, help="folder for the reward model")
    training.add_argument("--epochs", type=float, default=1, help="passes over the data")
    training.add_argument("--batch_size", type=int, default=64, help="queries a step")
    training.add_argument("--learning_rate", type=float, default=1e-5, help="peak; 5 %% warm-up, cosine")
    training.add_argument("--norm_penalty", type=float, default=0.001, help="on the mean squared reward")
    training.add_argument("--max_length", type=int, default=1024, help="tokens; the rest is cut at the left")
    training.add_argument("--seed", type=int, default=42, help="of the head, the held-out part, the order")
    parser.error = refuse
    args = parser.parse_args()
    program.check_ranges(args)
    args.run(args)


if __name__ == "__main__":
    program.run(main)
