"""Evaluation as in Section 3.4: greedy replies to the test prompts, their BLEU, and their reward.

    python evaluate.py --model out/final --data test.jsonl --reward_model RM_EVAL --out eval/clha
    python evaluate.py --model out/step-* --data dev.jsonl --reward_model RM --out eval/steps --plot steps.png
    python evaluate.py --model out/final --backend vllm ...          replies by vLLM: pip install .[vllm]
    python evaluate.py --responses curie.jsonl --data test.jsonl --reward_model RM_EVAL --out eval/curie
    python evaluate.py table eval/base eval/sft eval/clha
    python evaluate.py sheets eval/pro eval/clha --out sheets        for people to judge; then tally, compare
    torchrun --nproc_per_node 8 evaluate.py ...                      each process takes a share of the prompts

A model gives one reply of at most 128 tokens to each prompt, cut where it goes on to speak for the human. A
folder gets responses.jsonl (a line a reply, with its scores), scores.json and table.md. Several models get a
folder each below --out; best.txt names the one with the highest mean reward, as the release chooses its
checkpoint. Rewards are sigmoids in percent, as in Table 2; BLEU is the paper's: of characters, by sentence.
"""

import argparse
import gc
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from sacrebleu.metrics import BLEU
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import baselines
import clha
import program
import reward
from program import HelpFormatter, load_tokenizer, loading, refuse
from records import InputError, Record, fingerprint, read_jsonl, read_records, write_in_parts

logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it advises another BLEU than the paper's, each time
STOP_STRINGS = ("Human:", "human:", "Assistant:", "assistant:")  # the released evaluation cuts a reply there

# ------------------------------------------------------------------------------------------------------------
# Replies


def cut_reply(text: str, stop_strings: tuple[str, ...] = STOP_STRINGS) -> str:
    """A generated text up to the first stop string, without white space around it."""
    return re.split("|".join(stop_strings), text, maxsplit=1)[0].strip()


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    max_prompt_length: int,
    hindsight: bool = False,
) -> list[list[int]]:
    """The ids of prompts, as in training; with `hindsight` they end in the request for a good answer."""
    prefix = f" {baselines.GOOD}" if hindsight else ""
    texts = [clha.render(prompt) + prefix for prompt in prompts]
    rows = tokenizer(texts, split_special_tokens=True).input_ids if prompts else []
    return [clha.cut_prompt(row, max_prompt_length, tokenizer.bos_token_id) for row in rows]


def read_ids(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], hindsight: bool) -> list[str]:
    """The replies that rows of generated ids stand for, cut."""
    stop_strings = (*STOP_STRINGS, baselines.GOOD, baselines.BAD) if hindsight else STOP_STRINGS
    return [cut_reply(text, stop_strings) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    max_new_tokens: int = 128,
    max_prompt_length: int = 384,
    batch_size: int = 32,
    hindsight: bool = False,
    temperature: float = 0.0,
    progress: bool = True,
    synced_gpus: bool = False,
    static: bool | None = None,
) -> list[str]:
    """Replies to the prompts, in their order; made in batches of like length, the longest first.

    They are greedy, or sampled at a temperature above 0, from torch's random state.
    With `hindsight` the model, one of `--objective coh`, is asked for what it calls a good answer. A sharded
    model needs `synced_gpus`, and as many prompts on each process.
    With `static` (on a GPU, unless the model is sharded) all batches have one shape, batch_size rows of
    max_prompt_length tokens, and the cache has its full size: so on a GPU transformers compiles the step that
    makes a token, once, and replays it.
    """
    if static is None:
        static = model.device.type == "cuda" and not isinstance(model, FSDPModule)
    ids = prompt_ids(tokenizer, prompts, max_prompt_length, hindsight)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos = tokenizer.eos_token_id
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": eos}
    settings |= {"cache_implementation": "static"} if static else {}
    # What is not set, transformers takes from the model's folder; and of samples, the 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings |= {"repetition_penalty": 1.0} | (sampling if temperature else {"do_sample": False})
    replies = [""] * len(ids)
    with tqdm(total=len(ids), desc="generate", disable=None if progress else True) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = part + part[-1:] * (batch_size - len(part)) if static else part  # what is added is dropped
            width = max_prompt_length if static else len(ids[part[0]])
            padding = [width - len(ids[i]) for i in rows]  # on the left, where generation needs it
            batch = {
                "input_ids": [[pad] * n + ids[i] for n, i in zip(padding, rows, strict=True)],
                "attention_mask": [[0] * n + [1] * (width - n) for n in padding],
            }
            output = model.generate(
                **{name: torch.tensor(values, device=model.device) for name, values in batch.items()},
                generation_config=GenerationConfig(**settings),
                synced_gpus=synced_gpus,
            )
            texts = read_ids(tokenizer, output[: len(part), width:], hindsight)
            for i, text in zip(part, texts, strict=True):
                replies[i] = text
            bar.update(len(part))
    return replies


def load(path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model to generate with, in bfloat16 on a GPU, and its tokenizer."""
    gc.collect()  # a model that was compiled before is in a ring of references, and its memory is needed
    tokenizer = load_tokenizer(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with loading(path):
        settings = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(path, **settings)
    program.refuse_missing(path, info)
    return model.to(device).eval(), tokenizer


def import_vllm() -> ModuleType:
    """vLLM; raises InputError where it is not installed, or does not fit the machine."""
    try:
        import vllm
    except ImportError as error:
        raise InputError(f"--backend vllm: needs vLLM, `pip install .[vllm]` ({error})") from None
    return vllm


@contextmanager
def environment_of_engine(device: torch.device) -> Iterator[None]:
    """The environment of a process of its own that has one GPU, this one's; vLLM's engine inherits it.

    With the variables of torchrun it would look for our group, and wait for ever.
    """
    kept = dict(os.environ)
    for name in kept:
        if re.fullmatch("((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*)", name):
            del os.environ[name]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a process that ends gives all its memory back
    if device.type == "cuda":
        visible = kept.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[device.index] if visible else str(device.index)
        )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def load_vllm(path: str, device: torch.device, max_length: int) -> Any:
    """A vLLM engine for a language model, in a process of its own, for prompts with replies of max_length."""
    vllm, room = import_vllm(), {}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cuda":
        # vLLM takes a share of the whole GPU, by default nearly all. The reward model has its part already:
        # four fifths of what it leaves, so that it can still score.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room["gpu_memory_utilization"] = 0.8 * free / total
    with loading(path), environment_of_engine(device):
        # "vllm": nothing is taken from generation_config.json. We have the tokenizer.
        settings = {"dtype": dtype, "generation_config": "vllm", "skip_tokenizer_init": True}
        return vllm.LLM(path, max_model_len=max_length, **settings, **room)


def generate_vllm(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    hindsight: bool,
) -> list[str]:
    """Greedy replies of a vLLM engine, as `generate` makes them; vLLM makes the batches."""
    ids = prompt_ids(tokenizer, prompts, max_prompt_length, hindsight)
    # The folder may name more tokens that end a text; training knows one.
    ends = {"ignore_eos": True, "stop_token_ids": [tokenizer.eos_token_id]}
    sampling = import_vllm().SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, detokenize=False, **ends
    )
    inputs = [{"prompt_token_ids": row} for row in ids]
    outputs = engine.generate(inputs, sampling, use_tqdm=False)
    return read_ids(tokenizer, [output.outputs[0].token_ids for output in outputs], hindsight)


# ------------------------------------------------------------------------------------------------------------
# Scores


def char_bleu(hypotheses: list[str], references: list[str]) -> list[float]:
    """The paper's BLEU of each hypothesis against its reference, 0-100.

    The released evaluation gives nltk's sentence_bleu two *strings*, so its n-grams are of characters, blanks
    included. Here sacrebleu counts the same: a character stands as its code point, and nothing is smoothed.
    """
    metric = BLEU(tokenize="none", smooth_method="none", effective_order=False, force=True)
    return [
        metric.sentence_score(code_points(hypothesis), [code_points(reference)]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]


def code_points(text: str) -> str:
    """A text as words of which each is one character: its code point in hexadecimal."""
    return " ".join(f"{ord(character):x}" for character in text.strip())


def word_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU as others report it: of words (13a), over all sentences together, 0-100."""
    return BLEU(tokenize="13a").corpus_score(hypotheses, [references]).score


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean: percentiles of the means of seeded resamples."""
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(resamples))
    means = torch.stack([tensor[draw].mean() for draw in draws])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def summarise(rows: list[Record]) -> dict[str, Any]:
    """Means of the scored replies of one model, by subset and in Total, the mean over all items."""
    by_subset: dict[str, list[Record]] = {}
    for row in rows:
        by_subset.setdefault(row["subset"], []).append(row)
    summary = {}
    for subset, part in [*sorted(by_subset.items()), ("Total", rows)]:
        words = word_bleu([row["response"] for row in part], [row["reference"] for row in part])
        summary[subset] = {"n": len(part), "word_bleu": words}
        for name in ("reward", "char_bleu", "gold"):
            if name in part[0]:
                values = [row[name] for row in part]
                summary[subset][name] = {"mean": sum(values) / len(values), "interval": interval(values)}
    return summary


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Summaries by model as a Markdown table, a row a model and subset."""
    columns = ["char_bleu", "word_bleu", "reward"]
    if all("gold" in summary["Total"] for summary in summaries.values()):
        columns.append("gold")
    lines = [["model", "subset", "n", *(name.replace("_bleu", " BLEU") for name in columns)]]
    lines.append(["---"] * len(lines[0]))
    for model, summary in summaries.items():
        for subset, row in summary.items():
            lines.append([model, subset, f"{row['n']:,}", *(cell(row[name]) for name in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: float | dict[str, Any]) -> str:
    """A score with two decimals; a mean with its 95 % interval: 57.72 (56.90 to 58.51)."""
    if isinstance(value, float):
        return f"{value:.2f}"
    low, high = value["interval"]
    return f"{value['mean']:.2f} ({low:.2f} to {high:.2f})"


# ------------------------------------------------------------------------------------------------------------
# The command line


def evaluate_model(
    path: str,
    folder: Path,
    records: list[Record],
    judge: reward.RewardModel,
    args: argparse.Namespace,
    backend: str = "transformers",
) -> dict[str, Any]:
    """Replies, scores and table of one model, written to a folder by all processes together; its summary.

    `path` is the model, or with args.responses the file that has its replies.
    """
    rank, processes, device = clha.init_process()
    sizes = {"max_new_tokens": args.max_new_tokens, "max_prompt_length": args.max_prompt_length}
    items, engine = [{"record": record} for record in records], None
    if args.responses:
        replies = read_replies(path, records)
        items = [item | {"reply": text} for item, text in zip(items, replies, strict=True)]
    elif backend == "vllm":
        engine = load_vllm(path, device, sum(sizes.values()))
        reply = partial(generate_vllm, engine, load_tokenizer(path))
    else:
        reply = partial(generate, *load(path, device), batch_size=args.batch_size, progress=False)

    def work(share: list[Record], _: int) -> list[Record]:
        if not share:  # of the last part, there may be too few for each process
            return []
        mine = [item["record"] for item in share]
        if args.responses:
            replies = [item["reply"] for item in share]
        else:
            replies = reply([record["prompt"] for record in mine], **sizes, hindsight=args.hindsight)
        return score_replies(mine, replies, judge, args.gold)

    models = [fingerprint(path), fingerprint(judge.model.name_or_path)]
    what = [*models, sizes, args.batch_size, args.hindsight, args.gold, backend]
    out = folder / "responses.jsonl"
    write_in_parts(out, items, what, work, 4 * args.batch_size * processes, f"replies of {folder.name}")
    if engine is not None:
        engine.llm_engine.engine_core.shutdown()  # the next model needs its memory
    summary = summarise([row for _, row in read_jsonl(out)])
    if rank == 0:
        (folder / "table.md").write_text(table({folder.name: summary}) + "\n")
        scores = folder / "scores.json.partial"
        scores.write_text(json.dumps(summary, indent=2) + "\n")
        scores.rename(folder / "scores.json")  # the last: all is there
    return summary


def score_replies(
    records: list[Record], replies: list[str], judge: reward.RewardModel, gold: bool
) -> list[Record]:
    """Lines of responses.jsonl: the replies to the records' prompts, with their scores."""
    references = [record["responses"][record.get("chosen", 0)] for record in records]
    scores = judge.score([record["prompt"] for record in records], replies)
    rewards = torch.tensor(scores).sigmoid().tolist()
    rows = [
        {
            "id": record.get("id"),
            "subset": record.get("subset", "all"),
            "prompt": record["prompt"],
            "response": reply,
            "reference": reference,
            "char_bleu": bleu,
            "reward": 100 * value,
        }
        for record, reply, reference, bleu, value in zip(
            records, replies, references, char_bleu(replies, references), rewards, strict=True
        )
    ]
    if gold:
        import toy

        rows = [row | {"gold": toy.gold(row["prompt"], row["response"])} for row in rows]
    return rows


def make_judge(
    config: clha.Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Callable[[PreTrainedModel], float]:
    """What tells the mean reward, a sigmoid in percent, of a model's greedy replies to the --dev_data.

    The model may be sharded: then all processes call it together.
    """
    if not config.dev_data:
        raise InputError("--reward_model: needs --dev_data, whose prompts the model replies to")
    judge = reward.load_reward_model(config.reward_model, device)
    rank, processes, prompts = *clha.init_process()[:2], [r["prompt"] for r in read_records(config.dev_data)]
    share = prompts[rank::processes]
    padding = -(-len(prompts) // processes) - len(share)  # as many for each process, or they would wait

    def mean_reward(model: PreTrainedModel) -> float:
        replies = generate(
            model, tokenizer, share + prompts[:1] * padding, max_prompt_length=config.max_prompt_length,
            progress=False, synced_gpus=processes > 1,
        )  # fmt: skip
        values = torch.tensor(judge.score(share, replies[: len(share)]), device=device).sigmoid()
        total = values.sum()
        dist.all_reduce(total)
        return 100 * total.item() / len(prompts)

    return mean_reward


def read_replies(path: str, records: list[Record]) -> list[str]:
    """The replies {"id", "response"} of a file, in the order of the records; cut like generated ones.

    Raises InputError for a line of another form, a second reply to a record, and a record without one.
    """
    found: dict[Any, str] = {}
    for number, row in read_jsonl(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("response"), str):
            raise InputError(f'{path}, line {number}: needs "id", a record\'s, and "response", its reply')
        if row["id"] in found:
            raise InputError(f"{path}, line {number}: a second reply to {row['id']}")
        found[row["id"]] = cut_reply(row["response"])
    if missing := [record.get("id") for record in records if record.get("id") not in found]:
        raise InputError(f"{path}: has no reply to {len(missing):,} of the records, such as {missing[0]}")
    return [found[record["id"]] for record in records]


def read_summary(folder: Path) -> dict[str, Any]:
    """The scores that an earlier evaluation left in a folder."""
    path = folder / "scores.json"
    if not path.is_file():
        raise InputError(f"{folder}: no scores.json in it; `evaluate.py --model ... --out {folder}` makes it")
    summary = program.read_json(path, {"Total": dict}, "the scores of an evaluation")
    try:
        table({"": summary})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: not the scores of an evaluation; make them again") from None
    return summary


def step_of(name: str) -> int:
    """The N of a name like step-N; a name without a number stands for the start, step 0."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def plot_steps(summaries: dict[str, dict[str, Any]], path: str) -> None:
    """Draws the total reward (and gold reward) of the models named step-N against N, as a picture file."""
    pyplot = reward.import_pyplot()
    names = [name for name in ("reward", "gold") if name in next(iter(summaries.values()))["Total"]]
    points = sorted((step_of(name), summary["Total"]) for name, summary in summaries.items())
    size = (5 * len(names), 3.5)
    figure, all_axes = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for name, axes in zip(names, all_axes[0], strict=True):
        steps, rows = [step for step, _ in points], [row[name] for _, row in points]
        axes.plot(steps, [row["mean"] for row in rows], marker="o")
        axes.fill_between(steps, *zip(*(row["interval"] for row in rows), strict=True), alpha=0.2)
        axes.set(xlabel="step", ylabel={"reward": "mean sigmoid reward, %", "gold": "mean gold reward"}[name])
    reward.save_picture(figure, path)


def main() -> None:
    """Parses the command line and evaluates models, or makes one table of folders that are evaluated."""
    import people  # it imports this module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    commands = parser.add_subparsers(dest="command")
    table_command = commands.add_parser("table", help="one table of evaluated folders")
    table_command.error = refuse
    table_command.add_argument("folders", nargs="+", help="--out folders of earlier evaluations")
    table_command.add_argument("--total", action="store_true", help="only the Total rows")
    people.add_commands(commands)
    parser.add_argument("--model", nargs="+", help="Hugging Face folders or hub names")
    parser.add_argument(
        "--responses", default="", help='instead of --model: its replies, JSON lines {"id", "response"}'
    )
    parser.add_argument("--data", help="records; their chosen replies are the references")
    parser.add_argument("--reward_model", help="reward model of the evaluation: a folder or a hub name")
    parser.add_argument("--out", help="folder for the replies, the scores and the table")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of a reply (released: 128)")
    parser.add_argument(
        "--max_prompt_length", type=int, default=384, help="tokens of a prompt (released: 384)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="prompts generated together")
    parser.add_argument(
        "--backend", choices=("transformers", "vllm"), default="transformers", help="what makes the replies"
    )
    parser.add_argument(
        "--hindsight", action="store_true", help="the models were trained with --objective coh"
    )
    parser.add_argument("--gold", action="store_true", help="add the known reward of the toy world")
    parser.add_argument("--plot", default="", help="picture of the reward of models step-N against N")
    args = parser.parse_args()
    program.check_ranges(args)
    if "run" in args:
        args.run(args)
        return
    if args.command == "table":
        same_name = len({Path(folder).name for folder in args.folders}) < len(args.folders)
        summaries = {
            folder if same_name else Path(folder).name: read_summary(Path(folder)) for folder in args.folders
        }
        if args.total:
            summaries = {name: {"Total": summary["Total"]} for name, summary in summaries.items()}
        print(table(summaries))
        return
    if args.responses and args.model:
        refuse("--model or --responses, not both")
    if args.responses and args.backend == "vllm":
        refuse("--backend vllm: makes the replies of a --model; those of --responses are made")
    args.model = [args.responses] if args.responses else args.model
    needed = ("model", "data", "reward_model", "out")
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        refuse(f"the following arguments are required: {', '.join(missing)}")

    program.check_out(args.out, "folder")
    if args.backend == "vllm":
        import_vllm()
    records, out = read_records(args.data), Path(args.out)
    single = len(args.model) == 1
    folders = {path: out if single else out / Path(path).name for path in args.model}
    if len(set(folders.values())) < len(args.model):
        raise InputError(f"--model: two of {', '.join(args.model)} have one name; evaluate them one by one")
    if args.plot:
        reward.check_plot(args.plot)  # what is wrong is said now rather than after the work
    for path in args.model:
        _ = read_replies(path, records) if args.responses else load_tokenizer(path)
    judge = reward.load_reward_model(args.reward_model, clha.init_process()[2])
    summaries = {
        folder.name: evaluate_model(path, folder, records, judge, args, args.backend)
        for path, folder in folders.items()
    }
    if clha.init_process()[0] == 0:
        print(table(summaries))
        best = max(folders, key=lambda path: summaries[folders[path].name]["Total"]["reward"]["mean"])
        (out / "best.txt").write_text(best + "\n")
        if args.plot:
            plot_steps(summaries, args.plot)


if __name__ == "__main__":
    program.run(main)
