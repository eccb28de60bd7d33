"""The losses, by hand, by the released values, and by what must not change them."""

from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

import clha

NAN = float("nan")
RECIPE = {"margin": 0.5, "min_reward_gap": 1.0, "alpha": 0.1}


def test_rescore_keeps_pairs_whose_rewards_differ_by_more_than_the_gap() -> None:
    # |2 - 1| = 1 is not above 1; |2 - 0.5| = 1.5 is; |1 - 0.5| = 0.5 is not.
    keep, gate = clha.rescore(torch.tensor([[2.0, 1.0, 0.5]]), min_reward_gap=1.0)
    assert keep.tolist() == [[[False, False, True], [False, False, False], [False, False, False]]]
    assert gate.tolist() == [True]


@pytest.mark.parametrize(("best", "opens"), [(0.1, True), (0.0, False), (-0.1, False)])
def test_the_gate_opens_above_zero_only(best: float, opens: bool) -> None:
    assert clha.rescore(torch.tensor([[best, -2.0]]), 1.0)[1].tolist() == [opens]


def test_the_gate_looks_at_the_reply_to_imitate() -> None:
    rewards = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert clha.rescore(rewards, 1.0, target=torch.tensor([0, 1]))[1].tolist() == [True, False]


def test_without_rescoring_all_pairs_and_queries_train() -> None:
    keep, gate = clha.rescore(torch.tensor([[-1.0, -1.0], [-2.0, NAN]]), None)
    assert keep.tolist() == [[[False, True], [False, False]], [[False, False], [False, False]]]
    assert gate.tolist() == [True, True]


def test_huge_rewards_are_compared_like_others() -> None:
    keep, gate = clha.rescore(torch.tensor([[1e30, -1e30], [1e30, 1e30]]), 1.0)
    assert keep[:, 0, 1].tolist() == [True, False]
    assert gate.tolist() == [True, True]


def test_pairwise_margin_loss_by_hand() -> None:
    # p = (-1, -2, -1.5), margin 0.3, all three pairs kept:
    #   (1, 2): max(0, -2   - -1 + 0.3) = 0
    #   (1, 3): max(0, -1.5 - -1 + 0.6) = 0.1     two places apart, so twice the margin
    #   (2, 3): max(0, -1.5 - -2 + 0.3) = 0.8
    keep = torch.ones(1, 3, 3, dtype=torch.bool).triu(1)
    loss = clha.pairwise_margin_loss(torch.tensor([[-1.0, -2.0, -1.5]]), keep, 0.3)
    assert loss.tolist() == pytest.approx([0.9])
    keep[0, 1, 2] = False
    assert clha.pairwise_margin_loss(torch.tensor([[-1.0, -2.0, -1.5]]), keep, 0.3).tolist() == pytest.approx(
        [0.1]
    )


def test_the_better_reply_is_pushed_up_and_the_worse_one_down() -> None:
    # Eq. 4 as printed would give the opposite signs.
    avg_logps = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    keep = torch.ones(1, 2, 2, dtype=torch.bool).triu(1)
    clha.pairwise_margin_loss(avg_logps, keep, 0.5).sum().backward()
    assert avg_logps.grad.tolist() == [[-1.0, 1.0]]


def test_gated_sft_loss_by_hand() -> None:
    sum_logps, gate = torch.tensor([[-10.0, -7.0], [-20.0, -5.0]]), torch.tensor([True, False])
    assert clha.gated_sft_loss(sum_logps, gate).tolist() == [10.0, 0.0]
    assert clha.gated_sft_loss(sum_logps, ~gate, target=torch.tensor([0, 1])).tolist() == [0.0, 5.0]


def two_queries() -> tuple[Tensor, Tensor, Tensor]:
    """avg_logps, sum_logps and rewards of two queries, the second with two replies only."""
    avg_logps = torch.tensor([[-1.0, -2.0, -1.5], [-1.0, -0.8, 0.0]], dtype=torch.float64)
    sum_logps = avg_logps * torch.tensor([10, 4, 2], dtype=torch.float64)
    rewards = torch.tensor([[3.0, 1.0, -1.0], [2.0, 0.5, NAN]], dtype=torch.float64)
    return avg_logps, sum_logps, rewards


def test_clha_loss_by_hand_as_a_mean_over_queries() -> None:
    # All pairs are kept (gaps 2, 4, 2 and 1.5 > 1), with margin 0.5:
    #   query 1: (1,2) max(0, -1 + .5) = 0    (1,3) max(0, -.5 + 1) = .5    (2,3) max(0, .5 + .5) = 1: 1.5
    #   query 2: (1,2) max(0, .2 + .5) = .7
    # rank = (1.5 + 0.7) / 2 = 1.1; SFT = (10 + 10) / 2 = 10; total = 1.1 + 0.1 x 10 = 2.1
    loss, metrics = clha.clha_loss(*two_queries(), **RECIPE)
    assert loss.item() == pytest.approx(2.1)
    assert metrics["loss/rank"].item() == pytest.approx(1.1)
    assert metrics["loss/sft"].item() == pytest.approx(10)


def test_clha_loss_by_hand_in_the_released_reduction() -> None:
    # Offset 1 has the pairs 0, 1 and 0.7, mean 1.7 / 3; offset 2 has 0.5; the sum is 1.0666...
    loss, metrics = clha.clha_loss(*two_queries(), **RECIPE, reduction="release")
    assert metrics["loss/rank"].item() == pytest.approx(1.7 / 3 + 0.5)
    assert loss.item() == pytest.approx(1.7 / 3 + 0.5 + 0.1 * 10)


def test_an_offset_without_kept_pairs_adds_nothing() -> None:
    avg_logps, sum_logps, _ = two_queries()
    _, metrics = clha.clha_loss(avg_logps, sum_logps, torch.zeros(2, 3), **RECIPE, reduction="release")
    assert metrics["loss/rank"].item() == 0


def test_sft_by_mean_uses_the_mean_log_probs() -> None:
    _, metrics = clha.clha_loss(*two_queries(), **RECIPE, sft_reduction="mean")
    assert metrics["loss/sft"].item() == pytest.approx(1.0)  # (1 + 1) / 2


def test_without_contrast_only_the_sft_term_is_left() -> None:
    loss, _ = clha.clha_loss(*two_queries(), **RECIPE, contrast=False)
    assert loss.item() == pytest.approx(1.0)  # 0.1 x 10


def test_metrics_by_hand() -> None:
    # Right order: query 1 has (1,2) and (1,3), not (2,3): 2 of 3; query 2 has its only pair wrong: 0 of 1.
    _, metrics = clha.clha_loss(*two_queries(), **RECIPE)
    assert metrics["rewards/accuracies"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["rewards/margins"].item() == pytest.approx((0.5 - 0.2) / 2)  # best minus worst
    assert metrics["logps/chosen"].item() == pytest.approx(-1.0)
    assert metrics["logps/rejected"].item() == pytest.approx((-1.5 - 0.8) / 2)
    assert metrics["pairs_kept"].item() == 1 and metrics["gated"].item() == 0


@pytest.mark.parametrize("reduction", ["query", "release"])
def test_a_query_with_fewer_replies_has_the_loss_it_has_alone(reduction: str) -> None:
    avg_logps, sum_logps, rewards = two_queries()
    alone = clha.clha_loss(
        avg_logps[1:, :2], sum_logps[1:, :2], rewards[1:, :2], **RECIPE, reduction=reduction
    )
    padded = clha.clha_loss(avg_logps[1:], sum_logps[1:], rewards[1:], **RECIPE, reduction=reduction)
    assert padded[0].item() == pytest.approx(alone[0].item())
    assert {k: v.item() for k, v in padded[1].items()} == pytest.approx(
        {k: v.item() for k, v in alone[1].items()}
    )


@pytest.mark.parametrize("reduction", ["query", "release"])
def test_parts_of_a_step_add_up_to_the_step(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    avg_logps = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = torch.randn(7, 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    whole, metrics = clha.clha_loss(avg_logps, 9 * avg_logps, rewards, **RECIPE, reduction=reduction)
    (gradient,) = torch.autograd.grad(whole, avg_logps)
    counts = clha.loss_counts(clha.rescore(rewards, RECIPE["min_reward_gap"])[0], reduction)
    parts = [
        clha.clha_loss(part, 9 * part, r, **RECIPE, reduction=reduction, counts=counts)
        for part, r in zip(avg_logps.split([1, 4, 2]), rewards.split([1, 4, 2]), strict=True)
    ]
    total = sum(loss for loss, _ in parts)
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, avg_logps)[0], gradient)
    for name, value in metrics.items():
        assert sum(part[name] for _, part in parts).item() == pytest.approx(value.item(), abs=1e-6)


def test_the_released_losses_are_reproduced() -> None:
    cases: list[dict[str, Any]] = golden("losses.json")["cases"]
    assert len(cases) == 62
    for case in cases:
        avg_logps, sum_logps, rewards = (
            torch.tensor(case[name], dtype=torch.float64) for name in ("mean_logp", "sum_logp", "rewards")
        )
        avg_logps.requires_grad_()
        loss, metrics = clha.clha_loss(
            avg_logps,
            sum_logps,
            rewards,
            margin=case["margin"],
            min_reward_gap=case["gap_threshold"],
            alpha=case["sft_weight"] * (case["l"] - 1) ** 2,
            reduction="release",
            target=torch.tensor(case["sft_index"]),
        )
        released = case["release"]["clha"]
        assert loss.item() == pytest.approx(released["total"], abs=1e-6), case["label"]
        assert metrics["loss/rank"].item() == pytest.approx(released["rank_loss"], abs=1e-6), case["label"]
        (gradient,) = torch.autograd.grad(loss, avg_logps)
        expected = torch.tensor(released["grad_rank_wrt_p"], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)
