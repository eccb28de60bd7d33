"""RESULTS.md and its pictures, from docs/study/runs.jsonl.

    python -m study.report                     from the committed runs
    python -m study.report --runs out/study    from the finished runs of study.run, which become runs.jsonl

Every verdict follows from an interval: 95 % of a mean over seeds (Student's t). Differences are paired: first
taken within each seed.
"""

import hashlib
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import clha
import evaluate
import reward
from clha import InputError, Record
from study import run

Seeds = dict[int, Record]  # the rows of one run of the study by seed
Rows = dict[str, Seeds]  # the runs of one kind of world, by name or by their label in the tables
Kinds = dict[int, dict[float, Rows]]  # responses per query -> share of wrong labels -> labelled rows

TEMPLATE = Path(__file__).with_name("template.md")  # the prose of RESULTS.md
DOCS = Path("docs/study")
LABELS = ("base", *run.methods(2), *run.ABLATIONS)  # of rows, in the order of Tables 2 and 3
SCORES = {"gold": "gold", "reward": "reward over base", "char_bleu": "char BLEU", "word_bleu": "word BLEU"}
# Student's t: 97.5 % quantiles for 2 to 11 seeds
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# ------------------------------------------------------------------------------------------------------------
# Numbers


class Mean(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval, which is infinite for a single seed."""

    mean: float
    half: float
    seeds: int


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by Cornish and Fisher's expansion, to 0.002."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2


def mean_of(values: list[float]) -> Mean | None:
    """The mean of one value per seed; None without any."""
    if not values:
        return None
    half = math.inf
    if len(values) > 1:
        half = student_t(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Mean(statistics.mean(values), half, len(values))


def score(seeds: Seeds, name: str = "gold") -> Mean | None:
    """A score over all seeds; None where no seed has it."""
    return mean_of([row[name] for row in seeds.values() if name in row])


def difference(first: Seeds, second: Seeds, name: str = "gold") -> Mean | None:
    """The score of `first` minus that of `second`, over the seeds that both have."""
    return mean_of([first[seed][name] - second[seed][name] for seed in first if seed in second])


def read_runs(path: Path) -> dict[str, Rows]:
    """The rows of a file as {world: {name of the run: {seed: row}}}."""
    worlds: dict[str, Rows] = {}
    for _, row in clha.read_jsonl(path):
        runs = worlds.setdefault(row["world"], {})
        runs.setdefault(row["run"], {})[row["seed"]] = row
    return worlds


def label_rows(runs: Rows, length: int) -> Rows:
    """The finished rows of Tables 2 and 3 by their labels, in the order of the tables."""
    settings = run.methods(length) | run.ABLATIONS
    names = {label: run.run_name(settings[label], length) for label in settings}
    names = {"base": "base"} | names
    return {label: runs[name] for label, name in names.items() if name in runs}


def kinds_of(worlds: dict[str, Rows]) -> Kinds:
    """The rows of the toy worlds."""
    kinds: Kinds = {length: {} for length in run.LENGTHS}
    for length, noise in itertools.product(run.LENGTHS, run.NOISES):
        runs = worlds.get(run.world_name(noise, length), {})
        kinds[length][noise] = label_rows(runs, length)
    return kinds


# ------------------------------------------------------------------------------------------------------------
# Tables

NOT_KEPT = "(These runs have not kept it.)\n"


def cell(value: Mean | None, form: str = ".2f") -> str:
    """A mean with its interval for a table; nothing where there is none."""
    if value is None:
        return ""
    interval = f"± {value.half:.2f}" if value.seeds > 1 else "(one seed)"
    return f"{value.mean:{form}} {interval}"


def signed(value: Mean | None) -> str:
    """A difference for a table."""
    return cell(value, "+.2f")


def main_table(rows: Rows, by: str) -> str:
    """Table 2, with rewards above the base model's, and CLHA minus each row by the score `by`."""
    if "base" not in rows:
        return "(not run)\n"
    base = rows["base"]
    names = [name for name in SCORES if score(base, name)]
    lines = [["method", *(SCORES[name] for name in names), f"CLHA minus it, {by}", "seeds"]]
    for label, seeds in rows.items():
        cells = {name: cell(score(seeds, name)) for name in names}
        cells["reward"] = "" if label == "base" else signed(difference(seeds, base, "reward"))
        lead = signed(difference(rows.get("CLHA", {}), seeds, by))
        if label == "CLHA":
            label = "**CLHA**"
            lead = ""
        lines.append([label, *(cells[name] for name in names), lead, str(len(seeds))])
    return evaluate.markdown(lines)


def noise_table(by_noise: dict[float, Rows]) -> str:
    """Gold reward of each row by the share of wrong labels."""
    lines = [["method", *(f"{noise:.0%}" for noise in by_noise)]]
    for label in LABELS:
        cells = [cell(score(rows.get(label, {}))) for rows in by_noise.values()]
        if cells.count("") < len(cells) - 1:
            lines.append([label, *cells])
    return evaluate.markdown(lines)


def sweep_table(runs: Rows) -> str:
    """Gold reward for each value of each setting that was swept, and its difference from the center."""
    center = runs.get(run.run_name(run.CENTER, 2), {})
    lines = [["setting", "value", "gold", "minus the center"]]
    for setting, sweep in run.SWEEPS.items():
        for value, settings in sweep.items():
            seeds = runs.get(run.run_name(settings, 2), {})
            gain = "" if seeds is center else signed(difference(seeds, center))
            lines.append([setting, f"{value:g}", cell(score(seeds)), gain])
    return evaluate.markdown(lines)


def parts_table(title: str, seeds_by_label: Rows, key: str) -> str:
    """The means over seeds of each number that rows keep under `key`, a line per label."""
    lines: list[list[str]] = []
    for label, seeds in seeds_by_label.items():
        found = [row[key] for row in seeds.values() if key in row]
        if found:
            lines = lines or [[title, *found[0]]]
            means = [statistics.mean(row[name] for row in found) for name in found[0]]
            lines.append([label, *(f"{mean:.2f}" for mean in means)])
    return evaluate.markdown(lines) if lines else NOT_KEPT


CLAIMS = (  # the words of a claim, the row that should be better, and the other
    ("CLHA beats PRO (Table 2)", "CLHA", "PRO"),
    ("CLHA beats RRHF (Table 2)", "CLHA", "RRHF"),
    ("CLHA beats RRHF with CLHA's SFT (Table 2)", "CLHA", "RRHF, CLHA's SFT"),
    ("CLHA beats SFT (Table 2)", "CLHA", "SFT"),
    ("CLHA beats CoH (Table 2)", "CLHA", "CoH"),
    ("CLHA beats RLHF (Table 2)", "CLHA", "RLHF"),
    ("CLHA beats DPO (not a claim of the paper)", "CLHA", "DPO"),
    ("gate and filter together help (Table 3, rescoring)", "CLHA", "CLHA w/o rescore"),
    ("the gate helps SFT (CLHA w/o contrast beats SFT)", "CLHA w/o contrast", "SFT"),
    ("contrast helps (Table 3)", "CLHA", "CLHA w/o contrast"),
    ("margin helps (Table 3)", "CLHA", "CLHA w/o margin"),
)


def verdict(gain: Mean | None) -> str:
    """Holds, fails or not shown: where the interval of a difference, claimed to be above zero, lies."""
    if gain is None:
        return "not run"
    word = "**not shown**"
    if gain.mean - gain.half > 0:
        word = "**holds**"
    if gain.mean + gain.half < 0:
        word = "**fails**: it is the other way round"
    return f"{word} ({signed(gain)}, {gain.seeds} seeds)"


def claims_table(kinds: Kinds, fresh: Kinds) -> str:
    """What the main worlds say of each claim, and the fresh ones, and those of other noise."""
    columns = {f"{run.NOISE:.0%} wrong labels": (kinds, run.NOISE), "fresh seeds": (fresh, run.NOISE)}
    columns |= {f"{noise:.0%}": (kinds, noise) for noise in run.NOISES if noise != run.NOISE}
    claims = []
    for length in run.LENGTHS:
        for words, better, worse in CLAIMS:
            claims.append((f"{words}, {length} responses", length, better, length, worse))
    claims.append(("three responses of one author beat two (CLHA)", 3, "CLHA", 2, "CLHA"))
    lines = [["claim", *columns]]
    for words, length, better, other_length, worse in claims:
        line = [words]
        for worlds, noise in columns.values():
            first = worlds[length][noise].get(better, {})
            second = worlds[other_length][noise].get(worse, {})
            line.append(verdict(difference(first, second)))
        lines.append(line)
    return evaluate.markdown(lines)


# ------------------------------------------------------------------------------------------------------------
# The page


def plot_noise(kinds: Kinds) -> str:
    """Gold reward against the share of wrong labels, a panel per number of responses."""
    pyplot = reward.import_pyplot()
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, (length, by_noise) in zip(panels, kinds.items(), strict=True):
        for number, label in enumerate(LABELS):
            means = {noise: score(rows[label]) for noise, rows in by_noise.items() if label in rows}
            if len(means) > 1:
                color = {"CLHA": "black", "base": "0.7"}.get(label, f"C{number % 10}")
                dashes = "--" if label in run.ABLATIONS else "-"
                heights = [mean.mean for mean in means.values()]
                halves = [mean.half if mean.seeds > 1 else 0 for mean in means.values()]
                style = {"color": color, "linestyle": dashes, "marker": "o", "capsize": 2}
                axes.errorbar(list(means), heights, halves, label=label, **style)
        axes.set(title=f"{length} responses per query", xlabel="share of wrong labels", xticks=list(by_noise))
    panels[0].set_ylabel("gold reward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    path = DOCS / "noise.png"
    reward.save_picture(figure, str(path))
    return f"![Gold reward against the share of wrong labels]({path})\n"


def reading() -> str:
    """What people made of the numbers, if it was of these: it names a hash of runs.jsonl."""
    path = DOCS / "reading.md"
    text = path.read_text() if path.is_file() else ""
    found = hashlib.sha256((DOCS / "runs.jsonl").read_bytes()).hexdigest()
    return text if found[:12] in text else ""


def write() -> None:
    """Writes RESULTS.md and its pictures; raises InputError without the runs of the main worlds."""
    runs_file = DOCS / "runs.jsonl"
    worlds = read_runs(runs_file)
    name = run.world_name(run.NOISE, 2)
    if name not in worlds:
        raise InputError(f"{runs_file}: has no run of the world {name}")
    kinds = kinds_of(worlds)
    unseen = DOCS / "unseen.jsonl"
    fresh = kinds_of(read_runs(unseen) if unseen.is_file() else {})
    main = kinds[2][run.NOISE]
    bases = {f"{noise:.0%}": rows.get("base", {}) for noise, rows in kinds[2].items()}
    page = TEMPLATE.read_text().format(
        run=run,
        claims=claims_table(kinds, fresh),
        reading=reading(),
        two=main_table(main, "gold"),
        three=main_table(kinds[3][run.NOISE], "gold"),
        anatomy=parts_table("method", main, "anatomy"),
        noise_picture=plot_noise(kinds),
        noise_two=noise_table(kinds[2]),
        noise_three=noise_table(kinds[3]),
        rescoring=parts_table("wrong labels", bases, "rescoring"),
        sweeps=sweep_table(worlds[name]),
        likelihoods=parts_table("method", main, "likelihoods"),
        real=main_table(label_rows(worlds.get("real", {}), 2), "reward"),
    )
    Path("RESULTS.md").write_text(page)


def collect(out: Path) -> None:
    """Makes docs/study/runs.jsonl of the finished runs of a folder; raises InputError if there are none."""
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("**/row.json"))]
    if not rows:
        raise InputError(f"{out}: no finished runs in it; `python -m study.run toy --out {out}` makes them")
    reward.write_jsonl(DOCS / "runs.jsonl", rows)


def main() -> None:
    """Parses the command line and writes the report."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of study.run, whose rows become runs.jsonl first")
    args = parser.parse_args()
    reward.import_pyplot()  # what is missing is said before the work
    if args.runs:
        collect(args.runs)
    write()
    print(f"RESULTS.md is written, with its pictures in {DOCS}")


if __name__ == "__main__":
    clha.run(main)
