"""Reward models: load one, score responses with it, train one (Eq. 1 of the paper).

    python reward.py score --model MODEL --data train.jsonl --out scored.jsonl    add "rewards" to records
    torchrun --nproc_per_node 8 reward.py score ...                               shared by 8 processes
    python reward.py train --model BASE --data pairs.jsonl --out reward_model     learn from "chosen" labels

MODEL is an Open-Assistant reward model (in the paper OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5 for
training and OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1 for evaluation), a model from `reward.py train`, or
any Hugging Face sequence-classification model with one output.
"""

import argparse
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import clha
from clha import Example, InputError, Record, Turn

# ------------------------------------------------------------------------------------------------------------
# Loading


class OpenAssistantRewardModel(transformers.GPTNeoXPreTrainedModel):
    """GPT-NeoX and a linear `out_proj`, a name by which transformers' own classifier would miss its head."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of 1 + |reward|; rounding makes less


@dataclass
class RewardModel:
    """A reward model, its tokenizer, and the format in which it reads a dialogue."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    dialogue_ids: Callable[[list[Turn]], list[int]]  # a dialogue that ends with a response -> its ids
    max_length: int  # tokens; a longer chat loses its oldest turns, another text its beginning
    pack_tokens: int = 0  # of a forward pass; 0: 8192 on a GPU, 1024 on a CPU

    def __post_init__(self) -> None:
        self.pack_tokens = self.pack_tokens or (8192 if self.model.device.type == "cuda" else 1024)

    @property
    def head(self) -> torch.nn.Module | None:
        """The layer that turns a decoder's last state into a reward; None if the model is an encoder."""
        return getattr(self.model, "score", getattr(self.model, "out_proj", None))

    def score(self, prompts: list[list[Turn]], responses: list[str]) -> list[float]:
        """The reward of each response to the prompt in the same place.

        A prompt is computed once for all its responses, wherever they are in the list. Raises InputError if a
        reward is not finite, or not the one that the text gets alone.
        """
        if not responses:  # a process's share of the last part
            return []
        return self.score_ids(self.encode(prompts, responses), self.group(prompts))

    @torch.inference_mode()
    def score_ids(self, texts: list[list[int]], groups: list[list[int]]) -> list[float]:
        """The reward of each text, as token ids; the texts of a group share their prompt."""
        self.model.eval()
        kind = self.model.config.model_type
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if self.head and window and max(map(len, texts)) > window:
            wrong = f"a text is longer than the sliding_window; choose a --max_length of at most {window}"
            raise InputError(f"{kind}: {wrong}")
        queries = [share_prefix([texts[i] for i in group]) for group in groups]
        scores = [math.nan] * len(texts)
        passes = list(chunks([query["size"] for query in queries], self.pack_tokens))
        for chunk in passes:
            try:
                rewards = self.rewards([queries[k] for k in chunk]).tolist()
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{kind}: not supported ({clha.reason(error)})") from error
            for k, row in zip(chunk, rewards, strict=True):
                for i, reward in zip(groups[k], row, strict=False):  # rows are as wide as the longest query
                    scores[i] = reward
        if not all(map(math.isfinite, scores)):
            raise InputError(f"{self.model.name_or_path}: gives a text a reward that is not finite")
        if self.head:
            fullest = max(passes, key=lambda chunk: sum(len(groups[k]) for k in chunk))
            longest = max(range(len(queries)), key=lambda k: queries[k]["longest"])
            for i in {*groups[longest], *groups[fullest[-1]]}:  # the latter shares its pack with most
                self.compare(texts[i], scores[i])
        return scores

    def encode(self, prompts: list[list[Turn]], responses: list[str]) -> list[list[int]]:
        """Token ids of each prompt with its response, at most max_length of them."""
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            turns = [*prompt, {"role": "assistant", "content": response}]
            ids = self.dialogue_ids(clha.recent_turns(turns, self.tokenizer, self.max_length) or turns)
            rows.append(clha.cut_prompt(ids, self.max_length, self.tokenizer.bos_token_id))
        return rows

    def group(self, prompts: list[list[Turn]]) -> list[list[int]]:
        """The places of responses that share a prompt, and are computed together."""
        if not self.head:  # in an encoder a prompt sees the response: there is nothing to share
            return [[i] for i in range(len(prompts))]
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(json.dumps(prompt), []).append(i)
        return list(groups.values())

    def rewards(self, queries: list[Example]) -> Tensor:
        """Rewards (B, l) of B queries in float32; meaningless where a query has fewer than l responses."""
        device = self.model.device
        if not self.head:  # one response each, in a padded batch
            rows = [query["prompt_ids"] + query["response_ids"][0] for query in queries]
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
            return self.model(**batch).logits.float()
        length = filled_length(sum(query["size"] for query in queries), device)
        pack = clha.pack(queries, device, length)
        states = clha.hidden_states(self.model.base_model, pack)  # (N, d)
        prompts = torch.tensor([[len(query["prompt_ids"])] for query in queries], device=device)
        sizes = torch.cat([prompts, pack.lengths], dim=1)  # (B, 1 + l), in the order of the pack
        ends = sizes.flatten().cumsum(0).view_as(sizes)[:, 1:]  # (B, l)
        return self.head(states[ends - 1])[..., 0].float()

    def compare(self, ids: list[int], score: float) -> None:
        """Raises InputError where a text scored in a pack gets another score alone, with eager attention."""
        self.model.set_attn_implementation("eager")
        states = self.model.base_model(torch.tensor([ids], device=self.model.device), use_cache=False)
        alone = self.head(states.last_hidden_state[0, -1]).item()
        off = abs(score - alone) / (1 + abs(alone))
        if not off <= TOLERANCE[self.model.dtype]:
            wrong = f"not supported, as it scores a text {score:.4g} in a pack, {alone:.4g} alone"
            raise InputError(f"{self.model.config.model_type}: {wrong}")


def share_prefix(texts: list[list[int]]) -> Example:
    """Texts as one query: the prompt is what all of them begin with, short of the last token of any."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    common = min(len(list(same)), min(map(len, texts)) - 1)
    response_ids = [ids[common:] for ids in texts]
    lengths = [len(ids) for ids in response_ids]
    size = {"size": common + sum(lengths), "longest": common + max(lengths)}  # in tokens
    return {"prompt_ids": texts[0][:common], "response_ids": response_ids} | size


def filled_length(tokens: int, device: torch.device) -> int:
    """What a pack is filled to: 128, 256, 512, ... tokens, as flex_attention compiles each; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return max(128, 1 << (tokens - 1).bit_length())


def chunks(sizes: list[int], tokens: int) -> Iterator[list[int]]:
    """Indices of the queries of each forward pass, shortest first: one, or at most `tokens` when padded."""
    chunk: list[int] = []
    for k in sorted(range(len(sizes)), key=sizes.__getitem__):
        if chunk and (len(chunk) + 1) * sizes[k] > tokens:
            yield chunk
            chunk = []
        chunk.append(k)
    if chunk:
        yield chunk


def load_reward_model(
    path: str, device: str | torch.device | None = None, max_length: int = 1024, pack_tokens: int = 0
) -> RewardModel:
    """Loads a reward model from a folder or the hub: float32 on a CPU, bfloat16 on a GPU.

    Raises InputError if there is no such model, if it has more than one output, or if weights are missing
    (the head, above all).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if (Path(path) / "tokenizer.model").is_file() and not (Path(path) / "tokenizer.json").is_file():
        raise InputError(f"{path}: tokenizer.model alone gives wrong ids; it needs a tokenizer.json")
    # Given a config, AutoTokenizer does not look up the model type: it does not know Open-Assistant's.
    tokenizer = clha.load(transformers.AutoTokenizer, path, config=transformers.PretrainedConfig())
    config = clha.load(transformers.PretrainedConfig, path)
    kind = AutoModelForSequenceClassification
    dialogue_ids = partial(clha.dialogue_ids, tokenizer=tokenizer)
    if config.model_type == "gpt_neox_reward_model":
        kind = OpenAssistantRewardModel
        tokenizer.chat_template = None  # its own is not a template
        dialogue_ids = partial(open_assistant_ids, tokenizer=tokenizer)
    elif config.num_labels != 1:
        wrong = f"has {config.num_labels} outputs, not one; `reward.py train` makes a reward model"
        raise InputError(f"{path}: {wrong}")
    else:  # a template that takes nothing is refused now
        dialogue_ids([{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}])
    model = clha.load(kind, path, dtype=dtype, output_loading_info=True)
    config = model.config.get_text_config()
    if tokenizer.vocab_size > config.vocab_size:
        wrong = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise InputError(f"{path}: {wrong}")
    most = getattr(config, "max_position_embeddings", None) or math.inf
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    if padding is not None:  # RoBERTa's positions begin after that of its padding
        most -= padding + 1
    max_length = min(max_length, most)
    return RewardModel(model.to(device), tokenizer, dialogue_ids, max_length, pack_tokens)


def open_assistant_ids(turns: list[Turn], tokenizer: Tokenizer) -> list[int]:
    """A dialogue as Open-Assistant's models read it: a tag before each turn, EOS after it, no spaces."""
    tags = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}
    text = "".join(f"{tags[turn['role']]}{turn['content']}{tokenizer.eos_token}" for turn in turns)
    return tokenizer(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------------------
# Scoring


def write_scores(model: RewardModel, records: list[Record], out: Path) -> None:
    """Writes the records with "rewards" added, by all processes together; goes on where it was stopped."""
    settings = [fingerprint(model.model.name_or_path), model.max_length]
    _, processes, _ = clha.init_process()

    def work(share: list[Record], _: int) -> list[Record]:
        prompts = [record["prompt"] for record in share for _ in record["responses"]]
        responses = [response for record in share for response in record["responses"]]
        scores = iter(model.score(prompts, responses))
        return [record | {"rewards": list(islice(scores, len(record["responses"])))} for record in share]

    write_in_parts(out, records, settings, work, 512 * processes, "score")


def read_scale(path: Path, model: str) -> dict[str, Any] | None:
    """Mean and deviation of a model's rewards, from a file; None without one. Raises InputError."""
    if not path.exists():
        return None
    need = {"mean": int | float, "deviation": int | float, "model": str}
    scale = read_json(path, need, "a scale of rewards")
    if scale["model"] != model:
        raise InputError(f"{path}: is the scale of {scale['model']}'s rewards; choose another file")
    if not 0 < scale["deviation"] < math.inf or not math.isfinite(scale["mean"]):
        raise InputError(f"{path}: not a reward scale: {scale}")
    return scale


def standardized(records: list[Record], path: Path, model: str) -> list[Record]:
    """The records with (reward - mean) / deviation, by the file at `path`; if it is not there, they make it.

    So training and dev data get one scale. Raises InputError if all rewards are equal.
    """
    scale = read_scale(path, model)
    if scale:
        print(f"scale   read from {path}")
    else:
        rewards = torch.tensor([float(reward) for record in records for reward in record["rewards"]])
        scale = {"mean": rewards.mean().item(), "deviation": rewards.std().item(), "model": model}
        if not scale["deviation"] > 0:
            raise InputError("--standardize: all rewards are equal")
        write_text(path, json.dumps(scale) + "\n")
        print(f"scale   written to {path}")
    rows = []
    for record in records:
        rewards = [(reward - scale["mean"]) / scale["deviation"] for reward in record["rewards"]]
        rows.append(record | {"rewards": rewards})
    return rows


def reward_gaps(records: list[Record]) -> Tensor:
    """|r_i - r_j| of every pair of responses of every record, as one vector."""
    rows = [torch.tensor(record["rewards"], dtype=torch.float32) for record in records]
    return torch.cat([torch.pdist(rewards[:, None], p=1) for rewards in rows])


def summary(records: list[Record]) -> str:
    """Rewards, gate and reward gaps as a few lines of Markdown: what a `min_reward_gap` would keep."""
    rewards = torch.tensor([float(reward) for record in records for reward in record["rewards"]])
    line = f"{len(records):,} queries, rewards {rewards.mean():.3f} +- {rewards.std():.3f}; "
    opened = sum(max(record["rewards"]) > 0 for record in records) / len(records)
    line += f"the best response is above 0 (gate open) in {opened:.1%} of them"
    labeled = [record for record in records if "chosen" in record]
    if labeled:
        agreed = sum(record["rewards"][record["chosen"]] == max(record["rewards"]) for record in labeled)
        line += f", and is the chosen one in {agreed / len(labeled):.1%}"
    gaps = reward_gaps(records)
    names = ["reward gap"]
    shares = ["pairs"]
    for threshold in (0, 0.1, 0.25, 0.5, 1, 2, 3):
        names.append(f"> {threshold:g}")
        shares.append(f"{(gaps > threshold).float().mean():.1%}")
    return f"{line}\n\n{markdown([names, shares]).rstrip()}"


def draw_rewards(records: list[Record], min_reward_gap: float = clha.Config.min_reward_gap) -> Any:
    """What gate and filter see of a data set: the reward of each best response, and the gap of each pair."""
    best = torch.tensor([float(max(record["rewards"])) for record in records])
    gaps = reward_gaps(records)
    panels = [
        (best, 0, "Reward of the best response", "gate: {:.0%} imitated, right of 0", "queries"),
        (gaps, min_reward_gap, "Reward gap of a pair", "filter: {:.0%} train, right of {:g}", "pairs"),
    ]
    figure, grid = import_pyplot().subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, (values, threshold, title, label, counted) in zip(grid, panels, strict=True):
        axes.hist(values.numpy(), bins=25, color="0.6")
        axes.axvline(threshold, color="black")
        share = (values > threshold).float().mean().item()
        axes.set(title=title, xlabel=label.format(share, threshold), ylabel=counted)
    return figure


def import_pyplot() -> Any:
    """matplotlib's pyplot. Raises InputError if it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    return pyplot


def check_plot(path: str) -> None:
    """Raises InputError if no picture can be drawn at `path`."""
    suffixes = import_pyplot().figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lower()[1:] not in suffixes:
        raise InputError(f"--plot {path}: the name must end in one of {', '.join(sorted(suffixes))}")
    check_output(path, "file")


def save_picture(figure: Any, path: str) -> None:
    """Saves a figure, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------------------
# Long work, part by part


Work = Callable[[list[Any], int], list[Record]]


def write_in_parts(out: Path, items: list[Any], settings: Any, work: Work, part: int, desc: str) -> None:
    """Writes a JSON line per item, made by all processes together; stopped, it goes on where it was.

    work(share, start) returns the rows of this process's share of the `part` items from `start` on. Rows
    gather in OUT.<key>.partial, the key a hash of items and settings: work on others is never taken for
    these, nor removed. Raises InputError if another program is writing the same file.
    """
    rank, processes, _ = clha.init_process()
    key = hashlib.sha256(json.dumps(settings).encode())
    for item in items:
        key.update(json.dumps(item).encode())
    partial_path = out.with_name(f"{out.name}.{key.hexdigest()[:16]}.partial")
    with locked(out) if rank == 0 else nullcontext():
        done = clha.on_first_process(lambda: keep_whole_parts(partial_path, part))
        bar = tqdm(total=len(items), initial=done, desc=desc, disable=None if rank == 0 else True)
        for start in range(done, len(items), part):
            chunk = items[start : start + part]
            rows = gather(work(chunk[rank::processes], start), len(chunk))
            if rank == 0:
                append_jsonl(partial_path, rows)
            bar.update(len(chunk))
        bar.close()
        if rank == 0:
            partial_path.replace(out)
        dist.barrier()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other programs from writing `out`, in a folder that is made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock_path = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock_path, timeout=0):
            yield
            lock_path.unlink(missing_ok=True)
    except Timeout:
        raise InputError(f"{out}: another program is writing it; end that one, or wait") from None


def keep_settings(folder: Path, settings: dict[str, Any], finished: bool) -> None:
    """Writes what a folder's files are made with; raises InputError if `finished` ones were not made so."""
    path = folder / "settings.json"
    if not finished:
        write_text(path, json.dumps(settings, indent=2) + "\n")
    elif path.exists():
        told = clha.changes(read_json(path, {}, "settings"), settings)
        if told:
            raise InputError(f"{folder}: was made with other settings ({told}); choose another --out")


def keep_whole_parts(path: Path, part: int) -> int:
    """Cuts an unfinished file, made if need be, to whole parts; returns how many lines are left."""
    path.touch()
    lines = path.read_bytes().split(b"\n")[:-1]  # without the one that was being written
    done = len(lines) // part * part  # a part is the unit of whatever is random in it
    os.truncate(path, sum(len(line) + 1 for line in lines[:done]))
    return done


def gather(mine: list[Any], total: int) -> list[Any]:
    """The whole list on every process, if process r has its items r, r + processes, ..."""
    processes = dist.get_world_size()
    shares: list[list[Any]] = [[]] * processes
    dist.all_gather_object(shares, mine)
    return [shares[i % processes][i // processes] for i in range(total)]


def fingerprint(path: str | Path) -> list[Any]:
    """What tells a folder's files from later ones in the same place: names, sizes, times."""
    stats = {file.name: file.stat() for file in sorted(Path(path).glob("*"))}
    return [str(path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())]


# ------------------------------------------------------------------------------------------------------------
# Training


def reward_loss(rewards: Tensor, chosen: int, norm_penalty: float) -> Tensor:
    """Eq. 1, the mean over the (chosen, other) pairs of a query, plus norm_penalty x its mean squared reward.

    rewards (l,) -> (). Eq. 1 knows only differences; the penalty, which the paper does not have, pulls the
    mean reward towards zero, so that "above zero", the gate of Eq. 7, means better than the usual response.
    """
    others = torch.cat([rewards[:chosen], rewards[chosen + 1 :]])
    ranking = -F.logsigmoid(rewards[chosen] - others).mean()
    return ranking + norm_penalty * rewards.square().mean()


def train(args: argparse.Namespace) -> None:
    """Trains a reward model from a language model, with Eq. 1 on the "chosen" labels of records."""
    check_output(args.out, "new")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("train: works in one process; start it without torchrun")
    torch.manual_seed(args.seed)  # of the head
    model = start_from(args.model, args.max_length, args.pack_tokens, args.template)
    records = read_records(args.data, need=["chosen"])
    queries = [labeled_query(model, record) for record in tqdm(records, "tokens", disable=None)]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(args.seed)).tolist()
    shuffled = [queries[i] for i in order]
    count = max(1, len(queries) // 20)  # 5 % measure the accuracy and are never trained on
    held_out = shuffled[:count]
    training = shuffled[count:]
    steps = round(args.epochs * len(training) / args.batch_size)
    if not steps:
        few = f"{len(training)} records to train on (5 % are held out)"
        raise InputError(f"{args.data}: {few} make no step of --batch_size {args.batch_size}")
    longest = max(training, key=itemgetter("longest"))
    texts = [longest["prompt_ids"] + ids for ids in longest["response_ids"]]
    model.score_ids(texts, [list(range(len(texts)))])  # refuses what packs get wrong
    optimizer = torch.optim.AdamW(model.model.parameters(), args.learning_rate, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, round(0.05 * steps), steps)
    bar = tqdm(range(steps), desc="reward model", disable=None)
    for step in bar:
        places = range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = [training[place % len(training)] for place in places]  # each epoch in the same order
        loss = train_step(model, optimizer, batch, args.norm_penalty)
        if not math.isfinite(loss):
            raise InputError(f"--learning_rate {args.learning_rate}: the loss of step {step + 1} is {loss}")
        scheduler.step()
        bar.set_postfix(loss=f"{loss:.3f}")
    report = scale_rewards(model, held_out)
    with whole(args.out) as folder:
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        settings = {name: value for name, value in vars(args).items() if name != "run"}
        (folder / "training.json").write_text(json.dumps(report | settings, indent=2) + "\n")
    print(
        f"accuracy {report['accuracy']:.3f} on {report['pairs']} held-out pairs, mean reward "
        f"{report['mean_reward']:.3f} in units of its standard deviation, which was "
        f"{report['scale']:.3f} before scaling; saved in {args.out}"
    )


class NewRewardModel:
    """What `clha.load` loads here: a language model with a head drawn at random, the one weight missing."""

    @staticmethod
    def from_pretrained(path: str, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        settings |= {"num_labels": 1, "output_loading_info": True} | clha.EAGER
        model, info = AutoModelForSequenceClassification.from_pretrained(path, **settings)
        return model, info | {"missing_keys": set(info["missing_keys"]) - {"score.weight"}}


def start_from(path: str, max_length: int, pack_tokens: int = 0, template: str = "auto") -> RewardModel:
    """A language model with a new head, in float32. Raises InputError if it lacks weights of its own."""
    tokenizer = clha.load_tokenizer(path, template)
    model = clha.load(NewRewardModel, path).to("cuda" if torch.cuda.is_available() else "cpu")
    # Other programs read the reward at the last token that is not padding. If EOS were padding, that would be
    # the token before it; with no padding token at all they take one text at a time, and the right token.
    pads_with_eos = tokenizer.pad_token_id == tokenizer.eos_token_id
    model.config.pad_token_id = None if pads_with_eos else tokenizer.pad_token_id
    dialogue_ids = partial(clha.dialogue_ids, tokenizer=tokenizer)
    reward_model = RewardModel(model, tokenizer, dialogue_ids, max_length, pack_tokens)
    if not reward_model.head:
        raise InputError(f"{path}: is an encoder; here a reward model is trained from a decoder")
    return reward_model


def labeled_query(model: RewardModel, record: Record) -> Example:
    """A record as token ids, and which of its responses people chose."""
    prompts = [record["prompt"]] * len(record["responses"])
    return share_prefix(model.encode(prompts, record["responses"])) | {"chosen": record["chosen"]}


def train_step(
    model: RewardModel, optimizer: torch.optim.Optimizer, batch: list[Example], norm_penalty: float
) -> float:
    """An update by the mean loss over the queries of a batch, whatever the packs; returns that loss."""
    device = model.model.device.type
    total = 0.0
    optimizer.zero_grad()
    for chunk in chunks([query["size"] for query in batch], model.pack_tokens):
        queries = [batch[k] for k in chunk]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            rewards = model.rewards(queries)  # (B, l)
        losses = []
        for query, row in zip(queries, rewards, strict=True):
            own = row[: len(query["response_ids"])]
            losses.append(reward_loss(own, query["chosen"], norm_penalty))
        loss = torch.stack(losses).sum() / len(batch)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
    optimizer.step()
    return total


@torch.inference_mode()
def scale_rewards(model: RewardModel, held_out: list[Example]) -> dict[str, float]:
    """Makes the deviation of held-out rewards 1, so one min_reward_gap fits all models; reports on them.

    Raises InputError if they do not differ, or are not finite.
    """
    right = 0
    rows = []
    for query in held_out:
        row = model.rewards([query])[0]  # (l,)
        right += int((row[query["chosen"]] > row).sum())
        rows.append(row)
    rewards = torch.cat(rows)
    pairs = len(rewards) - len(rows)
    scale = rewards.std()
    if not 1e-4 < scale < math.inf:
        raise InputError(f"held-out rewards have a standard deviation of {scale:.2g}; they tell nothing")
    model.head.weight /= scale
    mean_reward = (rewards.mean() / scale).item()
    return {"accuracy": right / pairs, "pairs": pairs, "mean_reward": mean_reward, "scale": scale.item()}


# ------------------------------------------------------------------------------------------------------------
# What all programs here share besides clha.py: their command lines, and files that are whole or not there


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """For a file or folder that is there whole or not at all: yields where to write it, then renames that."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def append_jsonl(path: Path, rows: Iterable[Record]) -> None:
    """Adds JSON lines to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: str | Path, rows: Iterable[Record]) -> None:
    """Writes JSON lines, whole or not at all."""
    with whole(path) as unfinished:
        append_jsonl(unfinished, rows)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header. What a cell must not have is escaped."""
    lines = []
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        cells = ["".join(c if c.isprintable() else " " for c in text).replace("|", "\\|") for text in row]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def read_records(path: str | Path, need: Iterable[str] = ()) -> list[Record]:
    """All records of a file; see `clha.iter_records`."""
    return list(clha.iter_records(path, need))


def read_json(path: str | Path, need: dict[str, Any], what: str) -> dict[str, Any]:
    """An object from a JSON file. Raises InputError where it lacks what it needs, {name: type}."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a character, a lone surrogate
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(name), need[name]) for name in need):
        raise InputError(f"{path}: not {what}, with {', '.join(need)}")
    return value


def check_output(path: str | Path, kind: Literal["new", "file", "folder"]) -> None:
    """Raises InputError, before the work, where its output cannot be put; a "new" one must not be there."""
    path = Path(path)
    for above in path.parents:
        if above.is_file():
            raise InputError(f"{path}: {above} is a file; nothing can be put below it")
    if kind == "new" and path.exists():
        raise InputError(f"{path}: already exists; choose another output")
    if kind == "file" and path.is_dir():
        raise InputError(f"{path}: is a folder; it must be a file")
    if kind == "folder" and path.is_file():
        raise InputError(f"{path}: is a file; it must be a folder")


AT_LEAST_ONE = ("batch_size", "items", "max_length", "max_new_tokens", "num_responses", "queries")


def check_numbers(settings: Any, positive: Iterable[str] = ()) -> None:
    """Raises InputError for a number among the flags that is not finite, or smaller than it can be."""
    for name, value in vars(settings).items():
        least = int(name in (*AT_LEAST_ONE, *positive))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not least <= number < 2**32:
                raise InputError(f"--{name} {number}: must be a number of {least} or more, below 2**32")


class Parser(transformers.HfArgumentParser):
    """Flags from dataclasses, or added by hand; no abbreviations, and a wrong flag is an InputError."""

    def __init__(self, *dataclasses: type, **settings: Any) -> None:
        settings |= {"formatter_class": clha.HelpFormatter, "allow_abbrev": False}
        super().__init__(dataclasses, **settings)

    def add_command(self, name: str, run: Callable[[argparse.Namespace], None]) -> Callable[..., Any]:
        """A sub-command; `run` does it, and its docstring is the help. What this gives adds a flag to it."""
        if self._subparsers is None:
            self.commands = self.add_subparsers(dest="command", required=True)
        parser = self.commands.add_parser(name, help=run.__doc__, description=self.description)
        parser.set_defaults(run=run)
        return parser.add_argument

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


# ------------------------------------------------------------------------------------------------------------
# The command line


def score(args: argparse.Namespace) -> None:
    """Adds "rewards" to the records of a file and says how they are distributed."""
    rank, _, device = clha.init_process()
    check_output(args.out, "new")
    if args.plot:
        check_plot(args.plot)
    raw = Path(args.out)
    if args.standardize:  # a scale that does not fit is refused before the work
        check_output(args.standardize, "file")
        read_scale(Path(args.standardize), args.model)
        Path(args.standardize).parent.mkdir(parents=True, exist_ok=True)
        raw = Path(f"{args.out}.raw.partial")
    records = read_records(args.data)
    model = load_reward_model(args.model, device, args.max_length, args.pack_tokens)
    write_scores(model, records, raw)
    if rank == 0:
        if args.standardize:
            write_jsonl(args.out, standardized(read_records(raw), Path(args.standardize), args.model))
            raw.unlink()
        scored = read_records(args.out)
        print(f"{summary(scored)}\n\nwritten to {args.out}")
        if args.plot:
            save_picture(draw_rewards(scored), args.plot)


def main() -> None:
    """Parses the command line and runs `score` or `train`."""
    parser = Parser(description=__doc__)
    flag_of_score = parser.add_command("score", score)
    flag_of_train = parser.add_command("train", train)
    for flag in (flag_of_score, flag_of_train):
        flag("--data", required=True, help="records, JSON lines")
        flag("--max_length", type=int, default=1024, help="tokens; cut from the left")
        flag("--pack_tokens", type=int, default=0, help="of a forward pass; 0: by device")
    flag_of_score("--model", required=True, help="reward model: a folder or a hub name")
    flag_of_score("--out", required=True, help='the records with "rewards", JSON lines')
    scale = "(reward - mean) / deviation, both from this JSON file (such as scale.json), made if missing"
    flag_of_score("--standardize", default="", help=scale)
    flag_of_score("--plot", default="", help="picture of rewards and their gaps, such as gaps.png")
    flag = flag_of_train
    flag("--model", required=True, help="language model to start from, folder or hub name")
    flag("--out", required=True, help="folder for the reward model")
    flag("--epochs", type=float, default=1.0, help="passes over the data")
    flag("--batch_size", type=int, default=64, help="queries per step")
    flag("--learning_rate", type=float, default=1e-5, help="peak; 5 %% warm-up, then cosine")
    flag("--norm_penalty", type=float, default=0.001, help="on the mean squared reward")
    flag("--seed", type=int, default=42, help="of head, held-out queries and order")
    flag("--template", default="auto", help="as that of clha.py")
    args = parser.parse_args()
    check_numbers(args)
    args.run(args)


if __name__ == "__main__":
    clha.run(main)
