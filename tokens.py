"""Records as token ids on disk: made once, named by what they were made from, read by memory map.

A training run keeps them in OUTPUT/tokens, or in --token_cache, where runs share them. The name of a file
is a hash of the records, the tokenizer, the settings and this program, so that a change of any of them is
seen. However many records there are, a process holds only those that it works on.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import tokenizers
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import fast
from records import InputError, Record, iter_records

SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.list_(pa.int32())),
        "rewards": pa.list_(pa.float64()),
        "chosen": pa.int32(),
        "id": pa.string(),
        "cut": pa.int32(),
    }
)
TOGETHER = 1024  # records that are tokenised in one call, and stand in one part of the file


class Examples(Sequence):
    """The examples of a file, each as `clha.encode` makes it, read when it is asked for.

    `sizes` are the tokens that each takes in a pack; `more` has, by name, what else each is given, in lists.
    """

    def __init__(self, path: Path) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.parts = self.table.to_batches()  # all but the last have the same number of rows
        prompts, replies = self.table["prompt_ids"], self.table["response_ids"]
        count = pa.compute.list_value_length
        self.replies: list[int] = count(replies).to_pylist()
        lengths = iter(count(pa.compute.list_flatten(replies)).to_pylist())
        self.sizes: list[int] = [
            prompt + sum(islice(lengths, number))
            for prompt, number in zip(count(prompts).to_pylist(), self.replies, strict=True)
        ]
        self.more: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part, row = divmod(i, len(self.parts[0]))
        [example] = self.parts[part].slice(row, 1).to_pylist()
        return example | {name: values[i] for name, values in self.more.items()}

    def outlines(self) -> list[dict[str, Any]]:
        """All of them without their tokens: rewards, chosen, cut, and `response_ids` as long as theirs."""
        rows = self.table.select(["rewards", "chosen", "cut"]).to_pylist()
        return [row | {"response_ids": range(n)} for row, n in zip(rows, self.replies, strict=True)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of many texts; "</s>" in a text is four characters there, not the end of a reply."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return tokenizer(texts, split_special_tokens=True).input_ids
    # The same as above, but without offsets and masks: half the time.
    backend.encode_special_tokens = True
    backend.no_truncation()  # which a tokenizer.json may ask for, as of an earlier training
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def load_examples(path: str, tokenizer: PreTrainedTokenizerBase, config: Any) -> Examples:
    """The records of a file as token ids, checked for what this configuration needs.

    The first process tokenises them if that has not been done; the others wait. Raises InputError for a
    record that is wrong, as `records.iter_records`.
    """
    if config.objective != "clha":
        import baselines

        baselines.check_flags(config)
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [find_or_write(path, tokenizer, config)]
        except (InputError, OSError) as error:
            outcome = [error]  # so that all say the same
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    if not outcome[0].is_file():
        raise InputError(f"{outcome[0]}: must be on a file system that all machines see (--token_cache)")
    return Examples(outcome[0])


def find_or_write(path: str, tokenizer: PreTrainedTokenizerBase, config: Any) -> Path:
    """The file that holds the examples of a file of records; it is made if it is not there."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    scored = config.rescore or config.ranking == "reward" or config.objective != "clha"
    needed = {"rewards": scored, "chosen": config.sft_target == "chosen"}
    need = [name for name, wanted in needed.items() if wanted]
    limits = (config.max_length, config.max_prompt_length, config.ranking)
    hindsight = config.objective == "coh"
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab())
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    versions = [tokenizers.__version__, transformers.__version__]
    key = hashlib.sha256(repr([content, vocabulary, ends, need, limits, hindsight, versions]).encode())
    for name in ("clha.py", "tokens.py", "records.py", "baselines.py"):
        key.update(Path(__file__).with_name(name).read_bytes())
    out = Path(config.token_cache or Path(config.output_dir) / "tokens") / f"{key.hexdigest()[:16]}.arrow"
    if not out.exists():
        write_examples(out, path, tokenizer, need, limits, hindsight)
    return out


def write_examples(
    out: Path, path: str, tokenizer: PreTrainedTokenizerBase, need: list[str], limits: tuple[int, int, str],
    hindsight: bool,
) -> None:  # fmt: skip
    """Tokenises a file of records into an Arrow file, some at a time; whole or not at all."""
    import baselines
    import clha

    found = iter_records(path, need)
    found = map(baselines.hindsight, found) if hindsight else found
    parts = iter(lambda: list(islice(found, TOGETHER)), [])

    def tokenise(part: list[Record]) -> tuple[list[Record], list[list[list[int]]]]:
        texts = [clha.texts(record) for record in part]
        ids = iter(token_ids(tokenizer, [text for row in texts for text in row]))
        return part, [list(islice(ids, len(row))) for row in texts]

    partial_path = out.with_suffix(f".{secrets.token_hex(4)}.partial")  # of this process alone
    new_folders = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    try:
        with (
            tqdm(desc=f"tokens of {Path(path).name}", disable=None) as bar,
            pa.OSFile(str(partial_path), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for part, ids in fast.ahead(tokenise, parts):
                rows = [
                    clha.encode({"id": f"line {n}"} | record, tokenizer, *limits, row)
                    for n, (record, row) in enumerate(zip(part, ids, strict=True), done + 1)
                ]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                done += len(rows)
                bar.update(len(rows))
        partial_path.rename(out)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        with suppress(OSError):  # another program may have put something there
            for folder in new_folders:
                folder.rmdir()
        raise
