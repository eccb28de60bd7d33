"""Evaluation as in Section 3.4: greedy responses to the test prompts, their BLEU, and their reward.

    python evaluate.py generate --model out/final --data test.jsonl --out responses/clha.jsonl
    torchrun --nproc_per_node 8 evaluate.py generate ...             the processes share the prompts
    python evaluate.py score --responses responses/*.jsonl --data test.jsonl --reward_model RM_EVAL --out eval
    python evaluate.py table eval/base eval/sft eval/clha
    python evaluate.py best eval/step-*
    python evaluate.py publish --run out            a model card; with --push_to_hub, the model on the hub

Any engine can write the responses: a file has one JSON line {"id", "response"} per record. `requests` writes
the prompts in OpenAI's batch format, for `vllm run-batch` and closed models; `score` reads what comes back:

    python evaluate.py requests --data test.jsonl --model NAME --out requests.jsonl

A response has at most 128 tokens and is cut where the model goes on to speak for the human. Rewards are
sigmoids in percent, as in Table 2; BLEU is the paper's: over characters, sentence by sentence.
"""

import argparse
import gc
import json
import logging
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from sacrebleu.metrics import BLEU
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import clha
import reward
from clha import InputError, Record, Turn

# sacrebleu would recommend another BLEU than the paper's, for each response.
logging.getLogger("sacrebleu").setLevel(logging.ERROR)

STOP_STRINGS = ("Human:", "human:", "Assistant:", "assistant:")  # where the released evaluation cuts
SCORES = ("char_bleu", "reward")  # of each response; its line may have further numbers, such as "gold"

# ------------------------------------------------------------------------------------------------------------
# Generation


def cut_response(text: str, stop_strings: tuple[str, ...] = STOP_STRINGS) -> str:
    """A generated text up to the first stop string, without white space around it."""
    for stop in stop_strings:
        text = text.split(stop, maxsplit=1)[0]
    return text.strip()


def generate(*args: Any, **settings: Any) -> list[str]:
    """The texts of `sample`, which takes the same arguments."""
    return [row["response"] for row in sample(*args, **settings)]


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[Turn]],
    *,
    max_new_tokens: int = 128,
    max_prompt_length: int = 384,
    batch_size: int = 32,
    temperature: float = 0.0,
    response_prefix: str = "",
    stop_strings: tuple[str, ...] = (),
    static: bool | None = None,
) -> list[Record]:
    """A {"response", "finished"} for each prompt, in their order, generated in batches of similar length.

    Greedy at temperature 0, else sampled from the whole distribution with torch's random state; the model's
    own generation_config is ignored. The model continues `response_prefix`, which the responses leave out.
    They end with EOS, with what ends a turn in the chat template, or, in HH text, at STOP_STRINGS; one that
    has max_new_tokens before that is not finished.

    With `static` (the default on a GPU) every batch has one shape, batch_size rows of max_prompt_length
    tokens, and the cache has its full size: transformers compiles the decoding step once and replays it.
    """
    if not prompts:  # a process's share of the last part
        return []
    if static is None:
        static = model.device.type == "cuda"
    ends = {tokenizer.eos_token_id, clha.turn_end(tokenizer, tokenizer.chat_template)}
    stops = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends)}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, **stops)
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    if static:
        settings.update(cache_implementation="static")
    if not tokenizer.chat_template:
        stop_strings = (*STOP_STRINGS, *stop_strings)
    ids = [prompt_ids(prompt, response_prefix, tokenizer, max_prompt_length) for prompt in prompts]
    longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    responses: list[Record] = [{}] * len(ids)
    inherited = model.generation_config
    model.generation_config = GenerationConfig()  # or transformers would fill in from it what we leave unset
    try:
        for start in range(0, len(ids), batch_size):
            part = longest_first[start : start + batch_size]
            rows = [ids[i] for i in part]
            width = len(rows[0])
            if static:
                rows += rows[-1:] * (batch_size - len(rows))  # what is added is dropped below
                width = max_prompt_length
            left = {"padding": "max_length", "max_length": width, "padding_side": "left"}
            inputs = tokenizer.pad({"input_ids": rows}, **left, return_tensors="pt").to(model.device)
            output = model.generate(**inputs, generation_config=settings)
            for i, new in zip(part, output[: len(part), width:].tolist(), strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True)
                ended = not ends.isdisjoint(new) or any(stop in text for stop in stop_strings)
                responses[i] = {"response": cut_response(text, stop_strings), "finished": ended}
    finally:
        model.generation_config = inherited
    return responses


def prompt_ids(turns: list[Turn], response_prefix: str, tokenizer: Tokenizer, limit: int) -> list[int]:
    """At most `limit` ids for the model to go on from. Raises InputError if a chat's last turn has more."""
    if response_prefix:
        turns = [*turns, {"role": "assistant", "content": response_prefix}]
    kept = clha.recent_turns(turns, tokenizer, limit)
    if not kept:
        wrong = "too few tokens for the system turn and the last turn of a chat"
        raise InputError(f"--max_prompt_length {limit}: {wrong}: {turns[-1]['content'][:60]}")
    ids = clha.dialogue_ids(kept, tokenizer)
    if response_prefix:  # without the end of the turn, and what follows it
        end = clha.turn_end(tokenizer, tokenizer.chat_template)
        ids = ids[: max((i for i, token in enumerate(ids) if token == end), default=len(ids))]
    return clha.cut_prompt(ids, limit, tokenizer.bos_token_id)


def load(path: str, device: torch.device, template: str = "auto") -> tuple[PreTrainedModel, Tokenizer]:
    """A language model to generate with, in bfloat16 on a GPU, and its tokenizer, which can pad."""
    gc.collect()  # a model compiled earlier is in a reference cycle and still holds its memory
    tokenizer = clha.load_tokenizer(path, template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = {"dtype": dtype, "output_loading_info": True}
    # The folder's own generation_config.json is not even read.
    model = clha.load(AutoModelForCausalLM, path, generation_config=GenerationConfig(), **settings)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite; use an earlier checkpoint")
    return model.to(device).eval(), tokenizer


def write_responses(path: str, records: list[Record], out: Path, args: argparse.Namespace) -> None:
    """Writes --num_responses lines {"id", "response", "finished"} per record, by the model at `path`.

    All processes share the work. Each part has a seed of its own, so that samples do not depend on where it
    was interrupted and resumed.
    """
    rank, processes, device = clha.init_process()
    model, tokenizer = load(path, device, args.template)
    names = ("max_new_tokens", "max_prompt_length", "batch_size", "temperature", "response_prefix")
    options = {name: getattr(args, name) for name in names} | {"stop_strings": tuple(args.stop_strings)}
    items = []
    for record in records:
        try:  # what does not fit is said before the work begins, on every process
            prompt_ids(record["prompt"], args.response_prefix, tokenizer, args.max_prompt_length)
        except InputError as error:
            raise InputError(f"{record['id']}: {error}") from error
        items += [{"id": record["id"], "prompt": record["prompt"]}] * args.num_responses

    def work(share: list[Record], start: int) -> list[Record]:
        torch.manual_seed(args.seed + start + rank)
        rows = sample(model, tokenizer, [item["prompt"] for item in share], **options)
        return [{"id": item["id"]} | row for item, row in zip(share, rows, strict=True)]

    settings = [reward.fingerprint(path), tokenizer.chat_template, options, args.seed]
    part = 4 * args.batch_size * processes
    reward.write_in_parts(out, items, settings, work, part, f"generate {out.name}")
    if rank == 0:
        rows = [row for _, row in clha.read_jsonl(out)]
        empty = sum(not row["response"] for row in rows)
        cut = sum(not row["finished"] for row in rows)
        print(f"{len(rows):,} responses in {out}: {empty:,} blank, {cut:,} not finished (--max_new_tokens)")


# ------------------------------------------------------------------------------------------------------------
# Response files


def read_queries(path: str) -> list[Record]:
    """Records whose ids differ, so that responses can be told apart. Raises InputError."""
    records = reward.read_records(path)
    [(name, times)] = Counter(record["id"] for record in records).most_common(1)
    if times > 1:
        raise InputError(f"{path}: two records have the id {name}; each needs its own")
    return records


def read_line(line: Record) -> tuple[Any, Any]:
    """The id and the response of a line, {"id", "response"} or OpenAI's batch output; None if absent."""
    if "custom_id" not in line:
        return line.get("id"), line.get("response")
    try:
        text = line["response"]["body"]["choices"][0]["message"]["content"]
    except (IndexError, KeyError, TypeError):  # a failed request has no choices, or no response at all
        text = None
    return line["custom_id"], text


def numbers(line: Record) -> dict[str, float]:
    """The numbers of a response's line that are not scores of ours, such as "gold", by name."""
    ours = (*SCORES, "n", "word_bleu")
    return {name: value for name, value in line.items() if type(value) in (int, float) and name not in ours}


def read_responses(path: str, records: list[Record]) -> list[Record]:
    """A line {"id", "response"} per record, in their order, with the further numbers that the file has.

    Raises InputError for a line that is wrong or of no record, for a second response, and for a missing one.
    """
    known = {record["id"] for record in records}
    found: dict[str, Record] = {}
    for number, line in clha.read_jsonl(path):
        place = f"{path}, line {number}"
        item, text = read_line(line)
        item = str(item) if type(item) is int else item  # as records may have them
        if not isinstance(item, str) or not isinstance(text, str):
            shown = textwrap.shorten(json.dumps(line), 200)
            need = 'needs "id" and "response", two strings, or a successful line of OpenAI\'s batch output'
            raise InputError(f"{place}: {need}, not {shown}")
        if item not in known:
            raise InputError(f"{place}: no record has the id {item}")
        if item in found:
            raise InputError(f"{place}: a second response to {item}; score needs one per record")
        # `generate` has cut its own; those of other engines are cut as the release does.
        text = text.strip() if "finished" in line else cut_response(text)
        found[item] = {"id": item, "response": text}
        for name, value in numbers(line).items():
            if not abs(value) < 1e38:
                raise InputError(f'{place}: "{name}" must be a finite number, not {value}')
            found[item][name] = value
    missing = [record["id"] for record in records if record["id"] not in found]
    if missing:
        raise InputError(f"{path}: has no response to {len(missing):,} of the records, such as {missing[0]}")
    return [found[record["id"]] for record in records]


# ------------------------------------------------------------------------------------------------------------
# Scores


def char_bleu(hypotheses: list[str], references: list[str]) -> list[float]:
    """The paper's BLEU of each hypothesis against its reference, 0 to 100.

    The released evaluation gives nltk's sentence_bleu two *strings*, so its n-grams are of characters, spaces
    included. Here sacrebleu counts the same: a character stands as its code point, and nothing is smoothed.
    """
    metric = BLEU(tokenize="none", smooth_method="none", effective_order=False, force=True)
    scores = []
    for texts in zip(hypotheses, references, strict=True):
        hypothesis, reference = [" ".join(f"{ord(c):x}" for c in text.strip()) for text in texts]
        scores.append(metric.sentence_score(hypothesis, [reference]).score)
    return scores


def word_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU as others report it: over words (13a) and the whole corpus, 0 to 100."""
    return BLEU(tokenize="13a").corpus_score(hypotheses, [references]).score


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean: percentiles of the means of seeded resamples."""
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(resamples):
        means.append(tensor[torch.randint(len(tensor), tensor.shape, generator=generator)].mean())
    low, high = torch.stack(means).quantile(tensor.new_tensor([0.025, 0.975])).tolist()
    return low, high


def mean(values: list[float]) -> dict[str, Any]:
    """{"mean", "interval"} of some values."""
    return {"mean": sum(values) / len(values), "interval": interval(values)}


def score_responses(
    records: list[Record], responses: list[Record], reward_model: reward.RewardModel
) -> list[Record]:
    """Lines of responses.jsonl: those of `read_responses` with their records' texts, BLEU and reward."""
    texts = [row["response"] for row in responses]
    references = [record["responses"][record.get("chosen", 0)] for record in records]
    scores = reward_model.score([record["prompt"] for record in records], texts)
    rewards = torch.tensor(scores).sigmoid().tolist()
    bleus = char_bleu(texts, references)
    rows = []
    for i, record in enumerate(records):
        row = {
            "id": record["id"],
            "subset": record.get("subset", "all"),
            "prompt": record["prompt"],
            "response": texts[i],
            "reference": references[i],
            "char_bleu": bleus[i],
            "reward": 100 * rewards[i],
        }
        rows.append(numbers(responses[i]) | row)  # ours, where both have a name
    return rows


def summarise(rows: list[Record]) -> dict[str, dict[str, Any]]:
    """Mean scores by subset and in "Total", over all items; of further numbers, those that every row has."""
    names = [*SCORES, *(name for name in numbers(rows[0]) if all(name in row for row in rows))]
    subsets = sorted({row["subset"] for row in rows})
    groups = {subset: [row for row in rows if row["subset"] == subset] for subset in subsets}
    summary: dict[str, dict[str, Any]] = {}
    for subset, members in (groups | {"Total": rows}).items():
        words = word_bleu([row["response"] for row in members], [row["reference"] for row in members])
        summary[subset] = {"n": len(members), "word_bleu": words}
        for name in names:
            summary[subset][name] = mean([row[name] for row in members])
    return summary


def score_into(
    folder: Path, records: list[Record], responses: list[Record], reward_model: reward.RewardModel
) -> None:
    """Scores responses; leaves responses.jsonl, table.md and, last, scores.json in a folder."""
    rank, processes, _ = clha.init_process()
    items = list(zip(records, responses, strict=True))

    def work(share: list[tuple[Record, Record]], _: int) -> list[Record]:
        mine = [record for record, _ in share]
        return score_responses(mine, [response for _, response in share], reward_model)

    settings = [reward.fingerprint(reward_model.model.name_or_path), reward_model.max_length]
    out = folder / "responses.jsonl"
    reward.write_in_parts(out, items, settings, work, 256 * processes, f"score {folder.name}")
    if rank == 0:
        summary = summarise([row for _, row in clha.read_jsonl(out)])
        reward.write_text(folder / "table.md", table({folder.name: summary}))
        reward.write_text(folder / "scores.json", json.dumps(summary, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Tables


def cell(value: float | dict[str, Any] | None) -> str:
    """A score with two decimals; a mean with its 95 % interval: 57.72 (56.90 to 58.51)."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    low, high = value["interval"]
    return f"{value['mean']:.2f} ({low:.2f} to {high:.2f})"


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Summaries by model as a Markdown table, one row per model and subset."""
    names = ["char_bleu", "word_bleu", "reward"]
    for summary in summaries.values():
        names += [name for name in summary["Total"] if name not in ("n", *names)]
    rows = [["model", "subset", "n", *(name.replace("_bleu", " BLEU") for name in names)]]
    for model, summary in summaries.items():
        for subset, scores in summary.items():
            if len(summary) == 2 and subset != "Total":  # it is the same
                continue
            rows.append([model, subset, f"{scores['n']:,}", *(cell(scores.get(name)) for name in names)])
    return reward.markdown(rows)


def read_summary(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The scores that `score` left in a folder. Raises InputError."""
    path = Path(folder) / "scores.json"
    if not path.is_file():
        raise InputError(f"{folder}: no scores.json in it; `evaluate.py score` writes it")
    summary = reward.read_json(path, {"Total": dict}, "the scores of an evaluation")
    try:
        table({"": summary})
        float(summary["Total"]["reward"]["mean"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        wrong = "not the scores of an evaluation; `evaluate.py score` writes them"
        raise InputError(f"{path}: {wrong}") from None
    return summary


def step_of(name: str) -> int:
    """The N of a name like step-N; a name without a number stands for the start, step 0."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def plot_steps(summaries: dict[str, dict[str, Any]], path: str) -> None:
    """Draws the mean reward, and further numbers, of the models named step-N against N, as a picture file."""
    pyplot = reward.import_pyplot()
    models = sorted(summaries, key=step_of)
    steps = [step_of(model) for model in models]
    totals = [summaries[model]["Total"] for model in models]
    hidden = ("n", "char_bleu", "word_bleu")
    names = [name for name in totals[0] if name not in hidden and all(name in total for total in totals)]
    size = (5 * len(names), 3.5)
    figure, grid = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for name, axes in zip(names, grid[0], strict=True):
        scores = [total[name] for total in totals]
        low = [score["interval"][0] for score in scores]
        high = [score["interval"][1] for score in scores]
        axes.plot(steps, [score["mean"] for score in scores], marker="o")
        axes.fill_between(steps, low, high, alpha=0.2)
        label = "mean sigmoid reward, %" if name == "reward" else f"mean {name}"
        axes.set(xlabel="step", ylabel=label.replace("$", r"\$"))
    reward.save_picture(figure, path)


# ------------------------------------------------------------------------------------------------------------
# The command line


def run_generate(args: argparse.Namespace) -> None:
    """responses of models"""
    reward.check_output(args.out, "new" if len(args.model) == 1 else "folder")
    if args.num_responses > 1 and args.temperature == 0:
        raise InputError("--num_responses: greedy responses are all the same; use --temperature above 0")
    if "" in args.stop_strings:
        raise InputError("--stop_strings: an empty text would end every response")
    records = read_queries(args.data)
    files = {args.model[0]: Path(args.out)}
    if len(args.model) > 1:
        files = {path: Path(args.out) / f"{model_name(path)}.jsonl" for path in args.model}
    if len(set(files.values())) < len(args.model):
        raise InputError(f"--model: two of {', '.join(args.model)} have one name; generate them one by one")
    there = [path for path, out in files.items() if out.exists()]  # from a run that was stopped
    for path in args.model:
        clha.load_tokenizer(path, args.template)  # what is wrong with a model is said before the work begins
    rank, _, _ = clha.init_process()
    if len(args.model) > 1:
        settings = {name: value for name, value in vars(args).items() if name not in ("model", "out", "run")}
        settings["data"] = clha.file_hash(args.data)
        clha.on_first_process(lambda: reward.keep_settings(Path(args.out), settings, bool(there)))
    for path, out in files.items():
        if path not in there:
            write_responses(path, records, out, args)
        elif rank == 0:
            print(f"kept    {out}: already there")


def model_name(path: str) -> str:
    """What a model is called in tables: its folder, or for RUN/final the run."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def run_merge(args: argparse.Namespace) -> None:
    """LoRA adapters, merged with their base"""
    reward.check_output(args.out, "new")
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError:
        raise InputError("merge: needs Hugging Face's peft: pip install peft") from None
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(args.model, dtype="auto").merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except Exception as error:  # no adapters, no base, or one of another size
        raise InputError(f"{args.model}: cannot be merged ({clha.reason(error)})") from error
    with reward.whole(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged into {args.out}")


CARD = """---
{base}library_name: {library}
tags: [clha, preference-alignment]
---
# {name}

{model}, aligned with human preferences by {method} in {steps:,} steps of
{batch_size} queries, {epoch:.3g} passes over {queries:,} queries of {train_data}. {dialogues}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{metrics}
{settings}"""


def model_card(run: Path, folder: str) -> str:
    """The README.md of a finished run's model: base, data, what the last step logged, and the settings."""
    need = {"model": str, "train_data": str, "batch_size": int, "lora_rank": int}
    config = reward.read_json(run / "config.json", need, "the settings of a run of clha.py")
    rows = [row for _, row in clha.read_jsonl(run / "metrics.jsonl")]
    if not rows or not (run / "final").is_dir():
        raise InputError(f"{run}: not a finished run of clha.py, with metrics.jsonl and final/")
    chat = AutoTokenizer.from_pretrained(run / "final").chat_template
    clocks = ("seconds", "tokens_per_second")
    last = {name: value for name, value in rows[-1].items() if type(value) is float and name not in clocks}
    shown = [[name, f"{value:.4g}"] for name, value in last.items()]
    left_out = {"model", "train_data", "dev_data", "output_dir", "token_cache", "model_hash", "tokens"}
    settings = [[name, str(value)] for name, value in config.items() if name not in left_out]
    is_folder = Path(config["model"]).exists()
    return CARD.format(
        method=config.get("objective", "CLHA (Fang et al., LREC-COLING 2024)"),  # of study.baselines
        base="" if is_folder else f"base_model: {config['model']}\n",
        model=model_name(config["model"]) if is_folder else config["model"],
        library="peft" if config["lora_rank"] else "transformers",
        name=run.resolve().name,
        steps=len(rows),
        batch_size=config["batch_size"],
        epoch=rows[-1]["epoch"],
        queries=round(len(rows) * config["batch_size"] / rows[-1]["epoch"]),
        train_data=Path(config["train_data"]).name,
        folder=folder,
        dialogues=f"Prompt it in {'its chat template' if chat else 'the text of HH-RLHF'}.",
        metrics=reward.markdown([["the last step", ""], *shown]),
        settings=reward.markdown([["setting", ""], *settings]),
    )


def run_publish(args: argparse.Namespace) -> None:
    """a model card for a finished run; with --push_to_hub, the model on the hub"""
    final = Path(args.run_dir) / "final"
    path = final / "README.md"
    card = model_card(Path(args.run_dir), args.push_to_hub or str(final))
    ours = path.exists() and "tags: [clha" in path.read_text(encoding="utf-8")  # else it is peft's
    if not ours:
        reward.write_text(path, card)
    print(f"{path}: {'kept, as it may have been edited' if ours else 'written'}")
    if args.push_to_hub:
        try:
            huggingface_hub.create_repo(args.push_to_hub, private=True, exist_ok=True)
            url = huggingface_hub.upload_folder(repo_id=args.push_to_hub, folder_path=final)
        except Exception as error:  # of the network, or of the hub
            raise InputError(f"--push_to_hub {args.push_to_hub}: {clha.reason(error)}") from error
        print(f"pushed to {url}")


def run_requests(args: argparse.Namespace) -> None:
    """the prompts in OpenAI's batch format, for other engines"""
    reward.check_output(args.out, "new")
    records = read_queries(args.data)
    call = {"method": "POST", "url": "/v1/chat/completions"}
    greedy = {"max_completion_tokens": args.max_new_tokens, "temperature": 0}
    requests = []
    for record in records:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in record["prompt"]]
        body = {"model": args.model, "messages": turns} | greedy
        requests.append({"custom_id": record["id"], **call, "body": body})
    reward.write_jsonl(args.out, requests)
    print(f"{len(records):,} requests in {args.out}")


def run_score(args: argparse.Namespace) -> None:
    """BLEU and reward of files of responses"""
    reward.check_output(args.out, "folder")
    records = read_queries(args.data)
    files: dict[str, list[Record]] = {}
    for path in args.responses:
        name = Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
        if name in files or not name.strip("."):
            raise InputError(f"--responses {path}: {args.out}/{name} is taken; rename the file")
        files[name] = read_responses(path, records)  # what is wrong is said before the work begins
        if len(args.responses) == 1:
            reward.check_output(Path(args.out) / name / "scores.json", "new")
    there = [name for name in files if (Path(args.out) / name / "scores.json").exists()]  # of a stopped run
    rank, _, device = clha.init_process()
    reward_model = reward.load_reward_model(args.reward_model, device)
    for name, path in zip(files, args.responses, strict=True):
        settings = {"data": clha.file_hash(args.data), "responses": clha.file_hash(path)}
        settings["reward_model"] = args.reward_model
        keep = partial(reward.keep_settings, Path(args.out) / name, settings, name in there)
        clha.on_first_process(keep)
    if there and rank == 0:
        print(f"kept    {', '.join(there)} in {args.out}: already there")
    for name, responses in files.items():
        if name not in there:
            score_into(Path(args.out) / name, records, responses, reward_model)
    if rank == 0:
        print(table({name: read_summary(Path(args.out) / name) for name in files}), end="")


def run_table(args: argparse.Namespace) -> None:
    """one table of scored folders"""
    if args.plot:
        reward.check_plot(args.plot)
    names = [Path(folder).resolve().name for folder in args.folders]
    if len(set(names)) < len(names):
        names = args.folders
    summaries = dict(zip(names, map(read_summary, args.folders), strict=True))
    if args.total:
        summaries = {name: {"Total": summary["Total"]} for name, summary in summaries.items()}
    print(table(summaries), end="")
    if args.plot:
        plot_steps(summaries, args.plot)


def run_best(args: argparse.Namespace) -> None:
    """the scored folder with the highest mean reward, the first of equals"""
    print(max(args.folders, key=lambda folder: read_summary(folder)["Total"]["reward"]["mean"]))


def main() -> None:
    """Parses the command line and runs one of the commands."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_command("generate", run_generate)
    flag("--model", required=True, nargs="+", help="language models: Hugging Face folders or hub names")
    flag("--data", required=True, help="records, JSON lines")
    flag("--out", required=True, help="the responses; for several models, a folder of NAME.jsonl")
    flag("--num_responses", type=int, default=1, help="per record")
    flag("--temperature", type=float, default=0.0, help="for sampling; 0: greedy")
    flag("--max_new_tokens", type=int, default=128, help="tokens of a response (released: 128)")
    flag("--max_prompt_length", type=int, default=384, help="tokens of a prompt (released: 384)")
    flag("--batch_size", type=int, default=64, help="prompts per batch")
    flag("--response_prefix", default="", help='a text for the model to continue, such as "Good answer:"')
    stops = "also cut at these; HH text is cut at Human: and Assistant:"
    flag("--stop_strings", nargs="+", default=[], help=stops)
    flag("--seed", type=int, default=42, help="of the sampling")
    flag("--template", default="auto", help="as in clha.py; OUTPUT_DIR/final has its own")
    flag = parser.add_command("merge", run_merge)
    flag("--model", required=True, help="what clha.py --lora_rank left in OUTPUT_DIR/final")
    flag("--out", required=True, help="Hugging Face folder for the whole model")
    flag = parser.add_command("publish", run_publish)
    flag("--run", dest="run_dir", required=True, help="OUTPUT_DIR of clha.py; the card is final/README.md")
    flag("--push_to_hub", default="", metavar="OWNER/NAME", help="sends final/ there, as a private model")
    flag = parser.add_command("requests", run_requests)
    flag("--model", required=True, help="the name by which the engine knows its model")
    flag("--data", required=True, help="records, JSON lines")
    flag("--out", required=True, help="the requests, JSON lines")
    flag("--max_new_tokens", type=int, default=128, help="tokens of a response (released: 128)")
    flag = parser.add_command("score", run_score)
    flag("--responses", nargs="+", required=True, help="NAME.jsonl of `generate` or of OpenAI's batch output")
    flag("--data", required=True, help="records; their chosen responses are the references")
    flag("--reward_model", required=True, help="reward model of the evaluation: a folder or a hub name")
    flag("--out", required=True, help="each file gets a folder OUT/NAME")
    flag = parser.add_command("table", run_table)
    flag("folders", nargs="+", help="folders that `score` wrote")
    flag("--total", action="store_true", help="only the rows over all subsets")
    flag("--plot", default="", help="picture of reward against N, for folders named step-N")
    flag = parser.add_command("best", run_best)
    flag("folders", nargs="+", help="folders that `score` wrote")

    args = parser.parse_args()
    reward.check_numbers(args)
    args.run(args)


if __name__ == "__main__":
    clha.run(main)
