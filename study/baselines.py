"""The objectives that the paper compares CLHA with, and the released loss, trained by clha.py's trainer.

    python -m study.baselines --objective pro --model MODEL --train_data train.jsonl --output_dir out/pro
    torchrun --nproc_per_node 8 -m study.baselines --objective dpo ...

All flags of clha.py apply, except those of the loss that an objective does not use. Data, trainer and
evaluation are clha.py's, so two rows of a table differ in their objective alone.

| objective | source | --alpha, the weight of the SFT term, if not given |
| --- | --- | --- |
| sft | imitate the best response by reward (CLHA's paper, Section 3.2) | - |
| gated_sft | the same if its reward is above zero: Table 3, "w/o L_clha" | 0.05 (l - 1)^2, as in CLHA |
| rrhf | Yuan et al. 2023: L_rank + L_ft | 1 |
| pro | Song et al. 2023; without their temperatures, Eq. 2 of CLHA's paper | 0.05 (l - 1)^2, as in CLHA |
| coh | Liu et al. 2023a: imitate text that calls one response good, another bad | - |
| dpo | Rafailov et al. 2023, Eq. 7; Appendix A.3 for more than two responses | 0 |
| simpo | Meng et al. 2024: means in place of DPO's reference, and a margin --gamma | 0 |
| cpo | Xu et al. 2024, with the hinge that TRL's CPOTrainer offers: CLHA's nearest relative | 1 |
| odpo | Amini et al. 2024: DPO with the logarithm of the reward gap as a margin | 0 |
| lipo | Liu et al. 2024, LiPO-lambda: pairs weighted by reward and rank | 0 |
| released | CLHA as in the authors' code, by micro-batches of two queries | 0.05 (l - 1)^2 |

What some need besides rewards is first added to the records by a stage:

    python -m study.baselines STAGE --data in.jsonl --out out.jsonl

| stage | for | the records get |
| --- | --- | --- |
| labels | the human choice, without a reward model | rewards 1 for the chosen response and 0 for the others |
| ranked | released | their responses best first, as the authors' preprocessing leaves them |
| hindsight | coh | two texts; generate with --response_prefix "Good answer:" --stop_strings "Bad answer:" |
| reference | dpo, odpo, lipo | "reference_logps", by --model MODEL; torchrun shares the work |
"""

import argparse
import math
import sys
from dataclasses import MISSING, dataclass, replace
from functools import partial
from inspect import signature
from operator import itemgetter
from pathlib import Path
from statistics import median_low
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import clha
import reward
from clha import InputError, Record

# 1. The objectives ------------------------------------------------------------------------------------------
# avg_logps, sum_logps, rewards (B, l) -> (B,). As in clha.py, responses are ordered best first, and rewards
# are NaN where a query has fewer than l. With alpha 0 the ranking term is left.


def best_nll(logps: Tensor, rewards: Tensor) -> Tensor:
    """Minus the log-probability of the response with the highest reward: (B, l), (B, l) -> (B,)."""
    best = rewards.nan_to_num(nan=-math.inf).argmax(1, keepdim=True)  # the first of equals
    return -logps.gather(1, best)[:, 0]


def plackett_luce(scores: Tensor, present: Tensor) -> Tensor:
    """How unlikely the order is: -sum_k log exp(s_k) / sum_{i >= k} exp(s_i), (B, l), (B, l) -> (B,)."""
    lowest = torch.finfo(scores.dtype).min  # -inf would make gradients NaN
    scores = scores.masked_fill(~present, lowest)
    rest = scores.flip(1).logcumsumexp(1).flip(1)  # (B, l), log sum_{i >= k} exp(s_i)
    return (rest - scores).masked_fill(~present, 0).sum(1)


def leads(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """s_i - s_j, and whether r_i > r_j, for all pairs of a query: (B, l), (B, l) -> (B, l, l) each."""
    better = rewards[:, :, None] > rewards[:, None, :]  # never with NaN
    scores = scores.masked_fill(rewards.isnan(), 0)  # NaN, even times zero, would reach gradients
    return scores[:, :, None] - scores[:, None, :], better


def sft(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """Imitates the response with the highest reward, and uses no other."""
    return alpha * best_nll(sum_logps, rewards)


def gated_sft(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """alpha (1 - lambda) L_sft of Eq. 7: imitates the best response if its reward is above zero."""
    gate = (rewards > 0).any(1)
    return alpha * gate * best_nll(sum_logps, rewards)


def rrhf(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, sft_reduction: str = "sum"
) -> Tensor:
    """RRHF: the sum of max(0, p_j - p_i) over pairs with r_i > r_j, plus the SFT term, of sums or means."""
    lead, better = leads(avg_logps, rewards)
    hinge = (-lead).clamp(min=0)
    logps = sum_logps if sft_reduction == "sum" else avg_logps
    return (hinge * better).sum((1, 2)) + alpha * best_nll(logps, rewards)


def pro(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, temperatures: bool = True
) -> Tensor:
    """PRO: response k is set against all that are worse, for k = 1 ... l - 1, plus the SFT term.

    The temperatures, 1 / (r_k - r_j), are used as the factors that they are in their code: p_j counts
    r_k - r_j times, and p_k as often as the largest of those. Their code adds 1e-10 inside the logarithm.
    """
    present = rewards.isfinite()
    imitation = alpha * best_nll(sum_logps, rewards)
    if not temperatures:
        return plackett_luce(avg_logps, present) + imitation
    loss = torch.zeros_like(avg_logps[:, 0])
    for k in range(avg_logps.shape[1] - 1):
        worse = present[:, k + 1 :]  # (B, l - k - 1)
        factor = rewards[:, k, None] - rewards[:, k + 1 :]
        largest = factor.masked_fill(~worse, -math.inf).amax(1).nan_to_num(neginf=0)  # 0: none is worse
        negatives = factor.nan_to_num(0) * avg_logps[:, k + 1 :]
        negatives = negatives.masked_fill(~worse, -math.inf)
        positive = largest * avg_logps[:, k]
        scores = torch.cat([positive[:, None], negatives], dim=1)
        loss = loss + scores.logsumexp(1) - positive
    return loss + imitation


def coh(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """Chain of hindsight: SFT on the texts of `hindsight`. Their code leaves "Good answer:" out of it."""
    return -alpha * (sum_logps * rewards.isfinite()).sum(1)


def dpo(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, reference_logps: Tensor, beta: float
) -> Tensor:
    """DPO: the order should be likely where a response scores beta (sum_logps - reference_logps), (B, l)."""
    scores = beta * (sum_logps - reference_logps)
    return plackett_luce(scores, rewards.isfinite()) + alpha * best_nll(sum_logps, rewards)


def simpo(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """SimPO: -log sigmoid(beta (p_i - p_j) - gamma), summed over pairs with r_i > r_j."""
    lead, better = leads(avg_logps, rewards)
    losses = F.softplus(gamma - beta * lead)
    return (losses * better).sum((1, 2)) + alpha * best_nll(sum_logps, rewards)


def cpo(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, beta: float) -> Tensor:
    """CPO with a hinge: max(0, 1 - beta (s_i - s_j)) of sums s over pairs, plus a mean over tokens."""
    lead, better = leads(sum_logps, rewards)
    losses = (1 - beta * lead).clamp(min=0)
    return (losses * better).sum((1, 2)) + alpha * best_nll(avg_logps, rewards)


def odpo(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, reference_logps: Tensor, beta: float
) -> Tensor:
    """ODPO: -log sigmoid(beta (s_i - s_j) - log(r_i - r_j)) over pairs, s = sum_logps - reference_logps."""
    lead, better = leads(beta * (sum_logps - reference_logps), rewards)
    gap, _ = leads(rewards, rewards)
    offset = torch.where(better, gap, 1).log()
    losses = F.softplus(offset - lead)
    return (losses * better).sum((1, 2)) + alpha * best_nll(sum_logps, rewards)


def lipo(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, alpha: float, reference_logps: Tensor, beta: float
) -> Tensor:
    """LiPO-lambda: sum over r_i > r_j of Delta_ij log(1 + exp(-beta (s_i - s_j))), s as in `odpo`.

    Delta_ij = |2^psi_i - 2^psi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|: psi_i is the mean probability of
    response i to beat the others by the reward model, tau_i its rank by s, from 1.
    """
    scores = beta * (sum_logps - reference_logps)
    lead, better = leads(scores, rewards)
    gap, _ = leads(rewards, rewards)  # 0 to itself
    present = rewards.isfinite()
    pairs = present[:, :, None] & present[:, None, :]
    wins = (gap.sigmoid() * pairs).sum(2) - 0.5  # without itself
    psi = wins / (present.sum(1, keepdim=True) - 1)  # (B, l)
    order = scores.masked_fill(~present, -math.inf).argsort(dim=1, descending=True, stable=True)
    tau = 1 + order.argsort(dim=1)  # (B, l)
    gain, _ = leads(2**psi, rewards)
    discount, _ = leads(1 / (1 + tau).log(), rewards)
    losses = gain.abs() * discount.abs() * F.softplus(-lead)
    return (losses * better).sum((1, 2)) + alpha * best_nll(sum_logps, rewards)


FUNCTIONS = (sft, gated_sft, rrhf, pro, coh, dpo, simpo, cpo, odpo, lipo)
OBJECTIVES = {function.__name__: function for function in FUNCTIONS}

# 2. The release as released ---------------------------------------------------------------------------------
# It is no sum over queries: the kept pairs of a micro-batch share one mean.

MICRO_BATCH = 2  # queries per device and backward pass (train_hh.sh)


def released_clha_loss(
    avg_logps: Tensor,
    sum_logps: Tensor,
    rewards: Tensor,
    *,
    margin: float,
    min_reward_gap: float,
    alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The authors' loss of one micro-batch: (B, l) each -> the loss and its metrics, all scalars.

    The order of the responses is taken for the ranking, whatever the rewards say. For each offset d = j - i
    the loss has the mean of max(0, p_j - p_i + margin d) over the micro-batch's kept pairs, or 0.
    """
    keep, gate = clha.rescore(rewards, min_reward_gap)
    rank_loss = torch.zeros_like(avg_logps[0, 0])
    for offset in range(1, rewards.shape[1]):
        kept = keep.diagonal(offset, dim1=1, dim2=2)  # (B, l - offset)
        hinge = (avg_logps[:, offset:] - avg_logps[:, :-offset] + margin * offset).clamp(min=0)
        rank_loss = rank_loss + (hinge * kept).sum() / kept.sum().clamp(min=1)
    sft_loss = clha.gated_sft_loss(sum_logps, gate).mean()
    metrics = {"loss/rank": rank_loss.detach(), "loss/sft": sft_loss.detach()}
    order = rewards.nan_to_num(nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    sorted_logps = avg_logps.detach().gather(1, order)  # metrics go by reward
    found = clha.query_metrics(sorted_logps, rewards.gather(1, order), keep, gate)
    metrics |= {name: value.mean() for name, value in found.items()}
    return rank_loss + alpha * sft_loss, metrics


def released_loss_fn(config: "BaselineConfig") -> clha.Loss:
    """The mean of the released loss over a pack's micro-batches; a last single query has half the weight."""
    settings = loss_settings(config)

    def loss_fn(avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        totals: dict[str, Any] = {}
        parts = [values.split(MICRO_BATCH) for values in (avg_logps, sum_logps, rewards)]
        for matrices in zip(*parts, strict=True):
            share = len(matrices[0]) / len(rewards)
            loss, metrics = released_clha_loss(*matrices, **settings)
            metrics["loss"] = loss
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + share * value
        return totals.pop("loss"), totals

    return loss_fn


# 3. Training ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BaselineConfig(clha.Config):
    """clha.py's settings, the objective, and what belongs to some objectives alone."""

    objective: Literal[(*OBJECTIVES, "released")] = clha.option(MISSING, "what is minimized")
    beta: float = clha.option(0.1, "of DPO and its kin: how closely it keeps to the reference")
    gamma: float = clha.option(0.0, "margin of SimPO")
    temperatures: bool = clha.option(True, "of PRO: factors by reward gap; without them it is Eq. 2")
    sft_reduction: Literal["sum", "mean"] = clha.option("sum", "RRHF's SFT term: sum (paper) or mean (code)")


LOSS_SETTINGS = (
    "margin",
    "min_reward_gap",
    "gate",
    "alpha",
    "beta",
    "gamma",
    "temperatures",
    "sft_reduction",
)
ALPHAS = {"sft": 1.0, "rrhf": 1.0, "coh": 1.0, "cpo": 1.0, "dpo": 0.0, "simpo": 0.0, "odpo": 0.0, "lipo": 0.0}
REFERENCED = ("dpo", "odpo", "lipo")  # their records need "reference_logps"
RELEASED = {"margin": 3.0, "min_reward_gap": 3.0}  # one literal 3 of the released code is both


def default_alpha(config: BaselineConfig) -> float:
    """The weight of the SFT term where none is given; l is the median of the numbers of responses."""
    if config.objective in ALPHAS:
        return ALPHAS[config.objective]
    length = median_low(len(record["responses"]) for record in clha.iter_records(config.train_data))
    return 0.05 * (length - 1) ** 2


def loss_settings(config: BaselineConfig) -> dict[str, Any]:
    """The settings that the function of the objective takes."""
    taken = signature(OBJECTIVES.get(config.objective, released_clha_loss)).parameters
    return {name: getattr(config, name) for name in LOSS_SETTINGS if name in taken}


def objective_loss_fn(config: BaselineConfig) -> clha.Loss:
    """The mean of an objective over a pack's queries, in the form in which `clha.train` calls it."""
    objective = partial(OBJECTIVES[config.objective], **loss_settings(config))

    def loss_fn(
        avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, **more: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = objective(avg_logps, sum_logps, rewards, **more).mean()
        metrics = clha.query_metrics(avg_logps.detach(), rewards, *clha.rescore(rewards, 0.0, use_gate=False))
        return loss, {name: value.mean() for name, value in metrics.items()}

    return loss_fn


def train(config: BaselineConfig) -> None:
    """A whole run of `clha.train`. Raises InputError for settings that the objective does not read."""
    objective = config.objective
    read = loss_settings(config)
    if objective in ("sft", "coh"):  # nothing but the SFT term: its weight is 1
        del read["alpha"]
    changed = [name for name in LOSS_SETTINGS if getattr(config, name) != getattr(BaselineConfig, name)]
    unread = ", ".join(name for name in changed if name not in read)
    if unread:
        raise InputError(f"--objective {objective}: does not use {unread}")
    if config.beta <= 0:
        raise InputError(f"--beta {config.beta:g}: must be above 0")
    if objective == "released" and config.batch_size % MICRO_BATCH:
        raise InputError(f"--batch_size {config.batch_size}: must be even; released takes queries by two")
    if config.alpha is None:
        config = replace(config, alpha=default_alpha(config))
    if objective == "released":
        clha.train(config, released_loss_fn(config), ranked=False, group=MICRO_BATCH)
    elif objective in REFERENCED:
        clha.train(config, objective_loss_fn(config), fields=("rewards", "reference_logps"))
    else:
        clha.train(config, objective_loss_fn(config))


# 4. Stages that write record files --------------------------------------------------------------------------

GOOD = "Good answer:"  # what chain of hindsight calls the responses
BAD = "Bad answer:"


def labels(record: Record) -> Record:
    """The record with rewards 1 for the response that people chose and 0 for the others."""
    rewards = [0.0] * len(record["responses"])
    rewards[record["chosen"]] = 1.0
    return record | {"rewards": rewards}


def ranked(record: Record) -> Record:
    """The record with its responses best first, as the authors' preprocessing leaves them."""
    moved = clha.rank(record)
    if "chosen" not in record:  # an order by reward is no label
        del moved["chosen"]
    return moved


def hindsight(record: Record) -> Record:
    """A record whose two responses are texts of chain of hindsight: best and worst response, either first."""
    responses = clha.rank(record)["responses"]
    good = f"{GOOD} {responses[0]}"
    bad = f"{BAD} {responses[-1]}"
    texts = [f"{good}\n\n{bad}", f"{bad}\n\n{good}"]
    best = max(record["rewards"])
    found = {"prompt": record["prompt"], "responses": texts, "rewards": [best, best], "chosen": 0}
    return found | {name: record[name] for name in ("subset", "id") if name in record}


def write_reference(args: argparse.Namespace) -> None:
    """adds "reference_logps", the summed log-probability of each response under a model"""
    _, processes, device = clha.init_process()
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    config = clha.Config(args.model, args.data, args.out, **limits, pack_tokens=args.pack_tokens)
    config = clha.settle(config, device)
    records = reward.read_records(args.data)
    tokenizer = clha.load_tokenizer(args.model, args.template)
    policy, _ = clha.load_policy(config, device)

    def encode(record: Record) -> clha.Example | None:
        try:
            return clha.encode(record, tokenizer, config)
        except InputError as error:
            raise InputError(f"{args.data}, {record['id']}: {error}") from error

    longest = max(filter(None, map(encode, records)), key=itemgetter("longest"), default=None)
    if not longest:
        raise InputError(f"{args.data}: no prompt fits --max_prompt_length {args.max_prompt_length}")
    clha.check_policy(policy, longest, longest["longest"], config.dtype)
    policy.eval()

    @torch.no_grad()
    def work(share: list[Record], _: int) -> list[Record]:
        # A chat that does not fit is left out of the training too, whatever number it gets.
        examples = [encode(record) or longest for record in share]
        sizes = [example["size"] for example in examples]
        packs = clha.balance(sizes, config.pack_tokens, 1) if share else []
        most = torch.tensor(len(packs))  # of any process; a sharded model needs as many passes on each
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found = share.copy()
        for indices in packs + [[]] * (int(most) - len(packs)):
            queries = [examples[i] for i in indices] or [longest]
            rows = policy(clha.pack(queries, device)).tolist()
            for i, row in zip(indices, rows, strict=False):
                width = len(share[i]["responses"])
                found[i] = share[i] | {"reference_logps": (row + [0.0] * width)[:width]}
        return found

    settings = [reward.fingerprint(args.model), limits, config.dtype, tokenizer.chat_template]
    reward.write_in_parts(Path(args.out), records, settings, work, 512 * processes, "reference")


def write_changed(args: argparse.Namespace) -> None:
    """rewrites each record, as in the table above"""
    change, need = CHANGES[args.command]
    records = clha.iter_records(args.data, need=[need])
    reward.write_jsonl(args.out, (change(record) for record in records))


CHANGES = {"labels": (labels, "chosen"), "ranked": (ranked, "rewards"), "hindsight": (hindsight, "rewards")}
STAGES = dict.fromkeys(CHANGES, write_changed) | {"reference": write_reference}

# 5. The command line ----------------------------------------------------------------------------------------


def parse_config(argv: list[str]) -> BaselineConfig:
    """The flags of a training run; margin and reward gap of `released` are 3 if not given."""
    parser = reward.Parser(BaselineConfig, description=__doc__)
    args = parser.parse_args(argv)
    if args.objective == "released":
        parser.set_defaults(**RELEASED)
        args = parser.parse_args(argv)
    return BaselineConfig(**vars(args))


def main(argv: list[str]) -> None:
    """Runs a stage if the first word names one, else a training run."""
    if not argv or argv[0] not in STAGES:
        train(parse_config(argv))
        return
    parser = reward.Parser(description=__doc__)
    for name, run in STAGES.items():
        flag = parser.add_command(name, run)
        flag("--data", required=True, help="records, JSON lines")
        flag("--out", required=True, help="the records as the stage leaves them")
    flag("--model", required=True, help="reference model: a folder or a hub name")
    flag("--template", default="auto", help="as in the training run")
    flag("--max_length", type=int, default=512, help="as in the training run")
    flag("--max_prompt_length", type=int, default=384, help="as in the training run")
    flag("--pack_tokens", type=int, default=0, help="of a forward pass; 0: by device")
    args = parser.parse_args(argv)
    reward.check_numbers(args)
    reward.check_output(args.out, "new")
    args.run(args)


if __name__ == "__main__":
    clha.run(lambda: main(sys.argv[1:]))
