"""The outcome that docs/study/protocol.md tells of its first section follows from the rows."""

import statistics

from conftest import ROOT

import clha

METHODS = ("CLHA", "PRO", "SFT", "DPO")
WAYS = {
    "constant rate, last step": ("constant_with_warmup", "step-80"),
    "cosine rate, last step": ("cosine", "step-80"),
    "constant rate, mean of weights": ("constant_with_warmup", "average"),
    "cosine rate, mean of weights": ("cosine", "average"),
}


def test_the_spread_of_a_runs_end() -> None:
    folder = ROOT / "docs" / "study"
    rows = [row for _, row in clha.read_jsonl(folder / "measuring.jsonl")]
    assert len(rows) == 64  # four seeds, four methods, two rates, two orders
    protocol = (folder / "protocol.md").read_text()
    for way, (schedule, name) in WAYS.items():
        own = [row for row in rows if row["schedule"] == schedule]
        spreads = []
        for method in METHODS:
            golds = {seed: [] for seed in range(50, 54)}
            for row in own:
                if row["method"] == method:
                    golds[row["seed"]].append(row[name])
            spreads.append(statistics.mean(map(statistics.variance, golds.values())) ** 0.5)
        ends = [[row[f"step-{n}"] for n in (50, 60, 70, 80)] for row in own]
        within = statistics.mean(map(statistics.variance, ends)) ** 0.5
        level = statistics.mean(row[name] for row in own)
        cells = [*spreads, statistics.mean(spreads), within, level]
        assert f"| {way} | {' | '.join(f'{value:.2f}' for value in cells)} |\n" in protocol
