"""CLHA, contrastive learning for human alignment (Fang et al., LREC-COLING 2024), in one file.

A reward model has scored the replies to each prompt. CLHA fine-tunes a language model on them with

    L_total = sum_{i<j} (1 - k_ij) max(0, p_j - p_i + margin (j - i))  +  alpha (1 - lambda) L_sft     Eq. 3-7

where p_i is the mean log-probability of the i-th best reply, k leaves out pairs whose rewards are too close,
and lambda leaves out the imitation of a reply whose reward is not above zero. Read the file from top to
bottom, the way the data goes through it:

    records -> tokens -> packs -> log-probs -> loss -> step

Launch it as one process (CPU or GPU), or on eight GPUs:

    python clha.py --model MODEL --train_data train.jsonl --output_dir out
    torchrun --nproc_per_node 8 clha.py --model MODEL --train_data train.jsonl --output_dir out

A record is one JSON line: {"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."],
"rewards": [1.2, -0.3], "chosen": 0, "subset": "helpful-base", "id": "..."}.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.flex_attention import BlockMask
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import fast
import program
from checkpoint import Run, save_model
from program import init_process, load_tokenizer, loading
from records import ROLES, InputError, Record
from tokens import load_examples, token_ids

Example = dict[str, Any]  # one query as token ids: what `encode` returns
Batch = dict[str, Any]  # some queries in one row: what `pack` returns

# ------------------------------------------------------------------------------------------------------------
# 1. Configuration. Every default stands once, with its source; every field is a flag of the command line.


def option(default: Any, help: str) -> Any:
    """A field of `Config`: its default, and the text that --help shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """What a run is made of."""

    model: str = option(MISSING, "Hugging Face folder (or hub name) of the language model to align")
    train_data: str = option(MISSING, "scored records, JSON lines (see prepare_data.py, and reward.py score)")
    output_dir: str = option(MISSING, "gets metrics.jsonl, config.json and final/, a Hugging Face folder")
    dev_data: str = option("", "scored records for --eval_every")
    recipe: Literal["default", "release"] = option("default", "release: the numbers of the released code")
    # The method
    objective: Literal["clha", "sft", "rrhf", "pro", "coh", "dpo"] = option(
        "clha", "or another of the paper's table, on the same data and trainer (baselines.py)")
    margin: float = option(0.3, "of Eq. 6, in nats per token; the paper gives none, the release has 3")
    min_reward_gap: float = option(0.5, "k of Eq. 5: a pair trains if its rewards differ by more; release: 3")
    alpha: float | None = option(
        None, "weight of L_sft; if not given 0.05 (l - 1)^2, Section 3.3 (baselines.py has the others')")
    beta: float = option(0.1, "of DPO")
    temperatures: bool = option(True, "PRO without them: Eq. 2")
    reduction: Literal["query", "release"] = option(
        "query", "of Eq. 5: mean over queries; release: mean over the kept pairs of each offset j - i")
    sft_reduction: Literal["sum", "mean"] = option("sum", "of L_sft over the reply's tokens; release: sum")
    ranking: Literal["reward", "given"] = option(
        "reward", "order replies by reward (Section 3.2), or trust the file, as the released loss does")
    sft_target: Literal["best", "chosen"] = option(
        "best", "imitate the first of the ranking (release), or the human choice (Section 2.3)")
    rescore: bool = option(True, "every pair and every query trains: Table 3, w/o Rescore")
    contrast: bool = option(True, "only the SFT term trains: Table 3, w/o L_clha")
    # Tokens
    max_length: int = option(512, "tokens of a prompt and a reply together (train_hh.sh)")
    max_prompt_length: int = option(384, "tokens of a prompt; the rest is cut from its left (train_hh.sh)")
    # Optimisation
    learning_rate: float = option(5e-6, "peak learning rate of AdamW (Section 3.3)")
    epochs: float = option(2, "passes over the training data (Section 3.3)")
    max_steps: int = option(0, "if above 0, stop after so many steps")
    batch_size: int = option(128, "queries a step, over all processes (train_hh.sh: 8 GPUs x 2 x 8)")
    pack_tokens: int = option(0, "most tokens of a process's forward pass; 0: 8192 on a GPU, 1024 on a CPU")
    lr_schedule: Literal["constant", "cosine"] = option("constant", "after the warm-up (release: constant)")
    warmup_steps: int = option(0, "of linear warm-up (release: none)")
    weight_decay: float = option(0.01, "of AdamW (torch's default, as released)")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (release: 1.0)")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "to compute in; auto: bfloat16 on a GPU")
    seed: int = option(42, "of the data order, which does not depend on the number of processes")
    # Speed and memory (fast.py); none of these changes a number by more than rounding
    activation_checkpointing: Literal["full", "selective", "none"] = option(
        "full", "selective: matrix products are kept, the rest is made again; none: faster, most memory")
    attention: Literal["auto", "flex", "sdpa"] = option(
        "auto", "flex: one kernel, packs of one length; sdpa: query by query; auto: flex on a GPU, if it can")
    compile: bool = option(False, "compile each layer: with flex, faster after a first minute")
    replicate: int = option(1, "whole copies of the sharded model, such as one a machine (HSDP)")
    token_cache: str = option("", "folder of tokenised data, which all machines see; else OUTPUT_DIR/tokens")
    # Watching
    eval_every: int = option(100, "steps between two evaluations of --dev_data")
    reward_model: str = option("", "folder or hub name: also reward the greedy replies to --dev_data")
    save_every: int = option(0, "steps between two model folders step-N (release: 600); 0: only final/")
    # Safety (checkpoint.py)
    checkpoint_every: int = option(100, "steps between two checkpoints; 0: only the best, and when stopped")
    keep_checkpoints: int = option(2, "the newest, and the best by dev reward, or by dev loss")
    resume: Literal["auto", "never"] = option("auto", "go on from the newest checkpoint in --output_dir")
    resume_anyway: str = option("", "what may differ from the checkpoint: margin,epochs")
    on_save_error: Literal["stop", "go_on"] = option("stop", "if a checkpoint or the log can't be written")
    max_bad_steps: int = option(5, "stop after so many steps in a row whose loss or gradient is not finite")
    deterministic: bool = option(False, "only operations that repeat their bits on a GPU: slower")


# `default` was chosen by measurement on the toy world (the sweeps of RESULTS.md). `release` is train_hh.sh,
# where one literal 3 is both the margin and the reward gap.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "release": {"margin": 3.0, "min_reward_gap": 3.0, "reduction": "release", "save_every": 600},
}

# ------------------------------------------------------------------------------------------------------------
# 2. Records: `iter_records` of records.py reads and checks them; this is the text that a prompt stands for


def render(prompt: list[dict[str, str]]) -> str:
    """The text of a dialogue as HH-RLHF has it, up to the reply: "\\n\\nHuman: ...\\n\\nAssistant:"."""
    return "".join(f"\n\n{ROLES[turn['role']]}: {turn['content']}" for turn in prompt) + "\n\nAssistant:"


# ------------------------------------------------------------------------------------------------------------
# 3. Tokens. `load_examples` of tokens.py does this for a whole file, once, and keeps them on disk


def cut_prompt(ids: list[int], limit: int, bos: int | None) -> list[int]:
    """The last `limit` ids of a prompt, its BOS kept. (Text that is cut may give other ids afterwards.)"""
    if len(ids) <= limit:
        return ids
    return [bos, *ids[len(ids) - limit + 1 :]] if ids[0] == bos else ids[len(ids) - limit :]


def texts(record: Record) -> list[str]:
    """What is tokenised: the prompt, and the prompt with each reply."""
    prompt = render(record["prompt"])
    return [prompt, *(f"{prompt} {reply}" for reply in record["responses"])]


def encode(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int = 512, max_prompt_length: int = 384,
    ranking: str = "reward", ids: list[list[int]] | None = None,
) -> Example:
    """A record as token ids, its replies ordered by reward, best first (as in the file if there are none).

    Gives `prompt_ids`, `response_ids` (a list a reply), their `rewards` or None, where the `chosen` one now
    is, the record's `id`, and `cut`: how many of prompt and replies were cut. EOS ends each uncut reply.
    `ids` are those of `texts(record)`, where they are there already. Raises InputError if the prompt's ids
    are not a prefix of the whole text's: where a tokenizer merges over the start of a reply, the reply's
    log-probability is ill-defined.
    """
    full_prompt, *replies = ids or token_ids(tokenizer, texts(record))
    rewards = record.get("rewards")
    prompt_ids = cut_prompt(full_prompt, max_prompt_length, tokenizer.bos_token_id)
    room, cut, response_ids = max_length - len(prompt_ids), int(prompt_ids != full_prompt), []
    order = list(range(len(replies)))
    if rewards is not None and ranking == "reward":
        order.sort(key=lambda i: -rewards[i])  # stable: equal rewards stay in the file's order
    for i in order:
        if replies[i][: len(full_prompt)] != full_prompt:
            raise InputError(f"record {record.get('id')}: the tokenizer merges over the start of reply {i}")
        reply = [*replies[i][len(full_prompt) :], tokenizer.eos_token_id]
        response_ids.append(reply[:room])
        cut += len(reply) > room
    return {
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "rewards": [float(rewards[i]) for i in order] if rewards is not None else None,
        "chosen": order.index(record.get("chosen", 0)),
        "id": record.get("id"),
        "cut": cut,
    }


# ------------------------------------------------------------------------------------------------------------
# 4. Packs: several queries in one row, without padding, each prompt standing once for all its replies.
#
#     ids       <s> P  P  P  a  a  </s>  b  b  b  </s>  |  <s> Q  Q  c  </s>  d  d  </s>
#     position   0  1  2  3  4  5   6    4  5  6   7    |   0  1  2  3   4    3  4   5
#     owner     -1 -1 -1 -1  0  0   0    1  1  1   1    |  -1 -1 -1  0   0    1  1   1
#
# A token sees the earlier tokens of its own query that are prompt or its own reply. So each reply gets just
# the log-probability that it has alone, and the prompt is computed once.


def reply_matrix(examples: list[Example], name: str = "rewards") -> Tensor:
    """Rewards (B, l) of B queries, or other numbers that `name` has: NaN where a query has fewer than l
    replies, 0 if it is not scored."""
    rows = [example[name] or [0] * len(example["response_ids"]) for example in examples]
    width = max(map(len, rows))
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float32)


def size(example: Example) -> int:
    """Tokens that a query takes in a pack."""
    return len(example["prompt_ids"]) + sum(map(len, example["response_ids"]))


MORE = {"reference_logps"}  # what an example may have for its objective beside rewards, a number a reply


def pack(examples: list[Example], device: str | torch.device = "cpu", fill_to: int = 0) -> Batch:
    """B queries of at most l replies as one row of N tokens; M of them belong to replies.

    input_ids, position_ids (1, N); targets (M,) the tokens of the replies, predict_at (M,) the positions that
    predict them, reply (M,) the reply b * l + i they belong to; lengths (B, l), 0 where a query has fewer
    replies; last (B, l) the positions of the replies' last tokens; rewards (B, l) as in `reply_matrix`, and
    in `more` what else the objective needs, by name; chosen (B,). For attention: sizes, the tokens of each
    query; start (N,) where the query of a token begins; owner (N,) which of its replies it is of, -1: the
    prompt. With `fill_to`, N is made a multiple of it by a query that counts nowhere (fast.py).
    """
    # A part is a prompt or a reply: its query and reply (-1: the prompt), where that query begins, the tokens
    # of its prompt, where the part begins, its tokens.
    ids, parts, sizes = [], [], [size(example) for example in examples]
    for b, example in enumerate(examples):
        start, prompt = len(ids), len(example["prompt_ids"])
        for i, part in enumerate([example["prompt_ids"], *example["response_ids"]], -1):
            parts.append((b, i, start, prompt, len(ids), len(part)))
            ids += part
    if fill_to and (filling := -len(ids) % fill_to):
        parts.append((len(examples), -1, len(ids), filling, len(ids), filling))
        ids, sizes = ids + ids[:1] * filling, [*sizes, filling]
    parts, ids = torch.tensor(parts).T, torch.tensor(ids)  # (6, parts), (N,)
    place = torch.arange(len(ids))
    b, owner, start, prompt, begin, _ = parts.repeat_interleave(parts[-1], dim=1)  # of each token: (N,)
    in_reply = owner >= 0
    rewards = reply_matrix(examples)  # (B, l)
    position = place - begin + in_reply * prompt
    before = torch.where(place == begin, start + prompt, place) - 1  # a reply begins after its prompt's end
    lengths, last = torch.zeros(2, *rewards.shape, dtype=torch.long)
    query, i, _, _, first, length = parts[:, parts[1] >= 0]  # of each reply
    lengths[query, i], last[query, i] = length, first + length - 1
    batch = {
        "input_ids": ids[None], "position_ids": position[None], "targets": ids[in_reply],
        "predict_at": before[in_reply], "reply": (b * rewards.shape[1] + owner)[in_reply],
        "lengths": lengths, "last": last, "rewards": rewards, "start": start, "owner": owner,
        "chosen": torch.tensor([example["chosen"] for example in examples]),
    }
    more = {name: reply_matrix(examples, name).to(device) for name in MORE & examples[0].keys()}
    batch = {name: value.to(device) for name, value in batch.items()}
    return batch | {"sizes": sizes, "fill_to": fill_to, "more": more}


def query_masks(batch: Batch) -> list[Tensor]:
    """Of each query of a pack a bool (n, n) for its n tokens: may the row see the column?"""
    owners = batch["owner"].split(batch["sizes"])
    return [((owner == -1) | (owner == owner[:, None])).tril() for owner in owners]


def shared_prefix_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    masks: list[Tensor] | BlockMask | None = None, scaling: float | None = None, dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in a pack, query by query, as strangers never meet: (1, heads, N, d) -> (1, N, heads, d).

    With a BlockMask one kernel does the same. Without `masks` it is transformers' own, so that the same model
    can also generate.
    """
    if masks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if isinstance(masks, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation leaves float32
        return flex_attention_forward(module, query, key, value, masks, scaling=scaling, dropout=dropout)
    sizes, window = [len(mask) for mask in masks], kwargs.get("sliding_window") or math.inf
    if kwargs.get("softcap") or window < max(sizes):
        raise InputError(f"{type(module).__name__}: packs have no soft-capped or sliding-window attention")
    attend = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout,
                     enable_gqa=query.shape[1] != key.shape[1])
    parts = [
        attend(q, k, v, attn_mask=mask)
        for q, k, v, mask in zip(*(x.split(sizes, dim=2) for x in (query, key, value)), masks, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("shared_prefix", shared_prefix_attention)
transformers.AttentionMaskInterface.register("shared_prefix", sdpa_mask)


def forward_pack(model: PreTrainedModel, batch: Batch, **kwargs: Any) -> Any:
    """A forward pass of a Hugging Face decoder over a pack; gives the decoder's output."""
    if model.config._attn_implementation != "shared_prefix":
        model.set_attn_implementation("shared_prefix")
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    masks = fast.block_mask(batch) if batch["fill_to"] else query_masks(batch)
    # A mask of four dimensions keeps transformers from making one of its own; ours are in `masks`.
    unused = inputs["input_ids"].new_ones(1, 1, 1, 1, dtype=torch.bool)
    return model(**inputs, attention_mask=unused, masks=masks, use_cache=False, **kwargs)


def sequence_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each reply, EOS included, and its length in tokens: (B, l), (B, l).

    The LM head runs on the M positions that predict a reply's token, not on all N; and if their logits would
    be too many to hold, in chunks (fast.py).
    """
    predict_at, targets, rows = batch["predict_at"], batch["targets"], fast.rows_at_a_time(model)
    if rows is None or len(targets) <= rows:
        logits = forward_pack(model, batch, logits_to_keep=predict_at).logits[0]  # (M, V)
        token_logps = -F.cross_entropy(logits.float(), targets, reduction="none")  # (M,)
    else:
        with fast.head_gives_logps(model, targets, rows):
            token_logps = forward_pack(model, batch, logits_to_keep=predict_at).logits[0]  # (M,)
    lengths = batch["lengths"]
    sum_logps = token_logps.new_zeros(lengths.numel()).index_add(0, batch["reply"], token_logps)
    return sum_logps.view_as(lengths), lengths


# ------------------------------------------------------------------------------------------------------------
# 5. Rescoring and the losses, pure functions of log-probs and rewards (B, l). A query's replies stand best
#    first; one of fewer than l replies has NaN rewards, and any finite log-probs, in the places left empty.


def pick(values: Tensor, target: Tensor | None) -> Tensor:
    """The column target (B,) of each row of values (B, l), by default the first: (B,)."""
    return values[:, 0] if target is None else values.gather(1, target[:, None])[:, 0]


def rescore(
    rewards: Tensor, min_reward_gap: float | None, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Section 2.1: which pairs and which queries train, by their rewards (B, l).

    keep (B, l, l) bool, 1 - k of Eq. 5: True for pairs i < j with |r_i - r_j| > min_reward_gap, strictly.
    gate (B,) bool, 1 - lambda of Eq. 7: True where the reply to imitate, the first or `target` (B,), has a
    reward above zero. With min_reward_gap None all train: Table 3's 'w/o Rescore'.
    """
    gap = (rewards[:, :, None] - rewards[:, None, :]).abs()  # (B, l, l)
    pairs = gap.isfinite().triu(1)  # those of two replies that exist
    if min_reward_gap is None:
        return pairs, torch.ones_like(pairs[:, 0, 0])
    return pairs & (gap > min_reward_gap), pick(rewards, target) > 0


def pairwise_margin_loss(avg_logps: Tensor, keep: Tensor, margin: float) -> Tensor:
    """Eq. 4-6 summed over a query's kept pairs: avg_logps (B, l), keep (B, l, l), bool or weights -> (B,)."""
    position = torch.arange(avg_logps.shape[1], device=avg_logps.device)
    xi = margin * (position - position[:, None])  # (l, l), Eq. 6: margin x (j - i)
    # Eq. 4 is printed as p_i - p_j + xi. Minimised, that would push the better reply i *down*; the release
    # has the sign below (MarginRankingLoss with target 1), which asks the better reply to lead by xi.
    f = avg_logps[:, None, :] - avg_logps[:, :, None] + xi  # (B, l, l), f_ij = p_j - p_i + xi_ij
    return (keep * f.clamp(min=0)).sum((1, 2))  # Eq. 5


def gated_sft_loss(sum_logps: Tensor, gate: Tensor, target: Tensor | None = None) -> Tensor:
    """(1 - lambda) L_sft of Eq. 7, minus the log-prob of the reply to imitate: (B, l), (B,) -> (B,)."""
    return -(gate * pick(sum_logps, target))


def loss_counts(keep: Tensor, reduction: str) -> Tensor:
    """What sums over a batch are divided by, (l,): the SFT term by entry 0, the pairs j - i = d by entry d.

    "query": always the number of queries. "release": for pairs, the number of kept ones at their offset d.
    """
    queries, width = keep.shape[:2]
    if reduction == "query":
        return torch.full((width,), queries, device=keep.device)
    kept = [keep.diagonal(d, dim1=1, dim2=2).sum().clamp(min=1) for d in range(1, width)]
    return torch.tensor([queries, *kept], device=keep.device)


def clha_loss(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, margin: float, min_reward_gap: float | None,
    alpha: float, reduction: str = "query", sft_reduction: str = "sum", contrast: bool = True,
    target: Tensor | None = None, counts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 for a batch: avg_logps, sum_logps, rewards (B, l) -> the loss and metrics, all scalars.

    Give the `loss_counts` of a whole optimizer step as `counts` when the batch is a part of it: losses and
    metrics of the parts then add up to those of the step, however it was divided.
    """
    keep, gate = rescore(rewards, min_reward_gap, target)
    counts = loss_counts(keep, reduction) if counts is None else counts
    position = torch.arange(rewards.shape[1], device=rewards.device)
    offset = (position - position[:, None]).clamp(min=0)  # (l, l), j - i
    weights = keep.to(avg_logps) / counts[offset]  # (B, l, l), each kept pair's share in its mean
    rank_loss = contrast * pairwise_margin_loss(avg_logps, weights, margin).sum()
    sft_logps = sum_logps if sft_reduction == "sum" else avg_logps
    sft_loss = gated_sft_loss(sft_logps, gate, target).sum() / counts[0]
    loss = rank_loss + alpha * sft_loss
    metrics = {"loss": loss.detach(), "loss/rank": rank_loss.detach(), "loss/sft": sft_loss.detach()}
    for name, value in query_metrics(avg_logps.detach(), rewards, keep, gate).items():
        metrics[name] = value.sum() / counts[0]
    return loss, metrics


def query_metrics(avg_logps: Tensor, rewards: Tensor, keep: Tensor, gate: Tensor) -> dict[str, Tensor]:
    """What is logged beside the losses, each (B,); docs/metrics.md explains them."""
    pairs, _ = rescore(rewards, None)  # (B, l, l)
    right = pairs & (avg_logps[:, :, None] > avg_logps[:, None, :])
    best, worst = avg_logps[:, 0], pick(avg_logps, rewards.isfinite().sum(1) - 1)
    return {
        "rewards/accuracies": right.sum((1, 2)) / pairs.sum((1, 2)),
        "rewards/margins": best - worst,
        "logps/chosen": best,
        "logps/rejected": worst,
        "pairs_kept": keep.sum((1, 2)) / pairs.sum((1, 2)),
        "gated": (~gate).float(),
    }


# ------------------------------------------------------------------------------------------------------------
# 6. The model: sharded over the processes (FSDP2), read once (and saved by `save_model` of checkpoint.py)


def build_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, checkpointing: str = "full",
    compile: bool = False, replicate: int = 1,
) -> PreTrainedModel:
    """A causal LM with fp32 weights, sharded over all processes, that computes in `dtype`; without values.

    With `replicate` above 1 there are so many whole copies of it, each sharded over its part of the processes
    (HSDP): of several machines, each can have one, so that only gradients go from machine to machine.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    fast.wrap_layers(layers, checkpointing, compile)
    shape = (replicate, dist.get_world_size() // replicate)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")) if replicate > 1 else None
    # Gradients are reduced in fp32: in bf16, the mean over many processes can round small ones to zero.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for layer in layers:
        shard(layer)
    # The rest in one unit: embedding and LM head may share weights. It too is sharded again after a forward:
    # where no backward pass follows, the optimizer and checkpoints would see the gathered copy of it.
    shard(model, reshard_after_forward=True)
    model.to_empty(device=device)
    model.tie_weights()
    return model.train()


def load_model(path: str, device: torch.device, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    """The model of a folder or hub name, as `build_model` makes it.

    Rank 0 reads the weights; the others are built without memory and get their shards from it.
    """
    if rank_0 := dist.get_rank() == 0:
        settings = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
        with loading(path):
            full, info = AutoModelForCausalLM.from_pretrained(path, **settings)
        program.refuse_missing(path, info)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    model = build_model(config, device, dtype, **how)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(model, full.state_dict() if rank_0 else {}, options=options)
    for name, buffer in model.named_buffers():  # rotary frequencies: in no state dict, garbage until now
        if rank_0:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, src=0)
    return model


# ------------------------------------------------------------------------------------------------------------
# 7. Training


def data_order(queries: int, config: Config) -> list[tuple[float, list[int]]]:
    """(epochs so far, indices of the queries) of each optimizer step; every epoch has its own seeded order.

    The few queries that do not fill an epoch's last batch are left out of it.
    """
    per_epoch = queries // config.batch_size
    order = []
    for step in range(config.max_steps or round(config.epochs * per_epoch)):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            generator = torch.Generator().manual_seed(config.seed + epoch)
            shuffled = torch.randperm(queries, generator=generator).tolist()
        order.append(((step + 1) / per_epoch, shuffled[place * config.batch_size :][: config.batch_size]))
    return order


def deal(sizes: list[int], pack_tokens: int, processes: int) -> list[list[int]]:
    """Deals queries of these sizes evenly into packs of at most `pack_tokens`: indices, a list a pack.

    The packs are a multiple of `processes`, even if some stay empty: sharded models need as many passes on
    each process.
    """
    limit = max(pack_tokens, *sizes)  # a query is not divided
    rounds = math.ceil(sum(sizes) / limit / processes)
    while True:
        packs, loads = [[] for _ in range(rounds * processes)], [0] * (rounds * processes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # longest first, into the lightest pack
            lightest = loads.index(min(loads))
            packs[lightest].append(i)
            loads[lightest] += sizes[i]
        if max(loads) <= limit:
            return packs
        rounds += 1


def packs_of(examples: list[Example], device: torch.device, config: Config, fill_to: int = 0) -> list[Batch]:
    """This process's packs of a batch of queries, and what the loss of each is to be divided by: `counts`.

    That follows from the rewards alone, so it is known for the whole batch before the first forward pass. So
    the gradients are the same for any packs and any number of processes.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    keep, _ = rescore(reply_matrix(examples), config.min_reward_gap if config.rescore else None)
    more = {"counts": loss_counts(keep, config.reduction).to(device)}
    shares = deal([size(example) for example in examples], fill_to or config.pack_tokens, processes)
    # With an empty pack, a process only keeps step with the others.
    return [pack([examples[i] for i in part or [0]], device, fill_to) | more | {"weight": 1 if part else 0}
            for part in shares[rank::processes]]  # fmt: skip


def run_batch(
    model: PreTrainedModel, packs: list[Batch], loss_fn: Callable[..., Any], config: Config, train: bool
) -> dict[str, float]:
    """Loss and metrics of a batch of queries over all processes; with `train`, gradients are accumulated."""
    processes, totals = dist.get_world_size(), {}
    for batch in packs:
        with torch.set_grad_enabled(train):
            sum_logps, lengths = sequence_logps(model, batch)
            avg_logps = sum_logps / lengths.clamp(min=1)  # p of Eq. 3
            target, counts = batch["chosen"] if config.sft_target == "chosen" else None, batch["counts"]
            loss, metrics = loss_fn(
                avg_logps, sum_logps, batch["rewards"], target=target, counts=counts, **batch["more"])
        if train:  # FSDP averages over processes, and this is to be a sum
            (loss * batch["weight"] * processes).backward()
        totals = {name: totals.get(name, 0) + value * batch["weight"] for name, value in metrics.items()}
    values = torch.stack(list(totals.values()))
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def train(config: Config) -> None:
    """The whole run: from records to output_dir/final, with metrics.jsonl on the way."""
    rank, _, device = init_process()
    config, output = replace(config), Path(config.output_dir)  # the caller's own stays as it is
    if (output / "final").exists():
        raise InputError(f"{output}: holds a finished run (final/); choose another --output_dir")
    program.check_config(config)
    torch.manual_seed(config.seed + rank)  # of dropout, in a model that has it
    if config.deterministic:
        program.make_deterministic()
    config.pack_tokens = config.pack_tokens or (8192 if device.type == "cuda" else 1024)
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)

    tokenizer = load_tokenizer(config.model)
    examples = load_examples(config.train_data, tokenizer, config)
    dev_examples = load_examples(config.dev_data, tokenizer, config) if config.dev_data else []
    if config.batch_size > len(examples):
        raise InputError(f"--batch_size {config.batch_size}: must be 1 to {len(examples)} (queries)")
    if not (order := data_order(len(examples), config)):
        raise InputError(f"--epochs {config.epochs}: too few for a step")
    if config.alpha is None:
        length = max(len(example["response_ids"]) for example in examples.outlines())  # l, of the ranking
        weights = {"sft": 1.0, "rrhf": 1.0, "coh": 1.0, "dpo": 0.0}
        config.alpha = weights.get(config.objective, 0.05 * (length - 1) ** 2)
    gap = config.min_reward_gap if config.rescore else None
    loss_fn = partial(
        clha_loss, margin=config.margin, min_reward_gap=gap, alpha=config.alpha, reduction=config.reduction,
        sft_reduction=config.sft_reduction, contrast=config.contrast)

    model = load_model(
        config.model, device, dtype, checkpointing=config.activation_checkpointing, compile=config.compile,
        replicate=config.replicate)
    longest = max([*examples.sizes, *(dev_examples.sizes if dev_examples else [])])
    flex = fast.uses_flex(model, config.attention, longest, config.compile)
    fill_to = fast.pack_length(examples.sizes, order, config.pack_tokens, longest) if flex else 0
    if config.objective != "clha":
        import baselines
        config.rescore, loss_fn = False, baselines.make_loss(
            config, model, [examples, dev_examples], fill_to)
    if config.reward_model:
        import evaluate
        dev_reward = evaluate.make_judge(config, tokenizer, device)
    adamw = partial(torch.optim.AdamW, weight_decay=config.weight_decay, fused=device.type == "cuda")
    optimizer = adamw(model.parameters(), config.learning_rate)
    schedule = "cosine" if config.lr_schedule == "cosine" else "constant_with_warmup"
    scheduler = transformers.get_scheduler(schedule, optimizer, config.warmup_steps, len(order))
    run = Run(config, model, optimizer, scheduler, fill_to)  # where another one stopped, or at step 0
    if run.step > len(order):
        raise InputError(f"{output}: has done {run.step} steps already, more than the {len(order)} wanted")
    if rank == 0:
        print(program.describe(model, examples, len(order), config, fill_to), flush=True)

    def make_packs(planned: tuple[float, list[int]]) -> list[Batch]:
        return packs_of([examples[i] for i in planned[1]], device, config, fill_to)

    steps = order[run.step :]
    done, start = run.tokens, time.perf_counter()
    bar = tqdm(steps, "train", len(order), initial=run.step, disable=None if rank == 0 else True)
    work = zip(bar, fast.ahead(make_packs, steps), strict=True)  # the next packs are made meanwhile
    for step, ((epoch, indices), packs) in enumerate(work, run.step + 1):
        metrics = run_batch(model, packs, loss_fn, config, train=True)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).full_tensor().item()
        metrics |= {"epoch": epoch, "grad_norm": norm, "learning_rate": scheduler.get_last_lr()[0]}
        if math.isfinite(metrics["loss"] + norm):
            optimizer.step()
        else:
            run.skip(step, metrics["loss"], norm, [examples[i] for i in indices])
        scheduler.step()
        optimizer.zero_grad()
        run.tokens += sum(examples.sizes[i] for i in indices)
        speed = (run.tokens - done) / (time.perf_counter() - start)
        metrics |= {"num_tokens": run.tokens, "tokens_per_second": speed, "skipped": run.skipped}
        if dev_examples and (step % config.eval_every == 0 or step == len(order)):
            packs = packs_of(list(dev_examples), device, config, fill_to)
            dev = run_batch(model.eval(), packs, loss_fn, config, train=False)
            dev |= {"reward": dev_reward(model)} if config.reward_model else {}
            metrics |= {f"eval/{name}": value for name, value in dev.items()}
            model.train()
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "rewards/accuracies")})
        if config.save_every and step % config.save_every == 0:
            save_model(model, tokenizer, output / f"step-{step}", dtype)
        run.end_step(step, metrics, last=step == len(order))  # logs, saves, and stops after a signal
    save_model(model, tokenizer, output / "final", dtype)
    run.close()
    if rank == 0:
        print(f"done    {output / 'final'} is a Hugging Face folder; metrics in {output / 'metrics.jsonl'}")


# ------------------------------------------------------------------------------------------------------------
# 8. The command line


def parse_args(argv: list[str]) -> Config:
    """Flags to a Config; a recipe sets defaults, and a flag that is given wins over it."""
    usage = "clha.py --model MODEL --train_data FILE --output_dir FOLDER [options]"
    return program.parse_config(Config, RECIPES, usage, __doc__, argv)


if __name__ == "__main__":
    sys.modules["clha"] = sys.modules["__main__"]  # baselines.py imports this module, not a second one
    program.run(lambda: train(parse_args(sys.argv[1:])))
