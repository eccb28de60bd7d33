"""The losses: by hand, by reference values, and by what must not change them."""

from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

import clha

NAN = float("nan")
SETTINGS = {"margin": 0.5, "min_reward_gap": 1.0, "alpha": 0.1}


def triangle(*shape: int) -> Tensor:
    """All pairs i < j, as keep (B, l, l) has them."""
    return torch.ones(*shape, dtype=torch.bool).triu(1)


def two_queries() -> tuple[Tensor, Tensor, Tensor]:
    """avg_logps, sum_logps and rewards of two queries, the second with two responses only."""
    avg_logps = torch.tensor([[-1.0, -2.0, -1.5], [-1.0, -0.8, 0.0]], dtype=torch.float64)
    sum_logps = avg_logps * torch.tensor([10, 4, 2], dtype=torch.float64)
    rewards = torch.tensor([[3.0, 1.0, -1.0], [2.0, 0.5, NAN]], dtype=torch.float64)
    return avg_logps, sum_logps, rewards


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {name: value.item() for name, value in metrics.items()}


# Eq. 3


def test_the_mean_is_per_token_and_zero_where_there_is_no_response() -> None:
    averages = clha.mean_logps(torch.tensor([[-6.0, -1.0, 0.0]]), torch.tensor([[4, 1, 0]]))
    assert averages.tolist() == [[-1.5, -1.0, 0.0]]


# Rescoring, Section 2.1


def test_pairs_whose_rewards_differ_by_more_than_the_gap_are_kept() -> None:
    # |2 - 1| = 1 is not above 1; |2 - 0.5| = 1.5 is; |1 - 0.5| = 0.5 is not.
    keep, gate = clha.rescore(torch.tensor([[2.0, 1.0, 0.5]]), min_reward_gap=1.0)
    assert keep.tolist() == [[[False, False, True], [False, False, False], [False, False, False]]]
    assert gate.tolist() == [True]


def test_at_a_gap_of_zero_only_ties_make_no_pair() -> None:
    keep, _ = clha.rescore(torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0 - 2**-23, -3.0]]), 0.0)
    assert not keep[0].any()
    assert torch.equal(keep[1], triangle(3, 3))


def test_no_response_is_compared_with_itself_or_twice() -> None:
    keep, _ = clha.rescore(torch.zeros(1, 3), -1.0)  # all gaps are above -1
    assert torch.equal(keep, triangle(1, 3, 3))


def test_a_pair_is_kept_by_the_size_of_its_gap_also_where_the_worse_response_stands_first() -> None:
    keep, _ = clha.rescore(torch.tensor([[0.5, 3.0]]), 1.0)  # ranked=False trusts the file's order
    assert torch.equal(keep, triangle(1, 2, 2))


def test_places_without_a_response_make_no_pair() -> None:
    keep, gate = clha.rescore(torch.tensor([[5.0, -5.0, NAN, NAN]]), 0.0)
    assert keep.nonzero().tolist() == [[0, 0, 1]]
    assert gate.tolist() == [True]


@pytest.mark.parametrize(("best", "opens"), [(1e-30, True), (0.0, False), (-0.0, False), (-0.1, False)])
def test_the_gate_opens_above_zero_only(best: float, opens: bool) -> None:
    assert clha.rescore(torch.tensor([[best, -2.0]]), 1.0)[1].tolist() == [opens]


def test_the_gate_looks_at_the_first_response_of_each_query() -> None:
    rewards = torch.tensor([[-1.0, 2.0], [1.0, -3.0]])
    assert clha.rescore(rewards, 1.0)[1].tolist() == [False, True]


def test_without_the_gate_every_query_is_imitated_and_the_same_pairs_train() -> None:
    rewards = torch.tensor([[-1.0, -3.0, -3.0], [2.0, 1.5, NAN]])
    keep, gate = clha.rescore(rewards, 1.0, use_gate=False)
    assert gate.tolist() == [True, True]
    assert torch.equal(keep, clha.rescore(rewards, 1.0)[0])
    assert keep.nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]


# Eq. 4 to 7


def test_pairwise_margin_loss_by_hand() -> None:
    # p = (-1, -2, -1.5), margin 0.3, all three pairs kept:
    #   (1, 2): max(0, -2   - -1 + 0.3) = 0
    #   (1, 3): max(0, -1.5 - -1 + 0.6) = 0.1     two places apart, so twice the margin
    #   (2, 3): max(0, -1.5 - -2 + 0.3) = 0.8
    avg_logps = torch.tensor([[-1.0, -2.0, -1.5]])
    keep = triangle(1, 3, 3)
    assert clha.pairwise_margin_loss(avg_logps, keep, 0.3).tolist() == pytest.approx([0.9])
    keep[0, 1, 2] = False
    assert clha.pairwise_margin_loss(avg_logps, keep, 0.3).tolist() == pytest.approx([0.1])


def test_the_better_response_is_pushed_up_and_the_worse_one_down() -> None:
    # Eq. 4 as printed would give the opposite signs.
    avg_logps = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    clha.pairwise_margin_loss(avg_logps, triangle(1, 2, 2), 0.5).sum().backward()
    assert avg_logps.grad.tolist() == [[-1.0, 1.0]]


def test_a_lead_of_the_margin_is_enough() -> None:
    avg_logps = torch.tensor([[-1.0, -2.0], [-1.0, -1.25]], requires_grad=True)  # leads of 1 and 0.25
    loss = clha.pairwise_margin_loss(avg_logps, triangle(2, 2, 2), 0.5)
    assert loss.tolist() == [0.0, 0.25]
    loss.sum().backward()
    assert avg_logps.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_gated_sft_loss_by_hand() -> None:
    sum_logps = torch.tensor([[-10.0, -7.0], [-20.0, -5.0]])
    assert clha.gated_sft_loss(sum_logps, torch.tensor([True, False])).tolist() == [10.0, 0.0]
    assert clha.gated_sft_loss(sum_logps, torch.tensor([True, True])).tolist() == [10.0, 20.0]


def test_clha_loss_by_hand() -> None:
    # All pairs are kept (gaps 2, 4, 2 and 1.5 > 1), with margin 0.5:
    #   query 1: (1,2) max(0, -1 + .5) = 0    (1,3) max(0, -.5 + 1) = .5    (2,3) max(0, .5 + .5) = 1: 1.5
    #   query 2: (1,2) max(0, .2 + .5) = .7
    # rank = (1.5 + 0.7) / 2 = 1.1; SFT = (10 + 10) / 2 = 10; total = 1.1 + 0.1 x 10 = 2.1
    loss, metrics = clha.clha_loss(*two_queries(), **SETTINGS)
    assert loss.item() == pytest.approx(2.1)
    assert metrics["loss"].item() == pytest.approx(2.1)
    assert metrics["loss/rank"].item() == pytest.approx(1.1)
    assert metrics["loss/sft"].item() == pytest.approx(10)


def test_both_terms_are_divided_by_the_queries_not_by_what_is_kept_or_open() -> None:
    # Of four queries one pair and one gate are left: 0.5 / 4, and 10 / 4.
    avg_logps = torch.full((4, 2), -1.0)
    rewards = torch.tensor([[2.0, 0.0], [-1.0, -1.5], [-1.0, -1.5], [0.0, -0.5]])
    loss, metrics = clha.clha_loss(avg_logps, 10 * avg_logps, rewards, **SETTINGS)
    assert metrics["loss/rank"].item() == pytest.approx(0.125)
    assert metrics["loss/sft"].item() == pytest.approx(2.5)
    assert loss.item() == pytest.approx(0.375)


@pytest.mark.parametrize(("gate", "sft"), [(True, 0.0), (False, 10.0)])
def test_the_gate_can_be_switched_off(gate: bool, sft: float) -> None:
    avg_logps, sum_logps, rewards = two_queries()
    _, metrics = clha.clha_loss(avg_logps, sum_logps, rewards - 3, **SETTINGS, gate=gate)
    assert metrics["loss/sft"].item() == sft
    assert metrics["loss/rank"].item() == pytest.approx(1.1)
    assert metrics["gate_open"].item() == (not gate)


def test_gradients_by_hand() -> None:
    # Active are (1,3) and (2,3) of query 1 and (1,2) of query 2 (see above): -1 for i and +1 for j of
    # each, over the 2 queries. The empty place of query 2 gets nothing, and no NaN.
    avg_logps, sum_logps, rewards = two_queries()
    leaves = (avg_logps.requires_grad_(), sum_logps.requires_grad_())
    loss, metrics = clha.clha_loss(*leaves, rewards, **SETTINGS)
    by_avg, by_sum = torch.autograd.grad(loss, leaves)
    assert by_avg.tolist() == [[-0.5, -0.5, 1.0], [-0.5, 0.5, 0.0]]
    # L_sft is minus the log-prob of the best response, over 2 queries, times alpha 0.1.
    torch.testing.assert_close(by_sum, torch.tensor([[-0.05, 0, 0]] * 2, dtype=torch.float64))
    assert not any(value.requires_grad for value in metrics.values())


def test_rewards_only_choose_what_trains_however_large_they_are() -> None:
    avg_logps, sum_logps, rewards = two_queries()
    huge = torch.tensor([[9e37, 1.0, -9e37], [9e37, 0.5, NAN]])
    usual = clha.clha_loss(avg_logps, sum_logps, rewards, **SETTINGS)[1]
    assert numbers(clha.clha_loss(avg_logps, sum_logps, huge, **SETTINGS)[1]) == numbers(usual)


def test_metrics_by_hand() -> None:
    avg_logps = torch.tensor([[-1.0, -2.0, -2.0], [-1.0, -0.8, 0.0]])
    rewards = torch.tensor([[3.0, 2.5, -1.0], [0.0, -2.0, NAN]])
    _, metrics = clha.clha_loss(avg_logps, 10 * avg_logps, rewards, **SETTINGS)
    # Right order: query 1 has (1,2) and (1,3), while (2,3) are equal: 2 of 3; query 2: none of its one pair.
    assert metrics["rewards/accuracies"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["logps/chosen"].item() == -1.0
    assert metrics["logps/rejected"].item() == pytest.approx((-2.0 - 0.8) / 2)
    assert metrics["pairs_kept"].item() == pytest.approx((2 / 3 + 1) / 2)  # 3 - 2.5 is not above 1
    assert metrics["gate_open"].item() == 0.5  # query 2: a reward of 0 is not above 0


def test_equal_rewards_are_no_pair_to_order() -> None:
    avg_logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    rewards = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    _, metrics = clha.clha_loss(avg_logps, avg_logps, rewards, **SETTINGS)
    assert metrics["rewards/accuracies"].item() == (1 + 0) / 2  # query 1: two of two pairs; query 2 has none


# What must not change them


def test_a_query_with_fewer_responses_has_the_loss_and_gradient_it_has_alone() -> None:
    results = []
    for width in (2, 3):
        avg_logps, sum_logps, rewards = (values[1:, :width] for values in two_queries())
        avg_logps.requires_grad_()
        loss, metrics = clha.clha_loss(avg_logps, sum_logps, rewards, **SETTINGS)
        (gradient,) = torch.autograd.grad(loss, avg_logps)
        results.append([numbers(metrics), gradient[0, :2].tolist()])
    assert results[0] == results[1]


def random_queries(number: int) -> tuple[Tensor, Tensor]:
    """avg_logps and rewards (number, 3), best first; the first query has two responses."""
    generator = torch.Generator().manual_seed(0)
    avg_logps = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(number, 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    rewards[0, 2] = NAN
    return avg_logps.requires_grad_(), rewards


def test_the_parts_of_a_step_add_up_to_the_step_by_their_shares_of_its_queries() -> None:
    avg_logps, rewards = random_queries(7)
    loss, metrics = clha.clha_loss(avg_logps, 9 * avg_logps, rewards, **SETTINGS)
    (gradient,) = torch.autograd.grad(loss, avg_logps)
    total = torch.zeros(())
    sums = dict.fromkeys(metrics, 0.0)
    for first, end, width in ((0, 1, 2), (1, 5, 3), (5, 7, 3)):
        part = avg_logps[first:end, :width]
        share = (end - first) / 7
        part_loss, values = clha.clha_loss(part, 9 * part, rewards[first:end, :width], **SETTINGS)
        total = total + share * part_loss
        for name, value in values.items():
            sums[name] += share * value.item()
    assert sums == pytest.approx(numbers(metrics), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, avg_logps)[0], gradient)


def test_the_order_of_queries_changes_nothing() -> None:
    avg_logps, rewards = random_queries(7)
    _, forward = clha.clha_loss(avg_logps, 9 * avg_logps, rewards, **SETTINGS)
    _, backward = clha.clha_loss(avg_logps.flip(0), 9 * avg_logps.flip(0), rewards.flip(0), **SETTINGS)
    assert numbers(forward) == pytest.approx(numbers(backward), abs=1e-6)


# Reference values: Eq. 5 with the sign of the release, a mean over queries, independently computed in float64

Case = tuple[float, float, list[list[float]], list[list[int]], list[list[float]], float, float]

CASES: list[Case] = [  # margin, min_reward_gap, mean log-probs, tokens, rewards; loss/rank, loss/sft
    (3, 3, [[-2.59375, -1.2265625]], [[31, 12]], [[3.921875, -4.265625]], 4.3671875, 80.40625),
    (3, 3, [[-2.0, -1.0]], [[8, 8]], [[3.515625, 0.5]], 4.0, 16.0),
    (3, 3, [[-1.0, -2.0]], [[8, 8]], [[0.0, -4.0]], 2.0, 0.0),
    (3, 3, [[-0.5, -4.0, -6.0]], [[8, 8, 8]], [[8.0, 4.0, 0.0]], 1.5, 4.0),
    (3, 3, [[-12.0, -11.5, -0.00390625]], [[2, 3, 4]], [[5.0, 1.0, -3.0]], 35.9921875, 24.0),
    (
        3,
        3,
        [[-0.359375, -1.30859375, -1.0859375], [-1.4296875, -1.14453125, -1.265625]],
        [[14, 40, 19], [1, 52, 37]],
        [[4.46875, 0.296875, -2.71875], [5.328125, 3.03125, -5.984375]],
        9.794921875,
        3.23046875,
    ),
    (
        0.5,
        0.25,
        [
            [-2.54296875, -0.94140625, -0.86328125],
            [-2.6328125, -2.5390625, -3.875],
            [-1.09765625, -2.90234375, -5.8203125],
        ],
        [[51, 4, 34], [42, 15, 24], [36, 20, 22]],
        [[1.515625, 0.34375, 0.015625], [0.859375, -0.171875, -0.234375], [1.140625, 0.484375, -0.265625]],
        1.984375,
        93.26171875,
    ),
    (
        0.03125,
        0.5,
        [[-3.8125, -1.19140625, -11.328125, -2.16015625], [-0.9296875, -1.99609375, -1.15625, -0.9140625]],
        [[1, 2, 44, 58], [15, 46, 51, 10]],
        [[1.59375, 0.46875, 0.421875, -0.84375], [0.703125, 0.4375, -1.15625, -2.328125]],
        7.998046875,
        8.87890625,
    ),
]


def check_case(case: Case) -> None:
    """Compares the losses, computed from the summed log-probs on, with the reference."""
    margin, gap, averages, tokens, rewards, rank, sft = case
    lengths = torch.tensor(tokens)
    sum_logps = torch.tensor(averages, dtype=torch.float64) * lengths
    alpha = 0.05 * (lengths.shape[1] - 1) ** 2
    settings = {"margin": margin, "min_reward_gap": gap, "alpha": alpha}
    values = (clha.mean_logps(sum_logps, lengths), sum_logps, torch.tensor(rewards))
    loss, metrics = clha.clha_loss(*values, **settings)
    assert metrics["loss/rank"].item() == pytest.approx(rank, abs=1e-6)
    assert metrics["loss/sft"].item() == pytest.approx(sft, abs=1e-6)
    assert loss.item() == pytest.approx(rank + alpha * sft, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_reference_values(case: Case) -> None:
    check_case(case)


def test_all_reference_values() -> None:
    cases: list[dict[str, Any]] = golden("losses.json")["cases"]
    assert len(cases) == 62
    for case in cases:
        reference = case["own_float64"]
        rank = reference["paper_contrast"]["eq5_sum_over_pairs_batch_mean__sign_of_the_code(p_j-p_i+xi)"]
        first = zip(case["sum_logp"], case["rewards"], strict=True)
        sft = sum(-sums[0] for sums, rewards in first if rewards[0] > 0) / case["batch"]
        if not any(case["sft_index"]):  # else the release imitates another response than the first
            assert sft == pytest.approx(reference["clha"]["sft_unweighted"])
        settings = (case["margin"], case["gap_threshold"])
        check_case((*settings, case["mean_logp"], case["n_tokens"], case["rewards"], rank, sft))
