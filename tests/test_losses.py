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


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_tied_replies_make_no_pair_even_at_gap_zero(gap: float) -> None:
    assert not clha.rescore(torch.tensor([[2.0, 2.0]]), gap)[0].any()


def test_a_pair_is_kept_by_the_size_of_its_gap_also_where_the_worse_reply_stands_first() -> None:
    keep, _ = clha.rescore(torch.tensor([[0.5, 3.0]]), 1.0)  # ranking="given" trusts the file's order
    assert keep[0, 0, 1]


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
    avg_logps, keep = torch.tensor([[-1.0, -2.0, -1.5]]), torch.ones(1, 3, 3, dtype=torch.bool).triu(1)
    assert clha.pairwise_margin_loss(avg_logps, keep, 0.3).tolist() == pytest.approx([0.9])
    keep[0, 1, 2] = False
    assert clha.pairwise_margin_loss(avg_logps, keep, 0.3).tolist() == pytest.approx([0.1])


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


@pytest.mark.parametrize(
    ("reduction", "counts"),
    [
        ("query", [2, 2, 2]),
        # Of the pairs one place apart (1,2) of the first and (1,2), (2,3) of the second query are kept; of
        # those two places apart none. The latter is 1, for a sum of nothing is to be 0 and not 0 / 0.
        ("release", [2, 3, 1]),
    ],
)
def test_loss_counts_by_hand(reduction: str, counts: list[int]) -> None:
    keep = torch.zeros(2, 3, 3, dtype=torch.bool)
    keep[0, 0, 1] = keep[1, 0, 1] = keep[1, 1, 2] = True
    assert clha.loss_counts(keep, reduction).tolist() == counts


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


@pytest.mark.parametrize(
    ("reduction", "rank_gradient"),
    [
        # Active are (1,3) and (2,3) of query 1 and (1,2) of query 2 (see above): -1 for i and +1 for j of
        # each, over the 2 queries. The empty place of query 2 gets nothing, and no NaN.
        ("query", [[-0.5, -0.5, 1.0], [-0.5, 0.5, 0.0]]),
        # (1,3) is the one pair two places apart, the other two are of the 3 kept pairs one place apart.
        ("release", [[-1.0, -1 / 3, 4 / 3], [-1 / 3, 1 / 3, 0.0]]),
    ],
)
def test_gradients_by_hand(reduction: str, rank_gradient: list[list[float]]) -> None:
    avg_logps, sum_logps, rewards = two_queries()
    leaves = avg_logps.requires_grad_(), sum_logps.requires_grad_()
    loss, metrics = clha.clha_loss(*leaves, rewards, **RECIPE, reduction=reduction)
    by_avg, by_sum = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(by_avg, torch.tensor(rank_gradient, dtype=torch.float64))
    # L_sft is minus the log-prob of the best reply, over 2 queries, times alpha 0.1.
    torch.testing.assert_close(by_sum, torch.tensor([[-0.05, 0, 0]] * 2, dtype=torch.float64))
    assert not any(value.requires_grad for value in metrics.values())


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


def test_imitating_a_target_by_hand() -> None:
    # Query 1 imitates its second reply, reward 1: 8. Query 2 its second, reward 0.5: 3.2. (8 + 3.2) / 2 = 5.6
    _, metrics = clha.clha_loss(*two_queries(), **RECIPE, target=torch.tensor([1, 1]))
    assert metrics["loss/sft"].item() == pytest.approx(5.6)
    # The third reply of query 1 has reward -1 and is gated: (0 + 10) / 2 = 5.
    _, metrics = clha.clha_loss(*two_queries(), **RECIPE, target=torch.tensor([2, 0]))
    assert metrics["loss/sft"].item() == pytest.approx(5.0)
    assert metrics["gated"].item() == 0.5


def test_without_rescoring_by_hand() -> None:
    # With all rewards equal and below zero, nothing trains; without rescoring, everything does, as above.
    avg_logps, sum_logps, rewards = two_queries()
    equal = torch.where(rewards.isnan(), NAN, -1.0)
    nothing, _ = clha.clha_loss(avg_logps, sum_logps, equal, **RECIPE)
    everything, _ = clha.clha_loss(avg_logps, sum_logps, equal, **(RECIPE | {"min_reward_gap": None}))
    assert nothing.item() == 0 and everything.item() == pytest.approx(2.1)


@pytest.mark.parametrize("reduction", ["query", "release"])
def test_rewards_only_choose_what_trains_however_large_they_are(reduction: str) -> None:
    avg_logps, sum_logps, rewards = two_queries()
    huge = torch.tensor([[1e30, 1.0, -1e30], [1e30, 0.5, NAN]])
    usual, huge = (
        clha.clha_loss(avg_logps, sum_logps, r, **RECIPE, reduction=reduction) for r in (rewards, huge)
    )
    assert huge[0].item() == usual[0].item()
    assert {k: v.item() for k, v in huge[1].items()} == {k: v.item() for k, v in usual[1].items()}


def test_metrics_by_hand() -> None:
    avg_logps = torch.tensor([[-1.0, -2.0, -2.0], [-1.0, -0.8, 0.0]])
    rewards = torch.tensor([[3.0, 2.5, -1.0], [0.0, -2.0, NAN]])
    _, metrics = clha.clha_loss(avg_logps, 10 * avg_logps, rewards, **RECIPE)
    # Right order: query 1 has (1,2) and (1,3), while (2,3) are equal: 2 of 3; query 2: none of its one pair.
    assert metrics["rewards/accuracies"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["rewards/margins"].item() == pytest.approx((1.0 - 0.2) / 2)  # best minus worst
    assert metrics["logps/chosen"].item() == pytest.approx(-1.0)
    assert metrics["logps/rejected"].item() == pytest.approx((-2.0 - 0.8) / 2)
    assert metrics["pairs_kept"].item() == pytest.approx((2 / 3 + 1) / 2)  # 3 - 2.5 is not above 1
    assert metrics["gated"].item() == 0.5  # query 2: a reward of 0 is not above 0


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
    rewards[0, 2] = NAN  # the first query has two replies, so the part that it makes alone is narrower
    whole, metrics = clha.clha_loss(avg_logps, 9 * avg_logps, rewards, **RECIPE, reduction=reduction)
    (gradient,) = torch.autograd.grad(whole, avg_logps)
    counts = clha.loss_counts(clha.rescore(rewards, RECIPE["min_reward_gap"])[0], reduction)
    parts = [
        clha.clha_loss(part, 9 * part, r, **RECIPE, reduction=reduction, counts=counts)
        for part, r in (
            (avg_logps[:1, :2], rewards[:1, :2]),
            (avg_logps[1:5], rewards[1:5]),
            (avg_logps[5:], rewards[5:]),
        )
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
        alpha = case["sft_weight"] * (case["l"] - 1) ** 2
        loss, metrics = clha.clha_loss(
            avg_logps,
            sum_logps,
            rewards,
            margin=case["margin"],
            min_reward_gap=case["gap_threshold"],
            alpha=alpha,
            reduction="release",
            target=torch.tensor(case["sft_index"]),
        )
        released = case["release"]["clha"]
        assert loss.item() == pytest.approx(released["total"], abs=1e-6), case["label"]
        assert metrics["loss/rank"].item() == pytest.approx(released["rank_loss"], abs=1e-6), case["label"]
        sft = alpha * metrics["loss/sft"].item()
        assert sft == pytest.approx(released["sft_weighted"], abs=1e-6), case["label"]
        (gradient,) = torch.autograd.grad(loss, avg_logps)
        expected = torch.tensor(released["grad_rank_wrt_p"], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)
