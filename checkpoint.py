"""What keeps a training run from being lost: checkpoints, signals, steps that are not finite, and the log.

`clha.py` makes one `Run` and calls it in its loop; what a run promises:

- OUTPUT/checkpoints/step-N holds all that the next step depends on: the shards of the weights and of AdamW's
  state (safetensors, written by every process), and run.json: step, configuration, versions. A folder is
  there whole or not at all. `latest` is a link to the newest, `best` to the one with the best evaluation of
  --dev_data. Several machines need a file system that they share.
- The same command goes on from the newest one: with as many processes to the same bits, with another number
  to the same numbers up to rounding (but for dropout). Another configuration is refused unless it is named.
- SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint.

A checkpoint as a Hugging Face folder:

    python checkpoint.py out/checkpoints/best --out out/best
"""

import argparse
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import program
from records import InputError, claim, new_folder

# What may differ between a run and its continuation without being named: no step depends on it, but for
# rounding.
FREE = {
    "output_dir", "resume", "resume_anyway", "checkpoint_every", "keep_checkpoints", "on_save_error",
    "max_bad_steps", "save_every", "eval_every", "dev_data", "reward_model", "attention", "compile",
    "activation_checkpointing", "replicate", "token_cache",
}  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    found = (path for path in folder.glob("step-*") if path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


def tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The weights and AdamW's state by name, as they are in memory; a tied weight is there once."""
    state = {}
    for name, weight in model.named_parameters():
        state[f"model.{name}"] = weight
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[weight].items()}
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of this process's random generators."""
    states = {f"random.{dist.get_rank()}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state(device)
    return states


class Run:
    """A training run that outlives its processes; all of them make it and call it together.

    `step` is the number of steps that are done, `tokens` those seen in them, `skipped` the steps that were
    not taken. Raises InputError if the output folder holds a run of another configuration.
    """

    def __init__(
        self, config: Any, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: Any,
        fill_to: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.model, self.optimizer, self.scheduler = config, model, optimizer, scheduler
        self.fill_to = fill_to  # of `clha.pack`
        self.device, self.rank = next(model.parameters()).device, dist.get_rank()
        self.output = Path(config.output_dir)
        self.folder = self.output / "checkpoints"
        self.step = self.tokens = self.skipped = self.bad_in_a_row = self.saved = self.signal = 0
        self.best: list[float] = []  # step and score of the best evaluation that is saved
        self.best_before = self.best  # and what it was before the last save
        with open(config.train_data, "rb") as file:
            self.data = hashlib.file_digest(file, "sha256").hexdigest()
        self.lock = claim(self.output) if self.rank == 0 else None
        self.group = dist.new_group(backend="gloo")  # of the thread that writes in the background
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.handlers = {
            number: signal.signal(number, self.note_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self.resume()
            self.log = Log(self.output, config, self.step) if self.rank == 0 else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives signals back their meaning, and ends the thread and the claim on the folder."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.thread.shutdown()
        if self.lock:
            self.lock.close()

    # Going on

    def resume(self) -> None:
        """Loads the newest checkpoint, if there is one."""
        newest: list[Any] = [newest_checkpoint(self.folder)]
        dist.broadcast_object_list(newest)
        if newest[0] and self.config.resume == "never":
            raise InputError(
                f"{self.output}: holds an unfinished run ({newest[0].name}); --resume auto goes on with it"
            )
        if newest[0]:
            self.load(newest[0])
        for path in self.folder.glob("*.partial") if self.rank == 0 else ():  # of a run killed in a save
            shutil.rmtree(path)

    def load(self, path: Path) -> None:
        """Sets weights, AdamW's state, schedule, counters and random generators to those of a checkpoint."""
        saved = read_run(path)
        self.refuse_other_configuration(path, saved)
        get_optimizer_state_dict(self.model, self.optimizer)  # makes AdamW's state, for loading into it
        state = tensors(self.model, self.optimizer)
        random_states = random_state(self.device) if saved["processes"] == dist.get_world_size() else {}
        read_tensors(state | random_states, path)
        for name, value in random_states.items():
            if name.endswith("cuda"):
                torch.cuda.set_rng_state(value, self.device)
            else:
                torch.set_rng_state(value)
        self.scheduler.last_epoch = saved["step"] - 1  # it counts steps; this sets the rate of the next one
        self.scheduler.step()
        self.step = self.saved = saved["step"]
        self.tokens, self.skipped = saved["tokens"], saved["skipped"]
        judges = ("dev_data", "reward_model")
        if all(saved["config"][name] == getattr(self.config, name) for name in judges):  # or no comparison
            self.best = self.best_before = saved["best"]
        if self.rank == 0:
            self.link("latest", path)  # it may have been killed before it did so
            if self.best and self.best[0] == self.step:
                self.link("best", path)
            print(f"resume  from {path}, {self.step:,} steps done", flush=True)

    def refuse_other_configuration(self, path: Path, saved: dict[str, Any]) -> None:
        """Raises InputError if the run in `path` is not the one that is to go on, naming what differs."""
        now = json.loads(json.dumps(asdict(self.config))) | {"records": self.data[:8]}
        before = saved["config"] | {"records": saved["data"][:8]}
        differ = [name for name in now if name not in FREE and now[name] != before.get(name)]
        allowed = {name.strip() for name in self.config.resume_anyway.split(",")}
        if set(differ) - allowed:
            texts = [f"{name} {before.get(name)} -> {now[name]}" for name in differ if name not in allowed]
            raise InputError(
                f"{path}: is of another configuration ({', '.join(texts)}); choose another --output_dir, or "
                f"go on with --resume_anyway {','.join(differ)}"
            )
        if self.rank == 0 and saved.get("versions") != versions():
            print(f"resume  versions {saved.get('versions')} -> {versions()}: last bits may differ")

    # In the loop

    def note_signal(self, number: int, _: Any) -> None:
        """Remembers a signal until the step at hand is done."""
        self.signal = number

    def skip(self, step: int, loss: float, norm: float, examples: list[Any]) -> None:
        """Passes over a step whose loss or gradient is not finite, and ends the run after too many in a row.

        Another forward pass tells which queries have log-probs that are not finite.
        """
        import baselines

        self.skipped += 1
        self.bad_in_a_row += 1
        logps = baselines.all_logps(self.model, examples, self.config.pack_tokens, self.fill_to)
        guilty = [e["id"] for e, row in zip(examples, logps, strict=True) if not all(map(math.isfinite, row))]
        named = guilty or [example["id"] for example in examples]
        if self.rank == 0:
            where = "queries" if guilty else "one of the queries"
            shown = ", ".join(map(str, named[:5])) + ", ..." * (len(named) > 5)
            line = f"step {step}: skipped: loss {loss:g}, gradient norm {norm:g}; {where} {shown}"
            print(line, file=sys.stderr)
            with suppress(OSError), (self.output / "skipped.jsonl").open("a") as file:  # it is printed too
                print(json.dumps({"step": step, "queries": named}), file=file)
        if self.bad_in_a_row >= self.config.max_bad_steps:
            self.wait()
            self.close()
            raise InputError(
                f"step {step}: {self.bad_in_a_row} steps in a row were not finite (--max_bad_steps); "
                f"{self.output / 'skipped.jsonl'} names the queries; "
                f"the last good checkpoint is {newest_checkpoint(self.folder)}"
            )

    def end_step(self, step: int, metrics: dict[str, float], last: bool) -> None:
        """Logs a step, saves when it is time, and ends the run if a signal came or if saving failed."""
        self.step = step
        if math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            self.bad_in_a_row = 0
        error = self.log.write(step, metrics) if self.log else None
        if self.pending and self.pending.done():
            error = self.pending.exception() or error
        flags = torch.tensor([self.signal, bool(error)], device=self.device, dtype=torch.int)
        dist.all_reduce(flags, dist.ReduceOp.MAX)  # all processes stop at the same step, or none
        number, failed = flags.tolist()
        if failed:
            self.complain(error)
        score = metrics.get("eval/reward", -metrics["eval/loss"] if "eval/loss" in metrics else -math.inf)
        best = score > (self.best[1] if self.best else -math.inf)
        due = self.config.checkpoint_every and step % self.config.checkpoint_every == 0
        if number or (not self.bad_in_a_row and (best or due)):
            self.save([step, score] if best and not self.bad_in_a_row else [])
        if number or last:
            self.wait()
        if number and not last:
            self.close()
            if self.rank == 0:
                newest, name = newest_checkpoint(self.folder) or "the start", signal.Signals(number).name
                print(f"{name}: stopped after step {step}; the same command goes on from {newest}")
            raise SystemExit(128 + number)  # as if the signal had ended it

    # Saving

    def save(self, best: list[float]) -> None:
        """Copies the state, and starts to write it in the background; training can go on at once.

        `best` is the step and its score, if that is the best so far.
        """
        if self.saved == self.step or not self.optimizer.state:  # as before the first step
            return
        self.wait()
        self.saved, self.best_before, self.best = self.step, self.best, best or self.best
        partial = self.folder / f"step-{self.step}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        info = {
            "step": self.step, "tokens": self.tokens, "skipped": self.skipped, "best": self.best,
            "config": asdict(self.config), "data": self.data, "processes": dist.get_world_size(),
            "versions": versions(),
        }  # fmt: skip
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        state = tensors(self.model, self.optimizer) | random_state(self.device)
        shards = dcp.async_save(state, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(self.publish, shards, partial, info)

    def publish(self, shards: Future[Any], partial: Path, info: dict[str, Any]) -> None:
        """Gives a checkpoint its name once all processes have written their part; removes old ones."""
        try:
            shards.result()
            if self.rank == 0:
                final = partial.with_suffix("")
                (partial / "run.json").write_text(json.dumps(info, indent=2) + "\n")
                for path in (partial / "run.json", partial):
                    sync(path)
                partial.rename(final)
                self.link("latest", final)
                if info["best"] and info["best"][0] == info["step"]:
                    self.link("best", final)
                sync(self.folder)
                best = (self.folder / "best").resolve()
                for old in checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                    if old.resolve() != best:
                        shutil.rmtree(old.rename(old.with_suffix(".partial")))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def link(self, name: str, checkpoint: Path) -> None:
        """Makes OUTPUT/checkpoints/NAME point to a checkpoint; there is no moment without it."""
        new = self.folder / f"{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint.name)
        new.replace(self.folder / name)

    def wait(self) -> None:
        """Waits until the last save is done; all processes learn whether it failed."""
        error = self.pending.exception() if self.pending else None
        failed = torch.tensor(bool(error), device=self.device, dtype=torch.int)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed.item():
            self.complain(error)
        self.pending = None

    def complain(self, error: BaseException | None) -> None:
        """Says that something could not be written; ends the run if that is wanted."""
        if self.pending:
            self.pending.exception()  # waits for the thread
        self.pending, self.saved, self.best = None, 0, self.best_before
        text = f"step {self.step}: can't save: {reason(error)}; the newest checkpoint is " + str(
            newest_checkpoint(self.folder)
        )
        if self.config.on_save_error == "stop":
            self.close()
            raise InputError(f"{text}. Once there is room the same command goes on from there")
        if self.rank == 0:
            print(f"{text}; going on", file=sys.stderr)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: torch.dtype
) -> None:
    """Gathers the shards into a Hugging Face folder, in the dtype of the computation; whole or not at all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
        tied = plain.all_tied_weights_keys  # they stand in the file once, under their other name
        weights = {name: weight.to(dtype) for name, weight in state.items() if name not in tied}
        shutil.rmtree(path, ignore_errors=True)  # step-N, of a run that was stopped after it
        with new_folder(path) as folder:
            plain.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
    dist.barrier()


class Log:
    """metrics.jsonl, config.json and, where it is installed, TensorBoard; of the first process."""

    def __init__(self, output: Path, config: Any, step: int) -> None:
        """Starts them anew, or keeps what they have of the first `step` steps."""
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        for path in (output / "metrics.jsonl", output / "skipped.jsonl"):
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                partial = path.with_suffix(".partial")
                partial.write_bytes(b"".join(line for line in lines if step_of(line) <= step))
                partial.replace(path)
        self.file = (output / "metrics.jsonl").open("ab", buffering=0)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(output / "tensorboard", purge_step=step + 1)
        except ImportError:
            self.board = None

    def write(self, step: int, metrics: dict[str, float]) -> OSError | None:
        """Writes a line; gives the error if it can't. JSON has no number for what is not finite: null."""
        end = self.file.seek(0, os.SEEK_END)
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            line = json.dumps({"step": step, **row}).encode() + b"\n"
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(end)
            return error
        try:
            for name, value in metrics.items() if self.board else ():
                self.board.add_scalar(name, value, step)
        except OSError:  # its thread is dead; metrics.jsonl has all that it would have
            self.board = None
        return None


def step_of(line: bytes) -> float:
    """The step of a line of the log; of a line that is torn, more than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


# ------------------------------------------------------------------------------------------------------------
# Files of a checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The last of the whole checkpoints of a folder, if there are any."""
    return next(reversed(checkpoints(folder)), None)


def versions() -> dict[str, str]:
    """What the bits of a run depend on beside its configuration."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def sync(path: Path) -> None:
    """Sees to it that a file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def reason(error: BaseException | None) -> str:
    """The last line of an error; of one that several processes met, that of the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or repr(error)).splitlines()[-1] if error else "see the first process"


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint. Raises InputError if the folder is none."""
    need = {"step": int, "tokens": int, "skipped": int, "best": list, "config": dict, "data": str}
    return program.read_json(path / "run.json", need | {"processes": int}, "the state of a checkpoint")


def read_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    """Reads tensors in place by their names, each process its shard. Raises InputError if it can't."""
    try:
        logging.disable()  # what goes wrong is said here, in one line
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: a damaged checkpoint ({reason(error)}); without it, the one before serves"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Turns a checkpoint into a Hugging Face folder; one process, on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=program.HelpFormatter)
    parser.error = program.refuse
    parser.add_argument("checkpoint", type=Path, help="a folder step-N, or the link latest or best")
    parser.add_argument("--out", type=Path, required=True, help="gets a Hugging Face folder")
    args = parser.parse_args()
    program.check_out(args.out, "new")
    source = read_run(args.checkpoint)["config"]["model"]
    tokenizer = program.load_tokenizer(source)
    with program.loading(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read_tensors({f"model.{name}": weight.data for name, weight in model.named_parameters()}, args.checkpoint)
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{args.out} is a Hugging Face folder, in float32")


if __name__ == "__main__":
    program.run(main)
