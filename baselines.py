"""The objectives that the paper compares CLHA with (Section 3.2), as pure functions of log-probs and rewards.

    python clha.py --objective pro --model MODEL --train_data train.jsonl --output_dir out/pro

Data, trainer and evaluation are CLHA's own, so that two rows of a table differ in their objective alone. As
in clha.py, a query's replies stand best first, and where it has fewer than l its rewards are NaN. Each is

    f(avg_logps, sum_logps, rewards, *, sft_weight, ...) -> (B,)

with avg_logps, sum_logps, rewards (B, l). `sft_weight` weighs the imitation of the best reply: at 0 what is
left is the ranking term.

| objective | source | weight of the SFT term, if --alpha is not given |
| --- | --- | --- |
| sft | imitate the best reply by reward (CLHA's paper, Section 3.2) | 1 |
| rrhf | Yuan et al. 2023: L_rank + L_ft | 1 |
| pro | Song et al. 2023; without their temperatures, CLHA's Eq. 2 | 0.05 (l - 1)^2, as in CLHA |
| coh | Liu et al. 2023a: imitate text that calls one reply good, another bad | 1 |
| dpo | Rafailov et al. 2023, Eq. 7; its Appendix A.3 for more than two replies | 0 |
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import clha
from records import InputError, Record

GOOD, BAD = "Good answer:", "Bad answer:"  # what chain of hindsight calls the replies

# ------------------------------------------------------------------------------------------------------------
# The objectives


def best_nll(logps: Tensor, rewards: Tensor) -> Tensor:
    """Minus the log-prob of the reply with the highest reward: (B, l), (B, l) -> (B,)."""
    best = rewards.nan_to_num(nan=-math.inf).argmax(1, keepdim=True)  # the first of equals
    return -logps.gather(1, best)[:, 0]


def plackett_luce(scores: Tensor, present: Tensor) -> Tensor:
    """How unlikely the order is: -sum_k log exp(s_k) / sum_{i >= k} exp(s_i), (B, l), (B, l) -> (B,)."""
    scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)  # infinite, its gradient were NaN
    rest = scores.flip(1).logcumsumexp(1).flip(1)  # (B, l), log sum_{i >= k} exp(s_i)
    return (rest - scores).masked_fill(~present, 0).sum(1)


def sft(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, sft_weight: float) -> Tensor:
    """Imitates the reply with the highest reward, and uses no other."""
    return sft_weight * best_nll(sum_logps, rewards)


def rrhf(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, sft_weight: float, sft_reduction: str = "sum"
) -> Tensor:
    """RRHF: sum over pairs with r_i < r_j of max(0, p_i - p_j), plus the SFT term.

    Their paper's SFT term L_ft is a sum over the tokens; their code takes a mean (`sft_reduction` "mean"),
    which makes it many times smaller.
    """
    below = rewards[:, :, None] < rewards[:, None, :]  # (B, l, l); never with NaN
    hinge = (avg_logps[:, :, None] - avg_logps[:, None, :]).clamp(min=0)
    logps = sum_logps if sft_reduction == "sum" else avg_logps
    return (hinge * below).sum((1, 2)) + sft_weight * best_nll(logps, rewards)


def pro(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, sft_weight: float, temperatures: bool = True
) -> Tensor:
    """PRO: reply k is set against all that are worse, for k = 1 ... l - 1, plus the SFT term.

    The temperatures, 1 / (r_k - r_j), are here the factors that they are in their code: p_j counts r_k - r_j
    times, and p_k as often as the largest of those. Their code adds 1e-10 inside the logarithm, which rules
    the loss when the rest of it is small; here the logarithm is a stable one.
    """
    present, imitation = rewards.isfinite(), sft_weight * best_nll(sum_logps, rewards)
    if not temperatures:
        return plackett_luce(avg_logps, present) + imitation
    loss = torch.zeros_like(avg_logps[:, 0])
    for k in range(avg_logps.shape[1] - 1):
        worse = present[:, k + 1 :]  # (B, l - k - 1)
        factor = (rewards[:, k, None] - rewards[:, k + 1 :]).masked_fill(~worse, -math.inf)
        largest = factor.amax(1).masked_fill(~worse.any(1), 0)  # 0: the last reply has none to beat
        negatives = (factor.masked_fill(~worse, 0) * avg_logps[:, k + 1 :]).masked_fill(~worse, -math.inf)
        positive = largest * avg_logps[:, k]
        loss = loss + torch.cat([positive[:, None], negatives], dim=1).logsumexp(1) - positive
    return loss + imitation


def coh(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, sft_weight: float) -> Tensor:
    """Chain of hindsight: plain SFT on each text that `hindsight` made, summed over the texts of a query.

    Their code leaves the words "Good answer:" out of the loss; here they are tokens like the others.
    """
    return -sft_weight * (sum_logps * rewards.isfinite()).sum(1)


def dpo(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, sft_weight: float, reference_logps: Tensor,
    beta: float = 0.1,
) -> Tensor:  # fmt: skip
    """DPO: the order should be likely where a reply scores beta (sum_logps - reference_logps), (B, l) each.

    For two replies this is -log sigmoid of the difference of their scores, Eq. 7 of the DPO paper.
    """
    scores = beta * (sum_logps - reference_logps)
    return plackett_luce(scores, rewards.isfinite()) + sft_weight * best_nll(sum_logps, rewards)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"sft": sft, "rrhf": rrhf, "pro": pro, "coh": coh, "dpo": dpo}

# Settings of clha.Config that only some objectives read, and which of them read which.
OPTIONS = {"rrhf": ("sft_reduction",), "pro": ("temperatures",), "dpo": ("beta",)}
NOT_SHARED = {
    "margin", "min_reward_gap", "reduction", "sft_reduction", "sft_target", "rescore", "contrast",
    "temperatures", "beta",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# What clha.py calls


def hindsight(record: Record) -> Record:
    """A record whose two replies are texts of chain of hindsight: the best reply and the worst, either first.

    `evaluate.py --hindsight` asks the trained model for what comes after "Good answer:".
    """
    rewards = record["rewards"]
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])  # the first of equals is the better one
    good, bad = f"{GOOD} {record['responses'][order[0]]}", f"{BAD} {record['responses'][order[-1]]}"
    texts = [f"{good}\n\n{bad}", f"{bad}\n\n{good}"]
    return record | {"responses": texts, "rewards": [max(rewards)] * 2, "chosen": 0}


def check_flags(config: clha.Config) -> None:
    """Raises InputError for a flag that --objective does not read."""
    others = NOT_SHARED - {*OPTIONS.get(config.objective, ())}
    unread = sorted(name for name in others if getattr(config, name) != getattr(clha.Config, name))
    if unread:
        raise InputError(f"--objective {config.objective}: has no use for {', '.join(unread)}")
    if config.objective == "dpo" and config.beta <= 0:
        raise InputError(f"--beta {config.beta:g}: must be above 0")


def make_loss(config: clha.Config, model: Any, data: list[Any], fill_to: int = 0) -> Callable[..., Any]:
    """The loss of --objective in the form in which `clha.run_batch` calls it.

    For DPO the untrained `model` is asked first for its log-probs of all examples (its frozen self), which
    the `Examples` of `data` keep as "reference_logps".
    """
    settings = {name: getattr(config, name) for name in OPTIONS.get(config.objective, ())}
    objective = partial(OBJECTIVES[config.objective], sft_weight=config.alpha, **settings)
    if config.objective == "dpo":
        for examples in filter(len, data):
            examples.more["reference_logps"] = all_logps(model, examples, config.pack_tokens, fill_to)

    def loss_fn(
        avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, *, counts: Tensor, target: None, **more: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = objective(avg_logps, sum_logps, rewards, **more).sum() / counts[0]
        keep, gate = clha.rescore(rewards, None)
        metrics = clha.query_metrics(avg_logps.detach(), rewards, keep, gate)
        return loss, {"loss": loss.detach()} | {name: v.sum() / counts[0] for name, v in metrics.items()}

    return loss_fn


@torch.no_grad()
def all_logps(
    model: Any, examples: Sequence[clha.Example], pack_tokens: int, fill_to: int = 0
) -> list[list[float]]:
    """The summed log-probs of each example's replies under `model` as it is now; all processes share them."""
    model.eval()  # without dropout
    rank, processes, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    found: dict[int, list[float]] = {}
    shares = clha.deal([clha.size(example) for example in examples], fill_to or pack_tokens, processes)
    for part in tqdm(shares[rank::processes], desc="log-probs", disable=None if rank == 0 else True):
        batch = clha.pack([examples[i] for i in part or [0]], device, fill_to)  # without any, only keep step
        rows = clha.sequence_logps(model, batch)[0].tolist()
        found |= {i: row[: len(examples[i]["response_ids"])] for i, row in zip(part, rows, strict=False)}
    everywhere: list[Any] = [found] * processes
    if processes > 1:
        dist.all_gather_object(everywhere, found)
    model.train()
    whole = {i: logps for share in everywhere for i, logps in share.items()}
    return [whole[i] for i in range(len(examples))]
