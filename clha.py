"""CLHA, contrastive learning for human alignment (Fang et al., LREC-COLING 2024), in one file.

A reward model has scored the responses to each prompt. CLHA fine-tunes a language model on them with

    L_total = sum_{i<j} (1 - k_ij) max(0, p_j - p_i + margin (j - i))  +  alpha (1 - lambda) L_sft     Eq. 3-7

where p_i is the mean log-probability of the i-th best response, k drops pairs whose rewards are too close,
and lambda drops the imitation of the best response where its reward is not above zero. The code names
what stays: `keep` is 1 - k, `gate` is 1 - lambda. Rewards are used as they are, neither scaled nor centered.
Read from top to bottom: sections 1 to 6 are the paper, 7 to 10 run it. The data flow in a straight line:

    records -> tokens -> packs -> log-probs -> loss -> step

This starts a run or resumes a stopped one; in the end out/final is a Hugging Face folder (of adapters, with
--lora_rank). Another loss is an argument of `train`, in section 9.

    torchrun --nproc_per_node 8 clha.py --model MODEL --train_data train.jsonl --output_dir out

A record of train.jsonl is a JSON line; its last three fields may be missing:

    {"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."], "rewards": [1.2, -0.3],
     "chosen": 0, "subset": "helpful-base", "id": "..."}
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "transformers>=5.17,<6", "datasets>=4", "filelock", "xxhash", "tqdm"]
# ///

import copy
import gzip
import hashlib
import heapq
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import combinations, takewhile
from pathlib import Path
from statistics import median_low
from typing import Any, Literal

import datasets
import filelock
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

# 1. Configuration -------------------------------------------------------------------------------------------
# Every field is a flag of the command line: its name, its default, what it does or where it comes from


def option(default: Any, help: str) -> Any:
    """A field of `Config`: its default, and what --help says about it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The settings of a run."""

    model: str = option(MISSING, "language model to align: a Hugging Face folder or a hub name (owner/name)")
    train_data: str = option(MISSING, "scored records, JSON lines; `python reward.py score` adds the rewards")
    output_dir: str = option(MISSING, "gets metrics.jsonl, checkpoints/, final/; all machines must share it")
    dev_data: str = option("", "scored records to evaluate the loss on")
    # The method. The release (the authors' code) has one literal 3 for both the margin and the reward gap.
    # The paper gives neither; ours were chosen on a small world with a known reward, study/toy.py.
    margin: float = option(0.3, "in nats per token (Eq. 6)")
    min_reward_gap: float = option(0.5, "a pair whose rewards differ by no more than this is left out: k = 1")
    gate: bool = option(True, "imitate only best responses with a reward above 0 (Eq. 7); off: all of them")
    alpha: float | None = option(None, "Eq. 7; default 0.05 (l - 1)^2, l the median number of responses")
    # Tokens
    max_length: int = option(512, "tokens of prompt and response; the end is cut (release: 512)")
    max_prompt_length: int = option(384, "tokens of a prompt; its beginning is cut, or a chat's oldest turns")
    template: str = option("auto", "auto: the model's; NAME=VALUE: set in that; hh: HH-RLHF's; or a file")
    # Optimization
    lora_rank: int = option(0, "train only LoRA adapters of this rank, on all linear layers; 0: all weights")
    learning_rate: float = option(5e-6, "peak learning rate of AdamW (Section 3.3)")
    lr_schedule: Literal["constant_with_warmup", "cosine"] = option("constant_with_warmup", "as released")
    warmup_steps: int = option(0, "steps of linear warm-up (release: none)")
    epochs: float = option(2.0, "passes over the training data (Section 3.3)")
    max_steps: int = option(0, "steps of the run; 0: as many as --epochs make")
    batch_size: int = option(128, "queries per step, over all processes (release: 8 GPUs x 2 x 8)")
    weight_decay: float = option(0.01, "of AdamW (torch's default, as in the release)")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (release: 1.0)")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "to compute in; auto: bfloat16 on GPUs")
    seed: int = option(42, "for data order and LoRA (alike on any number of processes), and dropout")
    # Speed and memory: none of these changes a result by more than rounding
    pack_tokens: int = option(0, "tokens per forward pass, approximately; 0: 8192 on a GPU, else 1024")
    activation_checkpointing: Literal["full", "none"] = option("full", "full: layers are recomputed")
    replicate: int = option(1, "whole copies of the sharded model, such as one per machine (HSDP)")
    token_cache: str = option("", "folder for tokenized data that runs share; default: OUTPUT_DIR/tokens")
    # Watching and safety
    eval_every: int = option(100, "steps between evaluations on --dev_data")
    save_every: int = option(0, "steps between model folders OUTPUT_DIR/step-N (release: 600); 0: none")
    checkpoint_every: int = option(100, "steps between checkpoints to resume from; 0: only when stopped")
    tracker: Literal["", "wandb", "trackio", "mlflow", "tensorboard"] = option("", "gets the metrics too")
    deterministic: bool = option(False, "on a GPU, use only deterministic kernels; slower")


# 2. Records -------------------------------------------------------------------------------------------------
# One query per JSON line: a prompt with two or more responses (section 10 reads and checks them)

Record = dict[str, Any]
Turn = dict[str, str]
ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # and their names in HH-RLHF


class InputError(Exception):
    """What is wrong with a user's input, and where; programs print it in one line and exit with code 2."""


def rank(record: Record) -> Record:
    """The record with its responses, and the lists that go with them, sorted: best reward first."""
    order = list(range(len(record["responses"])))
    order.sort(key=lambda i: -record["rewards"][i])  # stable: equal rewards keep the file's order
    ranked = dict(record)
    for name, values in record.items():
        if isinstance(values, list) and len(values) == len(order) and name != "prompt":
            ranked[name] = [values[i] for i in order]
    return ranked | {"chosen": order.index(record.get("chosen", 0))}


# 3. Tokens --------------------------------------------------------------------------------------------------
# A dialogue as ids, in the chat template of the model or as in HH-RLHF (section 9 does this for a whole file)

Example = dict[str, Any]  # what `encode` returns, and numbers per response by name, such as "rewards"


def render(turns: list[Turn]) -> str:
    """The text of a dialogue as in HH-RLHF; where a response is to follow, it ends in "\\n\\nAssistant:"."""
    text = "".join(f"\n\n{ROLES[turn['role']]}: {turn['content']}" for turn in turns)
    return text if turns[-1]["role"] == "assistant" else f"{text}\n\nAssistant:"


MARK = "\ufdd0"  # a noncharacter: no text has it


def dialogue_ids(turns: list[Turn], tokenizer: Tokenizer) -> list[int]:
    """A dialogue in the tokenizer's chat template, or as HH-RLHF text with EOS at its end, as ids."""
    ended = turns[-1]["role"] == "assistant"  # else a response is to follow
    if not tokenizer.chat_template:
        end = [tokenizer.eos_token_id] if ended and tokenizer.eos_token else []
        whole = {"truncation": False, "padding": False}  # overrides what was saved with the tokenizer
        return tokenizer(render(turns), split_special_tokens=True, **whole).input_ids + end
    # Special tokens that someone typed stay plain text: MARK is put into them, and left out of the ids.
    special = "|".join(re.escape(token) for token in special_tokens(tokenizer).values())
    defuse = partial(re.sub, special, lambda found: f"{found[0][0]}{MARK}{found[0][1:]}")
    marked = [turn | {"content": defuse(turn["content"])} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=not ended)
    except Exception as error:  # a template is a program, and may fail in any way
        wrong = f"the chat template does not take {turns[:2]} ({reason(error)})"
        raise InputError(f"{tokenizer.name_or_path}: {wrong}") from error
    marking = marking_tokenizer(tokenizer)
    mark = marking.convert_tokens_to_ids(MARK)
    ids = marking(text, add_special_tokens=False, truncation=False, padding=False).input_ids
    return [i for i in ids if i != mark]


@cache
def marking_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer for which MARK is a special token, so that it cuts a text there."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens([MARK], special_tokens=True)
    return copied


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens of a tokenizer by their ids."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: str(token) for i, token in added if token.special or i == tokenizer.eos_token_id}


@cache
def turn_end(tokenizer: Tokenizer, template: str | None) -> int:
    """The id that ends a response: the first special one after its text, in the tokenizer's template."""
    dialogues = []  # `template` is only a key of the cache, as a tokenizer may be given another
    for answer in ("Hi", "No"):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        dialogues.append(dialogue_ids(turns, tokenizer)[::-1])
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*dialogues, strict=False))  # from the end
    special = special_tokens(tokenizer)
    ends = [i for i, _ in same if i in special]
    return ends[-1] if ends else tokenizer.eos_token_id


def recent_turns(turns: list[Turn], tokenizer: Tokenizer, limit: int) -> list[Turn]:
    """The newest turns of a chat, and its system turn, in `limit` ids; [] if no user turn fits."""
    if not tokenizer.chat_template:  # HH text is cut by ids instead
        return turns
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    for kept in [turns, *(system + turns[i:] for i in users[1:])]:  # all of them, then ever fewer
        if len(dialogue_ids(kept, tokenizer)) <= limit:
            return kept
    return []


def cut_prompt(ids: list[int], limit: int, bos: int | None) -> list[int]:
    """The last `limit` ids of a prompt, BOS kept. Cutting ids, not text, leaves the others as they are."""
    kept = ids[-limit:]
    if ids[:1] == [bos]:
        kept[0] = bos
    return kept


def encode(record: Record, tokenizer: Tokenizer, config: Config) -> Example | None:
    """A record as ids; None for a chat whose last user turn is too long. Raises InputError for bad ids."""
    turns = recent_turns(record["prompt"], tokenizer, config.max_prompt_length)
    if not turns:
        return None
    whole_prompt = dialogue_ids(turns, tokenizer)
    prompt_ids = cut_prompt(whole_prompt, config.max_prompt_length, tokenizer.bos_token_id)
    room = config.max_length - len(prompt_ids)
    end = turn_end(tokenizer, tokenizer.chat_template)
    response_ids = []
    for i, text in enumerate(record["responses"]):
        ids = dialogue_ids([*turns, {"role": "assistant", "content": text}], tokenizer)
        response = ids[len(whole_prompt) :]
        if ids[: len(whole_prompt)] != whole_prompt:
            raise InputError(f"response {i}: dialogue does not begin with its prompt; see --template")
        if end not in response[1:]:
            raise InputError(f"response {i}: has no tokens, or no end-of-turn token")
        response = response[: response.index(end) + 1]  # templates add a line break, or EOS
        response_ids.append(response[:room])
    size = len(prompt_ids) + sum(map(len, response_ids))  # in tokens
    longest = len(prompt_ids) + max(map(len, response_ids))
    numbers = {"size": size, "longest": longest, "count": len(response_ids)}
    return {"prompt_ids": prompt_ids, "response_ids": response_ids, "id": record.get("id", "")} | numbers


# 4. Packs ---------------------------------------------------------------------------------------------------
# Several queries in one row, without padding; each prompt occurs once for all its responses.
#
#     ids       <s> P  P  P  a  a  </s>  b  b  b  </s>  |  <s> Q  Q  c  </s>  d  d  </s>
#     position   0  1  2  3  4  5   6    4  5  6   7    |   0  1  2  3   4    3  4   5
#     response  -1 -1 -1 -1  0  0   0    1  1  1   1    |  -1 -1 -1  0   0    1  1   1
#
# A token sees itself and the earlier tokens of its own query's prompt and of its own response. So each
# response gets exactly the log-probability that it has alone, and the prompt is computed once.


@dataclass
class Pack:
    """B queries of at most l responses as one row of N tokens, M of which belong to responses."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), as if each response alone followed the prompt
    mask: list[Tensor] | BlockMask  # which token sees which: a bool (n, n) per query; or one mask, for flex
    targets: Tensor  # (M,), the tokens of the responses
    sources: Tensor  # (M,), the place in the row whose hidden state predicts each of them
    owners: Tensor  # (M,), b * l + i: the response that each of them belongs to
    lengths: Tensor  # (B, l), tokens per response; 0 where a query has fewer than l
    values: dict[str, Tensor]  # (B, l) each, such as "rewards"; NaN where a query has fewer than l
    share: float = 1.0  # of the queries of the step


def pack(examples: list[Example], device: torch.device | str = "cpu", length: int = 0) -> Pack:
    """Examples as one Pack, with a mask per query; or, for flex, filled to `length` tokens, with one mask."""
    rows = []  # of each token: id, position, response or -1, query
    targets = []
    sources = []
    owners = []
    width = max(len(example["response_ids"]) for example in examples)  # l
    for b, example in enumerate(examples):
        prompt = example["prompt_ids"]
        rows += [(token, position, -1, b) for position, token in enumerate(prompt)]
        prompt_end = len(rows) - 1  # predicts the first token of every response
        for i, response in enumerate(example["response_ids"]):
            targets += response
            sources += [prompt_end, *range(len(rows), len(rows) + len(response) - 1)]
            owners += [b * width + i] * len(response)
            rows += [(token, position, i, b) for position, token in enumerate(response, len(prompt))]
    rows += [(rows[0][0], 0, -1, len(examples))] * (length - len(rows))  # filler, as a query of its own

    tensor = partial(torch.tensor, device=device)
    ids, position, response, query = tensor(rows).T.contiguous()
    mask = flex_mask(query, response) if length else query_masks(query, response)
    lengths = tensor(owners).bincount(minlength=len(examples) * width).view(-1, width)
    values = {}  # such as rewards
    for name, value in examples[0].items():
        if isinstance(value, list) and name not in ("prompt_ids", "response_ids"):
            numbers = [tensor(example[name], dtype=torch.float32) for example in examples]
            values[name] = nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=math.nan)
    indices = (tensor(targets), tensor(sources), tensor(owners))
    return Pack(ids[None], position[None], mask, *indices, lengths, values)


def query_masks(query: Tensor, response: Tensor) -> list[Tensor]:
    """A bool (n, n) for each query of a pack: may the token of the row see the token of the column?"""
    parts = response.split(query.bincount().tolist())  # (n,) each
    return [((own == -1) | (own == own[:, None])).tril() for own in parts]


def flex_mask(query: Tensor, response: Tensor) -> BlockMask:
    """The same as one mask for flex_attention, which computes on a GPU only the tiles that are not empty."""

    def may_see(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        prompt_or_same = (response[column] == -1) | (response[column] == response[row])
        return (query[column] == query[row]) & (column <= row) & prompt_or_same

    return create_block_mask(may_see, None, None, len(query), len(query), device=query.device)


# 5. Log-probabilities ---------------------------------------------------------------------------------------
# Of the responses, by any Hugging Face decoder that obeys the mask (section 7 checks it)


def pack_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention over a pack, one query at a time, for transformers: (1, heads, N, d) -> (1, N, heads, d)."""
    if settings.get("s_aux") is not None or settings.get("softcap") is not None:
        raise ValueError("packs allow no attention sinks or soft caps")
    # transformers makes no mask for an attention that it does not know, and passes `pack_mask` on to it. One
    # query at a time costs the sum of their n^2, not N^2.
    masks = settings["pack_mask"]
    sizes = [len(mask) for mask in masks]
    grouped = query.shape[1] != key.shape[1]  # several query heads share a key head
    scale = settings.get("scaling")
    dropout = settings.get("dropout", 0.0)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), masks, strict=True)
    outputs = [attend(q, k, v, attn_mask=mask) for q, k, v, mask in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("pack", pack_attention)


def hidden_states(decoder: PreTrainedModel, pack: Pack) -> Tensor:
    """The last hidden states (N, d) of a Hugging Face decoder over a pack."""
    flex = isinstance(pack.mask, BlockMask)  # transformers' own flex_attention takes it as it is
    masks = {"attention_mask": pack.mask} if flex else {"pack_mask": pack.mask}
    attention = "flex_attention" if flex else "pack"
    if decoder.config._attn_implementation != attention:
        decoder.set_attn_implementation(attention)
    inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids}
    return decoder(**inputs, **masks, use_cache=False).last_hidden_state[0]


MAX_LOGITS = 2**25  # at most this many at a time: 128 MiB in float32, and a few copies


class Policy(nn.Module):
    """The language model in training: a pack in, the log-probability of each response out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not model._supports_attention_backend:
            raise InputError(f"{model.config.model_type}: not supported: it has attention code of its own")
        self.model = model

    def token_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(target) in float32, from the hidden states that predict them: (m, d), (m,) -> (m,)."""
        logits = self.model.get_output_embeddings()(hidden)  # (m, vocabulary)
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    def forward(self, pack: Pack) -> Tensor:
        """Summed log-probability of each response, EOS included: (B, l), 0 where a query has fewer than l."""
        # The LM head runs on the M positions that predict a response token, not on all N. Where their logits
        # are too many to hold, it runs in chunks, and recomputes their logits in the backward pass.
        hidden = hidden_states(self.model.base_model, pack)[pack.sources]  # (M, d)
        rows = max(1, MAX_LOGITS // self.model.get_output_embeddings().weight.shape[0])
        run = self.token_logps
        if len(hidden) > rows:
            run = partial(checkpoint, self.token_logps, use_reentrant=False)
        chunks = zip(hidden.split(rows), pack.targets.split(rows), strict=True)
        token_logps = torch.cat([run(*chunk) for chunk in chunks])  # (M,)
        sum_logps = token_logps.new_zeros(pack.lengths.numel()).index_add(0, pack.owners, token_logps)
        return sum_logps.view_as(pack.lengths).clone()  # FSDP puts hooks on outputs, and views take none

    def forward_alone(self, prompt_ids: list[int], response_ids: list[int]) -> Tensor:
        """The same for one response, computed by transformers alone: what a pack must reproduce."""
        self.model.set_attn_implementation("eager")  # each architecture's own
        ids = torch.tensor([prompt_ids + response_ids], device=self.model.device)
        logits = self.model(ids, use_cache=False).logits[0]  # (N, vocabulary)
        start = len(prompt_ids)
        return -F.cross_entropy(logits[start - 1 : -1].float(), ids[0, start:], reduction="sum")


# 6. Rescoring and the losses --------------------------------------------------------------------------------
# Pure functions of (B, l) log-probs and rewards. The responses of a query come best first; a query with
# fewer than l has NaN rewards in the places left over.


def mean_logps(sum_logps: Tensor, lengths: Tensor) -> Tensor:
    """p of Eq. 3, in nats per token: (B, l), (B, l) -> (B, l). A mean: sums favor short responses."""
    return sum_logps / lengths.clamp(min=1)


def rescore(rewards: Tensor, min_reward_gap: float, use_gate: bool = True) -> tuple[Tensor, Tensor]:
    """Which pairs and which best responses train (Section 2.1): (B, l) -> bool (B, l, l), (B,)."""
    gap = (rewards[:, :, None] - rewards[:, None, :]).abs()  # (B, l, l)
    keep = (gap > min_reward_gap).triu(1)  # 1 - k of Eq. 5, for i < j; never with NaN
    gate = (rewards[:, 0] > 0) | (not use_gate)  # 1 - lambda of Eq. 7
    return keep, gate


def pairwise_margin_loss(avg_logps: Tensor, keep: Tensor, margin: float) -> Tensor:
    """Eq. 4-6, summed over the kept pairs of a query: (B, l), (B, l, l) -> (B,)."""
    place = torch.arange(avg_logps.shape[1], device=avg_logps.device)
    xi = margin * (place - place[:, None])  # (l, l), Eq. 6: margin (j - i)
    # Eq. 4 is printed as p_i - p_j + xi. Minimized, that would push the better response i *down*; the release
    # has the sign below (MarginRankingLoss with target 1), which asks the better response to lead by xi.
    f = avg_logps[:, None, :] - avg_logps[:, :, None] + xi  # (B, l, l), f_ij = p_j - p_i + xi_ij
    return (keep * f.clamp(min=0)).sum((1, 2))  # Eq. 5


def gated_sft_loss(sum_logps: Tensor, gate: Tensor) -> Tensor:
    """(1 - lambda) L_sft of Eq. 7: minus the log-prob of the best response, (B, l), (B,) -> (B,)."""
    # A sum over tokens, as in the release; the paper does not say.
    return -(gate * sum_logps[:, 0])


def clha_loss(
    avg_logps: Tensor,
    sum_logps: Tensor,
    rewards: Tensor,
    *,
    margin: float,
    min_reward_gap: float,
    alpha: float,
    gate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7: avg_logps, sum_logps, rewards (B, l) -> the loss and metrics, scalars, means over B queries."""
    # Both terms are divided by B and by nothing else: neither by the kept pairs nor by the open gates.
    keep, gates = rescore(rewards, min_reward_gap, gate)
    rank_loss = pairwise_margin_loss(avg_logps, keep, margin).mean()
    sft_loss = gated_sft_loss(sum_logps, gates).mean()
    loss = rank_loss + alpha * sft_loss
    metrics = {"loss": loss.detach(), "loss/rank": rank_loss.detach(), "loss/sft": sft_loss.detach()}
    for name, values in query_metrics(avg_logps.detach(), rewards, keep, gates).items():
        metrics[name] = values.mean()
    return loss, metrics


def query_metrics(avg_logps: Tensor, rewards: Tensor, keep: Tensor, gate: Tensor) -> dict[str, Tensor]:
    """What is logged besides the losses, (B,) each; chosen is the best response by reward, not by people."""
    present = rewards.isfinite()  # (B, l)
    pairs = (present[:, :, None] & present[:, None, :]).triu(1)  # (B, l, l)
    better = rewards[:, :, None] > rewards[:, None, :]
    right = better & (avg_logps[:, :, None] > avg_logps[:, None, :])
    best = avg_logps[:, 0]
    worst = avg_logps.gather(1, present.sum(1, keepdim=True) - 1)[:, 0]
    return {
        "rewards/accuracies": right.sum((1, 2)) / better.sum((1, 2)).clamp(min=1),
        "logps/chosen": best,
        "logps/rejected": worst,
        "pairs_kept": keep.sum((1, 2)) / pairs.sum((1, 2)),
        "gate_open": gate.to(avg_logps),
    }


# 7. The model -----------------------------------------------------------------------------------------------
# Read once, sharded over the processes (FSDP2), saved as a Hugging Face folder


def load(kind: Any, path: str, **settings: Any) -> Any:
    """kind.from_pretrained of a folder or hub name. Raises InputError if it fails, or for missing weights."""
    hub_name = path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists()
    if not hub_name and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: neither a model folder with a config.json nor a hub name (owner/name)")
    try:
        loaded = kind.from_pretrained(path, trust_remote_code=False, **settings)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded ({type(error).__name__}: {reason(error)})") from error
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    if kind is AutoModelForCausalLM and "SequenceClassification" in str(model.config.architectures):
        raise InputError(f"{path}: is a reward model, not a language model")
    missing = sorted(info.get("missing_keys", ()))  # transformers would draw them at random
    if missing:
        raise InputError(f"{path}: has no weights for {', '.join(missing[:3])} ...")
    return model


def load_tokenizer(path: str, template: str = "auto") -> Tokenizer:
    """The tokenizer of a model, with the template that `Config` names. Raises InputError if that fails."""
    if (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"{path}: holds LoRA adapters; `python evaluate.py merge` makes a model of them")
    tokenizer = load(transformers.AutoTokenizer, path)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.get_chat_template()
    known = getattr(load(transformers.AutoConfig, path).get_text_config(), "vocab_size", math.inf)
    if tokenizer.eos_token_id is None or max(tokenizer.vocab_size, tokenizer.eos_token_id + 1) > known:
        raise InputError(f"{path}: the tokenizer has no EOS, or tokens beyond the {known} of the model")
    if "llama" in type(tokenizer).__name__.lower() and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        # transformers 5 builds such a tokenizer from a bare tokenizer.model, and it merges wrongly, too
        raise InputError(f"{path}: the LLaMA tokenizer drops BOS; the folder needs a valid tokenizer.json")
    if template == "hh":
        tokenizer.chat_template = None
    elif Path(template).is_file():
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"--template {template}: not UTF-8 ({reason(error)})") from None
    elif template != "auto":  # NAME=VALUE becomes a part of the template, and goes into final/ with it
        text = tokenizer.chat_template or ""
        found = re.fullmatch(r"(\w+)=(true|false|none|-?[\d.]+|\"[^\"]*\")", template)
        if not found or not re.search(rf"\b{found[1]}\b", text):
            need = "auto, hh, a file, or NAME=VALUE with a name that the model's own template reads"
            raise InputError(f"--template {template}: must be {need}")
        text = re.sub(rf"^{{%- set {found[1]}=.*?%}}", "", text)  # of a run that set it
        tokenizer.chat_template = f"{{%- set {template} %}}{text}"
    return tokenizer


def add_adapters(model: PreTrainedModel, config: Config) -> None:
    """Adds LoRA adapters to a model if the settings say so; then they alone train."""
    if config.lora_rank:
        try:
            from peft import LoraConfig
        except ImportError:
            raise InputError("--lora_rank: needs Hugging Face's peft: pip install peft") from None
        torch.manual_seed(config.seed)
        if Path(config.model).is_dir():  # final/ names its base by an absolute path
            model.name_or_path = str(Path(config.model).resolve())
        shape = {"r": config.lora_rank, "lora_alpha": 2 * config.lora_rank, "target_modules": "all-linear"}
        model.add_adapter(LoraConfig(task_type="CAUSAL_LM", **shape))


EAGER = {"dtype": torch.float32, "attn_implementation": "eager"}  # any model has it; a Policy sets its own


def build_policy(model_config: PretrainedConfig, config: Config, device: torch.device) -> Policy:
    """A causal LM without values yet: fp32 weights, sharded over all processes, computing in config.dtype.

    Weights that do not train are kept in config.dtype: they get no updates that rounding could swallow.
    """
    with torch.device("meta"):
        policy = Policy(AutoModelForCausalLM.from_config(model_config, **EAGER))
        add_adapters(policy.model, config)
        for weight in policy.parameters():
            if not weight.requires_grad:
                weight.data = weight.to(getattr(torch, config.dtype))
    mesh = None
    if config.replicate > 1:  # HSDP: each of N copies, such as one per machine, is sharded over its processes
        shape = (config.replicate, dist.get_world_size() // config.replicate)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Gradients are reduced in fp32: in bf16, the mean over many processes can round small ones to zero.
    precision = MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32)
    for layer in policy.modules():
        if type(layer).__name__ in policy.model._no_split_modules:
            if config.activation_checkpointing == "full":  # its backward pass recomputes it from its input
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    # Embedding and LM head may share weights, so the rest is one unit. FSDP would leave it gathered after a
    # forward pass; where no backward pass follows, as in evaluation, optimizer and checkpoints would then see
    # the gathered copy. So it is resharded like the layers.
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    register_fsdp_forward_method(policy, "forward_alone")
    policy.to_empty(device=device)
    policy.model.tie_weights()
    return policy.train()


def load_policy(config: Config, device: torch.device) -> tuple[Policy, str]:
    """The model of --model, and a hash of it: rank 0 reads its weights and sends the others their shards."""
    weights = {}
    model_config = load(transformers.AutoConfig, config.model)
    settings = model_config.to_diff_dict() | {"transformers_version": ""}  # of the library, not of the model
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    if dist.get_rank() == 0:
        full = load(AutoModelForCausalLM, config.model, output_loading_info=True, **EAGER)
        for name, weight in sorted(full.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.contiguous().numpy())
        add_adapters(full, config)
        weights = full.state_dict()
    policy = build_policy(model_config, config, device)
    broadcast = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(policy.model, weights, options=broadcast)
    for name, buffer in policy.model.named_buffers():  # rotary frequencies: in no state dict, garbage so far
        if dist.get_rank() == 0:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, src=0)
    if dist.get_rank() == 0:
        policy.model.generation_config = full.generation_config
    return policy, on_first_process(digest.hexdigest)


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # nats per token; rounding stays below, a leak above


def check_policy(policy: Policy, example: Example, longest: int, dtype: str, length: int = 0) -> None:
    """Raises InputError for a model that gets packs wrong, or takes no text of `longest` tokens."""
    # A query that follows another in a pack is compared with its responses alone, in 1 + l forward passes.
    # They reveal attention that reads past the mask, layers that carry a state along, scaled logits, and NaN.
    kind = policy.model.config.model_type
    for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size"):
        most = getattr(policy.model.config.get_text_config(), name, None)
        if most and most < longest:
            raise InputError(f"{kind}: a text has {longest} tokens, over {name} {most}; see --max_length")
    other = example | {"prompt_ids": example["prompt_ids"][::-1]}
    both = pack([other, example], policy.model.device, length)
    try:
        with torch.no_grad():
            packed = policy.eval()(both)[1]
            rows = [policy.forward_alone(example["prompt_ids"], ids) for ids in example["response_ids"]]
    except Exception as error:
        raise InputError(f"{kind}: not supported ({type(error).__name__}: {reason(error)})") from error
    policy.train()
    lengths = both.lengths[1].clamp(min=16)  # in a few tokens rounding does not average out
    off = ((packed - torch.stack(rows)) / lengths).abs().max().item()
    if not off <= TOLERANCE[dtype]:
        raise InputError(f"{kind}: not supported: log-probs in a pack are {off:.2g} nats per token off")


def save_model(policy: Policy, tokenizer: Tokenizer, path: Path, config: Config) -> None:
    """Gathers the shards into a Hugging Face folder: weights in `config.dtype`, tokenizer, config."""
    gather = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = dcp_state.get_model_state_dict(policy.model, options=gather)
    settings = {"dtype": getattr(torch, config.dtype), "attn_implementation": "eager"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy.model.config, **settings)
        add_adapters(model, config)

    def write() -> None:
        if path.exists():  # this run saved it before it was killed
            print(f"kept    {path}: already there")
            return
        tied = model.all_tied_weights_keys  # they are in the file once, under their other name
        state = {name: weight.to(model.dtype) for name, weight in weights.items() if name not in tied}
        unfinished = path.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        model.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        generation = policy.model.generation_config.to_json_string()
        (unfinished / "generation_config.json").write_text(generation)  # as the model came
        unfinished.rename(path)

    on_first_process(write)


# 8. Checkpoints ---------------------------------------------------------------------------------------------
# OUTPUT_DIR/checkpoints/step-N has weights and AdamW's moments, in sharded safetensors; learning rate, data
# order and seeds follow from N. A folder of that name is complete. The newest two are kept.


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def file_hash(path: str | Path) -> str:
    """A fast hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def state_tensors(policy: Policy, optimizer: Optimizer) -> dict[str, Tensor]:
    """By name, the weights that train, and their AdamW moments if there are any yet."""
    state = {}
    for name, weight in policy.model.named_parameters():
        if weight.requires_grad:
            state[f"model.{name}"] = weight
            for key, moment in optimizer.state[weight].items():
                state[f"optimizer.{name}.{key}"] = moment
    return state


def save_checkpoint(path: Path, state: dict[str, Tensor], identity: dict[str, Any]) -> None:
    """Writes a checkpoint, all processes together. Raises InputError if that fails; older ones stay."""
    unfinished = path.with_suffix(".partial")
    remove = partial(shutil.rmtree, unfinished, ignore_errors=True)
    on_first_process(remove)  # of a run that was killed
    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True))
    except dcp.CheckpointException as error:
        on_first_process(remove)
        raise InputError(f"{path}: cannot be saved ({reason(error)}); older checkpoints stay") from error

    def publish() -> None:
        content = {"run": identity, "files": {file.name: file_hash(file) for file in unfinished.iterdir()}}
        (unfinished / "run.json").write_text(json.dumps(content, indent=2) + "\n")
        unfinished.rename(path)
        for old in checkpoints(path.parent)[:-2]:
            shutil.rmtree(old)

    on_first_process(publish)


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two runs, as text; "" if nothing does. What is None now is not known yet."""
    known = [name for name in now | before if now.get(name, "") is not None]
    pairs = [(name, before.get(name), now.get(name)) for name in known]
    return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)[:300]


def restore(path: Path, policy: Policy, optimizer: Optimizer, identity: dict[str, Any]) -> int:
    """Loads a checkpoint's weights and AdamW; returns its step. Raises InputError if it does not fit."""

    def check() -> None:
        try:
            before = json.loads((path / "run.json").read_text())
            told = changes(before["run"], identity)
            damaged = [name for name, content in before["files"].items() if file_hash(path / name) != content]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            damaged = [reason(error)]
        if damaged:
            wrong = f"damaged ({', '.join(damaged)}); remove it to resume from the one before"
            raise InputError(f"{path}: {wrong}")
        if told:
            raise InputError(f"{path}: is another run's ({told}); choose another --output_dir")

    on_first_process(check)
    dcp_state.get_optimizer_state_dict(policy, optimizer)  # makes AdamW's moments, of zeros, to load into
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    for name, weight in policy.model.named_parameters():
        if f"optimizer.{name}.exp_avg" not in saved:  # it had no gradient so far, as weights for images
            optimizer.state.pop(weight, None)
    dcp.load(state_tensors(policy, optimizer), storage_reader=reader)
    return int(path.name[5:])


# 9. Training ------------------------------------------------------------------------------------------------

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
REWARDS = ("rewards",)
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # on either, a run saves a checkpoint and ends
MAX_SKIPPED = 5  # this many non-finite steps in a row end the run
# What may change when a run resumes, as may the number of processes. Model and training data may have other
# names; what they hold is compared by hashes: `identity` in `train`.
FREE = {
    *("model", "train_data", "dev_data", "output_dir", "token_cache", "tracker", "eval_every", "save_every"),
    *("checkpoint_every", "pack_tokens", "activation_checkpointing", "replicate"),
}


def load_examples(
    path: str, tokenizer: Tokenizer, config: Config, fields: tuple[str, ...] = REWARDS, ranked: bool = True
) -> datasets.Dataset:
    """The records of a file as Examples with the numbers of `fields`, best response first if `ranked`."""
    # One process tokenizes them, once, while the others wait for its lock; all memory-map the result.
    folder = config.token_cache or f"{config.output_dir}/tokens"
    content = file_hash(path)

    def tokenize() -> Iterator[Example]:
        kept = 0
        left_out = 0
        for record in iter_records(path, fields):
            record = rank(record) if ranked else record
            try:
                example = encode(record, tokenizer, config)
            except InputError as error:
                raise InputError(f"{path}, {record['id']}: {error}") from error
            if example:
                yield example | {name: [*map(float, record[name])] for name in fields}
            kept += bool(example)
            left_out += not example
        wrong = f"the system and last turns of {left_out} queries exceed --max_prompt_length"
        if not kept:
            raise InputError(f"{path}: nothing is left; {wrong}")
        if left_out:
            print(f"warning {path}: {wrong}, and are left out")
        if file_hash(path) != content:
            raise InputError(f"{path}: changed while it was read")

    settings = (config.max_length, config.max_prompt_length, tokenizer.chat_template, fields, ranked)
    versions = (file_hash(__file__), transformers.__version__)
    name = datasets.fingerprint.Hasher.hash((content, tokenizer, settings, versions))
    try:
        return datasets.Dataset.from_generator(tokenize, cache_dir=folder, fingerprint=name)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    except ValueError as error:
        raise InputError(f"{folder}: damaged ({reason(error)}); it can be removed") from error


def check_rewards(rewards: list[list[float]], config: Config) -> None:
    """Says which part of the method these rewards, ranked best first, switch off."""
    pairs = [high - low for row in rewards for high, low in combinations(row, 2)]
    kept = sum(gap > config.min_reward_gap for gap in pairs) / len(pairs)
    opened = sum(row[0] > 0 for row in rewards) / len(rewards)
    if kept < 0.01:
        print(f"warning --min_reward_gap {config.min_reward_gap:g} keeps {kept:.2%} of the pairs")
    most = 0.99 if len(rewards) >= 100 else 1  # a few queries may all have a good response
    if config.gate and not 0.01 <= opened <= most:
        print(f"warning --gate is open for {opened:.2%} of the queries: their best rewards are above 0")


def data_order(queries: int, config: Config) -> Tensor:
    """The queries of each step, (steps, batch_size) indices. Raises InputError if there are too few."""
    per_epoch = queries // config.batch_size
    steps = config.max_steps or round(config.epochs * per_epoch)
    if per_epoch == 0:
        raise InputError(f"--batch_size {config.batch_size}: more than the {queries} queries there are")
    if not 1 <= steps < 2**24:  # whose order takes 17 GB, with 128 queries each
        raise InputError(f"--epochs or --max_steps gives {steps:,} steps of {config.batch_size} queries")
    order = []
    for epoch in range(math.ceil(steps / per_epoch)):
        generator = torch.Generator().manual_seed(config.seed + epoch)  # neighboring seeds share orders
        shuffled = torch.randperm(queries, generator=generator)[: per_epoch * config.batch_size]
        order.append(shuffled.view(per_epoch, config.batch_size))
    return torch.cat(order)[:steps]


def balance(sizes: list[int], limit: int, processes: int) -> list[list[int]]:
    """Spreads items of these sizes evenly over packs of at most `limit` tokens: the indices in each pack."""
    limit = max(limit, *sizes)  # an item is not divided
    number = math.ceil(sum(sizes) / limit / processes) * processes  # as many for each; some may stay empty
    while True:
        packs = [[] for _ in range(number)]
        loads = [(0, place) for place in range(number)]  # a heap: the lightest pack is the first
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # longest first, into the lightest
            load, lightest = loads[0]
            packs[lightest].append(i)
            heapq.heapreplace(loads, (load + sizes[i], lightest))
        if max(loads)[0] <= limit:
            return packs
        number += max(1, number // processes // 20) * processes  # 5 %: large items may need many more


def pack_limit(sizes: list[int], order: Tensor, pack_tokens: int, group: int = 1) -> int:
    """Tokens per pack: the fullest step's, spread over as few packs as can hold them, plus 5 %."""
    fullest = torch.tensor(sizes)[order].sum(1).max().item() / dist.get_world_size()
    even = fullest / math.ceil(fullest / pack_tokens)
    return math.ceil(max(1.05 * even, group * max(sizes)) / 128) * 128  # in flex's tiles


def make_packs(
    examples: list[Example], device: torch.device, limit: int, fill: bool, group: int
) -> Iterator[Pack]:
    """This process's packs of a batch; each `group` of queries in a row stays in one, for a loss of them."""
    groups = [examples[i : i + group] for i in range(0, len(examples), group)]
    sizes = [sum(example["size"] for example in members) for members in groups]
    for indices in balance(sizes, limit, dist.get_world_size())[dist.get_rank() :: dist.get_world_size()]:
        members = [example for i in sorted(indices) for example in groups[i]]
        # A process without queries makes a pass too, as FSDP's processes work together; its share is 0.
        made = pack(members or groups[0], device, limit if fill else 0)
        made.share = len(members) / len(examples)
        yield made


def run_batch(policy: Policy, packs: Iterable[Pack], loss_fn: Loss, train: bool) -> dict[str, float]:
    """Mean loss and metrics of a batch of queries over all processes; with `train`, gradients accumulate."""
    # The loss of a pack is a mean, and its weight is its share of the queries: so packs and processes cannot
    # change the sum, which is the mean over the batch.
    totals = {}
    for part in packs:
        with torch.set_grad_enabled(train):
            sum_logps = policy(part)
            loss, metrics = loss_fn(mean_logps(sum_logps, part.lengths), sum_logps, **part.values)
        if train:  # FSDP averages gradients over the processes, and this is to be their sum
            (loss * part.share * dist.get_world_size()).backward()
        metrics = {"loss": loss.detach()} | metrics
        totals = {name: totals.get(name, 0) + value * part.share for name, value in metrics.items()}
    values = torch.stack(list(totals.values()))
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def open_log(output: Path, settings: dict[str, Any], done: int) -> Path:
    """Writes config.json, and cuts metrics.jsonl, whose path it returns, to the first `done` steps."""
    log = output / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    # In this order: a log without a config.json would be taken for another run's.
    texts = {output / "config.json": json.dumps(settings, indent=2) + "\n", log: "".join(lines[:done])}
    for path, text in texts.items():
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(text)
        unfinished.replace(path)
    return log


def report(log: Path, step: int, metrics: dict[str, float], skipped: list[str], trackers: list[Any]) -> None:
    """Appends a step to metrics.jsonl (null: not finite), with the ids of a skipped batch; tells trackers."""
    row: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    row |= {"skipped": skipped} if skipped else {}
    row |= {"time": datetime.now().isoformat(timespec="seconds")}
    with log.open("a") as file:
        print(json.dumps({"step": step} | row), file=file)
    try:
        for tracker in trackers:
            tracker.log(metrics, step)
    except Exception as error:  # of a network
        print(f"warning --tracker: {reason(error)}; nothing more is sent")
        trackers.clear()


def train(
    config: Config,
    loss_fn: Loss | None = None,
    fields: tuple[str, ...] = REWARDS,
    ranked: bool = True,
    group: int = 1,
) -> None:
    """The whole run: from records to OUTPUT_DIR/final, with a line of metrics.jsonl per step.

    Another objective is another loss_fn(avg_logps, sum_logps, **values) -> (mean over B queries, metrics: 0-d
    tensors by name); its `values` are the numbers per response that `fields` names. If `ranked`, responses
    come best reward first, else as in the file. Each `group` of queries in a row stays in one pack, for a
    loss of several together. A run that resumes cannot see whether loss_fn has changed.
    Raises InputError for wrong settings, data or model.
    """
    process, processes, device = init_process()
    config = settle(config, device)
    output = Path(config.output_dir)
    with claimed(output, config):
        tokenizer = load_tokenizer(config.model, config.template)
        load_data = partial(load_examples, tokenizer=tokenizer, config=config, fields=fields, ranked=ranked)
        examples = load_data(config.train_data)
        dev_data = load_data(config.dev_data) if config.dev_data else []
        dev_examples = [*dev_data]
        tokens = [file_hash(file["filename"]) for file in examples.cache_files]
        seen = [None] * processes  # machines may have different files of one name
        dist.all_gather_object(seen, (tokens, getattr(dev_data, "_fingerprint", "")))
        if seen.count(seen[0]) < processes:
            raise InputError(f"{config.train_data}: the processes read different data")
        counts = examples["count"][:]
        if config.alpha is None:
            config.alpha = 0.05 * (median_low(counts) - 1) ** 2  # Section 3.3
        if loss_fn is None:
            on_first_process(lambda: check_rewards(examples["rewards"][:], config))
            settings = {name: getattr(config, name) for name in ("margin", "min_reward_gap", "alpha", "gate")}
            loss_fn = partial(clha_loss, **settings)
        trackers = []  # one, on the first process, if it is asked for
        if config.tracker:
            on_first_process(lambda: trackers.append(start_tracker(config)))
        order = data_order(len(examples), config)
        sizes = examples["size"][:] + [example["size"] for example in dev_examples]
        longest = examples["longest"][:] + [example["longest"] for example in dev_examples]
        limit = pack_limit(sizes, order, config.pack_tokens, group)
        policy, model_hash = load_policy(config, device)
        # On a GPU packs are filled to one length, for which flex_attention is compiled; it has no dropout.
        model_config = policy.model.config.get_text_config()
        dropout = [getattr(model_config, name, 0) for name in ("attention_dropout", "attn_pdrop")]
        fill = device.type == "cuda" and policy.model._supports_flex_attn and not any(dropout)
        packs_of = partial(make_packs, device=device, limit=limit, fill=fill, group=group)
        # Near 512 tokens: long enough to show a leak, short enough for plain attention's quadratic memory.
        probe = examples[min(range(len(examples)), key=lambda i: abs(longest[i] - 512))]
        check_policy(policy, probe, max(longest), config.dtype, limit if fill else 0)
        adamw = partial(torch.optim.AdamW, weight_decay=config.weight_decay, fused=device.type == "cuda")
        optimizer = adamw(policy.parameters(), config.learning_rate)
        schedule = transformers.get_scheduler(config.lr_schedule, optimizer, config.warmup_steps, len(order))
        identity = fixed(config) | {"model_hash": model_hash, "tokens": tokens}
        on_first_process(lambda: check_files(output, identity))
        newest = on_first_process(lambda: checkpoints(output / "checkpoints")[-1:])
        done = restore(newest[0], policy, optimizer, identity) if newest else 0
        for _ in range(done):  # once for each step, as below
            schedule.step()
        log = on_first_process(lambda: open_log(output, asdict(config) | identity, done))
        if process == 0:
            print(f"prompt  {tokenizer.decode(probe['prompt_ids'])!r}")
            print(f"loss on {tokenizer.decode(probe['response_ids'][0])!r}")
            size = policy.model.num_parameters(only_trainable=True)
            disk = f"{12 * size / 1e9:,.3g} GB, and up to three may exist"
            print(f"train   {size:,} parameters; a checkpoint takes {disk}")
            responses = f"{median_low(counts)} responses (at most {max(counts)})"
            print(f"train   {len(examples):,} queries of {responses}, alpha {config.alpha:g}")
            print(f"train   steps {done + 1:,} to {len(order):,}", flush=True)
        signals = []  # held until the end of a step
        for number in SIGNALS:
            signal.signal(number, lambda received, _: signals.append(received))
        skipped = 0  # steps in a row that were not finite
        bar = tqdm(order[done:], "train", len(order), initial=done, disable=None if process == 0 else True)
        for step, indices in enumerate(bar, done + 1):
            start = time.perf_counter()
            last = step == len(order)
            torch.manual_seed(config.seed + step * processes + process)  # of dropout, in a model that has it
            batch = examples.select(indices.tolist()).to_list()
            metrics = run_batch(policy, packs_of(batch), loss_fn, train=True)
            norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).full_tensor().item()
            finite = math.isfinite(metrics["loss"] + norm)
            skipped = 0 if finite else skipped + 1
            if finite:
                optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            metrics |= {"grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]}
            metrics |= {"epoch": step * config.batch_size / len(examples), "seconds": seconds}
            metrics["tokens_per_second"] = sum(example["size"] for example in batch) / seconds
            schedule.step()
            if dev_examples and (step % config.eval_every == 0 or last):
                dev_metrics = run_batch(policy.eval(), packs_of(dev_examples), loss_fn, train=False)
                metrics |= {f"eval/{name}": value for name, value in dev_metrics.items()}
                policy.train()
            if process == 0:
                report(log, step, metrics, [] if finite else [example["id"] for example in batch], trackers)
                bar.set_postfix(loss=metrics["loss"])
                if bar.disable and (step % 10 == 0 or last):  # no terminal: a line now and then
                    shown = [name for name in ("loss", "rewards/accuracies") if name in metrics]
                    said = ", ".join(f"{name} {metrics[name]:.4f}" for name in shown)
                    left = timedelta(seconds=round(seconds * (len(order) - step)))
                    rate = f"{metrics['tokens_per_second']:,.0f} tokens/s, {left} left"
                    print(f"step    {step:,} of {len(order):,}, {said}, {rate}", flush=True)
            stepped = bool(optimizer.state)  # empty until AdamW's first step
            # Five in a row, or all of a run that is shorter
            if skipped == MAX_SKIPPED or (skipped and last and not stepped):
                raise InputError(f'{log}: {skipped} steps in a row were not finite; see "skipped"')
            if config.save_every and step % config.save_every == 0:
                save_model(policy, tokenizer, output / f"step-{step}", config)
            stop = torch.tensor(max(signals, default=0), device=device)
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # all processes stop at the same step, or none
            due = config.checkpoint_every and step % config.checkpoint_every == 0 and not skipped
            if stepped and (due or stop):
                path = output / "checkpoints" / f"step-{step}"
                save_checkpoint(path, state_tensors(policy, optimizer), identity)
            if stop and not last:
                if process == 0:
                    print(f"stopped after step {step}; the same command resumes", flush=True)
                raise SystemExit(128 + int(stop))  # as if the signal had ended it
        save_model(policy, tokenizer, output / "final", config)
        on_first_process(lambda: print(f"done    {output / 'final'} is a Hugging Face folder"))


# 10. Processes, files, and the command line -----------------------------------------------------------------


def init_process() -> tuple[int, int, torch.device]:
    """Joins the processes that torchrun started, or makes a group of one: (rank, processes, device)."""
    env = os.environ
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(env.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        process, processes = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        store = next(dist.rendezvous("env://"))[0] if "RANK" in env else dist.HashStore()
        if env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE"):
            # On one machine torchrun keeps its store when it restarts the processes, which would find stale
            # addresses in it (pytorch/pytorch#135712): so each start has keys of its own.
            store = dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        patience = timedelta(hours=1)  # the others wait while the first process saves a model
        dist.init_process_group(backend, None, patience, processes, process, store)
    return dist.get_rank(), dist.get_world_size(), device


def reason(error: BaseException) -> str:
    """What an error says, in one line; of several that processes met in a checkpoint, the first."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split())[:600]


def on_first_process(work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0; returns its result, or raises its error, on every process."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            known = isinstance(error, InputError | OSError)
            outcome[1] = error if known else InputError(f"{type(error).__name__}: {reason(error)}")
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def settle(config: Config, device: torch.device) -> Config:
    """A copy of the settings with device defaults filled in. Raises InputError for wrong settings."""
    for name, value in vars(config).items():
        least = int(name in ("batch_size", "eval_every", "replicate", "max_prompt_length"))
        if isinstance(value, int | float) and not least <= value < 2**32:
            raise InputError(f"--{name} {value}: must be a number of {least} or more, below 2**32")
    if config.max_prompt_length >= config.max_length:
        raise InputError(f"--max_prompt_length {config.max_prompt_length}: must be less than --max_length")
    if config.max_grad_norm == 0:
        raise InputError("--max_grad_norm 0: must be above 0; it would clip every gradient to nothing")
    if dist.get_world_size() % config.replicate:
        raise InputError(f"--replicate {config.replicate}: must divide the {dist.get_world_size()} processes")
    cuda = device.type == "cuda"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradient adds up in any order
    dtype = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    return replace(config, dtype=dtype, pack_tokens=config.pack_tokens or (8192 if cuda else 1024))


def fixed(config: Config) -> dict[str, Any]:
    """What stays when a run resumes; None is what model and data will tell."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return settings | {"model_hash": None, "tokens": None}


def check_files(output: Path, identity: dict[str, Any]) -> None:
    """Raises InputError if a folder has files of another run, or a model."""
    if not ((output / "config.json").exists() or (output / "metrics.jsonl").exists()):
        return
    try:
        before = json.loads((output / "config.json").read_text())
        told = changes({name: before[name] for name in before if name not in FREE}, identity)
    except (OSError, ValueError, AttributeError):
        told = "config.json is missing or torn"
    if told:
        raise InputError(f"{output}: is another run's, or a model ({told}); choose another --output_dir")


@contextmanager
def claimed(output: Path, config: Config) -> Iterator[None]:
    """Claims a folder for this run, until the end. Raises InputError if it is another's, or finished."""
    lock = filelock.FileLock(output / ".lock", timeout=0)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def claim() -> None:
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{output}: another program works in it; choose another --output_dir") from None
        if (output / "final").exists():
            raise InputError(f"{output}: holds a finished run (final/); choose another --output_dir")
        check_files(output, fixed(config))

    try:
        on_first_process(claim)
        yield
    finally:
        lock.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_tracker(config: Config) -> Any:
    """The object that logs a step's metrics to --tracker, by Hugging Face's accelerate."""
    try:
        from accelerate import PartialState, tracking

        PartialState()  # accelerate's own view of the processes, which its log needs
        kind = tracking.LOGGER_TYPE_TO_CLASS[config.tracker]
        folder = {"logging_dir": config.output_dir} if kind.requires_logging_directory else {}
        tracker = kind("clha", **folder)
        tracker.start()
        tracker.store_init_configuration(asdict(config))
        return tracker
    except ImportError as error:
        raise InputError(f"--tracker: pip install accelerate {config.tracker} ({reason(error)})") from None
    except Exception as error:  # of a network
        raise InputError(f"--tracker {config.tracker}: {reason(error)}") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yields (line number, object) of a JSON-lines file, gzipped or not. Raises InputError with the line."""
    number = 0
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # fails for half a character, a lone surrogate
                if not isinstance(row, dict):
                    raise ValueError(f"not a JSON object: {line.strip()[:40]}")
                yield number, row
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        where = "after line" if isinstance(error, OSError | EOFError | UnicodeDecodeError) else "line"
        raise InputError(f"{path}, {where} {number}: not JSON lines in UTF-8 ({reason(error)})") from error


def check_record(record: Record, need: Iterable[str] = ()) -> str | None:
    """What is wrong with a record, or None; `need` names optional fields that must be there."""
    turns = record["prompt"] if isinstance(record.get("prompt"), list) else []
    texts = record["responses"] if isinstance(record.get("responses"), list) else []
    chosen = record.get("chosen", None if "chosen" in need else 0)
    fields = [turn if isinstance(turn, dict) else {} for turn in turns]
    known = [str(turn.get("role")) in ROLES and isinstance(turn.get("content"), str) for turn in fields]
    if not known or not all(known):
        return f'"prompt" must be a list of {{"role": one of {", ".join(ROLES)}, "content": text}}'
    if turns[-1]["role"] == "assistant":
        return '"prompt" must not end with an assistant turn, which is for the responses'
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        return '"responses" must be a list of two or more texts, none of them empty'
    if type(chosen) is not int or not 0 <= chosen < len(texts):
        return f'"chosen" must be the index of a response, 0 to {len(texts) - 1}'
    if not isinstance(record.get("id", ""), str | int) or not isinstance(record.get("subset", ""), str):
        return '"id" must be a string or integer, "subset" a string'
    missing = {*need} - record.keys()
    if missing:
        hint = "; `python reward.py score` adds rewards, `python -m study.baselines` more"
        return f'no "{min(missing)}", a list with a number per response{hint}'
    for name in {"rewards", *need} & record.keys() - {"chosen"}:
        numbers = record[name] if isinstance(record[name], list) else []
        finite = [type(number) in (int, float) and abs(number) < 1e38 for number in numbers]
        if finite != [True] * len(texts):
            return f'"{name}" must be {len(texts)} finite numbers, one per response'
    return None


def iter_records(path: str | Path, need: Iterable[str] = ()) -> Iterator[Record]:
    """Reads and checks records one at a time; "id" defaults to the line. Raises InputError with the line."""
    number = 0
    for number, record in read_jsonl(path):
        wrong = check_record(record, need)
        if wrong and "responses" not in record:
            wrong += "; `python prepare_data.py preference` converts other data"
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong}")
        yield record | {"id": str(record.get("id", f"line {number}"))}
    if number == 0:
        raise InputError(f"{path}: no records in it")


def run(main: Callable[[], None]) -> None:
    """Runs a program; wrong input ends in one line and exit code 2."""
    transformers.logging.set_verbosity_error()  # what is wrong is said in our one line
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        main()
    except (InputError, OSError, dcp.CheckpointException) as error:  # OSError: a full disk, an odd name, ...
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # the first process says it; torchrun ends the others meanwhile
        message = "".join(c if c.isprintable() else " " for c in reason(error))  # it may quote the data
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# The first flag of each group of --help
HEADINGS = {"--margin": "method", "--max-length": "tokens", "--lora-rank": "optimization"}
HEADINGS |= {"--pack-tokens": "speed and memory", "--eval-every": "watching and safety"}


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows a description as it is written, HEADINGS, and the default of each flag that has one."""

    def add_argument(self, action: Action) -> None:
        for flag in action.option_strings:
            if flag in HEADINGS:
                self._add_item(str, [f"\n{HEADINGS[flag]}:\n"])
        super().add_argument(action)

    def _get_help_string(self, action: Action) -> str | None:
        told = action.required or action.default in (None, "")
        return action.help if told else super()._get_help_string(action)


def main() -> None:
    """Trains as the flags say; see --help."""
    about = {"description": __doc__, "formatter_class": HelpFormatter}
    about |= {"usage": SUPPRESS, "allow_abbrev": False}  # without the usage, a wrong flag is one line
    train(Config(**vars(transformers.HfArgumentParser(Config, **about).parse_args())))


if __name__ == "__main__":
    run(main)
