"""Preference data as records, one JSON line per query: HH-RLHF, the authors' data.zip, or any other.

    python prepare_data.py hh --source Anthropic/hh-rlhf --out data      the hub, or a folder of raw files
    python prepare_data.py release --source FOLDER --out data            the authors' files with their rewards
    python prepare_data.py preference --source DATA --out train.jsonl    other data, known by their columns
    python prepare_data.py join --data train.jsonl --responses more.jsonl --out train3.jsonl   longer rankings

The first two write train.jsonl, dev.jsonl and test.jsonl; they print how many queries each subset has, next
to the paper's Table 1, and what was left out and why. No dev query is in the test set.

`preference` reads a file (JSON, JSON lines, parquet, CSV), a folder of them, or a data set on the hub, and
says which of these it is: TRL's prompt, chosen, rejected, as text or messages, with or without the prompt (so
also UltraFeedback binarized and Tulu 3); all_generated_responses with all_rm_scores; response_0,
response_0_reward and so on; UltraFeedback's completions; HelpSteer3; Nectar. Scores of reward models become
rewards; ratings by people or by GPT-4 only say which response is the chosen one.

`join` adds responses, JSON lines {"id", "response"} that `evaluate.py generate` or any other program wrote.
"""

import argparse
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tqdm import tqdm

import clha
import reward
from clha import InputError, Record, Turn

TABLE_1 = {  # of the paper: (training, test) queries of each subset
    "harmless-base": (42537, 2312),
    "helpful-base": (43835, 2354),
    "helpful-online": (22007, 1137),
    "helpful-rejection-sampled": (52421, 2749),
}
Splits = dict[str, list[Record]]  # "train", "dev", "test" -> records
Row = tuple[str, str, str, int, dict[str, Any]]  # file, split, subset, line, content

# ------------------------------------------------------------------------------------------------------------
# Raw HH-RLHF

HEADER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
# The last two are of the authors' files, below.
ROLES = {"Human": "user", "Assistant": "assistant", "prompter": "user", "assistant": "assistant"}


def split_dialogue(text: str) -> list[Turn]:
    """HH-RLHF's text as turns; nothing is lost but white space around them.

    A turn begins at "Human:" or "Assistant:" after an empty line, or at the very start, and goes on to the
    next, empty lines included. (The released parser drops all but the first paragraph of a turn.) Turns of
    one role in a row become one turn; text before the first turn is taken as the human's.
    """
    before, *pieces = HEADER.split(text)
    sections = list(zip(pieces[::2], pieces[1::2], strict=True))
    if before.strip():
        sections.insert(0, ("Human", before))
    turns = []
    for name, group in itertools.groupby(sections, key=itemgetter(0)):
        contents = [content.strip() for _, content in group]
        content = "\n\n".join(content for content in contents if content)
        turns.append({"role": ROLES[name], "content": content})
    return turns


def hh_record(row: dict[str, Any]) -> Record | str:
    """The record of a row {"chosen", "rejected"}, two whole dialogues; or why it is left out."""
    read = split_dialogue if isinstance(row["chosen"], str) else as_turns
    chosen = read(row["chosen"])
    rejected = read(row["rejected"])
    for turns in (chosen, rejected):
        if not turns or turns[-1]["role"] != "assistant":
            return "the last turn is not the assistant's"
    prompt = chosen[:-1]
    if not prompt or prompt != rejected[:-1]:
        return "chosen and rejected answer different dialogues"
    return {"prompt": prompt, "responses": [chosen[-1]["content"], rejected[-1]["content"]], "chosen": 0}


def hh_rows(source: str, subset: str, split: str) -> Iterable[tuple[int, dict[str, Any]]] | None:
    """(line, row) of a raw file in a folder, or of a data set on the hub; None if there is no such file."""
    if Path(source).is_dir():
        for name in (f"{subset}/{split}.jsonl", f"{subset}/{split}.jsonl.gz"):
            if (Path(source) / name).is_file():
                return clha.read_jsonl(Path(source) / name)
        return None
    if Path(source).is_file() or source.count("/") != 1 or source[0] in "./~":
        raise InputError(f"{source}: no such folder, and not a hub name like Anthropic/hh-rlhf")
    print(f"taking {subset}/{split} of {source} from the Hugging Face hub")
    return enumerate(read_source(source, split, subset), 1)


def read_hh(source: str) -> Iterator[Row]:
    """Yields the rows of all of HH-RLHF that `source` has; prints the names of files that it lacks."""
    found = False
    for subset, split in itertools.product(TABLE_1, ("train", "test")):
        rows = hh_rows(source, subset, split)
        if rows is None:
            print(f"not found: {source}/{subset}/{split}.jsonl(.gz)")
            continue
        found = True
        file = f"{source}, {subset}/{split}"
        for line, row in tqdm(rows, desc=f"{subset}/{split}", disable=None):
            yield file, split, subset, line, row
    if not found:
        raise InputError(f"{source}: has none of HH-RLHF's files, such as harmless-base/train.jsonl.gz")


# ------------------------------------------------------------------------------------------------------------
# The authors' data.zip

TAG = re.compile(r"<\|(prompter|assistant)\|>")
EOS = "<|endoftext|>"


def release_record(row: dict[str, Any]) -> Record:
    """The record of a row of the authors' files: prefix, suffix, reward, sft_index.

    A prefix is a list of tagged turns, "<|prompter|>..." or "<|assistant|>...", that ends in an empty
    "<|assistant|>"; there is one per response, all the same. Raises ValueError for a row of another form.
    """
    prefix = row["prefix"]
    if isinstance(prefix[0], list):
        prefix = prefix[0]
    for name, texts in (("prefix", prefix), ("suffix", row["suffix"])):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'"{name}" is not a list of texts')
    before, *pieces = TAG.split("".join(prefix).replace(EOS, ""))
    sections = zip(pieces[::2], pieces[1::2], strict=True)
    turns = [{"role": ROLES[tag], "content": content.strip()} for tag, content in sections]
    if before.strip() or not turns or turns[-1] != {"role": "assistant", "content": ""}:
        raise ValueError('"prefix" must begin with a tag and end in <|assistant|>')
    responses = [text.replace(EOS, "").strip() for text in row["suffix"]]
    chosen = row.get("sft_index", 0)
    return {"prompt": turns[:-1], "responses": responses, "rewards": row["reward"], "chosen": chosen}


def read_release(source: str) -> Iterator[Row]:
    """Yields the rows of the authors' files, one or all below a folder; their names say of which split."""
    root = Path(source)
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*.json*") if path.is_file())
    if not paths:
        raise InputError(f"{source}: no such file, nor a folder with .json, .jsonl or .json.gz files")
    for path in paths:
        place = path.name if root.is_file() else str(path.relative_to(root))
        split = "dev" if "dev" in path.name else "test"
        if "train" in place:
            split = "train"
        for line, row in tqdm(clha.read_jsonl(path), desc=place, disable=None):
            subset = path.name.split(".")[0].replace("_", "-")
            meta = row.get("meta")
            if isinstance(meta, dict):
                raw = Path(str(meta.get("path"))).parent.name  # of the raw file that the row was made from
                subset = raw if raw in TABLE_1 else subset
            yield str(path), split, subset, line, row


# ------------------------------------------------------------------------------------------------------------
# Records of both


def collect(rows: Iterable[Row], parse: Callable[..., Record | str]) -> tuple[Splits, Counter[str]]:
    """All rows as records by split, and how many were left out for which reason. Raises InputError."""
    splits: Splits = {"train": [], "dev": [], "test": []}
    dropped: Counter[str] = Counter()
    for file, split, subset, line, content in rows:
        place = f"{file}, line {line}"
        try:
            record = parse(content)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{place}: not a row of this format ({error})") from None
        if isinstance(record, str):
            dropped[record] += 1
        elif not all(response.strip() for response in record["responses"]):
            dropped["an empty response"] += 1
        else:
            record |= {"subset": subset, "id": f"{subset}/{split}/{line}"}
            wrong = clha.check_record(record)
            if wrong:
                raise InputError(f"{place}: {wrong}")
            splits[split].append(record)
    return splits, dropped


def same_query(record: Record) -> str:
    """A key that two records share if they are the same query, in whatever order its responses are."""
    return repr((record["prompt"], sorted(record["responses"])))


def hold_out(splits: Splits, items: int, seed: int) -> int:
    """Makes sure that no dev query is in the test set; returns how many were taken out of it.

    If there is no dev set, `items` of the test queries are drawn as one.
    """
    test = splits["test"]
    if test and not splits["dev"]:
        if items >= len(test):
            raise InputError(f"--dev_items {items}: only {len(test)} test queries to draw from")
        splits["dev"] = random.Random(seed).sample(test, items)
    dev = {same_query(record) for record in splits["dev"]}
    splits["test"] = [record for record in test if same_query(record) not in dev]
    return len(test) - len(splits["test"])


def report(splits: Splits, read: int, dropped: Counter[str], removed: int) -> str:
    """Table 1 of what was read, next to the paper's, and what was left out."""
    counts = {split: Counter(record["subset"] for record in records) for split, records in splits.items()}
    others = set().union(*counts.values()) - set(TABLE_1)
    rows = [["subset", "train", "dev", "test", "paper: train", "test"]]
    for subset in [*TABLE_1, *sorted(others)]:
        numbers = [counts[split][subset] for split in ("train", "dev", "test")]
        paper = [f"{number:,}" for number in TABLE_1.get(subset, ())] or ["", ""]
        rows.append([subset, *(f"{number:,}" for number in numbers), *paper])
    lines = [reward.markdown(rows), f"{read:,} queries read, {dropped.total():,} of them left out"]
    for reason, count in dropped.most_common():
        lines.append(f"  {count:,}: {reason}")
    lines.append(f"{len(splits['dev']):,} dev queries; {removed:,} taken out of the test set")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Other preference data. A format takes a row to its prompt, its responses, and what is known of them; it
# raises ValueError to leave a row out.


def as_turns(prompt: Any) -> list[Turn]:
    """A prompt, a text, a dialogue in HH-RLHF's text or messages, as turns."""
    if not isinstance(prompt, str):
        return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    dialogue = re.fullmatch(r"(\s*Human:.*)\n\nAssistant:\s*", prompt, re.DOTALL)
    return split_dialogue(dialogue[1]) if dialogue else [{"role": "user", "content": prompt}]


def last_answer(messages: Any, prompt: list[Turn]) -> str:
    """The response among messages, which may repeat the prompt, or as a text."""
    if isinstance(messages, str):
        return messages.strip()
    turns = as_turns(messages)
    answer = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise ValueError("an answer of more than one turn")
    return answer[0]["content"]


def from_pairs(row: dict[str, Any]) -> Record:
    """TRL's formats: chosen and rejected, after "prompt" or after what both begin with."""
    if row.get("prompt") is not None:
        prompt = as_turns(row["prompt"])
        answers = [row["chosen"], row["rejected"]]
        texts = [text for text in (row["prompt"], *answers) if isinstance(text, str)]
        if len(texts) == 3 and all(text.startswith(texts[0]) for text in texts):  # they repeat the prompt
            answers = [text.removeprefix(texts[0]) for text in answers]
        return {"prompt": prompt, "responses": [last_answer(answer, prompt) for answer in answers]}
    record = hh_record(row)
    if isinstance(record, str):
        raise ValueError(f"no prompt: {record}")
    return record


def from_scored_list(row: dict[str, Any]) -> Record:
    """Any number of responses, with a reward model's scores."""
    prompt = as_turns(row["prompt"])
    return {"prompt": prompt, "responses": row["all_generated_responses"], "rewards": row["all_rm_scores"]}


def from_scored_columns(row: dict[str, Any]) -> Record:
    """response_0, response_1, ... with response_0_reward, ..."""
    names = [name for name in row if re.fullmatch(r"response_\d+", name) and row[name] is not None]
    names.sort(key=lambda name: int(name.removeprefix("response_")))
    prompt = as_turns(row["prompt"])
    responses = [last_answer(row[name], prompt) for name in names]
    return {"prompt": prompt, "responses": responses, "rewards": [row[f"{name}_reward"] for name in names]}


def from_completions(row: dict[str, Any]) -> Record:
    """UltraFeedback: completions rated by GPT-4."""
    ratings = [float(completion["overall_score"]) for completion in row["completions"]]
    if not all(map(math.isfinite, ratings)) or ratings.count(max(ratings)) > 1:
        raise ValueError("a tie, or no rating")
    responses = [completion["response"] for completion in row["completions"]]
    chosen = ratings.index(max(ratings))
    return {"prompt": as_turns(row["instruction"]), "responses": responses, "chosen": chosen}


def from_helpsteer(row: dict[str, Any]) -> Record:
    """HelpSteer3: from -3, the first is much better, to 3."""
    preference = row["overall_preference"]
    if preference == 0:
        raise ValueError("a tie")
    responses = [row["response1"], row["response2"]]
    return {"prompt": as_turns(row["context"]), "responses": responses, "chosen": int(preference > 0)}


def from_nectar(row: dict[str, Any]) -> Record:
    """Nectar: answers ranked from 1, the best; the prompt is HH-RLHF's text."""
    answers = sorted(row["answers"], key=itemgetter("rank"))
    return {"prompt": as_turns(row["prompt"]), "responses": [answer["answer"] for answer in answers]}


OURS = "clha.py's records"
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Record]]] = {
    OURS: (("prompt", "responses"), dict),
    "scored responses": (("prompt", "all_generated_responses", "all_rm_scores"), from_scored_list),
    "scored columns": (("prompt", "response_0", "response_0_reward"), from_scored_columns),
    "UltraFeedback's completions": (("instruction", "completions"), from_completions),
    "HelpSteer3": (("context", "response1", "response2", "overall_preference"), from_helpsteer),
    "Nectar": (("prompt", "answers"), from_nectar),
    "pairs": (("chosen", "rejected"), from_pairs),
}


def read_source(source: str, split: str, subset: str | None = None) -> Dataset:
    """The rows of a file, of a folder of files, or of a data set, or a folder of it, on the hub."""
    path = Path(source)
    kinds = {".parquet": "parquet", ".csv": "csv"}
    try:
        if path.is_file():
            return load_dataset(kinds.get(path.suffix, "json"), data_files=source, split=split)
        if path.is_dir() or (source.count("/") == 1 and source[0] not in "./~"):
            return load_dataset(source, data_dir=subset, split=split)
    except Exception as error:  # of any reader
        cause = clha.reason(error.__cause__ or error) or "no rows in it"
        raise InputError(f"{source}: cannot be read ({type(error).__name__}: {cause})") from error
    raise InputError(f"{source}: no such file or folder, and not a hub name (owner/name)")


def recognize(columns: list[str], source: str) -> str:
    """The name of the format that has these columns. Raises InputError if there is none."""
    for name, (needed, _) in FORMATS.items():
        if set(needed) <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    raise InputError(f"{source}: has the columns {', '.join(columns)}, in no known format ({known})")


def convert(rows: Dataset, name: str, source: str, strict: bool) -> tuple[list[Record], dict[str, list[int]]]:
    """The records of all rows, and the numbers of the rows that were left out, by reason."""
    records = []
    ids = set()
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(tqdm(rows, desc=name, disable=None), 1):
        try:
            found = FORMATS[name][1](row)
            record = {key: value for key, value in found.items() if value is not None}
            given = (row.get("id"), row.get("prompt_id"), f"row {number}")
            own = next(str(value) for value in given if value not in (None, ""))
            record["id"] = f"{own} (row {number})" if own in ids else own  # a prompt with several pairs
            wrong = clha.check_record(record)
            if not wrong and len(set(record["responses"])) < len(record["responses"]):
                wrong = "two responses are the same"
            if not wrong and "chosen" not in record and name != OURS:  # of ours nobody may have chosen
                rewards = record.get("rewards", [0])  # without them it is the first
                record["chosen"] = rewards.index(max(rewards))
        except ValueError as error:
            wrong = str(error)
        except (KeyError, IndexError, TypeError):
            wrong = "values are missing"
        if wrong and strict:
            raise InputError(f"{source}, row {number}: {wrong}")
        if wrong:
            dropped.setdefault(wrong, []).append(number)
        else:
            records.append(record)
            ids.add(record["id"])
    return records, dropped


# ------------------------------------------------------------------------------------------------------------
# Longer rankings: HH-RLHF_3 of Section 3.1, where ChatGPT gave each prompt a third response


def add_responses(record: Record, responses: list[str]) -> Record:
    """A record with more responses, but for empty and double ones, and without numbers per response."""
    joined = list(record["responses"])
    for response in map(str.strip, responses):
        if response and response not in joined:
            joined.append(response)
    kept = {name: value for name, value in record.items() if not isinstance(value, list)}
    return kept | {"prompt": record["prompt"], "responses": joined}


def read_responses(path: str, records: list[Record]) -> list[list[str]]:
    """The finished responses {"id", "response"} of a file to each record: any number. Raises InputError."""
    unfinished = 0
    found: dict[str, list[str]] = {record["id"]: [] for record in records}
    if len(found) < len(records):
        raise InputError('--data: each record needs an "id" of its own to be given responses from a file')
    for number, row in clha.read_jsonl(path):
        place = str(row.get("id"))
        response = row.get("response")
        if place not in found or not isinstance(response, str):
            raise InputError(f'{path}, line {number}: needs a "response", and the "id" of a record')
        if row.get("finished", True):
            found[place].append(response)
        else:  # trained on, it would teach the model to end there
            unfinished += 1
    if unfinished:
        print(f"left out {unfinished:,} responses that are not finished; see evaluate.py --max_new_tokens")
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------
# The command line


def prepare_hh(args: argparse.Namespace) -> None:
    """Writes HH-RLHF as train, dev and test.jsonl."""
    write_splits(args, read_hh(args.source), hh_record)


def prepare_release(args: argparse.Namespace) -> None:
    """Writes the authors' data.zip as train, dev and test.jsonl."""
    write_splits(args, read_release(args.source), release_record)


def write_splits(args: argparse.Namespace, rows: Iterable[Row], parse: Callable[..., Record | str]) -> None:
    """Writes those of train, dev and test.jsonl that have records, and says what is in them."""
    reward.check_output(args.out, "folder")
    splits, dropped = collect(rows, parse)
    read = sum(len(records) for records in splits.values()) + dropped.total()
    removed = hold_out(splits, args.dev_items, args.seed)
    files = {Path(args.out) / f"{split}.jsonl": records for split, records in splits.items() if records}
    for path in files:
        reward.check_output(path, "new")
    for path, records in files.items():
        reward.write_jsonl(path, records)
    print(report(splits, read, dropped, removed))
    for path, records in files.items():
        if "rewards" in records[0]:
            print(f"\n{path.stem}: {reward.summary(records)}")


def prepare_preference(args: argparse.Namespace) -> None:
    """Writes other preference data, of any known format, as records."""
    reward.check_output(args.out, "new")
    rows = read_source(args.source, args.split)
    name = recognize(rows.column_names, args.source)
    print(f"{args.source}: {name}, by the columns {', '.join(FORMATS[name][0])}")
    records, dropped = convert(rows, name, args.source, args.strict)
    for reason, numbers in sorted(dropped.items(), key=lambda item: -len(item[1])):
        print(f"  left out {len(numbers):,}: {reason} (first: row {numbers[0]})")
    if not records:
        raise InputError(f"{args.source}: none of its {len(rows):,} rows can be used")
    reward.write_jsonl(args.out, records)
    scored = all("rewards" in record for record in records)
    print(reward.summary(records) if scored else "no rewards: `python reward.py score` adds them")
    print(f"{len(records):,} queries written to {args.out}")


def join(args: argparse.Namespace) -> None:
    """Gives each record more responses, from a file; they then need new rewards."""
    reward.check_output(args.out, "new")
    records = reward.read_records(args.data)
    responses = read_responses(args.responses, records)
    joined = [add_responses(record, more) for record, more in zip(records, responses, strict=True)]
    reward.write_jsonl(args.out, joined)
    lengths = Counter(len(record["responses"]) for record in joined)
    counts = [f"{lengths[length]:,} of {length} responses" for length in sorted(lengths)]
    print(f"{', '.join(counts)}; written to {args.out}. `python reward.py score` gives them rewards")


def main() -> None:
    """Parses the command line and runs one of the commands."""
    parser = reward.Parser(description=__doc__)
    hh = parser.add_command("hh", prepare_hh)
    hh("--source", required=True, help="Anthropic/hh-rlhf, or a folder with its four subsets")
    release = parser.add_command("release", prepare_release)
    release("--source", required=True, help="a file of the authors', or a folder of them")
    for flag in (hh, release):
        flag("--out", required=True, help="folder for train, dev and test.jsonl")
        flag("--dev_items", type=int, default=280, help="dev queries drawn from the test set")
        flag("--seed", type=int, default=42, help="of that draw")
    flag = parser.add_command("preference", prepare_preference)
    flag("--source", required=True, help="a file, a folder, or a hub name (owner/name)")
    flag("--split", default="train", help="of a data set on the hub, or of a folder; a file is all train")
    flag("--out", required=True, help="the records, JSON lines")
    flag("--strict", action="store_true", help="stop at the first row that cannot be used")
    flag = parser.add_command("join", join)
    flag("--data", required=True, help="records to add responses to")
    flag("--responses", required=True, help='JSON lines {"id", "response"}')
    flag("--out", required=True, help="file for the longer records")
    args = parser.parse_args()
    reward.check_numbers(args)
    args.run(args)


if __name__ == "__main__":
    clha.run(main)
