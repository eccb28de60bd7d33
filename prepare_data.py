"""Preference data as records, one JSON line a query: HH-RLHF, the authors' data.zip, or the toy world.

    python prepare_data.py hh --source Anthropic/hh-rlhf --out data      the hub, or a folder of raw files
    python prepare_data.py release --source FOLDER --out data            the authors' files with their rewards
    python prepare_data.py toy --out data                                a small world with a known reward
    python prepare_data.py augment --data train.jsonl --model M --out train3.jsonl    a third reply, sampled

The first three write train.jsonl, dev.jsonl and test.jsonl; they print how many queries each subset has,
beside the paper's Table 1, and what was left out and why. No dev query is in the test set.
"""

import argparse
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import clha
import program
import reward
from program import HelpFormatter, refuse
from records import (
    InputError,
    Record,
    check_record,
    fingerprint,
    read_jsonl,
    read_records,
    write_in_parts,
    write_jsonl,
)

TABLE_1 = {  # (training, test) queries of each subset in the paper
    "harmless-base": (42537, 2312),
    "helpful-base": (43835, 2354),
    "helpful-online": (22007, 1137),
    "helpful-rejection-sampled": (52421, 2749),
}
Splits = dict[str, list[Record]]  # "train", "dev", "test" -> records
Row = tuple[str, str, str, int, dict[str, Any]]  # file, split, subset, line and what stands there

# ------------------------------------------------------------------------------------------------------------
# Raw HH-RLHF


def split_dialogue(text: str) -> list[dict[str, str]]:
    """HH-RLHF's text as turns {"role": "user" or "assistant", "content"}, with nothing lost but outer blanks.

    A turn begins at "Human:" or "Assistant:" after an empty line, or at the very start, and goes on to the
    next, empty lines included. (The released parser drops all but the first paragraph of a turn.) Turns of
    one role in a row become one turn; text before the first turn is taken as the human's.
    """
    before, *pieces = re.split(r"(?:\n\n|\A\s*)(Human|Assistant):", text)
    sections = zip(pieces[::2], pieces[1::2], strict=True)
    whole = [("Human", before), *sections] if before.strip() else sections
    turns: list[dict[str, str]] = []
    for name, same in itertools.groupby(whole, key=lambda section: section[0]):
        contents = (content.strip() for _, content in same)
        role = {"Human": "user", "Assistant": "assistant"}[name]
        turns.append({"role": role, "content": "\n\n".join(filter(None, contents))})
    return turns


def hh_record(row: dict[str, Any]) -> Record | str:
    """The record of a raw row {"chosen", "rejected"}, both whole dialogues; or why it is left out."""
    dialogues = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
    if not all(turns and turns[-1]["role"] == "assistant" for turns in dialogues):
        return "the last turn is not the assistant's"
    (*prompt, chosen), (*other_prompt, rejected) = dialogues
    if not prompt or prompt != other_prompt:
        return "chosen and rejected answer different dialogues"
    return {"prompt": prompt, "responses": [chosen["content"], rejected["content"]], "chosen": 0}


def hh_rows(source: str, subset: str, split: str) -> Iterable[tuple[int, dict[str, Any]]] | None:
    """(line, row) of a raw file in a folder, or of a part of a data set on the hub; None if it is missing."""
    if Path(source).is_dir():
        names = f"{subset}/{split}.jsonl", f"{subset}/{split}.jsonl.gz"
        path = next((Path(source) / name for name in names if (Path(source) / name).is_file()), None)
        return path and read_jsonl(path)
    if source.count("/") != 1 or source[0] in "./~":
        raise InputError(f"{source}: no such folder, and not a hub name like Anthropic/hh-rlhf")
    from datasets import load_dataset

    print(f"taking {subset}/{split} of {source} from the Hugging Face hub")
    try:
        return enumerate(load_dataset(source, data_dir=subset, split=split), 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from error


def read_hh(source: str) -> Iterator[Row]:
    """Yields (file, split, subset, line, row) of all of HH-RLHF that `source` has; names what it has not."""
    found = False
    for subset, split in itertools.product(TABLE_1, ("train", "test")):
        rows = hh_rows(source, subset, split)
        if rows is None:
            print(f"not found: {source}/{subset}/{split}.jsonl(.gz)")
            continue
        found = True
        for line, row in tqdm(rows, desc=f"{subset}/{split}", disable=None):
            if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
                raise InputError(f"{source}, {subset}/{split}, line {line}: no texts chosen and rejected")
            yield f"{source}, {subset}/{split}", split, subset, line, row
    if not found:
        raise InputError(f"{source}: has none of HH-RLHF's files, such as harmless-base/train.jsonl.gz")


# ------------------------------------------------------------------------------------------------------------
# The authors' data.zip


def release_record(row: dict[str, Any]) -> Record:
    """The record of a row of the authors' files: prefix, suffix, reward, sft_index.

    A prefix is a list of tagged turns, "<|prompter|>..." or "<|assistant|>...", that ends in an empty
    "<|assistant|>"; there is one for each reply, all the same. Raises ValueError for a row of another form.
    """
    prefix = row["prefix"][0] if isinstance(row["prefix"][0], list) else row["prefix"]
    for name, texts in (("prefix", prefix), ("suffix", row["suffix"])):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'"{name}" is not a list of texts')
    text = "".join(prefix).replace("<|endoftext|>", "")
    before, *tagged = re.split(r"<\|(prompter|assistant)\|>", text)
    roles = {"prompter": "user", "assistant": "assistant"}
    pieces = zip(tagged[::2], tagged[1::2], strict=True)
    turns = [{"role": roles[tag], "content": text.strip()} for tag, text in pieces]
    if before.strip() or not turns or turns[-1] != {"role": "assistant", "content": ""}:
        raise ValueError('"prefix" does not begin with a tag, or not end in <|assistant|>')
    responses = [text.replace("<|endoftext|>", "").strip() for text in row["suffix"]]
    chosen = row.get("sft_index", 0)
    return {"prompt": turns[:-1], "responses": responses, "rewards": row["reward"], "chosen": chosen}


def read_release(source: str) -> Iterator[Row]:
    """Yields (file, split, subset, line, row) of the authors' files: one file, or all in and below a folder.

    "train" in a file's path below the folder makes it training data, "dev" in its name dev data; the others
    are test data.
    """
    root = Path(source)
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*.json*") if p.is_file())
    if not paths:
        raise InputError(f"{source}: no such file, nor a folder with .json, .jsonl or .json.gz files")
    for path in paths:
        place = path.name if root.is_file() else str(path.relative_to(root))
        split = "train" if "train" in place else "dev" if "dev" in path.name else "test"
        for line, row in tqdm(read_jsonl(path), desc=place, disable=None):
            meta = row.get("meta")
            raw = Path(str(meta.get("path"))).parent.name if isinstance(meta, dict) else ""
            subset = raw if raw in TABLE_1 else path.name.split(".")[0]
            yield str(path), split, subset.replace("_", "-"), line, row


# ------------------------------------------------------------------------------------------------------------
# Records of both


def collect(rows: Iterable[Row], parse: Callable[..., Record | str]) -> tuple[Splits, Counter[str]]:
    """All rows as records by split, and how many were left out for which reason."""
    splits: Splits = {"train": [], "dev": [], "test": []}
    dropped: Counter[str] = Counter()
    for file, split, subset, line, row in rows:
        try:
            record = parse(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{file}, line {line}: not a row of this format ({error})") from None
        if not isinstance(record, str):
            record |= {"subset": subset, "id": f"{subset}/{split}/{line}"}
            if not all(response.strip() for response in record["responses"]):
                record = "an empty reply"
            elif wrong := check_record(record, []):
                raise InputError(f"{file}, line {line}: {wrong}")
        if isinstance(record, str):
            dropped[record] += 1
        else:
            splits[split].append(record)
    return splits, dropped


def same_query(record: Record) -> str:
    """A key that two records share if they are the same query."""
    return repr((record["prompt"], sorted(record["responses"])))


def hold_out(splits: Splits, items: int, seed: int) -> int:
    """Sees to it that no dev query is in the test set; returns how many were taken out of it.

    Where there is no dev set, `items` of the test queries are drawn as one.
    """
    if not splits["dev"] and splits["test"]:
        if items >= len(splits["test"]):
            raise InputError(f"--dev_items {items}: only {len(splits['test'])} test queries to draw from")
        splits["dev"] = random.Random(seed).sample(splits["test"], items)
    dev = {same_query(record) for record in splits["dev"]}
    test = [record for record in splits["test"] if same_query(record) not in dev]
    removed, splits["test"] = len(splits["test"]) - len(test), test
    return removed


def report(splits: Splits, read: int, dropped: Counter[str], removed: int) -> str:
    """Table 1 of what was read, beside the paper's, and what was left out."""
    counts = {split: Counter(record["subset"] for record in records) for split, records in splits.items()}
    subsets = [*TABLE_1, *sorted(set().union(*counts.values()) - set(TABLE_1))]
    lines = ["| subset | train | dev | test | paper: train | test |", "| --- |" + " --- |" * 5]
    for subset in subsets:
        paper = [f"{n:,}" for n in TABLE_1.get(subset, ())] or ["", ""]
        cells = [f"{counts[split][subset]:,}" for split in ("train", "dev", "test")] + paper
        lines.append(f"| {subset} | " + " | ".join(cells) + " |")
    lines.append(f"\n{read:,} queries read, {dropped.total():,} of them left out")
    lines += [f"  {count:,}: {reason}" for reason, count in dropped.most_common()]
    lines.append(f"{len(splits['dev']):,} dev queries, which took {removed:,} out of the test set")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Longer rankings: HH-RLHF_3 of Section 3.1, where ChatGPT gave each prompt a third reply


def add_replies(record: Record, replies: list[str]) -> Record:
    """A record with more replies; none that is empty or there already. Its old rewards are dropped."""
    texts = dict.fromkeys(reply.strip() for reply in replies)
    new = [text for text in texts if text and text not in record["responses"]]
    kept = {name: value for name, value in record.items() if name != "rewards"}
    return kept | {"responses": [*record["responses"], *new]}


def read_extra(path: str, records: list[Record]) -> list[list[str]]:
    """The replies {"id", "response"} that a file has for each record: any number, in the file's order."""
    ids = [record.get("id") for record in records]
    found: dict[str, list[str]] = {i: [] for i in ids if isinstance(i, str)}
    if len(found) < len(ids):
        raise InputError(
            '--data: each record needs an "id" of its own, a text, to be given replies of a file'
        )
    for number, row in read_jsonl(path):
        texts = isinstance(row.get("response"), str) and isinstance(row.get("id"), str)
        if not texts or row["id"] not in found:
            raise InputError(f'{path}, line {number}: needs "response", a reply, and the "id" of a record')
        found[row["id"]].append(row["response"])
    return list(found.values())


def write_sampled(records: list[Record], args: argparse.Namespace) -> None:
    """Writes the records, each with replies that a model samples; goes on where it was stopped.

    Each part of 256 records has a seed of its own, so that a stop changes nothing.
    """
    import evaluate

    rank, _, device = clha.init_process()
    model, tokenizer = evaluate.load(args.model, device)

    def work(share: list[Record], start: int) -> list[Record]:
        torch.manual_seed(args.seed + start + rank)
        prompts = [record["prompt"] for record in share]
        sizes = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
        sampled = [
            evaluate.generate(
                model, tokenizer, prompts, **sizes, temperature=args.temperature, progress=False
            )
            for _ in range(args.replies)
        ]
        return [add_replies(record, replies) for record, *replies in zip(share, *sampled, strict=True)]

    settings = [fingerprint(args.model), args.replies, args.temperature, args.max_new_tokens, args.seed]
    write_in_parts(Path(args.out), records, settings, work, 256, "sample")


def augment(args: argparse.Namespace) -> None:
    """Gives each record more replies, from a file or a model; they then need new rewards."""
    records, out = read_records(args.data), Path(args.out)
    program.check_out(out, "new")
    if bool(args.extra) == bool(args.model):
        raise InputError("either --model, to sample replies, or --extra, a file that has them, is needed")
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature}: must be above 0")
    if args.extra:
        extra = read_extra(args.extra, records)
        write_jsonl(out, map(add_replies, records, extra))
    else:
        write_sampled(records, args)
    lengths = Counter(len(record["responses"]) for record in read_records(out))
    counts = ", ".join(f"{count:,} of {length} replies" for length, count in sorted(lengths.items()))
    print(f"{counts}; written to {out}. `python reward.py score` gives them rewards")


# ------------------------------------------------------------------------------------------------------------
# The command line


def prepare(args: argparse.Namespace) -> None:
    """Reads HH-RLHF or the authors' files; writes those of train, dev and test.jsonl that have records."""
    program.check_out(args.out, "folder")
    rows, parse = (read_hh, hh_record) if args.command == "hh" else (read_release, release_record)
    splits, dropped = collect(rows(args.source), parse)
    read = sum(map(len, splits.values())) + dropped.total()
    removed = hold_out(splits, args.dev_items, args.seed)
    for split, records in splits.items():
        if records:
            write_jsonl(Path(args.out) / f"{split}.jsonl", records)
    print(report(splits, read, dropped, removed))
    for split, records in splits.items():
        if records and "rewards" in records[0]:
            print(f"\n{split}: {reward.summary(records)}")


def make_toy(args: argparse.Namespace) -> None:
    """Makes the toy world."""
    import toy

    program.check_out(args.out, "new")
    if not 0 <= args.label_noise <= 1:
        raise InputError(f"--label_noise {args.label_noise}: must be a share, 0 to 1")
    if not 2 <= args.length <= 8:
        raise InputError(f"--length {args.length}: must be 2 to 8 replies")
    toy.write(
        Path(args.out), args.seed, label_noise=args.label_noise, length=args.length, queries=args.queries
    )
    print(f"written to {args.out}: init/, an untrained model, and the records of")
    for path in sorted(Path(args.out).glob("*.jsonl")):
        print(f"  {path.name}: {sum(1 for _ in read_jsonl(path)):,} queries")


def main() -> None:
    """Parses the command line and runs one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = partial(commands.add_parser, formatter_class=HelpFormatter, description=__doc__)
    hh = add_command("hh", help="HH-RLHF")
    release = add_command("release", help="the authors' data.zip")
    toy_world = add_command("toy", help="the toy world")
    longer = add_command("augment", help="more replies to each prompt")
    for command in (hh, release, toy_world, longer):
        command.error = refuse
        command.set_defaults(run=prepare)
        command.add_argument("--out", required=True, help="folder (augment: file) for the records")
        command.add_argument("--seed", type=int, default=42, help="of whatever is drawn")
    hh.add_argument("--source", required=True, help="Anthropic/hh-rlhf, or a folder with its four subsets")
    release.add_argument("--source", required=True, help="a file of the authors', or a folder with some")
    for command in (hh, release):
        command.add_argument("--dev_items", type=int, default=280, help="dev queries drawn from the test set")
    toy_world.set_defaults(run=make_toy)
    toy_world.add_argument("--label_noise", type=float, default=0.2, help="share of wrong labels")
    toy_world.add_argument("--length", type=int, default=2, help="replies a query in train.jsonl")
    toy_world.add_argument("--queries", type=int, default=2048, help="queries in train.jsonl")
    longer.set_defaults(run=augment)
    longer.add_argument("--data", required=True, help="records to add replies to")
    longer.add_argument(
        "--model", default="", help="language model that samples them: a folder or a hub name"
    )
    longer.add_argument("--extra", default="", help='or a file with them, JSON lines {"id", "response"}')
    longer.add_argument("--replies", type=int, default=1, help="sampled for each prompt")
    longer.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    longer.add_argument("--max_new_tokens", type=int, default=128, help="tokens of a reply")
    longer.add_argument("--batch_size", type=int, default=64, help="prompts generated together")
    args = parser.parse_args()
    program.check_ranges(args)
    args.run(args)


if __name__ == "__main__":
    program.run(main)
