"""Is anything lost when a run is killed? One small run of clha.py, killed again and again at random moments.

    python -m bench.chaos --kills 50 --out out/chaos          50 SIGKILLs, on 2 processes
    python -m bench.chaos --only kills --kills 4 --steps 150  the same in two minutes
    python -m bench.chaos --only resize disk                  other numbers of processes, a full disk
    python -m bench.chaos --only machines                     two torchruns, as on two machines

`kills`: half of them hit one process, which torchrun brings back (--max_restarts); half hit all processes and
torchrun, and the same command is given again. They come while the run starts, trains or saves a checkpoint.
`resize`: a run is stopped and resumed, on the same number of processes and on another. `disk` mounts a
small tmpfs, for which it must be root. `machines` kills one of two processes, each with its own
torchrun and copy of the model. Linux only. Prints a Markdown table, and JSON on the last line.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoConfig

import clha
import reward
from study import toy

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]


def make_data(folder: Path) -> None:
    """A toy world whose responses have their true rewards, and a model with dropout: random states matter."""
    toy.write(folder, seed=0, queries=256)
    records = reward.read_records(folder / "train.jsonl")
    for record in records:
        record["rewards"] = toy.golds(record)
    reward.write_jsonl(folder / "scored.jsonl", records)
    reward.write_jsonl(folder / "dev.jsonl", records[:16])
    shutil.copytree(folder / "init", folder / "dropout")
    AutoConfig.from_pretrained(folder / "init", attention_dropout=0.1).save_pretrained(folder / "dropout")


class Trial:
    """A run of clha.py: `start` starts it, or resumes it."""

    def __init__(self, args: Namespace, name: str, steps: int, **more: Any) -> None:
        data = args.out / "data"
        self.out = args.out / name
        self.processes = args.processes
        self.log = self.out.with_suffix(".log")
        self.weights = self.out / "final" / "model.safetensors"
        self.steps = steps
        self.killed = 0.0  # when it was killed last
        settings = {
            "model": data / "dropout",
            "train_data": data / "scored.jsonl",
            "dev_data": data / "dev.jsonl",
            "output_dir": self.out,
            "token_cache": data / "tokens",
            "max_steps": steps,
            "batch_size": 8,
            "learning_rate": 1e-4,
            "pack_tokens": 512,
            "checkpoint_every": 10,
            "eval_every": 15,
            "deterministic": args.deterministic,
        }
        self.flags = [f"--{flag}={value}" for flag, value in (settings | more).items()]

    def start(self, processes: int = 0, restarts: int = 0, port: int = 0) -> None:
        """Starts a torchrun with so many processes, or with a port two torchruns of a process each."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        where = ["--standalone", f"--nproc_per_node={processes or self.processes}"]
        if port:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--local_addr=127.0.0.1"]
            where.append(f"--rdzv_endpoint=127.0.0.1:{port}")
        launch = ["-m", "torch.distributed.run", f"--max_restarts={restarts}", *where]
        command = [sys.executable, *launch, "clha.py", *self.flags]
        with self.log.open("a") as log:
            for _ in range(2 if port else 1):
                self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def logged(self) -> list[int]:
        """The steps in metrics.jsonl, after a 0, without a line that is being written."""
        path = self.out / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [0, *(json.loads(line)["step"] for line in lines)]

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = clha.checkpoints(self.out / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written; a kill may have left the beginning of another one."""
        unfinished = (self.out / "checkpoints").glob("step-*.partial")
        return any(newer(path, self.killed) for path in unfinished)

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> bool:
        """Waits for something to be true; False if the run ended before, or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def until_step(self, step: int) -> None:
        """Waits until so many steps are logged."""
        self.until(lambda: self.logged()[-1] >= step)

    def kill(self, everything: bool, generator: random.Random) -> None:
        """SIGKILL to one of the processes that train, or to torchrun and all of them."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if not everything:
            self.until(children.read_text)  # torchrun itself takes seconds to start them
        workers = [int(pid) for pid in children.read_text().split()]
        for pid in [self.process.pid, *workers] if everything else [generator.choice(workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if everything:
            self.process.wait()
        self.killed = time.time()

    def stop(self, step: int) -> None:
        """SIGTERM once so many steps are logged, and waits for the end."""
        self.until_step(step)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def finish(self) -> None:
        """Waits for the end of the run, which must be a good one."""
        if self.process.wait(timeout=3600):
            last = self.log.read_text().strip().splitlines()[-1]
            raise clha.InputError(f"{self.log}: ended with {self.process.returncode}: {last}")

    def outcome(self, reference: "Trial") -> Result:
        """How often it went on from a checkpoint, and whether it ended as a run that nothing stopped."""
        resumes = re.findall(r"^train .* steps (?!1 to )", self.log.read_text(), re.MULTILINE)
        return {
            "resumes from a checkpoint": len(resumes),
            "every step logged once": self.logged() == list(range(self.steps + 1)),
            "weights identical": self.weights.read_bytes() == reference.weights.read_bytes(),
            "weights apart": distance(load_file(self.weights), load_file(reference.weights)),
        }


def newer(path: Path, moment: float) -> bool:
    """Whether a file was written after a moment."""
    return path.exists() and path.stat().st_mtime > moment


def undisturbed(args: Namespace, steps: int) -> Trial:
    """A run that nothing stops; it is kept, and used again."""
    trial = Trial(args, f"undisturbed-{steps}", steps)
    if not trial.weights.exists():
        shutil.rmtree(trial.out, ignore_errors=True)
        trial.start()
        trial.finish()
    return trial


# The trials -------------------------------------------------------------------------------------------------

MOMENTS = ("starting", "training", "saving", "training")  # in turn


def kills(args: Namespace) -> Result:
    """Kills a run at random moments; counts what had to be done twice."""
    reference = undisturbed(args, args.steps)
    generator = random.Random(0)
    trial = Trial(args, "kills/run", args.steps)
    counts: Counter[str] = Counter()
    trial.start(restarts=args.kills)
    for number in range(args.kills):
        began = time.time()
        moment = MOMENTS[number % len(MOMENTS)]
        wait_for(moment, trial, generator)
        if trial.process.poll() is not None:
            raise clha.InputError(f"--steps {args.steps}: the run was over after {number} kills; take more")
        counts["while saving"] += trial.saving()
        counts["while starting"] += moment == "starting"
        everything = generator.random() < 0.5
        trial.kill(everything, generator)
        counts["to all" if everything else "to one"] += 1
        if newer(trial.out / "metrics.jsonl", began):
            counts["steps repeated"] += max(0, trial.logged()[-1] - trial.saved())
        print(f"kill {number + 1}: {moment}, step {trial.logged()[-1]}, saved {trial.saved()}", flush=True)
        if everything:
            trial.start(restarts=args.kills)
    trial.finish()
    return {"kills": args.kills, **counts, "steps": args.steps} | trial.outcome(reference)


def wait_for(moment: str, trial: Trial, generator: random.Random) -> None:
    """Waits for a moment of one of the kinds in MOMENTS, in this start of the run."""
    if moment == "starting":
        time.sleep(generator.uniform(0.3, 6))
        return
    began = time.time()
    path = trial.out / "metrics.jsonl"
    trial.until(lambda: newer(path, began) and trial.logged()[-1] > 0)
    if moment == "training":
        trial.until_step(trial.logged()[-1] + generator.randrange(1, 15))
    while moment == "saving" and trial.until(trial.saving):
        time.sleep(generator.uniform(0, 0.01))
        if trial.saving():
            return


def resize(args: Namespace) -> Result:
    """From step 20 to 40 on other numbers of processes; without dropout, which is each process's own."""
    result: Result = {}
    init = args.out / "data" / "init"
    start = load_file(init / "model.safetensors")
    for before, after in ((2, 1), (1, 2)):
        trial = Trial(args, f"resize/{before}", 40, model=init)
        resized = Trial(args, f"resize/{before}-{after}", 40, model=init)
        trial.start(before)
        trial.stop(20)
        shutil.copytree(trial.out, resized.out)
        result[f"{before} -> {after}, from step"] = resized.saved()
        for run, processes in ((trial, before), (resized, after)):
            run.start(processes)
            run.finish()
        weights = load_file(trial.weights)
        result[f"{before} -> {after}, relative difference"] = distance(load_file(resized.weights), weights)
        result[f"{before} -> {after}, moved by"] = distance(start, weights)
    return result


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a weight matrix."""
    return max(((weights[name] - other).norm() / other.norm()).item() for name, other in others.items())


def disk(args: Namespace) -> Result:
    """A disk with room for two checkpoints: the run ends in a line, and goes on once there is more."""
    reference = undisturbed(args, 60)
    newest = clha.checkpoints(reference.out / "checkpoints")[-1]
    size = sum(path.stat().st_size for path in newest.iterdir())
    folder = args.out / "disk" / "small"
    folder.mkdir()
    room = int(2.6 * size)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    try:
        trial = Trial(args, "disk/small/run", 60)
        trial.log = args.out / "disk" / "run.log"
        trial.start()
        code = trial.process.wait()
        found = clha.checkpoints(trial.out / "checkpoints")
        lines = trial.log.read_text().splitlines()
        said = next((line for line in lines if "cannot be saved" in line or "No space" in line), "nothing")
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
        trial.start()
        trial.finish()
        result = {"MiB per checkpoint": round(size / 2**20, 1), "exit code of torchrun": code}
        result["it says"] = said.replace(str(folder), "...")
        result["checkpoints whole"] = ", ".join(path.name for path in found)
        return result | trial.outcome(reference)
    finally:
        subprocess.run(["umount", folder], check=True)


def machines(args: Namespace) -> Result:
    """A process of one of two "machines" is killed three times; both torchruns start theirs again."""
    generator = random.Random(0)
    trials = []
    for number in (0, 3):
        trial = Trial(args, f"machines/{number}", 200, replicate=2)
        trial.start(restarts=number, port=get_free_port())
        for kill_number in range(number):
            trial.until_step(50 * kill_number + 25)
            trial.kill(False, generator)
        trial.finish()
        trials.append(trial)
    reference, trial = trials
    return {"kills": 3} | trial.outcome(reference)


TRIALS = {"kills": kills, "resize": resize, "disk": disk, "machines": machines}


def main() -> None:
    """Makes the data, and runs the trials that are wanted."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="some of the trials")
    flag("--kills", type=int, default=50, help="SIGKILLs")
    flag("--steps", type=int, default=1500, help="of the run that is killed")
    flag("--processes", type=int, default=2, help="of `kills`; 1 on a machine with one GPU")
    flag("--deterministic", action="store_true", help="for the same bits on a GPU")
    flag("--out", type=Path, default=Path("out/chaos"), help="folder for the runs")
    args = parser.parse_args()
    reward.check_numbers(args, positive=("kills", "steps", "processes"))
    reward.check_output(args.out, "folder")
    args.out = args.out.resolve()
    torch.set_num_threads(1)
    if not (args.out / "data" / "dropout").exists():
        make_data(args.out / "data")
    results = {}
    for name in args.only:
        shutil.rmtree(args.out / name, ignore_errors=True)  # of an earlier trial
        (args.out / name).mkdir()
        results[name] = TRIALS[name](args)
    print("\n| trial | what | result |\n| --- | --- | --- |")
    for name, result in results.items():
        for what, value in result.items():
            print(f"| {name} | {what} | {value} |")
    print(json.dumps(results))


if __name__ == "__main__":
    clha.run(main)
