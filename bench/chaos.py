"""Is anything lost when a run is killed? One small run of clha.py, killed again and again at random moments.

    python bench/chaos.py --kills 50 --out out/chaos      50 times SIGKILL, on 2 processes
    python bench/chaos.py --only signal resize disk       SIGTERM; another number of processes; a full disk
    python bench/chaos.py --only machines                 two agents of torchrun, as on two machines

`kills`: half of them to one process, which torchrun brings back (--max_restarts); half to all of it, and the
same command is given again. The moments: while it starts, while it trains, while it saves. `resize`: stopped
on 2 processes and gone on with on 1, and the other way round, against a run that was not stopped. `disk`
mounts a small tmpfs, for which it must be root. `machines` kills one of two processes, which have a torchrun
and a copy of the model each. Linux only. Prints a Markdown table, and JSON last.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

sys.path[:0] = [str(Path(__file__).parents[1])]
import program
import toy
from checkpoint import checkpoints, newest_checkpoint
from program import HelpFormatter, refuse
from records import InputError, read_jsonl, write_jsonl

ROOT = Path(__file__).parents[1]


def make_data(folder: Path) -> None:
    """A toy world whose replies have their true rewards, and a model with dropout: random states matter."""
    toy.write(folder, seed=0, queries=256)
    records = [record for _, record in read_jsonl(folder / "train.jsonl")]
    for record in records:
        record["rewards"] = [toy.gold(record["prompt"], reply) for reply in record["responses"]]
    write_jsonl(folder / "scored.jsonl", records)
    write_jsonl(folder / "dev.jsonl", records[:16])
    shutil.copytree(folder / "init", folder / "dropout")
    settings = json.loads((folder / "init" / "config.json").read_text())
    (folder / "dropout" / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))


class Trial:
    """One run of clha.py under torchrun: `start` starts it, or starts it again."""

    def __init__(self, data: Path, out: Path, steps: int, model: str = "dropout", **settings: Any) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        flags = {
            "model": data / model, "train_data": data / "scored.jsonl", "output_dir": out, "max_steps": steps,
            "batch_size": 8, "learning_rate": 1e-4, "pack_tokens": 512, "checkpoint_every": 10,
            "dev_data": data / "dev.jsonl", "eval_every": 15,
        }  # fmt: skip
        self.flags = [str(word) for k, value in (flags | settings).items() for word in (f"--{k}", value)]
        out.parent.mkdir(parents=True, exist_ok=True)

    def start(self, processes: int = 2, restarts: int = 0, port: int = 0) -> None:
        """Starts torchrun, a single process without it, or at a port two torchruns of a process each."""
        machines = 2 if port else 1
        nodes = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port} --local_addr=127.0.0.1"
        launch = ["-m", "torch.distributed.run", *(nodes.split() if port else ["--standalone"])]
        launch += [f"--max_restarts={restarts}", f"--nproc_per_node={processes // machines}"]
        launch = launch if processes > 1 else []
        command = [sys.executable, *launch, "clha.py", *self.flags]
        self.began = time.time()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if port else {}
        with self.log.open("a") as log:
            for _ in range(machines):
                self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def workers(self) -> list[int]:
        """The processes that train."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()]

    def steps(self) -> int:
        """The last step that is logged."""
        path = self.out / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        newest = newest_checkpoint(self.out / "checkpoints")
        return int(newest.name[5:]) if newest else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.out / "checkpoints").glob("step-*.partial"))

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> bool:
        """Waits for something to be true; False if the run ended before, or the time is over."""
        end = time.time() + seconds
        while time.time() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def kill(self, everything: bool, generator: random.Random) -> None:
        """SIGKILL to one of the processes that train, or to all and torchrun."""
        if not everything:
            self.until(self.workers)  # torchrun itself takes seconds to start
        workers = self.workers()
        for pid in [self.process.pid, *workers] if everything else [generator.choice(workers)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if everything:
            self.process.wait()

    def finish(self) -> None:
        """Waits for the end of the run, which must be a good one."""
        if self.process.wait(timeout=3600):
            raise InputError(f"{self.log}: ended with {self.process.returncode}: {self.tail()}")

    def tail(self) -> str:
        """The last line that the run printed."""
        return self.log.read_text().strip().splitlines()[-1]

    def weights(self) -> Path:
        """The final weights."""
        return self.out / "final" / "model.safetensors"


def reference(args: argparse.Namespace, data: Path, steps: int, model: str, processes: int) -> Trial:
    """A run that nothing stops; made once."""
    out = args.out / f"reference-{model}-{steps}-{processes}"
    trial = Trial(data, out, steps, model, keep_checkpoints=100)
    if not trial.weights().exists():
        trial.start(processes)
        trial.finish()
    return trial


def kills(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Kills a run at random moments; counts what had to be done twice."""
    generator, trial = random.Random(args.seed), Trial(data, args.out / "kills", args.steps)
    whole = reference(args, data, args.steps, "dropout", 2)
    shutil.rmtree(trial.out, ignore_errors=True)
    trial.log.unlink(missing_ok=True)
    moments: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    trial.start(restarts=args.kills)
    for number in range(args.kills):
        began, before = time.time(), trial.steps()
        moment = generator.choice(["starting", "training", "training", "saving"])
        if moment == "starting":
            time.sleep(generator.uniform(0.3, 6))
        else:  # in this life, and not in the one before
            fresh = lambda: newer(trial.out / "metrics.jsonl", began) and trial.steps() != before  # noqa: B023, E731
            trial.until(fresh)
            time.sleep(generator.uniform(0, 2))
            if moment == "saving":
                trial.until(trial.saving, 20)
                time.sleep(generator.uniform(0, 0.02))
        if trial.process.poll() is not None:
            raise InputError(f"--steps {args.steps}: the run was over after {number} kills; more are needed")
        moments[
            "while saving" if trial.saving() else "while starting" if moment == "starting" else "else"
        ] += 1
        everything = generator.random() < 0.5
        trial.kill(everything, generator)
        counts["to all" if everything else "to one"] += 1
        if newer(trial.out / "metrics.jsonl", began):
            counts["steps repeated"] += max(0, trial.steps() - trial.saved())
        if everything:
            trial.start(restarts=args.kills)
        print(f"kill {number + 1}: {moment}, step {trial.steps()}, saved {trial.saved()}", flush=True)
    trial.finish()
    resumes = trial.log.read_text().count("resume  from")
    same = trial.weights().read_bytes() == whole.weights().read_bytes()
    logged = [row["step"] for _, row in read_jsonl(trial.out / "metrics.jsonl")]
    return {
        "kills": args.kills, **counts, **moments, "resumes from a checkpoint": resumes, "steps": args.steps,
        "every step logged once": logged == list(range(1, args.steps + 1)), "weights identical": same,
    }  # fmt: skip


def newer(path: Path, moment: float) -> bool:
    """Whether a file was written after a moment."""
    return path.exists() and path.stat().st_mtime > moment


def signals(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """SIGTERM to torchrun, SIGINT to a single process; the same command goes on."""
    whole, trial = reference(args, data, 60, "dropout", 2), Trial(data, args.out / "signal", 60)
    shutil.rmtree(trial.out, ignore_errors=True)
    trial.start()
    trial.until(lambda: trial.steps() >= 23)
    trial.process.send_signal(signal.SIGTERM)
    trial.process.wait()
    stopped, saved = trial.steps(), trial.saved()
    trial.start()
    trial.finish()
    same = trial.weights().read_bytes() == whole.weights().read_bytes()
    return {"SIGTERM at step": stopped, "checkpoint": saved, "weights identical": same}


def resize(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Twenty more steps on another number of processes; without dropout, which is each process's own."""
    result = {}
    for before, after in ((2, 1), (1, 2)):
        whole = reference(args, data, 40, "init", before)
        trial = Trial(data, args.out / f"resize-{before}-{after}", 40, "init")
        shutil.rmtree(trial.out, ignore_errors=True)
        shutil.copytree(whole.out, trial.out, symlinks=True)
        shutil.rmtree(trial.out / "final")
        for path in checkpoints(trial.out / "checkpoints"):
            if int(path.name[5:]) > 20:
                shutil.rmtree(path)
        result[f"{before} -> {after}, from step"] = trial.saved()
        trial.start(after)
        trial.finish()
        ours, theirs = load_file(trial.weights()), load_file(whole.weights())
        errors = [((ours[name] - w).norm() / w.norm()).item() for name, w in theirs.items()]
        start = load_file(data / "init" / "model.safetensors")
        moved = max(((start[name] - w).norm() / w.norm()).item() for name, w in theirs.items())
        result |= {f"{before} -> {after}, relative": max(errors), "moved by": moved}
    return result


def disk(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """A disk that is full after some checkpoints: stopped, given room, gone on with; and going on without."""
    whole = reference(args, data, 60, "dropout", 2)
    size = sum(path.stat().st_size for path in newest_checkpoint(whole.out / "checkpoints").iterdir())
    result = {"MiB a checkpoint": round(size / 2**20, 1)}
    for policy in ("stop", "go_on"):
        folder = args.out / f"disk-{policy}"
        folder.mkdir(parents=True, exist_ok=True)
        room = f"size={int(3.6 * size)}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", folder], check=True)
        try:
            trial = Trial(data, folder / "run", 60, keep_checkpoints=100, on_save_error=policy)
            trial.log = args.out / f"disk-{policy}.log"
            trial.log.unlink(missing_ok=True)
            trial.start()
            code = trial.process.wait()
            text = trial.log.read_text()
            line = next(line for line in text.splitlines() if "can't save" in line)
            result |= {f"{policy}: exit code": code, f"{policy}: it says": line.replace(str(folder), "...")}
            result[f"{policy}: checkpoints whole"] = trial.saved()
            if policy == "stop":
                room = f"remount,size={20 * size}"
                subprocess.run(["mount", "-o", room, "tmpfs", folder], check=True)
                trial.start()
                trial.finish()
            same = trial.weights().read_bytes() == whole.weights().read_bytes()
            result[f"{policy}: weights identical"] = same
        finally:
            subprocess.run(["umount", folder], check=True)
    return result


def machines(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """A process of one of two "machines" is killed three times; both torchruns start theirs again."""
    generator, trials = random.Random(args.seed), {}
    for kills in (0, 3):
        trials[kills] = trial = Trial(data, args.out / f"machines-{kills}", 200, replicate=2)
        shutil.rmtree(trial.out, ignore_errors=True)
        trial.log.unlink(missing_ok=True)
        trial.start(restarts=kills, port=get_free_port())
        for kill in range(kills):
            trial.until(lambda wanted=50 * kill + 25: trial.steps() >= wanted)  # noqa: B023
            trial.kill(False, generator)
        trial.finish()
    same = trials[3].weights().read_bytes() == trials[0].weights().read_bytes()
    logged = [row["step"] for _, row in read_jsonl(trials[3].out / "metrics.jsonl")]
    resumes = trials[3].log.read_text().count("resume  from")
    once = logged == list(range(1, 201))
    return {"kills": 3, "resumes": resumes, "every step logged once": once, "weights identical": same}


TRIALS = {"kills": kills, "signal": signals, "resize": resize, "disk": disk, "machines": machines}


def main() -> None:
    """Makes the data, and runs the trials that are wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="some of the trials")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--steps", type=int, default=1500, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("out/chaos"), help="folder for the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out = args.out.resolve()
    data = args.out / "data"
    if not (data / "dropout").exists():
        make_data(data)
    results = {name: TRIALS[name](args, data) for name in args.only}
    print("\n| trial | what | result |\n| --- | --- | --- |")
    for name, result in results.items():
        for what, value in result.items():
            print(f"| {name} | {what} | {value} |")
    print(json.dumps(results))


if __name__ == "__main__":
    program.run(main)
