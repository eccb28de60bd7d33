"""Record files: JSON lines that are checked when they are read, written whole, and made in resumable parts.

A record is one query:

    {"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."], "rewards": [1.2, -0.3],
     "chosen": 0, "subset": "helpful-base", "id": "..."}

"rewards", "chosen" (the index of the reply that people preferred), "subset" and "id" may be absent.
"""

import fcntl
import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

Record = dict[str, Any]  # one query as read from a file
ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # and their names in HH-RLHF


class InputError(Exception):
    """What is wrong with a user's input and where, in one line; a program prints it and exits with code 2."""

    def __str__(self) -> str:  # what it quotes of the input may have line ends
        return " ".join(super().__str__().splitlines())


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yields (line number, object) of a JSON-lines file, gzipped or not. Raises InputError with the line."""
    path, number = Path(path), 0
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object: {line.strip()[:40]}")
                if "\\u" in line:  # an escaped half of a character, which no file and no tokenizer takes
                    json.dumps(row, ensure_ascii=False).encode()
                yield number, row
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}, line {number}: has half a character (a lone surrogate)") from None
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: not readable as UTF-8 text ({error})") from None
    except (RecursionError, ValueError) as error:  # brackets without end, a number of thousands of digits
        raise InputError(f"{path}, line {number}: not JSON of a record ({error})") from None


def write_jsonl(path: str | Path, rows: Iterable[Record]) -> None:
    """Writes JSON lines whole or not at all: into a temporary file, which is then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    try:
        with partial_path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial_path.replace(path)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that is there whole or not at all: yields where to write it; an error leaves nothing."""
    path = Path(path)
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    try:
        partial_path.mkdir(parents=True)
        yield partial_path
        partial_path.rename(path)
    except BaseException as error:
        shutil.rmtree(partial_path, ignore_errors=True)
        if isinstance(error, SafetensorError):  # which hides the OSError, a full disk above all
            raise InputError(f"{path}: can't be written: {error}") from error
        raise


def check_record(record: Record, need: Iterable[str]) -> str | None:
    """What is wrong with a record, or None."""
    prompt, responses, rewards = record.get("prompt"), record.get("responses"), record.get("rewards")
    chosen = record.get("chosen", 0)
    if not isinstance(prompt, list) or not prompt or not all(map(is_turn, prompt)):
        return f'"prompt" must be a list of {{"role": one of {", ".join(ROLES)}, "content": text}}'
    if not isinstance(responses, list) or len(responses) < 2:
        return '"responses" must be a list of two or more replies'
    if not all(isinstance(response, str) and response.strip() for response in responses):
        return '"responses" has an empty reply'
    if rewards is not None and not (isinstance(rewards, list) and len(rewards) == len(responses)):
        return f'"rewards" must be a list of {len(responses)} numbers, one a reply'
    if not all(type(reward) in (int, float) and abs(reward) < 1e38 for reward in rewards or []):  # float32
        return f'"rewards" must be finite numbers, not {str(rewards)[:80]}'
    if type(chosen) is not int or not 0 <= chosen < len(responses):
        return f'"chosen" must be the index of a reply, 0 to {len(responses) - 1}, not {str(chosen)[:20]}'
    if not all(isinstance(record.get(name, ""), str) for name in ("subset", "id")):
        return '"subset" and "id" must be texts'
    hints = {"rewards": "; `python reward.py score` adds them", "chosen": ""}
    return next((f'no "{name}" yet{hints[name]}' for name in need if record.get(name) is None), None)


def is_turn(message: Any) -> bool:
    """Whether this is {"role": one of ROLES, "content": text}."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return False
    return isinstance(message.get("role"), str) and message["role"] in ROLES


def iter_records(path: str | Path, need: Iterable[str] = ()) -> Iterator[Record]:
    """Reads and checks records, one at a time; `need` names optional fields that must be there: "rewards",
    "chosen".

    Raises InputError with file and line: not JSON, fewer than two replies, an empty reply, rewards that are
    missing, not finite, or of another number than the replies.
    """
    number = 0
    for number, record in read_jsonl(path):
        if wrong := check_record(record, need):
            raise InputError(f"{path}, line {number}: {wrong}")
        yield record
    if not number:
        raise InputError(f"{path}: no records in it")


def read_records(path: str | Path, need: Iterable[str] = ()) -> list[Record]:
    """All records of a file at once; see `iter_records`."""
    return list(iter_records(path, need))


# ------------------------------------------------------------------------------------------------------------
# Long work, part by part


def claim(folder: Path) -> IO[str]:
    """Makes a folder this process's own, as long as what is returned is open and the process lives.

    Raises InputError if another program is at work in it: two of them would write into each other's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    lock(file, folder)
    return file


def lock(file: IO[Any], what: Path) -> None:
    """Locks an open file until it is closed. Raises InputError if another program has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{what}: another program is at work in it; end that one, or wait") from None


def gather(mine: list[Any], total: int) -> list[Any]:
    """The whole list again on every process, when process r has the items r, r + processes, ... of it."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    shares = [mine] * processes
    if processes > 1:
        dist.all_gather_object(shares, mine)
    return [shares[i % processes][i // processes] for i in range(total)]


def fingerprint(path: str | Path) -> list[Any]:
    """What tells a file or the files of a folder from what may stand there later: names, sizes, times."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [str(path), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


def write_in_parts(
    out: Path, items: list[Any], settings: Any, work: Callable[[list[Any], int], list[Record]], part: int,
    desc: str,
) -> None:  # fmt: skip
    """Writes a line for each item, made by all processes together; stopped, it goes on where it was.

    work(share, start) makes the rows of this process's share of the `part` items from `start` on. The lines
    gather in OUT.<hash>.partial, named by items and settings, so that work of other ones is not taken for
    these. The finished file is there at once, by a rename.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    key = hashlib.sha256(json.dumps(settings).encode())
    for item in items:
        key.update(json.dumps(item).encode())
    partial_path = out.with_name(f"{out.name}.{key.hexdigest()[:8]}.partial")
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
    with partial_path.open("a+b") if rank == 0 else nullcontext() as file:
        lines: list[bytes] = []
        if file:
            lock(file, partial_path)
            file.seek(0)
            lines = file.read().split(b"\n")[:-1]  # without a torn one
        count = [len(lines)]
        if processes > 1:
            dist.broadcast_object_list(count)
        done = min(count[0], len(items)) // part * part  # each part is random, if at all, by its start
        if file:
            file.truncate(sum(len(line) + 1 for line in lines[:done]))
        bar = tqdm(total=len(items), initial=done, desc=desc, disable=None if rank == 0 else True)
        for start in range(done, len(items), part):
            chunk = items[start : start + part]
            rows = gather(work(chunk[rank::processes], start), len(chunk))
            if file:
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
                file.flush()
            bar.update(len(chunk))
    bar.close()
    if rank == 0:
        partial_path.replace(out)
        for stale in out.parent.glob(f"{out.name}.*.partial"):  # of other settings
            stale.unlink()
    if processes > 1:
        dist.barrier()
