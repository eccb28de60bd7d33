"""Do the readers withstand any bytes? A coverage-guided fuzz target (atheris: `pip install .[fuzz]`).

    python -m bench.fuzz --minutes 30 --corpus out/fuzz
    python -m bench.fuzz --replay out/fuzz/findings/TypeError-clha-42

An input's first byte chooses a reader; the rest is the file that it gets. A reader may do its work or raise
InputError. Anything else is a finding, and so is a result that cannot be written as UTF-8 (half a character).
A finding is kept as a file, one for each kind of exception and line of the project that it came through. Half
of the changes to an input put an odd value at any place of its JSON. What libFuzzer says is in log.txt, in
the same folder; a later run goes on from the inputs there.
"""

import argparse
import contextlib
import functools
import gzip
import inspect
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import clha
import evaluate
import prepare_data
import reward
from study import people, toy

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "study")  # of the files that a finding is named after
MODULES = (clha, evaluate, prepare_data, people)

# The readers: each takes a path and gives what it read ------------------------------------------------------

PROMPT = '[{"role": "assistant", "content": "What?"}, {"role": "user", "content": "How?"}]'
RECORD = (
    f'{{"prompt": {PROMPT}, "responses": ["So.", "No."], "rewards": [0.5, -1], "chosen": 1, "subset": "toy"}}'
)
RAW = r'{"chosen": "\n\nHuman: Hi\n\nAssistant: So.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}'
PREFIX = '["<|prompter|>Hi", "<|assistant|>"]'
RELEASED = f'{{"prefix": [{PREFIX}, {PREFIX}], "suffix": ["So.<|endoftext|>", "No."], "reward": [1.5, -0.5], '
RELEASED += '"sft_index": 0, "meta": {"path": "raw/helpful-base/dev.jsonl"}}'
RESPONSE = r'{"id": "line 1", "response": "So.\n\nHuman: And?", "gold": 61.5}'
BATCH = '{"custom_id": "line 1", "response": {"body": {"choices": [{"message": {"content": "So."}}]}}}'
SCORED = f'{{"id": "a", "subset": "toy", "prompt": {PROMPT}, "response": "So.", "reward": 61.5}}'
MEANS = '{"n": 2, "reward": {"mean": 61.5, "interval": [60, 63]}, "bleu": {"mean": 20, "interval": [19, 21]}}'
CHECKPOINT = '{"identity": {"seed": 1}, "processes": 2, "progress": {"step": 10}}'
KEY = '{"sheet": "s", "models": ["x", "y"], "items": {"1": {"id": "1", "subset": "toy", "left": "x"}}}'
VOTES = '{"sheet": "s", "annotator": "Ann", "answers": {"1": "left"}}'
CONFIG = clha.Config("", "", "", max_length=64, max_prompt_length=32)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A small tokenizer of bytes and a few merges."""
    return toy.train_tokenizer(["How? What? So. No."], vocab_size=300)


def read_encoded(path: Path) -> Any:
    """Records as token ids, which must be what `encode` promises."""
    eos = tokenizer().eos_token_id
    examples = []
    for record in reward.read_records(path, ("rewards",)):
        example = clha.encode(record, tokenizer(), CONFIG)
        prompt = example["prompt_ids"]
        assert 0 < len(prompt) <= 32
        assert prompt[0] == tokenizer().bos_token_id
        for response in example["response_ids"]:
            assert 0 < len(response) <= 64 - len(prompt)
            assert eos not in response[:-1]
        examples.append(example)
    return examples


def read_hh(path: Path) -> Any:
    """Raw HH-RLHF as records."""
    return prepare_data.collect(prepare_data.read_hh(str(path.parents[1])), prepare_data.hh_record)


def read_release(path: Path) -> Any:
    """The authors' format as records."""
    return prepare_data.collect(prepare_data.read_release(str(path)), prepare_data.release_record)


def read_joined(path: Path) -> Any:
    """A record with more responses."""
    record = {"id": "line 1"} | json.loads(RECORD)
    [responses] = prepare_data.read_responses(str(path), [record])
    return prepare_data.add_responses(record, responses)


def read_key(path: Path) -> Any:
    """A key, and an annotator's votes by it."""
    votes = path.with_name("good.json")
    votes.write_text(VOTES)
    key = people.read_key(str(path))
    return key, people.read_votes(str(votes), key)


READERS: list[tuple[str, Callable[[Path], Any], str]] = [  # name of the file, its reader, a good file
    ("data.jsonl", read_encoded, RECORD),
    ("data.jsonl.gz", read_encoded, RECORD),
    ("rows.jsonl", lambda path: list(clha.read_jsonl(path)), '{"a": [1, "\\ud83d\\ude00"]}\n{"b": null}'),
    ("helpful-base/test.jsonl", read_hh, RAW),
    ("hh_test/helpful_base.json", read_release, RELEASED),
    ("more.jsonl", read_joined, RESPONSE),
    ("responses.jsonl", lambda path: evaluate.read_responses(str(path), [{"id": "line 1"}]), RESPONSE),
    ("batch.jsonl", lambda path: evaluate.read_responses(str(path), [{"id": "line 1"}]), BATCH),
    ("eval/scores.json", lambda path: evaluate.read_summary(path.parent), f'{{"Total": {MEANS}}}'),
    ("eval/responses.jsonl", lambda path: people.read_evaluation(path.parent), SCORED),
    ("step-1/run.json", lambda path: reward.read_json(path, {"progress": dict}, "a checkpoint"), CHECKPOINT),
    ("key.json", read_key, KEY),
    ("votes.json", lambda path: people.read_votes(str(path), json.loads(KEY)), VOTES),
]


def seeds() -> list[bytes]:
    """A good file for each reader."""
    found = []
    for number, (name, _, text) in enumerate(READERS):
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        found.append(bytes([number]) + content)
    return found


def read(data: bytes, folder: Path) -> None:
    """Gives an input to its reader; raises what that must not raise."""
    name, reader, _ = READERS[data[0] % len(READERS)] if data else READERS[0]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[1:])
    with contextlib.suppress(clha.InputError), contextlib.redirect_stdout(io.StringIO()):
        json.dumps(reader(path), ensure_ascii=False).encode()


# Fuzzing ----------------------------------------------------------------------------------------------------

ODD = [
    *("null", "true", "-1", "2", "1.5", "1e30", "1e39", "NaN", "-Infinity", "9" * 40, "9" * 4400, "[" * 3000),
    *("[]", "{}", "[[]]", '[["a"], 1]', '{"path": 1}', '""', '" "', r'"\ud800"', r'"\u0000"', r'"\n"'),
    *('"</s>"', r'"\u2028\u202e"', r'"a\n\nHuman: b\n\nAssistant: c"', '"<|assistant|>"', '"<|prompter|>"'),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and objects, as (container, index or key)."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def put_odd_value(data: bytes, generator: random.Random) -> bytes | None:
    """An input with an odd value somewhere in the JSON of one of its lines; None if that is not JSON."""
    lines = data[1:].split(b"\n")
    number = generator.randrange(len(lines))
    try:
        root = [json.loads(lines[number])]
        container, key = generator.choice(list(places(root)))
        container[key] = "HERE"
        text = json.dumps(root[0])
    except (ValueError, RecursionError):
        return None
    lines[number] = text.replace('"HERE"', generator.choice(ODD)).encode()
    return data[:1] + b"\n".join(lines)


def place(error: Exception) -> str:
    """The kind of an exception, and the last line of the project that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent in FOLDERS] or frames
    return f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].lineno}"


def fuzz(corpus: Path, seconds: int) -> None:
    """Fuzzes in this process, which libFuzzer ends."""
    import atheris

    for module in MODULES:
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        generator = random.Random(seed)
        changed = put_odd_value(data, generator) if generator.random() < 0.5 else None
        return changed[:max_size] if changed else atheris.Mutate(data, max_size)

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
    if find_spec("atheris") is None:
        raise clha.InputError("bench.fuzz: needs atheris; `pip install .[fuzz]`")
    for name in ("inputs", "findings"):
        (corpus / name).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / "inputs" / f"seed-{number}").write_bytes(seed)
    start = time.monotonic()
    end = start + 60 * minutes
    with (corpus / "log.txt").open("w+") as log:
        while time.monotonic() < end - 1:  # an input that hangs ends a process, and is kept
            command = [sys.executable, "-m", "bench.fuzz", "--corpus", str(corpus)]
            command += ["--seconds", str(int(end - time.monotonic()))]
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
            if code in (1, 2):  # not libFuzzer's for a finding
                raise clha.InputError(f"{corpus}/log.txt: says why nothing could be fuzzed")
        log.seek(0)
        text = log.read()
    inputs = sum(int(number) for number in re.findall(r"number_of_executed_units:\s*(\d+)", text))
    covered = re.findall(r"cov: (\d+)", text)[-1]
    findings = sorted((corpus / "findings").iterdir())
    print(f"{inputs:,} inputs in {(time.monotonic() - start) / 60:.1f} minutes; branches seen: {covered}")
    print(f"{len(findings)} findings", *findings, sep="\n  ")


def main() -> None:
    """Parses the command line and fuzzes, or shows a finding again."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long to fuzz")
    parser.add_argument("--corpus", type=Path, default=ROOT / "out" / "fuzz", help="folder that is kept")
    parser.add_argument("--replay", type=Path, help="a finding to raise again")
    parser.add_argument("--seconds", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    reward.check_numbers(args)
    corpus = args.corpus.resolve()
    if args.replay:
        with tempfile.TemporaryDirectory() as folder:
            read(args.replay.read_bytes(), Path(folder))
    elif args.seconds:
        fuzz(corpus, args.seconds)
    else:
        report(corpus, args.minutes)


if __name__ == "__main__":
    clha.run(main)
