"""How fast does a machine train? Its rate, for bench/plan.py; and whether plans come true.

    python bench/rates.py --models 24M [settings of clha.py]       adds this machine's rate to rates.jsonl
    torchrun --nproc_per_node 2 bench/rates.py --model MODEL --train_data FILE       a model and data of yours
    python bench/rates.py --check --models 24M 58M [settings]      plans, trains, compares: 1 and 2 processes

Weights are random; of a model only config.json and the tokenizer are read.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import lengths
from footprint import GRADIENTS, MOMENTS, WEIGHTS
from plan import HERE, flops, lengths_of, load, make_plan, seconds, settle, size_of

import clha
import fast
import program
import toy
from program import HelpFormatter, refuse
from records import InputError, write_jsonl


def status(name: str) -> int:
    """Bytes of this process by Linux: VmRSS, what it has, or VmHWM, its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def measure(config: clha.Config, steps: int) -> dict[str, Any]:
    """Real training steps of a model with random weights: a row for rates.jsonl, and what memory it took."""
    rank, processes, device = clha.init_process()
    if device.type == "cpu" and processes > 1 and rank < os.cpu_count():
        os.sched_setaffinity(0, {rank})  # else the processes move about, and wait for each other
    dtype = settle(config, device.type)
    model_config, examples, order = load(config)
    name = config.model if config.model.count("/") == 1 else Path(config.model).name
    gc.collect()
    before = status("VmRSS")
    checkpointing = config.activation_checkpointing
    model = clha.build_model(model_config, device, dtype, checkpointing, config.compile, config.replicate)
    with torch.no_grad():
        for weight in model.parameters():
            weight.to_local().normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.fill_(0.01)  # any rotary frequency takes as long
    flex = fast.uses_flex(model, config.attention, max(examples.sizes), config.compile)
    fill_to = fast.pack_length(examples.sizes, order, config.pack_tokens) if flex else 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=device.type == "cuda")
    loss = {"margin": config.margin, "min_reward_gap": config.min_reward_gap, "alpha": 0.05}

    def loss_fn(*args: Any, **more: Any) -> Any:
        return clha.clha_loss(*args, **loss, **more)

    size, took, work = size_of(model_config), [], []
    shortest = min(range(len(examples)), key=lambda i: examples.sizes[i])
    for step in range(2 * steps + 2):  # a short query, which shows what a pass costs; a step of the run; ...
        if step == 2 and device.type == "cpu":  # the first two warm up, and leave AdamW's moments
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        optimizer.zero_grad()
        indices = [shortest] if step % 2 == 0 else order[step // 2 % len(order)][1]
        packs = clha.packs_of([examples[i] for i in indices], device, config, fill_to)
        dist.barrier()
        start = time.perf_counter()
        clha.run_batch(model, packs, loss_fn, config, train=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).full_tensor().item()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        batch = lengths_of([examples[i] for i in indices])
        done = flops(size, batch, checkpointing)[1] / processes
        work.append((sum(q.size for q in batch), done, len(packs)))
    peak = status("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = {
        WEIGHTS: [weight.to_local() for weight in model.parameters()],
        GRADIENTS: [weight.grad.to_local() for weight in model.parameters()],
        MOMENTS: [moment.to_local() for moment in moments],
    }
    row = {name: sum(x.nbytes for x in tensors) for name, tensors in held.items()} | {"peak": peak}
    per_rank: list[Any] = [None] * processes
    dist.all_gather_object(per_rank, row)
    of_steps = list(zip(took[3::2], work[3::2], strict=True))
    # Two equations: a pass's own cost and the FLOPs of a step, and the same of the short query.
    one, (_, little, _) = statistics.median(took[2::2]), work[0]
    if fill_to:  # a short query is filled, and costs what any pack does
        one = little = 0
    done_per_s = statistics.median((done - n * little) / (t - n * one) for t, (_, done, n) in of_steps)
    fixed = max(0, one - little / done_per_s) / size.parameters
    tokens_per_s = statistics.median(tokens / t for t, (tokens, _, _) in of_steps)
    cores = torch.get_num_threads() * processes
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    argv = [Path(word).name if os.sep in word and Path(word).exists() else word for word in sys.argv[1:]]
    return {
        "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        "kind": gpu or f"cpu-{cores}-cores", "processes": processes, "model": name,
        "parameters": size.parameters, "checkpointing": checkpointing,
        "pack_tokens": fill_to or config.pack_tokens,
        "tokens_per_s": round(tokens_per_s, 1), "flops_per_s": round(6 * size.parameters * tokens_per_s),
        "done_flops_per_s": round(done_per_s * processes), "pass_s_per_parameter": fixed,
        "torch": torch.__version__,
        "command": "python bench/rates.py " + " ".join(argv), "memory": per_rank,
    }  # fmt: skip


def stand_in(folder: Path, name: str) -> tuple[Path, Path]:
    """A model folder without weights, of lengths.MODELS, and records as long as HH's: for trials."""
    model, data = folder / name, folder / "data.jsonl"
    if not data.exists():
        toy.train_tokenizer([" the" * 9]).save_pretrained(folder / "tokenizer")
        rows = [
            {
                "prompt": [{"role": "user", "content": " ".join(["the"] * max(1, prompt - 21))}],
                "responses": [" ".join(["the"] * (reply - 1)) for reply in replies],
                "rewards": [1.0, -1.0],
            }
            for prompt, *replies in lengths.HH_LENGTHS
        ]
        write_jsonl(data, rows)
    lengths.config(name).save_pretrained(model)
    for file in (folder / "tokenizer").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    return model, data


def launch(flags: list[str], processes: int, out: Path, **environment: str) -> dict[str, Any]:
    """The row that this program gives in processes of its own, one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__]
    command += ["--rates", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    out.unlink(missing_ok=True)
    result = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"a trial failed: {result.stderr[-600:]}")
    return json.loads(out.read_text())


# Large blocks go back to the system as soon as they are freed: so the peak is what was alive, not a heap's.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def check(names: list[str], group: list[int], settings: list[str], steps: int, rounds: int) -> None:
    """Plans and then trains each model on so many processes; the rate is one of *another* model.

    Both models take turns, so that the machine's mood is the same for a rate and for what it predicts.
    """
    print("| model | processes | memory, MB | measured | off | s a step | measured | off | rate of |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rate.jsonl"
        for processes in group:
            plans, memories, flags = {}, {}, {}
            for name in names:
                flags[name] = ["--models", name, "--steps", str(steps), *settings]
                plans[name] = make_plan(parse(flags[name], folder)[1], "cpu", processes)
                memories[name] = launch(flags[name], processes, out, **MALLOC)["memory"]
            rows = [{name: launch(flags[name], processes, out) for name in names} for _ in range(rounds)]
            for name in names:
                plan, other = plans[name], names[names.index(name) - 1]
                predicted = [seconds(row[other], plan) / plan["steps"] for row in rows]
                measured = [plan["tokens"] / plan["steps"] / row[name]["tokens_per_s"] for row in rows]
                off = statistics.median(a / b for a, b in zip(predicted, measured, strict=True)) - 1
                for part in (WEIGHTS, GRADIENTS, MOMENTS):
                    assert memories[name][0][part] == plan["memory"][part], part
                total, peak = plan["memory"].total(), max(row["peak"] for row in memories[name])
                print(
                    f"| {name} | {processes} | {total / 1e6:.0f} | {peak / 1e6:.0f} | "
                    f"{total / peak - 1:+.1%} | {statistics.median(predicted):.2f} | "
                    f"{statistics.median(measured):.2f} | {off:+.1%} | {other} |",
                    flush=True,
                )


# ------------------------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str], folder: str) -> tuple[argparse.Namespace, clha.Config | None]:
    """Our own flags, and those of clha.py, whose files go to `folder`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = refuse
    flag = parser.add_argument
    flag("--rates", type=Path, metavar="FILE", help="gets a line, instead of rates.jsonl beside this program")
    flag("--check", action="store_true", help="plan, train and compare on this machine")
    flag("--models", nargs="+", choices=lengths.MODELS, default=list(lengths.MODELS),
         help="of --check; without --model, the first is the model")  # fmt: skip
    flag("--processes", nargs="+", type=int, default=[1, 2], metavar="N", help="of --check")
    flag("--steps", type=int, default=3, metavar="N", help="of a trial")
    flag("--rounds", type=int, default=3, metavar="N", help="of --check: trials of each model, in turns")
    args, args.settings = parser.parse_known_args(argv)
    args.rates = args.rates or HERE / "rates.jsonl"
    for name in ("steps", "rounds"):
        if not 1 <= getattr(args, name) < 2**20:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if args.check:
        return args, None
    if "--model" not in args.settings:
        model, data = stand_in(Path(folder), args.models[0])
        args.settings += ["--model", str(model), "--train_data", str(data)]
    return args, clha.parse_args([*args.settings, "--output_dir", folder])


def main() -> None:
    """Measures, or checks."""
    with tempfile.TemporaryDirectory() as folder:
        args, config = parse(sys.argv[1:], folder)
        if args.check:
            check(args.models, args.processes, args.settings, args.steps, args.rounds)
            return
        row = measure(config, args.steps)
        if dist.get_rank() == 0:
            args.rates.parent.mkdir(parents=True, exist_ok=True)
            with args.rates.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    program.run(main)
