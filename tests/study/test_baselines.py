"""Every objective of study/baselines.py by value: by hand, against released values, and in training runs."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, golden
from safetensors.torch import load_file
from torch import Tensor

import clha
import reward
from clha import InputError, Record
from study import baselines
from study.baselines import OBJECTIVES, BaselineConfig, released_clha_loss

NAN = float("nan")
SMALL = {"batch_size": 16, "pack_tokens": 2048, "activation_checkpointing": "none"}

# ------------------------------------------------------------------------------------------------------------
# Released values: a few cases in numbers here, all of them where ../shared is

# Of ../shared/golden/losses.json: cases 24, 42, 46, 64, 70 and 108; 42 and 46 are not sorted by reward.
CASES: list[dict[str, Any]] = [
    {
        "mean_logp": [[-0.359375, -1.30859375, -1.0859375], [-1.4296875, -1.14453125, -1.265625]],
        "sum_logp": [[-5.03125, -52.34375, -20.6328125], [-1.4296875, -59.515625, -46.828125]],
        "rewards": [[4.46875, 0.296875, -2.71875], [5.328125, 3.03125, -5.984375]],
        "margin": 3.0,
        "gap_threshold": 3.0,
        "rank_loss": 8.436197916666666,
        "sft_weighted": 0.64609375,
        "grad": [[-5 / 6, 0.0, 5 / 6], [-1 / 2, -1 / 3, 5 / 6]],
        "pro": 7.48900963399153,
        "plain_pro": 1.6632383536731659,
        "rrhf": [0.22265625, 0.44921875],
        "sft_mean": [0.359375, 1.4296875],
    },
    {
        "mean_logp": [[-0.66796875, -1.828125, -1.54296875, -0.2734375]],
        "sum_logp": [[-40.078125, -16.453125, -16.97265625, -9.84375]],
        "rewards": [[1.984375, -2.265625, 0.296875, -2.96875]],
        "margin": 3.0,
        "gap_threshold": 3.0,
        "rank_loss": 12.44921875,
        "sft_weighted": 18.03515625,
        "grad": [[-1.5, 0.5, -0.5, 1.5]],
        "pro": 11.733523732614717,
        "plain_pro": 4.6396076403445985,
        "rrhf": [3.21875],
        "sft_mean": [0.66796875],
    },
    {
        "mean_logp": [
            [-1.140625, -1.64453125, -2.55078125, -1.01171875],
            [-2.07421875, -1.93359375, -2.03125, -3.22265625],
        ],
        "sum_logp": [
            [-49.046875, -88.8046875, -22.95703125, -24.28125],
            [-89.19140625, -90.87890625, -77.1875, -164.35546875],
        ],
        "rewards": [[0.890625, -4.6875, 0.65625, -3.0625], [0.125, 6.5625, -0.375, -4.453125]],
        "margin": 3.0,
        "gap_threshold": 3.0,
        "rank_loss": 16.03125,
        "sft_weighted": 31.103613281250002,
        "grad": [[-2 / 3, 0.0, 0.0, 2 / 3], [-2 / 3, -1.0, 0.0, 5 / 3]],
        "pro": 25.82292096374063,
        "plain_pro": 3.159621518633302,
        "rrhf": [2.57421875, 0.04296875],
        "sft_mean": [1.140625, 1.93359375],
    },
    {
        "mean_logp": [
            [-0.828125, -0.48828125, -4.84375],
            [-0.84765625, -7.4140625, -3.17578125],
            [-1.7265625, -2.3984375, -3.0234375],
            [-1.73828125, -2.7734375, -1.40625],
        ],
        "sum_logp": [
            [-5.796875, -20.99609375, -276.09375],
            [-20.34375, -163.109375, -9.52734375],
            [-70.7890625, -127.1171875, -36.28125],
            [-3.4765625, -38.828125, -67.5],
        ],
        "rewards": [
            [-0.0625, -0.59375, -1.328125],
            [2.984375, 2.375, 2.21875],
            [1.59375, 1.03125, -0.96875],
            [2.5625, 1.078125, 0.46875],
        ],
        "margin": 3.0,
        "gap_threshold": 3.0,
        "rank_loss": 0.0,
        "sft_weighted": 4.73046875,
        "grad": [[0.0, 0.0, 0.0]] * 4,
        "pro": 2.0780589273420302,
        "plain_pro": 2.214402505525607,
        "rrhf": [0.33984375, 4.23828125, 0.0, 1.69921875],
        "sft_mean": [0.828125, 0.84765625, 1.7265625, 1.73828125],
    },
    {
        "mean_logp": [[-1.0, -2.0]],
        "sum_logp": [[-8.0, -16.0]],
        "rewards": [[0.0, -4.0]],
        "margin": 3.0,
        "gap_threshold": 3.0,
        "rank_loss": 2.0,
        "sft_weighted": 0.0,
        "grad": [[-1.0, 1.0]],
        "pro": 0.01814993327942327,
        "plain_pro": 0.3132616875182229,
        "rrhf": [0.0],
        "sft_mean": [1.0],
    },
    {
        "mean_logp": [
            [-2.54296875, -0.94140625, -0.86328125],
            [-2.6328125, -2.5390625, -3.875],
            [-1.09765625, -2.90234375, -5.8203125],
        ],
        "sum_logp": [
            [-129.69140625, -3.765625, -29.3515625],
            [-110.578125, -38.0859375, -93.0],
            [-39.515625, -58.046875, -128.046875],
        ],
        "rewards": [
            [1.515625, 0.34375, 0.015625],
            [0.859375, -0.171875, -0.234375],
            [1.140625, 0.484375, -0.265625],
        ],
        "margin": 0.5,
        "gap_threshold": 0.25,
        "rank_loss": 1.5479166666666666,
        "sft_weighted": 18.65234375,
        "grad": [[-8 / 15, 0.0, 8 / 15], [-0.2, 0.2, 0.0], [0.0, 0.0, 0.0]],
        "pro": 2.0937595878192967,
        "plain_pro": 1.4919938088774978,
        "rrhf": [3.359375, 0.09375, 0.0],
        "sft_mean": [2.54296875, 2.6328125, 1.09765625],
    },
]


def matrices(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """avg_logps, sum_logps and rewards of a case, in float64."""
    avg_logps = torch.tensor(case["mean_logp"], dtype=torch.float64, requires_grad=True)
    sum_logps = torch.tensor(case["sum_logp"], dtype=torch.float64)
    return avg_logps, sum_logps, torch.tensor(case["rewards"], dtype=torch.float64)


def file_cases() -> list[dict[str, Any]]:
    """All cases of losses.json in the form of `CASES`."""
    cases = []
    for case in golden("losses.json")["cases"]:
        release = case["release"]
        own = case["own_float64"]
        flat = {name: case[name] for name in ("mean_logp", "sum_logp", "rewards", "margin", "gap_threshold")}
        flat["sft_index"] = case["sft_index"]
        flat["rank_loss"] = release["clha"]["rank_loss"]
        flat["sft_weighted"] = release["clha"]["sft_weighted"]
        flat["grad"] = release["clha"]["grad_rank_wrt_p"]
        flat["pro"] = release["pro"]["rank_loss"]
        flat["plain_pro"] = own["pro_plain_eq"]["rank_loss"]
        flat["rrhf"] = [row["rrhf_loss"] for row in release["rrhf_rows"]]
        flat["sft_mean"] = [row["sft_loss_token_mean"] for row in own["rrhf_rows"]]
        cases.append(flat)
    return cases


def compare_released(case: dict[str, Any]) -> None:
    """`released_clha_loss` has the released rank loss, its gradient, and the released SFT term."""
    avg, total, rewards = matrices(case)
    alpha = 0.05 * (rewards.shape[1] - 1) ** 2
    settings = {"margin": case["margin"], "min_reward_gap": case["gap_threshold"], "alpha": alpha}
    loss, metrics = released_clha_loss(avg, total, rewards, **settings)
    assert metrics["loss/rank"].item() == pytest.approx(case["rank_loss"], rel=1e-9, abs=1e-9)
    rank_loss, _ = released_clha_loss(avg, total, rewards, **settings | {"alpha": 0.0})
    if rank_loss.requires_grad:  # with one response per query there is no pair
        (gradient,) = torch.autograd.grad(rank_loss, avg)
        assert gradient.flatten().tolist() == pytest.approx(
            torch.tensor(case["grad"]).flatten().tolist(), abs=1e-6
        )
    # Their code is told which response to imitate, and their data always names the first.
    first = torch.tensor(case.get("sft_index", [0] * len(rewards)))[:, None]
    _, named = released_clha_loss(avg, total.gather(1, first), rewards.gather(1, first), **settings)
    assert alpha * named["loss/sft"].item() == pytest.approx(case["sft_weighted"], rel=1e-9, abs=1e-9)
    if not first.any():
        assert loss.item() == pytest.approx(case["rank_loss"] + case["sft_weighted"], rel=1e-9)


def compare_pro(case: dict[str, Any]) -> bool:
    """`pro` has the released ranking loss, unless the released 1e-10 weighs in; whether it was compared."""
    avg, total, rewards = matrices(case)
    plain = OBJECTIVES["pro"](avg, total, rewards, alpha=0.0, temperatures=False).mean()
    assert plain.item() == pytest.approx(case["plain_pro"], rel=1e-9, abs=1e-9)
    gaps = rewards[:, :, None] - rewards[:, None, :]
    if gaps.clamp(min=0).amax() * -avg.amin() > 13:  # exp(-13) is 2e-6: 1e-10 is seen next to it
        return False
    loss = OBJECTIVES["pro"](avg, total, rewards, alpha=0.0).mean()
    assert loss.item() == pytest.approx(case["pro"], rel=1e-4, abs=1e-4)
    return True


def compare_rrhf(case: dict[str, Any]) -> None:
    """`rrhf` has the released ranking loss of each query, and the SFT term by mean."""
    avg, total, rewards = matrices(case)
    ranking = OBJECTIVES["rrhf"](avg, total, rewards, alpha=0.0)
    assert ranking[: len(case["rrhf"])].tolist() == pytest.approx(case["rrhf"], rel=1e-6, abs=1e-6)
    loss = OBJECTIVES["rrhf"](avg, total, rewards, alpha=1.0, sft_reduction="mean")
    assert (loss - ranking).tolist() == pytest.approx(case["sft_mean"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_released_values(case: dict[str, Any]) -> None:
    compare_released(case)
    compare_rrhf(case)
    compare_pro(case)


def test_pro_is_compared_in_some_cases() -> None:
    assert [compare_pro(case) for case in CASES] == [False, True, False, False, True, True]


def test_all_released_values() -> None:
    cases = file_cases()
    assert len(cases) == 62
    for case in cases:
        compare_released(case)
        compare_rrhf(case)
    assert sum(compare_pro(case) for case in cases) > 20


# ------------------------------------------------------------------------------------------------------------
# Objectives by hand


def test_sft_imitates_the_response_with_the_highest_reward() -> None:
    avg = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    total = torch.tensor([[-4.0, -6.0], [-4.0, -6.0]])
    rewards = torch.tensor([[0.5, 0.1], [-0.5, 0.1]])  # the second is not sorted
    assert OBJECTIVES["sft"](avg, total, rewards, alpha=0.5).tolist() == [2.0, 3.0]
    assert OBJECTIVES["sft"](avg, total, rewards, alpha=0.0).tolist() == [0.0, 0.0]


def test_gated_sft_imitates_only_what_is_above_zero() -> None:
    total = torch.tensor([[-4.0, -6.0], [-4.0, -6.0], [-4.0, -6.0]])
    rewards = torch.tensor([[0.5, 0.1], [0.0, -1.0], [-0.1, NAN]])
    assert OBJECTIVES["gated_sft"](total, total, rewards, alpha=0.5).tolist() == [2.0, 0.0, 0.0]


def test_gated_sft_is_clha_without_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    total = -10 * torch.rand(8, 3, generator=generator)
    rewards = torch.randn(8, 3, generator=generator).sort(1, descending=True).values
    infinite = {"margin": 0.3, "min_reward_gap": 1e9}  # no pair is kept
    expected, _ = clha.clha_loss(total, total, rewards, **infinite, alpha=0.2)
    loss = OBJECTIVES["gated_sft"](total, total, rewards, alpha=0.2).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_rrhf_by_hand() -> None:
    # r = (2, 1, 1): the pairs with r_i < r_j are (2, 1) and (3, 1); the tie of 2 and 3 makes none.
    #   p_2 - p_1 = -1.5 + 2 = 0.5,   p_3 - p_1 = -3 + 2 < 0
    avg = torch.tensor([[-2.0, -1.5, -3.0]])
    total = torch.tensor([[-8.0, -3.0, -3.0]])
    rewards = torch.tensor([[2.0, 1.0, 1.0]])
    assert OBJECTIVES["rrhf"](avg, total, rewards, alpha=0.0).item() == pytest.approx(0.5)
    assert OBJECTIVES["rrhf"](avg, total, rewards, alpha=1.0).item() == pytest.approx(0.5 + 8.0)
    mean = OBJECTIVES["rrhf"](avg, total, rewards, alpha=1.0, sft_reduction="mean")
    assert mean.item() == pytest.approx(0.5 + 2.0)


def test_pro_by_hand() -> None:
    # One pair, r = (2, -1): both log-probs count three times.
    #   log(exp(3 p_1) + exp(3 p_2)) - 3 p_1 = log(1 + exp(3 (p_2 - p_1)))
    avg = torch.tensor([[-1.0, -0.5]])
    total = torch.tensor([[-3.0, -1.0]])
    rewards = torch.tensor([[2.0, -1.0]])
    expected = math.log(1 + math.exp(3 * 0.5))
    assert OBJECTIVES["pro"](avg, total, rewards, alpha=0.0).item() == pytest.approx(expected)
    with_sft = OBJECTIVES["pro"](avg, total, rewards, alpha=0.1)
    assert with_sft.item() == pytest.approx(expected + 0.3)


def test_pro_without_temperatures_is_equation_2_by_hand() -> None:
    avg = torch.tensor([[-1.0, -2.0, -3.0]])
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    rewards = torch.tensor([[9.0, 1.0, 0.0]])  # only their order counts
    loss = OBJECTIVES["pro"](avg, avg, rewards, alpha=0.0, temperatures=False)
    assert loss.item() == pytest.approx(expected)


def test_pro_does_not_drown_in_an_epsilon() -> None:
    # exp(-30) is 1e-13: the released form gives log(1e-10) + 30 = 7; the exact value is log(1 + exp(-30)).
    avg = torch.tensor([[-10.0, -20.0]])
    rewards = torch.tensor([[3.0, 0.0]])
    assert OBJECTIVES["pro"](avg, avg, rewards, alpha=0.0).item() == pytest.approx(0.0, abs=1e-6)


def test_coh_imitates_both_texts() -> None:
    total = torch.tensor([[-4.0, -6.0]])
    assert OBJECTIVES["coh"](total / 2, total, torch.zeros(1, 2), alpha=0.5).tolist() == [5.0]


def test_dpo_by_hand() -> None:
    # beta = 0.5: scores 0.5 (-4 + 6) = 1 and 0.5 (-6 + 5) = -0.5
    total = torch.tensor([[-4.0, -6.0]])
    rewards = torch.tensor([[1.0, 0.0]])
    settings = {"reference_logps": torch.tensor([[-6.0, -5.0]]), "beta": 0.5}
    loss = OBJECTIVES["dpo"](total, total, rewards, alpha=0.0, **settings)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    with_sft = OBJECTIVES["dpo"](total, total, rewards, alpha=0.1, **settings)
    assert with_sft.item() == pytest.approx(loss.item() + 0.4)


def test_dpo_of_an_unchanged_model_knows_nothing() -> None:
    total = torch.tensor([[-4.0, -6.0], [-1.0, -9.0]])
    rewards = torch.tensor([[1.0, 0.0]] * 2)
    loss = OBJECTIVES["dpo"](total, total, rewards, alpha=0.0, reference_logps=total, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_simpo_by_hand() -> None:
    avg = torch.tensor([[-1.0, -1.5, -3.0]])
    rewards = torch.tensor([[2.0, 2.0, 1.0]])  # the first two are no pair
    loss = OBJECTIVES["simpo"](avg, 9 * avg, rewards, alpha=0.0, beta=2.0, gamma=0.5)
    # -log sigmoid(2 * 2 - .5) and -log sigmoid(2 * 1.5 - .5), as TRL's CPOTrainer has them for "simpo"
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.5)) + math.log1p(math.exp(-2.5)))


def test_cpo_with_a_hinge_by_hand() -> None:
    avg = torch.tensor([[-1.0, -1.5], [-1.0, -1.5]])
    total = torch.tensor([[-4.0, -6.0], [-4.0, -19.0]])
    rewards = torch.tensor([[1.0, 0.0]] * 2)
    loss = OBJECTIVES["cpo"](avg, total, rewards, alpha=0.5, beta=0.1)
    assert loss.tolist() == pytest.approx([1 - 0.2 + 0.5, 0.5])  # the second leads by more than 1 / beta


def test_odpo_by_hand() -> None:
    total = torch.tensor([[-4.0, -6.0]])
    settings = {"reference_logps": torch.tensor([[-5.0, -5.0]]), "beta": 0.5}
    loss = OBJECTIVES["odpo"](total, total, torch.tensor([[3.0, 0.0]]), alpha=0.0, **settings)
    # -log sigmoid(.5 * 2 - log 3) = log(1 + 3 / e); with a gap of 1 it is DPO
    assert loss.item() == pytest.approx(math.log1p(3 / math.e))
    rewards = torch.tensor([[1.0, 0.0]])
    loss = OBJECTIVES["odpo"](total, total, rewards, alpha=0.0, **settings)
    expected = OBJECTIVES["dpo"](total, total, rewards, alpha=0.0, **settings)
    assert loss.item() == pytest.approx(expected.item())


def test_lipo_lambda_by_hand() -> None:
    total = torch.tensor([[-4.0, -6.0, -3.0]])
    rewards = torch.tensor([[math.log(4), 0.0, -math.log(4)]])
    settings = {"reference_logps": torch.tensor([[-5.0, -5.0, -5.0]]), "beta": 0.5}
    loss = OBJECTIVES["lipo"](total, total, rewards, alpha=0.0, **settings)
    # sigmoid(log 4) = 4/5, sigmoid(log 16) = 16/17; scores .5, -.5, 1: ranks 2, 3, 1
    psi = [(4 / 5 + 16 / 17) / 2, (1 / 5 + 4 / 5) / 2, (1 / 17 + 1 / 5) / 2]
    discount = [1 / math.log(3), 1 / math.log(4), 1 / math.log(2)]
    scores = [0.5, -0.5, 1.0]
    expected = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        weight = (2 ** psi[i] - 2 ** psi[j]) * abs(discount[i] - discount[j])
        expected += weight * math.log1p(math.exp(scores[j] - scores[i]))
    assert loss.item() == pytest.approx(expected)


NEEDED: dict[str, dict[str, float]] = {name: {"beta": 0.1} for name in ("dpo", "cpo", "odpo", "lipo")}
NEEDED["simpo"] = {"beta": 0.1, "gamma": 0.0}


@pytest.mark.parametrize(("name", "temperatures"), [*((name, True) for name in OBJECTIVES), ("pro", False)])
def test_absent_responses_change_neither_value_nor_gradient(name: str, temperatures: bool) -> None:
    avg = torch.tensor([[-1.0, -0.5, 0.0]], requires_grad=True)  # there is no third: its reward is NaN
    rewards = torch.tensor([[1.0, 0.2, NAN]])
    options = {"temperatures": temperatures} if name == "pro" else NEEDED.get(name, {})

    def loss(avg_logps: Tensor, rewards: Tensor, reference: Tensor) -> Tensor:
        more = {"reference_logps": reference} if name in baselines.REFERENCED else {}
        return OBJECTIVES[name](avg_logps, 3 * avg_logps, rewards, alpha=0.3, **options, **more)

    padded = loss(avg, rewards, torch.tensor([[-2.0, -2.0, NAN]]))
    alone = loss(avg[:, :2], rewards[:, :2], torch.tensor([[-2.0, -2.0]]))
    assert padded.item() == pytest.approx(alone.item())
    (gradient,) = torch.autograd.grad(padded.sum(), avg)
    (expected,) = torch.autograd.grad(alone.sum(), avg)
    assert gradient[0].tolist() == pytest.approx(expected[0].tolist())
    assert expected[0, :2].abs().sum() > 0


@pytest.mark.parametrize("name", ["rrhf", "pro", "dpo", "simpo", "cpo", "odpo", "lipo"])
def test_the_ranking_term_alone_raises_the_better_response_and_lowers_the_worse(name: str) -> None:
    avg = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    more = {"reference_logps": torch.tensor([[-6.0, -3.0]])} if name in baselines.REFERENCED else {}
    more |= NEEDED.get(name, {})
    OBJECTIVES[name](avg, 3 * avg, torch.tensor([[1.0, 0.0]]), alpha=0.0, **more).sum().backward()
    assert avg.grad is not None
    assert avg.grad[0, 0] < 0 < avg.grad[0, 1]


# ------------------------------------------------------------------------------------------------------------
# The release by hand


def test_released_by_hand() -> None:
    # Offset 1: of the pairs (1, 2), (2, 3) of each query, those with a gap above 1 are (1, 2) of the first
    # and (2, 3) of the second:  hinges  -2 + 1 + 0.5 = -0.5 -> 0  and  -1 + 3 + 0.5 = 2.5,  mean 1.25.
    # Offset 2: both pairs (1, 3) are kept:  -1 + 1 + 1 = 1  and  -1 + 2 + 1 = 2,  mean 1.5.
    # SFT: the first of query 1 has a reward above zero, that of query 2 is exactly zero:  (6 + 0) / 2 = 3.
    avg = torch.tensor([[-1.0, -2.0, -1.0], [-2.0, -3.0, -1.0]])
    total = torch.tensor([[-6.0, -9.0, -9.0], [-7.0, -9.0, -9.0]])
    rewards = torch.tensor([[2.0, 0.5, 0.0], [0.0, -1.0, -3.0]])
    loss, metrics = released_clha_loss(avg, total, rewards, margin=0.5, min_reward_gap=1.0, alpha=0.1)
    assert metrics["loss/rank"].item() == pytest.approx(1.25 + 1.5)
    assert metrics["loss/sft"].item() == pytest.approx(3.0)
    assert loss.item() == pytest.approx(2.75 + 0.3)
    assert metrics["pairs_kept"].item() == pytest.approx(4 / 6)
    assert metrics["gate_open"].item() == 0.5


def test_released_ranks_by_position_and_logs_by_reward() -> None:
    avg = torch.tensor([[-1.0, -2.0]])
    rewards = torch.tensor([[-4.0, 4.0]])  # the better response stands second
    loss, metrics = released_clha_loss(avg, 9 * avg, rewards, margin=3.0, min_reward_gap=3.0, alpha=1.0)
    assert loss.item() == pytest.approx(-2 + 1 + 3)  # the first is pushed up all the same, and not imitated
    assert metrics["logps/chosen"].item() == -2.0
    assert metrics["logps/rejected"].item() == -1.0
    assert metrics["rewards/accuracies"].item() == 0.0


def test_released_absent_responses_count_nowhere() -> None:
    avg = torch.tensor([[-1.0, -0.5, 0.0]])
    rewards = torch.tensor([[4.0, 0.5, NAN]])
    settings = {"margin": 3.0, "min_reward_gap": 3.0, "alpha": 0.2}
    padded, metrics = released_clha_loss(avg, 3 * avg, rewards, **settings)
    alone, expected = released_clha_loss(avg[:, :2], 3 * avg[:, :2], rewards[:, :2], **settings)
    assert padded.item() == alone.item()
    assert metrics == expected


def config(objective: str, **settings: Any) -> BaselineConfig:
    """A config of an objective that nothing is read from disk for."""
    return BaselineConfig(model="", train_data="", output_dir="", objective=objective, **settings)


def step_of_one_kept_pair_in_25() -> tuple[Tensor, Tensor, Tensor]:
    """128 queries, a step of the release; 5 of them have a pair with a gap above 3, each hinge is 3."""
    rewards = torch.tensor([[1.0, 0.5]] * 128)
    rewards[::26] = torch.tensor([4.0, 0.0])
    logps = torch.zeros(128, 2)
    return logps, logps, rewards


def test_released_counts_per_micro_batch_and_not_per_step() -> None:
    # 64 micro-batches of two queries; in 5 of them the mean over kept pairs is 3, in the others is none:
    #   5 x 3 / 64 = 0.234.  Counted over the step it would be 5 x 3 / 5 = 3: 12.8 times as much.
    step = step_of_one_kept_pair_in_25()
    loss_fn = baselines.released_loss_fn(config("released", margin=3.0, min_reward_gap=3.0, alpha=0.0))
    loss, metrics = loss_fn(*step)
    assert loss.item() == pytest.approx(15 / 64)
    assert metrics["loss/rank"].item() == pytest.approx(15 / 64)
    assert metrics["pairs_kept"].item() == pytest.approx(5 / 128)
    whole_step, _ = released_clha_loss(*step, margin=3.0, min_reward_gap=3.0, alpha=0.0)
    assert whole_step.item() == pytest.approx(3.0)
    assert whole_step.item() / loss.item() == pytest.approx(12.8)


def test_a_micro_batch_of_two_kept_pairs_weighs_as_much_as_one_of_one() -> None:
    # Hinges 3 - 1 = 2 and 3 + 1 = 4 share a micro-batch, 3 + 2 = 5 is alone:  ((2 + 4) / 2 + 5) / 2 = 4
    avg = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-3.0, -1.0], [-1.0, -1.0]])
    rewards = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [1.0, 0.0]])
    loss_fn = baselines.released_loss_fn(config("released", margin=3.0, min_reward_gap=3.0, alpha=0.0))
    assert loss_fn(avg, avg, rewards)[0].item() == pytest.approx(4.0)
    # Two packs of one micro-batch each, weighted by their queries, are the same.
    parts = [loss_fn(avg[i : i + 2], avg[i : i + 2], rewards[i : i + 2])[0] for i in (0, 2)]
    assert sum(parts).item() / 2 == pytest.approx(4.0)
    # A last query without a second one has half the weight of two:  (2 x 3 + 5) / 3
    assert loss_fn(avg[:3], avg[:3], rewards[:3])[0].item() == pytest.approx(11 / 3)


# ------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("objective", "settings", "line"),
    [
        (
            "sft",
            {"margin": 1.0, "alpha": 2.0},
            "--objective sft: does not use margin, alpha",
        ),
        ("gated_sft", {"gate": False}, "--objective gated_sft: does not use gate"),
        ("rrhf", {"temperatures": False}, "--objective rrhf: does not use temperatures"),
        ("pro", {"sft_reduction": "mean"}, "--objective pro: does not use sft_reduction"),
        ("coh", {"min_reward_gap": 0.0}, "--objective coh: does not use min_reward_gap"),
        ("coh", {"alpha": 0.5}, "--objective coh: does not use alpha"),
        ("cpo", {"gamma": 0.5}, "--objective cpo: does not use gamma"),
        ("dpo", {"beta": 0.0}, "--beta 0: must be above 0"),
        ("released", {"gate": False}, "--objective released: does not use gate"),
        ("released", {"batch_size": 7}, "--batch_size 7: must be even"),
    ],
)
def test_a_setting_that_an_objective_does_not_read_is_refused(
    objective: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        baselines.train(config(objective, **settings))


def test_flags() -> None:
    words = ["--model", "m", "--train_data", "t", "--output_dir", "o"]
    found = baselines.parse_config([*words, "--objective", "released", "--margin", "1"])
    assert (found.margin, found.min_reward_gap) == (1.0, 3.0)
    found = baselines.parse_config([*words, "--objective", "released"])
    assert (found.margin, found.min_reward_gap) == (3.0, 3.0)
    found = baselines.parse_config([*words, "--objective", "pro", "--no_temperatures", "--alpha", "0.5"])
    assert (found.margin, found.temperatures, found.alpha, found.beta) == (0.3, False, 0.5, 0.1)
    for wrong in (words, [*words, "--objective", "ppo"], [*words, "--objective", "sft", "--bet", "1"]):
        with pytest.raises(InputError):
            baselines.parse_config(wrong)


def test_settings_of_an_objective_reach_it() -> None:
    avg = torch.tensor([[-1.0, -0.5], [-2.0, -3.0]])
    rewards = torch.tensor([[2.0, -1.0], [0.5, 0.2]])
    matrices = (avg, 4 * avg, rewards)
    changes: dict[str, list[dict[str, Any]]] = {
        "sft": [{}],
        "gated_sft": [{}],
        "rrhf": [{}, {"sft_reduction": "mean"}],
        "pro": [{}, {"temperatures": False}],
        "coh": [{}],
        "dpo": [{}, {"beta": 1.0}],
        "simpo": [{}, {"beta": 1.0}, {"gamma": 1.0}],
        "cpo": [{}, {"beta": 1.0}],
        "odpo": [{}, {"beta": 1.0}],
        "lipo": [{}, {"beta": 1.0}],
    }
    assert changes.keys() == OBJECTIVES.keys()
    for name, several in changes.items():
        more = {"reference_logps": 3 * avg} if name in baselines.REFERENCED else {}
        losses = []
        for settings in several:
            loss_fn = baselines.objective_loss_fn(config(name, alpha=0.7, **settings))
            loss, _ = loss_fn(*matrices, **more)
            expected = OBJECTIVES[name](
                *matrices, alpha=0.7, **NEEDED.get(name, {}) | settings, **more
            ).mean()
            assert loss.item() == pytest.approx(expected.item())
            losses.append(loss.item())
        assert len(set(losses)) == len(several)


def test_metrics_of_an_objective_by_hand() -> None:
    avg = torch.tensor([[-1.0, -0.5, -2.0], [-2.0, -3.0, 0.0]])
    rewards = torch.tensor([[2.0, -1.0, -1.0], [-0.2, -0.5, NAN]])
    loss_fn = baselines.objective_loss_fn(config("sft", alpha=1.0))
    _, metrics = loss_fn(avg, avg, rewards)
    assert metrics["rewards/accuracies"].item() == pytest.approx((1 / 2 + 1) / 2)  # of unequal ones
    assert metrics["logps/chosen"].item() == -1.5
    assert metrics["logps/rejected"].item() == -2.5
    assert metrics["pairs_kept"].item() == pytest.approx((2 / 3 + 1) / 2)  # the tie is no pair
    assert metrics["gate_open"].item() == 1.0


@pytest.mark.parametrize(
    ("objective", "alpha"),
    [
        ("sft", 1.0),
        ("rrhf", 1.0),
        ("coh", 1.0),
        ("dpo", 0.0),
        ("simpo", 0.0),
        ("cpo", 1.0),
        ("pro", 0.2),
        ("gated_sft", 0.2),
        ("released", 0.2),
    ],
)
def test_default_weight_of_the_sft_term(objective: str, alpha: float, tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Tea?"}
    records = [{"prompt": [turn], "responses": list("abcdefghi"[:length])} for length in (2, 3, 3, 9)]
    reward.write_jsonl(tmp_path / "train.jsonl", records)
    settings = config(objective)
    settings.train_data = str(tmp_path / "train.jsonl")
    assert baselines.default_alpha(settings) == pytest.approx(alpha)


# ------------------------------------------------------------------------------------------------------------
# Stages

RECORD: Record = {
    "prompt": [
        {"role": "user", "content": "Tea?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How?"},
    ],
    "responses": ["Okay.", "Bad.", "Fine."],
    "rewards": [0.1, -2.0, 1.5],
    "reference_logps": [-1.0, -2.0, -3.0],
    "chosen": 1,
    "id": "tea",
}


def test_labels_make_the_chosen_response_the_best() -> None:
    found = baselines.labels(RECORD)
    assert found == RECORD | {"rewards": [0.0, 1.0, 0.0]}


def test_ranked_moves_all_that_belongs_to_a_response() -> None:
    assert baselines.ranked(RECORD) == RECORD | {  # the prompt has as many turns, and stays
        "responses": ["Fine.", "Okay.", "Bad."],
        "rewards": [1.5, 0.1, -2.0],
        "reference_logps": [-3.0, -1.0, -2.0],
        "chosen": 2,
    }
    tied = RECORD | {"rewards": [0.0, 1.0, 1.0]}
    assert baselines.ranked(tied)["responses"] == ["Bad.", "Fine.", "Okay."]
    unlabelled = {name: value for name, value in RECORD.items() if name != "chosen"}
    assert "chosen" not in baselines.ranked(unlabelled)


def test_hindsight_writes_the_best_and_the_worst_response_in_both_orders() -> None:
    found = baselines.hindsight(RECORD)
    assert found == {
        "prompt": RECORD["prompt"],
        "responses": [
            "Good answer: Fine.\n\nBad answer: Bad.",
            "Bad answer: Bad.\n\nGood answer: Fine.",
        ],
        "rewards": [1.5, 1.5],
        "chosen": 0,
        "id": "tea",
    }
    assert RECORD["responses"] == ["Okay.", "Bad.", "Fine."]  # as it was
    tied = baselines.hindsight(RECORD | {"rewards": [0.5, 0.5, 0.5]})["responses"]
    assert tied[0] == "Good answer: Okay.\n\nBad answer: Fine."  # no response is both


def test_a_stage_writes_records(tmp_path: Path) -> None:
    reward.write_jsonl(tmp_path / "in.jsonl", [RECORD, RECORD | {"id": "again"}])
    paths = ["--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    for stage, change in (("labels", baselines.labels), ("ranked", baselines.ranked)):
        baselines.main([stage, *paths])
        found = list(clha.iter_records(tmp_path / "out.jsonl"))
        assert found == [change(RECORD), change(RECORD | {"id": "again"})]
        with pytest.raises(InputError, match="already exists"):
            baselines.main([stage, *paths])
        (tmp_path / "out.jsonl").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "lacks", "message"),
    [
        (["labels"], "chosen", 'in.jsonl, line 1: "chosen" must be the index'),
        (["ranked"], "rewards", 'in.jsonl, line 1: no "rewards"'),
        (["hindsight"], "rewards", 'in.jsonl, line 1: no "rewards"'),
        (["labels", "--model", "m"], "", "unrecognized arguments: --model m"),
        (["reference"], "", "--model"),
        (["reference", "--model", "nowhere"], "", "nowhere: neither a model folder"),
        (["reference", "--model", "m", "--max_length", "-1"], "", "--max_length -1"),
    ],
)
def test_a_stage_refuses_in_one_line(words: list[str], lacks: str, message: str, tmp_path: Path) -> None:
    record = {name: value for name, value in RECORD.items() if name != lacks}
    reward.write_jsonl(tmp_path / "in.jsonl", [record])
    paths = ["--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(InputError, match=re.escape(message)):
        baselines.main([words[0], *paths, *words[1:]])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 records of the toy world with rewards whose gaps are 1.5 or 4; some are not sorted by reward."""
    records = []
    for i, (_, record) in enumerate(clha.read_jsonl(world / "train.jsonl")):
        rewards = [[1.0, -0.5], [2.5, -1.5], [-1.5, 2.5]][i % 3]
        records.append(record | {"rewards": rewards})
    path = tmp_path_factory.mktemp("scored") / "train.jsonl"
    reward.write_jsonl(path, records[:48])
    return path


def add_reference(model: Path, data: Path, out: Path, *more: str) -> list[list[float]]:
    """Runs the stage `reference`; the numbers it added."""
    words = ["--model", str(model), "--data", str(data), "--out", str(out), "--pack_tokens", "512", *more]
    baselines.main(["reference", *words])
    return [record["reference_logps"] for record in clha.iter_records(out)]


def test_the_reference_is_read_in_the_template_of_the_training(
    world: Path, scored: Path, tmp_path: Path
) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(world / "init", chat)
    tokenizer = clha.load_tokenizer(str(chat))
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.content }}{% if turn.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(chat)
    plain = add_reference(world / "init", scored, tmp_path / "plain.jsonl")
    assert add_reference(chat, scored, tmp_path / "chat.jsonl") != plain
    assert add_reference(chat, scored, tmp_path / "hh.jsonl", "--template", "hh") == plain
    # A chat that does not fit is left out of the training; until then it has as many numbers as responses.
    long = {"prompt": [{"role": "user", "content": "tea " * 999}], "responses": ["a", "b", "c"]}
    records = [*clha.iter_records(scored), long | {"rewards": [2.0, 1.0, 0.0]}]
    reward.write_jsonl(tmp_path / "long.jsonl", records)
    found = add_reference(chat, tmp_path / "long.jsonl", tmp_path / "out.jsonl", "--pack_tokens", "64")
    assert len(found[-1]) == 3


@pytest.fixture(scope="module")
def referenced(world: Path, scored: Path) -> Path:
    """The records with "reference_logps" of the untrained model."""
    out = scored.with_name("referenced.jsonl")
    add_reference(world / "init", scored, out)
    torch.distributed.destroy_process_group()
    return out


def run(world: Path, data: Path, out: Path, objective: str, **settings: Any) -> list[dict[str, Any]]:
    """Trains the toy world's model for two steps; the rows of metrics.jsonl."""
    steps = {"max_steps": 2, "learning_rate": 1e-3}
    if objective == "released":
        steps |= baselines.RELEASED
    paths = {"model": str(world / "init"), "train_data": str(data), "output_dir": str(out)}
    baselines.train(BaselineConfig(**paths, objective=objective, **SMALL | steps | settings))
    return [row for _, row in clha.read_jsonl(out / "metrics.jsonl")]


ALPHAS = {"sft": 1, "gated_sft": 0.05, "rrhf": 1, "pro": 0.05, "coh": 1, "dpo": 0, "released": 0.05}
ALPHAS |= {"simpo": 0, "cpo": 1, "odpo": 0, "lipo": 0}


@pytest.mark.parametrize("name", ALPHAS)
def test_each_objective_trains(
    name: str, world: Path, scored: Path, referenced: Path, tmp_path: Path
) -> None:
    data = referenced if name in baselines.REFERENCED else scored
    rows = run(world, data, tmp_path / "out", name, dev_data=str(data), eval_every=2)
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    assert math.isfinite(rows[-1]["eval/loss"])
    assert rows[0]["logps/chosen"] < 0 and rows[0]["logps/rejected"] < 0
    before = load_file(world / "init/model.safetensors")
    after = load_file(tmp_path / "out/final/model.safetensors")
    assert all((after[weight] != before[weight]).any() for weight in after)  # embeddings and norms too
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["objective"] == name and saved["alpha"] == pytest.approx(ALPHAS[name])
    if name == "dpo":  # at the first step the model is its own reference
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[-1]["eval/loss"] < math.log(2)


def logps_of(world: Path, data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """avg_logps, sum_logps and rewards of all records in the file's order, by the untrained model."""
    _, _, device = clha.init_process()
    settings = clha.Config(str(world / "init"), str(data), "")
    settings = clha.settle(settings, device)
    tokenizer = clha.load_tokenizer(settings.model)
    examples = []
    for record in clha.iter_records(data):
        example = clha.encode(record, tokenizer, settings)
        examples.append(example | {"rewards": record["rewards"]})
    policy, _ = clha.load_policy(settings, device)
    batch = clha.pack(examples)
    with torch.no_grad():
        sum_logps = policy(batch)
    return clha.mean_logps(sum_logps, batch.lengths), sum_logps, batch.values["rewards"]


def test_the_loss_of_a_run_is_the_mean_of_the_objective(world: Path, scored: Path, tmp_path: Path) -> None:
    rows = run(world, scored, tmp_path / "sft", "sft", batch_size=48, max_steps=1)
    avg, total, rewards = logps_of(world, scored)
    expected = OBJECTIVES["sft"](avg, total, rewards, alpha=1.0).mean().item()
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_released_run_is_the_mean_over_micro_batches(
    world: Path, scored: Path, tmp_path: Path
) -> None:
    # pack_tokens: several packs a step, each of whole micro-batches in their order
    rows = run(world, scored, tmp_path / "out", "released", max_steps=1, pack_tokens=400)
    avg, total, rewards = logps_of(world, scored)
    settings = clha.Config("", "", "", batch_size=16, max_steps=1)
    [step] = clha.data_order(48, settings)
    losses = []
    for i in range(0, 16, 2):
        pair = step[i : i + 2]
        loss, _ = released_clha_loss(
            avg[pair], total[pair], rewards[pair], margin=3.0, min_reward_gap=3.0, alpha=0.05
        )
        losses.append(loss.item())
    assert rows[0]["loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    whole_step, _ = released_clha_loss(
        avg[step], total[step], rewards[step], margin=3.0, min_reward_gap=3.0, alpha=0.05
    )
    assert rows[0]["loss"] != pytest.approx(whole_step.item(), rel=1e-2)


def test_another_objective_does_not_resume_a_run(world: Path, scored: Path, tmp_path: Path) -> None:
    run(world, scored, tmp_path, "pro", max_steps=1, checkpoint_every=1)
    (tmp_path / "final").rename(tmp_path / "taken away")
    with pytest.raises(InputError, match="objective pro -> rrhf"):
        run(world, scored, tmp_path, "rrhf", max_steps=1, alpha=0.05)
    own = clha.Config(
        str(world / "init"), str(scored), str(tmp_path), **SMALL, max_steps=1, learning_rate=1e-3
    )
    with pytest.raises(InputError, match="objective pro -> None"):
        clha.train(own)
    with pytest.raises(InputError, match="temperatures True -> False"):
        run(world, scored, tmp_path, "pro", max_steps=1, temperatures=False)
    rows = run(world, scored, tmp_path, "pro", max_steps=1)  # the same one goes on: nothing is left to do
    assert len(rows) == 1 and (tmp_path / "final").is_dir()


def test_dpo_without_a_reference_is_one_line(world: Path, scored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'line 1: no "reference_logps"'):
        run(world, scored, tmp_path / "out", "dpo")


def test_the_reference_is_that_of_each_response_alone(world: Path, scored: Path, referenced: Path) -> None:
    _, sum_logps, _ = logps_of(world, scored)
    records = list(clha.iter_records(referenced))
    found = [record.pop("reference_logps") for record in records]
    assert records == list(clha.iter_records(scored))  # nothing else has changed, the order neither
    torch.testing.assert_close(torch.tensor(found), sum_logps)


def test_the_reference_knows_no_dropout(world: Path, scored: Path, tmp_path: Path) -> None:
    for path in (world / "init").iterdir():
        text = path.read_bytes().replace(b'"attention_dropout": 0.0', b'"attention_dropout": 0.5')
        (tmp_path / path.name).write_bytes(text)
    assert b'"attention_dropout": 0.5' in (tmp_path / "config.json").read_bytes()
    first = add_reference(tmp_path, scored, tmp_path / "first.jsonl")
    assert add_reference(tmp_path, scored, tmp_path / "second.jsonl") == first


def start_two(program: Path) -> None:
    """Runs a program as two processes that find each other as those of torchrun do, which starts slower."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = os.environ | address | {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank}
        words = [sys.executable, str(program)]
        processes.append(
            subprocess.Popen(words, cwd=program.parent, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]


def test_two_processes_are_as_one(world: Path, scored: Path, referenced: Path, tmp_path: Path) -> None:
    """The reference, DPO and the release: the same numbers from two processes, to rounding."""
    odd = tmp_path / "odd.jsonl"  # one process has fewer records than the other
    reward.write_jsonl(odd, list(clha.iter_records(scored))[:3])
    program = tmp_path / "program.py"
    program.write_text(
        "import clha\n"
        "from study import baselines\n"
        "def main():\n"
        f"    common = ['--model', {str(world / 'init')!r}, '--batch_size', '16', '--max_steps', '2']\n"
        "    common += ['--pack_tokens', '2048', '--learning_rate', '1e-3']\n"
        f"    stage = ['reference', '--model', {str(world / 'init')!r}, '--pack_tokens', '100']\n"
        f"    baselines.main([*stage, '--data', {str(odd)!r}, '--out', 'odd-out.jsonl'])\n"
        f"    dpo = ['--objective', 'dpo', '--train_data', {str(referenced)!r}, '--output_dir', 'dpo']\n"
        "    baselines.main([*common, *dpo])\n"
        f"    released = ['--objective', 'released', '--train_data', {str(scored)!r}]\n"
        "    baselines.main([*common, *released, '--output_dir', 'released'])\n"
        "clha.run(main)\n"
    )
    start_two(program)
    expected = [record["reference_logps"] for record in clha.iter_records(referenced)][:3]
    found = [record["reference_logps"] for record in clha.iter_records(tmp_path / "odd-out.jsonl")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    for name, data in (("dpo", referenced), ("released", scored)):
        rows = run(world, data, tmp_path / f"{name}-alone", name)
        together = [row for _, row in clha.read_jsonl(tmp_path / name / "metrics.jsonl")]
        for key in ("loss", "grad_norm", "logps/chosen", "pairs_kept", "gate_open"):
            values = [row[key] for row in together]
            assert values == pytest.approx([row[key] for row in rows], rel=1e-4, abs=1e-6), (name, key)
