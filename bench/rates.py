"""How fast does a machine train? Its rate, for bench.plan; and whether memory plans hold.

    python -m bench.rates --models 24M [settings of clha.py]       adds this machine's rate to rates.jsonl
    torchrun --nproc_per_node 2 -m bench.rates --model MODEL --train_data FILE      a model and data of yours
    python -m bench.rates --check --models 24M 58M [settings]      plans, trains, compares: 1 and 2 processes

Weights are random; of a model only config.json and the tokenizer are read.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import clha
import reward
from bench import train_step
from bench.plan import make_plan, prepare
from study import toy

ROOT = Path(__file__).parents[1]


class Trainer:
    """The steps of `clha.train`: in packs of at most `limit` tokens, filled to them for flex_attention."""

    def __init__(self, policy: clha.Policy, limit: int, fill: bool) -> None:
        self.policy = policy
        self.device = policy.model.device
        self.packs_of = partial(clha.make_packs, device=self.device, limit=limit, fill=fill, group=1)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(policy.parameters(), clha.Config.learning_rate, fused=fused)

    def step(self, examples: list[clha.Example]) -> dict[str, float]:
        """An optimizer step, as one process of clha.py takes it, and its metrics."""
        loss_fn = partial(clha.clha_loss, **train_step.SETTINGS)
        return clha.run_batch(self.policy, self.packs_of(examples), loss_fn, train=True) | self.update()

    def update(self) -> dict[str, float]:
        """Clipping and AdamW."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), clha.Config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm.full_tensor().item()}


def clock(device: torch.device) -> float:
    """The time in seconds, when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(config: clha.Config, steps: int) -> dict[str, Any]:
    """Real training steps of a model with random weights, after one that warms up: a row for rates.jsonl."""
    rank, processes, device = clha.init_process()
    if device.type == "cpu" and processes > 1 and rank < os.cpu_count():
        os.sched_setaffinity(0, {rank})  # else the processes move about, and wait for each other
    run = prepare(config, device)
    gc.collect()
    before = train_step.rss("VmRSS")
    policy = train_step.random_policy(run.model, run.config, device)
    trainer = Trainer(policy, run.limit, run.fill)
    per_s = []
    for number in range(steps + 1):
        if number == 1 and device.type == "cpu":  # AdamW's moments are there now
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        batch = run.examples.select(run.order[number % len(run.order)].tolist()).to_list()
        dist.barrier()
        start = clock(device)
        trainer.step(batch)
        per_s.append(sum(example["size"] for example in batch) / (clock(device) - start))
    peak = train_step.rss("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated()
    peaks: list[Any] = [None] * processes
    dist.all_gather_object(peaks, peak)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    parameters = policy.model.num_parameters()
    tokens_per_s = statistics.median(per_s[1:])
    return {
        "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        "kind": gpu or f"cpu-{torch.get_num_threads() * processes}-cores",
        "processes": processes,
        "model": config.model if config.model.count("/") == 1 else Path(config.model).name,
        "parameters": parameters,
        "checkpointing": config.activation_checkpointing,
        "pack_tokens": run.limit,
        "tokens_per_s": round(tokens_per_s, 1),
        "flops_per_s": round(6 * parameters * tokens_per_s),
        "torch": torch.__version__,
        "peak": peaks,
    }


def stand_in(folder: Path, name: str) -> tuple[Path, Path]:
    """A model folder without weights, of train_step.MODELS, and records as long as HH's: for trials."""
    model = folder / name
    data = folder / "data.jsonl"
    rows = []
    for prompt, *responses in train_step.HH_LENGTHS:
        turns = [{"role": "user", "content": " ".join(["the"] * max(1, prompt - 21))}]  # a token each
        texts = [" ".join(["the"] * (response - 1)) for response in responses]
        rows.append({"prompt": turns, "responses": texts, "rewards": [1.0, -1.0]})
    reward.write_jsonl(data, rows)
    train_step.llama(name).save_pretrained(model)
    toy.train_tokenizer([" the" * 9]).save_pretrained(model)
    return model, data


def launch(flags: list[str], processes: int) -> dict[str, Any]:
    """The row that this program measures in processes of its own, one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *torchrun, "-m", "bench.rates", "--rates", os.devnull, *flags]
    # Large blocks go back to the system when they are freed: the peak is what was alive, not a heap's size.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | malloc
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise clha.InputError(f"a trial failed: {result.stderr[-600:]}")
    return json.loads(result.stdout.splitlines()[-1])


def check(args: Namespace, settings: list[str]) -> None:
    """Plans the memory of each model on one process and on two, and then trains it."""
    print("| model | processes | memory, MB, planned | measured | off |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            for name in args.models:
                flags = ["--models", name, "--steps", str(args.steps), *settings]
                planned = sum(make_plan(parse(flags, folder)[1], "cpu", processes).memory.values())
                peak = max(launch(flags, processes)["peak"])
                cells = f"{planned / 1e6:.0f} | {peak / 1e6:.0f} | {planned / peak - 1:+.1%}"
                print(f"| {name} | {processes} | {cells} |", flush=True)


def parse(argv: list[str], folder: str) -> tuple[Namespace, clha.Config | None, list[str]]:
    """Our own flags; and clha.py's settings, of a stand-in without --model, with `folder` for its files."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--rates", type=Path, default=ROOT / "bench" / "rates.jsonl", help="gets a line")
    flag("--check", action="store_true", help="plan, train and compare on this machine")
    flag("--models", nargs="+", choices=train_step.MODELS, default=train_step.SMALL, help="without --model")
    flag("--steps", type=int, default=3, metavar="N", help="of a trial")
    args, settings = parser.parse_known_args(argv)
    reward.check_numbers(args, positive=("steps",))
    if args.check:
        return args, None, settings
    if "--model" not in settings:
        model, data = stand_in(Path(folder), args.models[0])
        settings += ["--model", str(model), "--train_data", str(data)]
    [config] = reward.Parser(clha.Config).parse_args_into_dataclasses([*settings, "--output_dir", folder])
    return args, config, settings


def main() -> None:
    """Measures, or checks."""
    with tempfile.TemporaryDirectory() as folder:
        args, config, settings = parse(sys.argv[1:], folder)
        if config is None:
            check(args, settings)
            return
        row = measure(config, args.steps)
        if dist.get_rank() == 0:
            print(json.dumps(row))
            args.rates.parent.mkdir(parents=True, exist_ok=True)
            reward.append_jsonl(args.rates, [row])


if __name__ == "__main__":
    clha.run(main)
