"""What does a step of LLaMA-7B cost on one GPU? Whole optimizer steps, in turn, on the same queries:

    ours          clha.py: packs of one length, flex_attention
    padded        the release: 2 queries at a time, a padded forward a candidate, full log-softmax
    concatenated  8 queries at a time, one padded forward over all prompt-reply texts, full logits

    python bench/gpu.py --model 7B --numerics --profile
    python bench/gpu.py --no_ways --pack_tokens 4096 8192 16384 32768 --checkpointing full selective --compile
    python bench/gpu.py --no_ways --score 1.3B --generate
    python bench/gpu.py --model 24M --device cpu --queries 4 --rounds 2      without a GPU, to try it

Weights are random; queries have the lengths of HH-RLHF. The clock covers making the batch, forward, backward,
clipping and AdamW. `mfu` is 6 x all parameters x tokens a second over the GPU's peak, `of_product` over what
a large matrix product reaches; prompts count once, and nothing padded, filled or made again counts. Prints
Markdown tables. Each row is at once a line of NAME.rows.jsonl, beside --out NAME.jsonl, which gets our rate.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import lengths
import score
import train_step

import clha
import evaluate
import fast
import program
from program import HelpFormatter, refuse
from records import InputError

MODELS: dict[str, tuple[int, int, int, int]] = {  # hidden size, layers, heads, intermediate size
    "7B": (4096, 32, 32, 11008),
    "1.3B": (2048, 24, 16, 5504),
    "2M": (32, 2, 2, 64),
}
NAMES = [*lengths.MODELS, *MODELS]
PEAK = {"H200": 990, "H100": 990, "A100": 312, "A800": 312}  # TFLOPS in bfloat16, by a part of the GPU's name
TOGETHER = {"padded": 2, "concatenated": 8}  # queries of a backward pass; the release has 2 (train_hh.sh)
TEST_PROMPTS = 8272  # of the paper's test set
LOSS = partial(clha.clha_loss, **train_step.RECIPE)

Queries = list[clha.Example]
Step = dict[str, float]  # what was measured: seconds, peak_gib, loss, grad_norm
Steps = list[Step | None]


def config(name: str, **more: Any) -> LlamaConfig:
    """The LLaMA of a name."""
    if name not in MODELS:
        return lengths.config(name, **more)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return LlamaConfig(vocab_size=32000, **dict(zip(sizes, MODELS[name], strict=True)), **more)


def wait(device: torch.device) -> float:
    """The time when the device has done all its work, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fill(tokens: int, seed: int) -> Queries:
    """As many queries as a pack of this length holds."""
    queries = lengths.queries(tokens // 64, seed)
    ends = accumulate(map(clha.size, queries))
    return [query for query, end in zip(queries, ends, strict=True) if end <= tokens]


# ------------------------------------------------------------------------------------------------------------
# Steps


class Trainer:
    """A random model with the optimizer of clha.train; both are made again after a lack of memory."""

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.settings = clha.Config(model="", train_data="", output_dir="")
        self.optimizer: torch.optim.Optimizer | None = None
        self.build("full", compile=False)

    def build(self, checkpointing: str, compile: bool) -> None:
        """Makes the model and a new optimizer; those before are dropped first."""
        self.drop()
        self.how = (checkpointing, compile)
        self.model = clha.build_model(self.config, self.device, self.dtype, *self.how)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in self.model.parameters():
                local = weight.to_local()
                local.fill_(1) if local.ndim == 1 else local.normal_(0, 0.02)
        # Rotary frequencies are garbage so far; a model with hardly any weights has the same ones.
        small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8}
        same = AutoModelForCausalLM.from_config(LlamaConfig(**self.config.to_dict() | small))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(same.get_buffer(name))
        how = {"weight_decay": self.settings.weight_decay, "fused": self.device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.settings.learning_rate, **how)
        self.flex = fast.uses_flex(self.model, "auto", 640)  # the longest of lengths.py

    def drop(self) -> None:
        """Gives back the memory, also where FSDP holds on to the model: after an error in a backward pass."""
        for weight in self.optimizer.param_groups[0]["params"] if self.optimizer else ():
            weight.grad = None
            weight.to_local().untyped_storage().resize_(0)
        self.model = self.optimizer = None
        torch.compiler.reset()  # what was compiled holds the model; and only so many shapes are compiled
        gc.collect()
        torch.cuda.empty_cache()

    def step(self, way: str, queries: Queries, tokens: int) -> Step:
        """An optimizer step, as one process of clha.py takes it; `tokens` is the length of our packs."""
        loss = torch.zeros((), device=self.device)
        if way == "ours":
            settings = replace(self.settings, pack_tokens=tokens)
            packs = clha.packs_of(queries, self.device, settings, tokens if self.flex else 0)
            loss += clha.run_batch(self.model, packs, LOSS, settings, train=True)["loss"]
        else:
            self.model.set_attn_implementation("sdpa")
            for start in range(0, len(queries), TOGETHER[way]):
                part = queries[start : start + TOGETHER[way]]
                addend = train_step.WAYS[way](self.model, part) * (len(part) / len(queries))
                addend.backward()
                loss += addend.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.full_tensor().item()}

    def measure(self, way: str, queries: Queries, tokens: int) -> Step | None:
        """A step, with `seconds` and `peak_gib` (None on a CPU); None where the memory is not enough."""
        cuda, result = self.device.type == "cuda", None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = wait(self.device)
        with suppress(torch.OutOfMemoryError):  # which holds what the step had made, until it is over
            result = self.step(way, queries, tokens)
        if result is None:
            self.build(*self.how)  # FSDP was left in the middle of its work
            return None
        more = {"seconds": wait(self.device) - start}
        return result | more | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}

    def in_turn(self, ways: Iterable[str], batches: list[Queries], tokens: int) -> dict[str, Steps]:
        """The steps of each way, batch by batch; None is the last of a way whose memory is not enough."""
        results: dict[str, Steps] = {way: [] for way in ways}
        for batch in batches:
            for way, steps in results.items():
                if None not in steps:
                    steps.append(self.measure(way, batch, tokens))
        return results


# ------------------------------------------------------------------------------------------------------------
# Figures


class Report:
    """Tables on the screen, and JSON lines in files."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.out, self.columns = Path(args.out), ()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.peak = args.peak_tflops or next((n for name, n in PEAK.items() if name in self.gpu), None)
        self.product: float | None = None  # TFLOPS of a large matrix product
        told = {name: value for name, value in vars(args).items() if name != "out"}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.machine = {"gpu": self.gpu, "processes": 1, **versions, "arguments": told}

    def add(self, stage: str, row: dict[str, Any]) -> None:
        """Prints a row, below the head of its table if that is new, and appends it to the file."""
        if (stage, *row) != self.columns:
            self.columns = (stage, *row)
            print(f"\n| {' | '.join(row)} |\n|{' --- |' * len(row)}")
        cells = (f"{v:,.4g}" if type(v) is float else "" if v is None else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)
        self.append(self.out.with_suffix(".rows.jsonl"), {"stage": stage} | row)

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Appends a line to a file."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self.machine) + "\n")

    def rates(self, trainer: Trainer, batches: list[Queries], steps: Steps) -> dict[str, Any]:
        """What the steps of a way come to, without the first, which warms up: medians; the most memory."""
        names = ("queries_per_s", "tokens_per_s", "flops_per_s", "mfu", "of_product", "peak_gib", "loss")
        if None in steps:
            return dict.fromkeys(names) | {"result": "out of memory"}
        done = list(zip(batches, steps, strict=True))[1:]
        queries = statistics.median(len(batch) / step["seconds"] for batch, step in done)
        tokens = statistics.median(sum(map(clha.size, batch)) / step["seconds"] for batch, step in done)
        flops = training_flops(sum(weight.numel() for weight in trainer.model.parameters()), tokens)
        shares = [flops / (tflops * 1e12) if tflops else None for tflops in (self.peak, self.product)]
        values = [queries, tokens, flops, *shares, max(step["peak_gib"] or 0 for _, step in done) or None]
        return dict(zip(names, [*values, steps[-1]["loss"]], strict=True)) | {"result": "done"}


def training_flops(parameters: int, tokens: float) -> float:
    """Of a forward and backward pass over `tokens`, as they are usually counted: 6 a parameter and token."""
    return 6.0 * parameters * tokens


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOPS that a product of two matrices of 8192 x 8192 reaches; on a CPU 512 x 512."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = wait(device)
        for _ in range(10):
            a @ b
        seconds.append(wait(device) - start)
    return 2 * n**3 * 10 / statistics.median(seconds[1:]) / 1e12  # the first one warms up


# ------------------------------------------------------------------------------------------------------------
# Training


def compare_numerics(device: torch.device, report: Report, tokens: int) -> None:
    """Log-probs and gradients of a small model, with heads as LLaMA-7B's, against SDPA in float32.

    Asserts that flex_attention gives the same; in bfloat16, not 4 times as far off as SDPA is.
    """
    queries, errors, expected = fill(tokens, seed=0), {}, None
    for dtype in (torch.float32, torch.bfloat16):
        trainer = Trainer(lengths.config("24M", head_dim=128), device, dtype)
        for attention in ("sdpa", "flex")[: 1 + trainer.flex]:
            batch = clha.pack(queries, device, tokens if attention == "flex" else 0)
            sums, counts = clha.sequence_logps(trainer.model, batch)
            sums.mean().backward()
            gradient = torch.cat([weight.grad.to_local().flatten() for weight in trainer.model.parameters()])
            trainer.optimizer.zero_grad()
            found = ((sums / counts).detach(), gradient)
            expected = expected or found
            apart = [a - b for a, b in zip(found, expected, strict=True)]
            error = [apart[0].abs().max().item(), (apart[1].norm() / expected[1].norm()).item()]
            errors[dtype, attention] = error
            names = ("logps_apart_by_nats_a_token", "gradient_apart_by_share")
            row = dict(zip(names, error, strict=True))
            report.add("numerics", {"dtype": str(dtype), "attention": attention} | row)
        if trainer.flex:
            allowed = [4 * e for e in errors[dtype, "sdpa"]] if dtype == torch.bfloat16 else [1e-3, 1e-3]
            pairs = zip(errors[dtype, "flex"], allowed, strict=True)
            assert all(error <= most for error, most in pairs), f"flex_attention is wrong in {dtype}"
        trainer.drop()


def compare_ways(trainer: Trainer, report: Report, args: argparse.Namespace, limit: int) -> None:
    """The three ways in turn; `over_ours` is the median of paired ratios of seconds.

    Each step of each trains the same weights, so their losses are not quite the same.
    """
    batches = [lengths.queries(args.queries, seed) for seed in range(-1, args.rounds)]
    sizes = [clha.size(query) for batch in batches for query in batch]
    order = [(0.0, list(range(n, n + args.queries))) for n in range(0, len(sizes), args.queries)]
    tokens = fast.pack_length(sizes, order, limit) if trainer.flex else limit
    results = trainer.in_turn(["ours", *TOGETHER], batches, tokens)
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    for way, steps in results.items():
        row = {"model": args.model, "parameters": parameters, "queries": args.queries, "way": way}
        row |= report.rates(trainer, batches, steps) | {"over_ours": None}
        if None not in steps + results["ours"]:
            took = ([step["seconds"] for step in each] for each in (steps, results["ours"]))
            row["over_ours"] = median_ratio(*took)
        report.add("ways", row | {"pack_tokens": tokens if way == "ours" else None})
        if way == "ours" and row["result"] == "done":
            report.append(report.out, row)


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """The median of paired ratios, without the first, which warms up."""
    return statistics.median([a / b for a, b in zip(seconds, others, strict=True)][1:])


def compare_heads(trainer: Trainer, report: Report, tokens: int) -> None:
    """Our step with the logits in chunks, and with all of them at once."""
    before, batches = fast.LOGITS, [fill(tokens, seed=0)] * 3
    for head, limit in {"in chunks": before, "all logits at once": 2**60}.items():
        fast.LOGITS = limit
        steps = trainer.in_turn(["ours"], batches, tokens)["ours"]
        row = {"head": head, "pack_tokens": tokens}
        report.add("head", row | report.rates(trainer, batches, steps))
    fast.LOGITS = before


def sweep(trainer: Trainer, report: Report, args: argparse.Namespace) -> None:
    """Our step of one full pack: how long, what its layers keep, compiled or not; until one does not fit."""
    for checkpointing, compile in product(args.checkpointing, (False, True)[: 1 + args.compile]):
        trainer.build(checkpointing, compile)
        for tokens in sorted(args.pack_tokens):
            batches = [fill(tokens, seed) for seed in range(-1, args.rounds)]
            steps = trainer.in_turn(["ours"], batches, tokens)["ours"]
            row = {"model": args.model, "checkpointing": checkpointing, "compile": compile}
            report.add("sweep", row | {"pack_tokens": tokens} | report.rates(trainer, batches, steps))
            if None in steps:
                break


GROUPS = {  # of kernels, by what their names have; the first that fits. On a CPU operations stand for them
    "attention": r"flex|flash|fmha|attention|triton_tem",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|matmul|::b?(add)?mm\b",
    "copies and casts": r"memcpy|memset|copy|_cat|::cat|catarray|split|nccl",
    "clipping and optimizer": r"adam|multi_tensor|foreach|lpnorm|vector_norm",
    "log-softmax": r"soft_?max|nll",
    "norms and elementwise": r"",
}


def losses(kernels: list[tuple[str, float, float, float]], wall: float) -> list[dict[str, Any]]:
    """Groups of kernels (name, start, end, own time) and idleness, by share of the wall time, largest first.

    The shares add up to more than 1 where kernels run at the same time.
    """
    times: dict[str, dict[str, float]] = {}
    busy, last = 0.0, -1.0
    for name, start, end, own in sorted(kernels, key=lambda kernel: kernel[1]):
        group = next(group for group, words in GROUPS.items() if re.search(words, name, re.IGNORECASE))
        names = times.setdefault(group, {})
        names[name] = names.get(name, 0.0) + own
        busy, last = busy + max(0.0, end - max(start, last)), max(last, end)
    rows = [(sum(names.values()), group, max(names, key=names.__getitem__)) for group, names in times.items()]
    rows = sorted([*rows, (wall - busy, "idle", "")], reverse=True)
    return [{"group": group, "share": time / wall, "most_of_it": name[:60]} for time, group, name in rows]


def profile(trainer: Trainer, report: Report, tokens: int) -> None:
    """Where the time of our step goes: two steps of a full pack, after one that warms up."""
    cuda, queries = trainer.device.type == "cuda", fill(tokens, seed=0)
    trainer.step("ours", queries, tokens)
    activity, kind = ("CUDA", DeviceType.CUDA) if cuda else ("CPU", DeviceType.CPU)
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, activity)]) as found:
        start = wait(trainer.device)
        for _ in range(2):
            trainer.step("ours", queries, tokens)
        wall = wait(trainer.device) - start
    events = [e for e in found.events() if e.device_type == kind and not e.is_user_annotation]
    kernels = []
    for event in events:  # on a CPU they stand in each other
        start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
        kernels.append((event.name, start, end, end - start if cuda else event.self_cpu_time_total / 1e6))
    rows = losses(kernels, wall)
    for row in rows:
        report.add("profile", {"pack_tokens": tokens} | row)
    largest = [row["group"] for row in rows if row["group"] != "matrix products"][:3]
    print(f"\nThe largest beside matrix products: {', '.join(largest)}", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Scoring and generation


@torch.inference_mode()
def compare_scoring(name: str, rounds: int, device: torch.device, dtype: torch.dtype, report: Report) -> None:
    """Scoring by reward.py's packs against padded batches of 16 rows: score.py's ways."""
    cuda, seconds = device.type == "cuda", {"packed": [], "padded": []}
    batches = [lengths.queries(256 if cuda else 16, seed) for seed in range(-1, rounds)]
    with device:
        settings = config(name, num_labels=1, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(settings, dtype=dtype).eval()
    for queries in batches:
        for way, size in {"packed": 8192 if cuda else 1024, "padded": 16}.items():
            start = wait(device)
            with device if way == "padded" else nullcontext():  # its tensors are made where torch does
                getattr(score, way)(model, queries, size)
            seconds[way].append(wait(device) - start)
    for way, took in seconds.items():
        row = {"model": name, "way": way, "queries_per_s": len(batches[0]) / statistics.median(took[1:])}
        report.add("scoring", row | {"over_packed": median_ratio(took, seconds["packed"])})


class Numbers:
    """Stands in for a tokenizer: the tokens of a text are the numbers in it."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, texts: list[str], **_: Any) -> transformers.BatchEncoding:
        ids = [[1, *map(int, re.findall(r"\d+", text))] for text in texts]
        return transformers.BatchEncoding({"input_ids": ids})

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        """The numbers of each row."""
        return [" ".join(map(str, row.tolist())) for row in rows]


def measure_generation(
    name: str, number: int, device: torch.device, dtype: torch.dtype, report: Report
) -> None:
    """Greedy replies of 128 tokens, which a random model never ends: two batches, after one as warm-up."""
    with device:
        model = AutoModelForCausalLM.from_config(config(name), dtype=dtype).eval()
    texts = [" ".join(map(str, query["prompt_ids"][1:])) for query in lengths.queries(3 * number, seed=0)]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    for part in (prompts[:number], prompts[number:]):
        start = wait(device)
        replies = evaluate.generate(model, Numbers(), part, batch_size=number, progress=False)
        speed = len(part) / (wait(device) - start)
    tokens = statistics.mean(len(reply.split()) for reply in replies)
    row = {"model": name, "batch": number, "prompts_per_s": speed, "tokens_a_reply": tokens}
    report.add("generation", row | {f"minutes_for_{TEST_PROMPTS}_prompts": TEST_PROMPTS / speed / 60})


# ------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    flag, how = parser.add_argument, ["full", "selective", "none"]
    on = partial(flag, action="store_true")
    flag("--model", choices=NAMES, default="7B", help="a random LLaMA of this size")
    flag("--device", choices=["cuda", "cpu"], default="cuda", help="where")
    flag("--queries", type=int, default=16, help="a step; the paper's 128 are 16 on each of 8 GPUs")
    flag("--rounds", type=int, default=5, help="steps of each way, after one that warms up")
    on("--no_ways", help="do not compare the three ways")
    flag("--pack_tokens", type=int, nargs="+", default=[], help="lengths of full packs to try, ours only")
    flag("--checkpointing", nargs="+", choices=how, default=["full"], help="each, of --pack_tokens")
    on("--compile", help="each of --pack_tokens with compiled layers too")
    on("--numerics", help="is flex_attention right? And memory with and without chunks of logits")
    on("--profile", help="which kernels take our step's time")
    flag("--score", choices=NAMES, default="", help="measure scoring with a reward model of this size")
    on("--generate", help="measure generation with --model")
    flag("--peak_tflops", type=float, help="of the GPU in bfloat16; known for H200, H100, A100, A800")
    flag("--out", default="out/bench/gpu.jsonl", help="gets our rate, which bench/plan.py reads")
    args = parser.parse_args()
    program.check_ranges(args)
    program.check_out(args.out, "file")
    if not args.rounds:
        raise InputError("--rounds 0: must be 1 or more")
    if wrong := [n for n in args.pack_tokens if n < 640 or n % fast.TILE]:
        raise InputError(f"--pack_tokens {wrong[0]}: must be a multiple of {fast.TILE}, 640 or more")
    if (cuda := torch.cuda.is_available()) != (args.device == "cuda"):
        reason = "hide the GPU from it: CUDA_VISIBLE_DEVICES=" if cuda else "there is no GPU here"
        raise InputError(f"--device {args.device}: {reason}")
    return args


def main() -> None:
    """Measures what the flags ask for, stage by stage."""
    args = parse_args()
    program.init_process()
    device, cuda = torch.device(args.device), args.device == "cuda"
    dtype, limit = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    report = Report(args, device)
    if args.numerics:
        compare_numerics(device, report, limit)
    report.product = product_rate(device, dtype)
    report.add("product", {"gpu": report.gpu, "dtype": str(dtype), "tflops": report.product})
    if not args.no_ways or args.numerics or args.profile or args.pack_tokens:
        trainer = Trainer(config(args.model), device, dtype)
        if not args.no_ways:
            compare_ways(trainer, report, args, limit)
        if args.numerics:
            compare_heads(trainer, report, limit)
        if args.profile:
            profile(trainer, report, limit)
        sweep(trainer, report, args)
        trainer.drop()
    if args.score:
        compare_scoring(args.score, args.rounds, device, dtype, report)
    if args.generate:
        measure_generation(args.model, 64 if cuda else 2, device, dtype, report)


if __name__ == "__main__":
    program.run(main)
