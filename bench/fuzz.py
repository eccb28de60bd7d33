"""Do the readers hold against any bytes? A coverage-guided fuzz target (atheris: `pip install .[fuzz]`).

    python bench/fuzz.py --minutes 30 --corpus out/fuzz
    python bench/fuzz.py --replay out/fuzz/findings/TypeError-records-42

An input's first byte chooses a reader, the rest is the file that it gets. A reader may do its work or raise
InputError. Anything else is a finding, and so is a result that no file and no terminal takes (half a
character). A finding is kept as a file, one for each kind of exception and line of the project that it came
through. Half of the changes to an input put an odd value at any place of its JSON. What libFuzzer says is in
log.txt, in the same folder; a later run goes on from the inputs there.
"""

import argparse
import contextlib
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
try:
    import atheris
except ImportError:
    import program

    program.stop("needs atheris: pip install .[fuzz]")

PROJECT = ["records", "program", "prepare_data", "people", "evaluate", "clha"]  # no others: faster
with atheris.instrument_imports(include=PROJECT):
    import clha
    import evaluate
    import people
    import prepare_data
    import program
    import toy
    from records import InputError, read_jsonl, read_records

# ------------------------------------------------------------------------------------------------------------
# The readers: each takes a file's path and gives what it read

RECORD = {
    "prompt": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "What?"}],
    "responses": ["So.", "No."], "rewards": [0.5, -1], "chosen": 1, "subset": "toy", "id": "a",
}  # fmt: skip
RAW = {name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}
RELEASED = {
    "prefix": [["<|prompter|>Hi", "<|assistant|>"]] * 2, "suffix": ["So.<|endoftext|>", "No."],
    "reward": [1.5, -0.5], "sft_index": 0, "meta": {"path": "raw/helpful-base/dev.jsonl"},
}  # fmt: skip
REPLY = {"id": "a", "response": "So.\n\nHuman: And?", "reward": 61.5}
KEY = {
    "sheet": "sheet-1", "models": ["x", "y"],
    "items": {item: {"id": item, "subset": "toy", "left": "x"} for item in ("1", "2")},
}  # fmt: skip
VOTES = {"sheet": "sheet-1", "annotator": "Ann", "answers": {"1": "left", "2": "tie"}}
SHEET = b'\xef\xbb\xbfsheet,item,prompt,answer\r\nsheet-1,1,"a\r\nb",left\r\nsheet-1,2,,\r\n'
TOKENIZER = toy.train_tokenizer([f"{clha.render(RECORD['prompt'])} So."], vocab_size=300)


def as_line(row: Any) -> bytes:
    """A row as a line of JSON."""
    return json.dumps(row).encode()


def encoded(path: Path) -> Any:
    """Records as token ids, which must be what `encode` promises."""
    examples = [clha.encode(record, TOKENIZER, 64, 32) for record in read_records(path)]
    for example in examples:
        assert 0 < len(example["prompt_ids"]) <= 32 and example["prompt_ids"][0] == TOKENIZER.bos_token_id
        assert all(0 < len(ids) <= 64 - len(example["prompt_ids"]) for ids in example["response_ids"])
        assert all(TOKENIZER.eos_token_id not in ids[:-1] for ids in example["response_ids"])
    return examples


def hh(path: Path) -> Any:
    """Raw HH-RLHF as records."""
    return prepare_data.collect(prepare_data.read_hh(str(path.parents[1])), prepare_data.hh_record)


def votes_by_key(path: Path) -> Any:
    """A key, and an annotator's votes by it."""
    key = people.read_key(str(path))
    votes = path.with_name("good.json")
    votes.write_bytes(as_line(VOTES))
    return key, people.read_votes(str(votes), key)


def release(path: Path) -> Any:
    """The authors' format as records."""
    return prepare_data.collect(prepare_data.read_release(str(path)), prepare_data.release_record)


READERS: list[tuple[str, Callable[[Path], Any], bytes]] = [  # name of the file, its reader, a good file
    ("data.jsonl", encoded, as_line(RECORD)),
    ("data.jsonl.gz", encoded, gzip.compress(as_line(RECORD))),
    ("rows.jsonl", lambda path: list(read_jsonl(path)), b'{"a": [1, "\\ud83d\\ude00"]}\n{"b": null}'),
    ("helpful-base/test.jsonl", hh, as_line(RAW)),
    ("hh_test/helpful_base.json", release, as_line(RELEASED)),
    ("extra.jsonl", lambda path: prepare_data.read_extra(str(path), [RECORD]), as_line(REPLY)),
    ("replies.jsonl", lambda path: evaluate.read_replies(str(path), [RECORD]), as_line(REPLY)),
    ("eval/responses.jsonl", lambda path: people.read_evaluation(path.parent), as_line(RECORD | REPLY)),
    ("key.json", votes_by_key, as_line(KEY)),
    ("votes.json", lambda path: people.read_votes(str(path), KEY), as_line(VOTES)),
    ("votes.csv", lambda path: people.read_votes(str(path), KEY), SHEET),
]


def read(data: bytes, folder: Path) -> None:
    """Gives an input to its reader; raises what that must not raise."""
    name, reader, _ = READERS[data[0] % len(READERS)] if data else READERS[0]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[1:])
    with contextlib.suppress(InputError), contextlib.redirect_stdout(io.StringIO()):
        json.dumps(reader(path), ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------------
# Fuzzing

ODD = [
    *("null", "true", "-1", "2", "1.5", "1e30", "1e39", "NaN", "-Infinity", "9" * 40, "9" * 4400, "[" * 3000),
    *("[]", "{}", "[[]]", '[["a"], 1]', '{"path": 1}', '""', '" "', r'"\ud800"', r'"\u0000"', r'"\n"'),
    *('"</s>"', r'"\u2028\u202e"', r'"a\n\nHuman: b\n\nAssistant: c"', '"<|assistant|>"', '"<|prompter|>"'),
]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """An input with an odd value somewhere in the JSON of one of its lines, or changed by libFuzzer."""
    generator = random.Random(seed)
    if generator.random() < 0.5:
        return atheris.Mutate(data, max_size)
    lines = data[1:].split(b"\n")
    line = generator.randrange(len(lines))
    try:
        root = [json.loads(lines[line])]
        places: list[tuple[Any, Any]] = []  # (container, index or key)
        containers: list[Any] = [root]
        while containers:
            container = containers.pop()
            keys = container if isinstance(container, dict) else range(len(container))
            places += [(container, key) for key in keys]
            containers += [container[key] for key in keys if isinstance(container[key], dict | list)]
        container, key = generator.choice(places)
        container[key] = "HERE"
        lines[line] = json.dumps(root[0]).replace('"HERE"', generator.choice(ODD)).encode()
    except (ValueError, RecursionError):  # not JSON, or not any more
        return atheris.Mutate(data, max_size)
    return (data[:1] + b"\n".join(lines))[:max_size]


def place(error: Exception) -> str:
    """The kind of an exception, and the last line of the project that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == ROOT] or frames
    return f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].lineno}"


def fuzz(corpus: Path, seconds: int) -> None:
    """Fuzzes in this process, which libFuzzer ends."""

    def one(data: bytes) -> None:
        try:
            read(data, corpus / "files")
        except Exception as error:
            path = corpus / "findings" / place(error)
            if not path.exists():
                path.write_bytes(data)

    limits = [f"-max_total_time={seconds}", "-max_len=16384", "-timeout=30", "-rss_limit_mb=4096"]
    wanted = ["-print_final_stats=1", f"-artifact_prefix={corpus}/findings/", str(corpus / "inputs")]
    atheris.Setup([sys.argv[0], *limits, *wanted], one, custom_mutator=mutate)
    atheris.Fuzz()


def report(corpus: Path, minutes: float) -> None:
    """Runs `fuzz` in processes of its own until the time is over, and prints what came of it."""
    for name in ("inputs", "findings"):
        (corpus / name).mkdir(parents=True, exist_ok=True)
    for number, (_, _, good) in enumerate(READERS):
        (corpus / "inputs" / f"seed-{number}").write_bytes(bytes([number]) + good)
    start = time.monotonic()
    with (corpus / "log.txt").open("w+") as log:
        while (left := int(60 * minutes - time.monotonic() + start)) > 0:  # one that hangs is ended, and kept
            command = [sys.executable, __file__, "--corpus", str(corpus), "--seconds", str(left)]
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            if code in (1, 2):  # not libFuzzer's for a finding
                raise InputError(f"{corpus}/log.txt: says why nothing could be fuzzed")
        log.seek(0)
        text = log.read()
    inputs = sum(map(int, re.findall(r"number_of_executed_units:\s*(\d+)", text)))
    covered = re.findall(r"cov: (\d+)", text)
    findings = sorted(path.name for path in (corpus / "findings").iterdir())
    print(f"{inputs:,} inputs in {(time.monotonic() - start) / 60:.1f} minutes; branches seen: {covered[-1]}")
    print("\n".join([f"{len(findings)} findings", *(f"  {corpus}/findings/{name}" for name in findings)]))


def main() -> None:
    """Parses the command line and fuzzes, or shows a finding again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=program.HelpFormatter)
    parser.error = program.refuse
    parser.add_argument("--minutes", type=float, default=30, help="to fuzz")
    parser.add_argument("--corpus", type=Path, default=ROOT / "out" / "fuzz", help="folder that is kept")
    parser.add_argument("--replay", type=Path, help="a finding to raise again")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        with tempfile.TemporaryDirectory() as folder:
            read(args.replay.read_bytes(), Path(folder))
    elif args.seconds:
        fuzz(args.corpus, args.seconds)
    else:
        report(args.corpus, args.minutes)


if __name__ == "__main__":
    program.run(main)
