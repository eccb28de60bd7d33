"""The spread of a run's end, by hand."""

from study import measuring


def rows(golds: dict[str, tuple[float, float]]) -> list[measuring.Record]:
    """Two orders of each method under both schedules, with these golds at the last step."""
    found = []
    for method in measuring.METHODS:
        for schedule in measuring.SCHEDULES:
            for order in measuring.ORDERS:
                row = {"seed": 50, "method": method, "schedule": schedule, "order": order}
                row |= {"step-50": 1.0, "step-60": 1.0, "step-70": 1.0, "average": 2.0}
                found.append(row | {"step-80": golds[schedule][order]})
    return found


def test_the_spread_between_two_orders_is_told_by_hand() -> None:
    text = measuring.table(rows({"constant_with_warmup": (1.0, 2.0), "cosine": (1.0, 1.0)}))
    constant, cosine, mean, _ = text.splitlines()[2:]
    # The deviation of 1 and 2 is .71; among 1, 1, 1, 2 it is .5, in half of the runs.
    assert constant == "| constant rate, last step | 0.71 | 0.71 | 0.71 | 0.71 | 0.71 | 0.35 | 1.50 |"
    assert cosine == "| cosine rate, last step | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 1.00 |"
    assert mean.startswith("| constant rate, mean of weights | 0.00 |") and mean.endswith(" 2.00 |")
