"""RESULTS.md and its pictures, from the runs of study.py that are finished (`python study.py report`).

Every number is computed here from the scores that evaluate.py left in the folders of the runs; every verdict
follows from an interval. Intervals are 95 % of a mean over seeds (Student's t), and differences are paired:
first taken within each seed.
"""

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import clha
import evaluate
import people
import reward
import study
import toy
from records import InputError, Record, read_jsonl, read_records, write_jsonl

Runs = dict[int, dict[str, float]]  # seed -> score -> value, of one run in one kind of world
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)  # by n - 1
SCORES = {"gold": "gold", "reward": "reward", "char_bleu": "char BLEU", "word_bleu": "word BLEU"}


class Mean(NamedTuple):
    """A mean over seeds with its 95 % interval, which is infinite for a single seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.seeds > 1 else f"{self.mean:.2f} (one seed)"


def mean_of(values: list[float]) -> Mean:
    """The mean of values and the half width of its interval."""
    if len(values) < 2:
        return Mean(values[0], float("inf"), len(values))
    t = T_975[min(len(values) - 1, len(T_975)) - 1]  # of more seeds, a little too wide
    return Mean(statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5, len(values))


def read_runs(folder: Path) -> dict[str, dict[str, float]]:
    """The Total scores of each run that is evaluated in a folder of a world, by the run's name."""
    runs = {}
    for path in sorted(folder.glob("*/eval/scores.json")):
        total = evaluate.read_summary(path.parent)["Total"]
        values = {name: total[name] for name in SCORES if name in total}
        means = {n: v if isinstance(v, float) else v["mean"] for n, v in values.items()}
        runs[path.parents[1].name] = means
    return runs


class Kind:
    """All seeds of one kind of world: its runs by name, with a row of a table looked up by its settings."""

    def __init__(self, folders: dict[int, Path], length: int, planned: set[str] | None = None) -> None:
        self.length, self.folders, self.runs = length, folders, {}
        for seed, folder in folders.items():
            for name, scores in read_runs(folder).items():
                if planned is None or name in planned:  # not what an earlier plan has left
                    self.runs.setdefault(name, {})[seed] = scores

    def find(self, settings: dict[str, Any] | None) -> Runs:
        """The runs with these settings; the base model's for None."""
        return self.runs.get("base" if settings is None else study.run_name(settings, self.length), {})

    def score(self, settings: dict[str, Any] | None, name: str = "gold") -> Mean | None:
        """A score of a row, over its seeds; None if there is none."""
        values = [scores[name] for scores in self.find(settings).values() if name in scores]
        return mean_of(values) if values else None

    def difference(
        self, a: dict[str, Any] | None, b: dict[str, Any] | None, name: str = "gold"
    ) -> Mean | None:
        """Score of row a minus that of row b, paired by seed."""
        first, second = self.find(a), self.find(b)
        both = sorted(first.keys() & second.keys())
        return mean_of([first[s][name] - second[s][name] for s in both]) if both else None


def toy_kind(out: Path, noise: float, length: int) -> Kind:
    """The toy worlds of a noise and length."""
    folders = sorted((out / "toy").glob(f"seed-*/noise-{noise:g}/length-{length}"))
    planned = {study.run_name(settings, length) for settings in study.plan(noise, length)} | {"base", "rlhf"}
    return Kind({int(folder.parts[-3].removeprefix("seed-")): folder for folder in folders}, length, planned)


def real_kind(out: Path) -> Kind:
    """The runs on real text."""
    folders = sorted((out / "real").glob("seed-*"))
    return Kind({int(folder.name.removeprefix("seed-")): folder for folder in folders}, 2)


# ------------------------------------------------------------------------------------------------------------
# Tables


def cell(value: Mean | None) -> str:
    """A mean for a table."""
    return "" if value is None else str(value)


def signed(value: Mean | None) -> str:
    """A difference for a table."""
    return "" if value is None else f"{value.mean:+.2f} ± {value.half:.2f}".replace("± inf", "(one seed)")


def rows_of(length: int) -> dict[str, dict[str, Any] | None]:
    """All rows of Table 2 and Table 3."""
    return {"base": None} | study.methods(length) | study.RLHF | study.ABLATIONS | study.RELEASE


def main_table(kind: Kind, by: str) -> str:
    """Table 2, and CLHA minus each row by the score `by`.

    Rewards are given as what they are above the base model's: each judge has a zero of its own.
    """
    names = [name for name in SCORES if kind.score(None, name)]
    titles = [f"{SCORES[name]} over base" if name == "reward" else SCORES[name] for name in names]
    lines = [["method", *titles, f"CLHA minus it, {SCORES[by]}", "seeds"]]
    for row, settings in rows_of(kind.length).items():
        if value := kind.score(settings, by):
            gain = signed(kind.difference(settings, None, "reward")) if settings is not None else ""
            cells = [gain if name == "reward" else cell(kind.score(settings, name)) for name in names]
            difference = "" if row == "CLHA" else signed(kind.difference({}, settings, by))
            lines.append([f"**{row}**" if row == "CLHA" else row, *cells, difference, str(value.seeds)])
    return people.markdown(lines)


def noise_table(kinds: dict[float, Kind]) -> str:
    """Gold reward of each row by the share of wrong labels."""
    lines = [["method", *(f"{noise:.0%} wrong labels" for noise in kinds)]]
    for name, settings in rows_of(next(iter(kinds.values())).length).items():
        values = [kind.score(settings) for kind in kinds.values()]
        if sum(value is not None for value in values) > 1:
            lines.append([name, *map(cell, values)])
    return people.markdown(lines)


def ablation_table(kinds: dict[str, Kind]) -> str:
    """Table 3: what each part is worth, CLHA minus CLHA without it in gold reward."""
    lines = [["CLHA minus ...", *kinds]]
    for name, settings in (study.ABLATIONS | study.RELEASE).items():
        lines.append([name, *(signed(kind.difference({}, settings)) for kind in kinds.values())])
    return people.markdown(lines)


def anatomy_table(kind: Kind) -> str:
    """What the replies of each row are made of, means over replies and then over seeds."""
    lines: list[list[str]] = []
    for name, settings in (
        rows_of(kind.length) | {"CLHA w/o SFT": study.SWEEPS["weight of the summed SFT"][0.0]}
    ).items():
        run = "base" if settings is None else study.run_name(settings, kind.length)
        paths = [folder / run / "eval/responses.jsonl" for folder in kind.folders.values()]
        seeds = [
            [toy.anatomy(row["prompt"], row["response"]) for _, row in read_jsonl(path)]
            for path in paths if path.is_file()
        ]  # fmt: skip
        if seeds:
            lines = lines or [["method", *seeds[0][0]]]
            means = [
                statistics.mean(statistics.mean(r[part] for r in rows) for rows in seeds)
                for part in lines[0][1:]
            ]
            lines.append([name, *(f"{value:.2f}" for value in means)])
    return people.markdown(lines) if lines else ""


def rescoring_table(kinds: dict[float, Kind]) -> str:
    """What rescoring sees of the training data: whether pairs it keeps are in their true order, and whether
    the best reply is a good one (gold above 0) where the gate is open. Means over seeds."""
    titles = ["wrong labels", "reward model agrees with labels", "mean reward (sd 1)", "pairs kept"]
    titles += ["in true order", "dropped: in true order", "gate open", "best reply good", "same, gate open"]
    lines = [titles]
    for noise, kind in kinds.items():
        found: list[dict[str, float]] = []
        for folder in kind.folders.values():
            if not (folder / "train.jsonl").is_file():
                continue
            training = json.loads((folder.parent / "rm_train/training.json").read_text())
            found.append({"accuracy": training["accuracy"], "mean": training["mean_reward"]})
            found[-1] |= rescoring(read_records(folder / "train.jsonl"))
        if found:
            means = {name: statistics.mean(row[name] for row in found) for name in found[0]}
            cells = [f"{value:.2f}" if name == "mean" else f"{value:.0%}" for name, value in means.items()]
            lines.append([f"{noise:.0%}", *cells])
    return people.markdown(lines)


def rescoring(records: list[Record]) -> dict[str, float]:
    """The shares that `rescoring_table` shows, of scored toy records. Pairs of equal gold are left out."""
    kept, dropped, good, good_open = [], [], [], []
    for record in records:
        golds = [toy.gold(record["prompt"], reply) for reply in record["responses"]]
        ranked = sorted(zip(record["rewards"], golds, strict=True), reverse=True)
        for (r, gold), (other_r, other_gold) in itertools.combinations(ranked, 2):
            if gold != other_gold:
                (kept if r - other_r > clha.Config.min_reward_gap else dropped).append(gold > other_gold)
        good.append(ranked[0][1] > 0)
        if ranked[0][0] > 0:
            good_open.append(good[-1])
    return {
        "kept": len(kept) / (len(kept) + len(dropped)),
        "kept right": statistics.mean(kept),
        "dropped right": statistics.mean(dropped),
        "open": len(good_open) / len(good),
        "good": statistics.mean(good),
        "good where open": statistics.mean(good_open),
    }


def sweep_table(kind: Kind) -> str:
    """Gold reward for each value of each setting that was swept, and its difference from the centre."""
    lines = [["setting", "value", "gold", "minus the centre"]]
    for name, sweep in study.SWEEPS.items():
        for value, settings in sweep.items():
            centre = study.run_name(settings, 2) == study.run_name(study.CENTRE, 2)
            difference = "" if centre else signed(kind.difference(settings, study.CENTRE))
            lines.append(
                [name, f"**{value:g}**" if centre else f"{value:g}", cell(kind.score(settings)), difference]
            )
    return people.markdown(lines)


def verdict(difference: Mean | None) -> str:
    """holds, fails or not shown, as the interval of a difference that a claim says is above zero."""
    if difference is None:
        return "not run"
    word = "**not shown**"
    if difference.mean - difference.half > 0:
        word = "**holds**"
    elif difference.mean + difference.half < 0:
        word = "**fails**: it is the other way round"
    return f"{word} ({signed(difference)}, {difference.seeds} seeds)"


# ------------------------------------------------------------------------------------------------------------
# Pictures


def save(figure: Any, path: Path) -> str:
    """Writes a picture and returns the Markdown that shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return f"![{path.stem}]({path})\n"


def plot_noise(kinds: dict[int, dict[float, Kind]], path: Path) -> str:
    """Gold reward against the share of wrong labels, a panel a length of rankings."""
    pyplot = reward.import_pyplot()
    figure, all_axes = pyplot.subplots(1, len(kinds), figsize=(10, 3.8), sharey=True, layout="constrained")
    colours = {name: f"C{i % 10}" for i, name in enumerate(rows_of(2))} | {"CLHA": "black", "base": "0.7"}
    for axes, (length, by_noise) in zip(all_axes, kinds.items(), strict=True):
        for name, settings in rows_of(length).items():
            points = [(noise, value) for noise, kind in by_noise.items() if (value := kind.score(settings))]
            if len(points) > 1:
                noises, values = [noise for noise, _ in points], [value for _, value in points]
                style = {"linewidth": 3, "zorder": 5} if name == "CLHA" else {}
                style |= {"linestyle": "--"} if name.startswith("CLHA w/o") else {}
                means, halves = [v.mean for v in values], [v.half if v.seeds > 1 else 0 for v in values]
                style |= {"color": colours[name], "marker": "o", "markersize": 4, "capsize": 2}
                axes.errorbar(noises, means, halves, label=name, **style)
        axes.set(title=f"{length} replies a query", xlabel="share of wrong labels", xticks=list(by_noise))
    all_axes[0].set_ylabel("gold reward")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return save(figure, path)


def plot_sweeps(kind: Kind, path: Path) -> str:
    """Gold reward against each setting that was swept."""
    pyplot = reward.import_pyplot()
    panels = {"margin": ["margin"], "reward gap": ["reward gap"]}
    panels["weight of the SFT term"] = [name for name in study.SWEEPS if name.startswith("weight")]
    figure, all_axes = pyplot.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        for name in names:
            points = [(value, score) for value, settings in study.SWEEPS[name].items()
                      if (score := kind.score(settings))]  # fmt: skip
            values, halves = [p.mean for _, p in points], [p.half if p.seeds > 1 else 0 for _, p in points]
            axes.errorbar([x for x, _ in points], values, halves, marker="o", capsize=2, label=name)
        axes.set(xlabel=title)
        axes.set_xscale("symlog", linthresh=0.01 if len(names) > 1 else 0.1)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    all_axes[0].set_ylabel("gold reward")
    return save(figure, path)


def likelihoods(kind: Kind, settings: dict[str, Any]) -> dict[int, dict[str, list[float]]]:
    """Dev log-probs of chosen and rejected replies by step, a value a seed."""
    curves: dict[int, dict[str, list[float]]] = {}
    for seed in kind.find(settings):
        path = kind.folders[seed] / study.run_name(settings, kind.length) / "metrics.jsonl"
        for _, row in read_jsonl(path) if path.is_file() else ():
            for name in ("chosen", "rejected"):
                if (value := row.get(f"eval/logps/{name}")) is not None:
                    curves.setdefault(row["step"], {}).setdefault(name, []).append(value)
    return curves


PANELS = ("SFT", "RRHF, CLHA's SFT", "PRO", "DPO", "CLHA", "CLHA w/o margin")


def plot_likelihoods(kind: Kind, path: Path) -> str:
    """Mean log-probs per token of the chosen and rejected dev replies over training, a panel an objective."""
    pyplot = reward.import_pyplot()
    rows = {n: s for n, s in (study.methods(2) | study.ABLATIONS).items() if n in PANELS}
    figure, all_axes = pyplot.subplots(1, len(rows), figsize=(11, 3), sharey=True, layout="constrained")
    for axes, (name, settings) in zip(all_axes, rows.items(), strict=True):
        curves = likelihoods(kind, settings)
        for reply, colour in (("chosen", "tab:blue"), ("rejected", "tab:red")):
            axes.plot(list(curves), [statistics.mean(row[reply]) for row in curves.values()], "o-",
                      color=colour, label=reply, markersize=3)  # fmt: skip
        axes.set(title=name, xlabel="step")
    all_axes[0].set_ylabel("dev log-prob, nats a token")
    all_axes[0].legend(frameon=False)
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# The text


def claims(kinds: dict[int, dict[float, Kind]]) -> str:
    """The paper's claims, each with what the toy world says of it."""
    rows, lines = study.methods(2), [["claim", "20 % wrong labels", "0 %", "40 %"]]
    order = (study.NOISE, *(noise for noise in kinds[2] if noise != study.NOISE))

    def add(claim: str, difference: Callable[[Kind], Mean | None], length: int = 2) -> None:
        lines.append([claim, *(verdict(difference(kinds[length][noise])) for noise in order)])

    for name in ("PRO", "RRHF", "RRHF, CLHA's SFT", "SFT", "CoH"):
        add(f"CLHA beats {name} (Table 2)", lambda kind, row=rows[name]: kind.difference({}, row))
    add("CLHA beats RLHF (Table 2)", lambda kind: kind.difference({}, study.RLHF["RLHF"]))
    add("CLHA beats DPO (not a claim of the paper)", lambda kind: kind.difference({}, rows["DPO"]))
    for name, settings in study.ABLATIONS.items():
        part = name.removeprefix("CLHA w/o ").replace("rescore", "rescoring")
        add(f"{part} helps (Table 3)", lambda kind, s=settings: kind.difference({}, s))
    three = study.methods(3)
    for name in ("PRO", "RRHF", "SFT", "DPO"):
        claim = f"CLHA beats {name}, three replies"
        add(claim, lambda kind, row=three[name]: kind.difference({}, row), length=3)
    longer = ["three replies beat two (CLHA)"]
    for noise in order:
        two, more = (kinds[length][noise].find({}) for length in (2, 3))
        pairs = [more[seed]["gold"] - two[seed]["gold"] for seed in two.keys() & more.keys()]
        longer.append(verdict(mean_of(pairs) if pairs else None))
    return people.markdown([*lines, longer])


def dump(kinds: dict[str, Kind], path: Path) -> None:
    """All scores behind the report as JSON lines, a line a run."""
    rows = [
        {"world": world, "seed": seed, "run": name, **scores}
        for world, kind in kinds.items() for name, runs in kind.runs.items() for seed, scores in runs.items()
    ]  # fmt: skip
    write_jsonl(path, rows)


TOY_TEXT = f"""# Results

The tables and pictures here are written by `python study.py report` from runs that `bash run.sh study` makes;
[docs/study/runs.jsonl](docs/study/runs.jsonl) has the scores of every run. There is one data path, one
trainer and one evaluation, so two rows differ in their objective alone; except that chain of hindsight trains
on texts of its own, and RLHF samples its replies itself, with TRL's trainer.

**What was tuned.** Learning rate and steps are the same for all ({study.STEPS} steps of 64 queries,
{study.LEARNING_RATE:g}) and were tuned for none of them, nor were the weights of the baselines. CLHA's margin
and reward gap were: by the sweeps below, on these very worlds at 20 % wrong labels and two replies. There its
lead is flattered; the other columns are cleaner evidence. RLHF's KL coefficient was chosen on another world.

**± is a 95 % interval** of the mean over seeds (Student's t). Seeds differ in everything: data, base model,
reward models. Differences are paired by seed, so they are known better than the scores themselves. *Gold* is
the toy world's true reward, -3 to 3; above 0 is acceptable. *Reward* is the mean sigmoid score, in percent,
by a reward model that no training saw. Where the two disagree, gold is right.

## What holds of the paper's claims

On the toy world, by gold reward. *Holds* and *fails*: the 95 % interval of the difference leaves out zero, so
of the verdicts below one in forty would say *holds* by chance.
"""

READING = Path("docs/study/reading.md")  # what people made of the numbers, for those runs
LIKELIHOOD_TEXT = """## Likelihoods over training

Of the best and the worst dev reply by reward, in nats a token, mean over seeds. Where both fall while the
distance between them grows, a model learns to tell replies apart and unlearns to say them: what the paper
calls preference overfitting.
"""

REAL_TEXT = """## Real text

{queries:,} different queries of HH-RLHF with their real rewards (`python study.py real`), in four parts:
{train:,} train, {judge:,} are the judge's, {dev:,} dev, {test:,} test. A LLaMA of {millions:.0f} M
parameters is trained from scratch on all text of the first part ({steps} steps of 4,096 tokens, to a loss
of {loss:.2f} nats a token). The judge is made of it with the human labels of the second part, which no run
sees; it is right in {accuracy:.0%} of {pairs} pairs that it never saw. Then each objective takes {max_steps}
steps of {batch_size} queries (learning rate {learning_rate:g}, {dtype}, {max_length} tokens a query). Seeds
differ in the order of the data only: base model, judge and test items are shared, so the intervals know
nothing of what another base model or judge would say.
"""

REAL_LIMITS = """Most queries are of HH-RLHF's test split, scored by the larger, evaluation reward model;
a few are the dev items of the release, scored by the smaller one. One reward gap serves both.

Where the judge is right in about half of its pairs, it is no better than a coin, and its rewards say nothing.

What so small a model can show: that the whole path runs on real text, real rewards and long prompts, and how
each objective moves a model's likelihoods and lengths. What it can't: whether replies get better. A model of
this size, trained on so little, does not write English, and a judge made of it rewards form, not content. The
order of these rows is no evidence about LLaMA-7B.
"""


def real_section(out: Path, kind: Kind) -> list[str]:
    """What was done on real text, and its table."""
    sizes = {n: len(read_records(out / f"real/data/{n}.jsonl")) for n in ("train", "judge", "dev", "test")}
    base, judge = (json.loads((out / f"real/{name}/training.json").read_text()) for name in ("base", "judge"))
    facts = study.REAL | sizes | {"queries": sum(sizes.values()), "millions": base["parameters"] / 1e6}
    facts |= {name: base[name] for name in ("steps", "loss")} | {n: judge[n] for n in ("accuracy", "pairs")}
    return [REAL_TEXT.format(**facts), main_table(kind, "reward"), REAL_LIMITS]


def write(out: Path) -> None:
    """Writes RESULTS.md and docs/study, its pictures and scores. Raises InputError if there are no runs."""
    reward.import_pyplot()  # what is wrong is said now
    kinds = {length: {noise: toy_kind(out, noise, length) for noise in study.NOISES} for length in (2, 3)}
    main, pictures = kinds[2][study.NOISE], Path("docs/study")
    if not main.runs:
        raise InputError(f"{out}: no finished runs in it; `python study.py toy --out {out}` makes them")
    named = {f"toy, {length} replies, noise {noise:g}": kind
             for length, by_noise in kinds.items() for noise, kind in by_noise.items()}  # fmt: skip
    real = real_kind(out)
    dump(named | {"real": real}, pictures / "runs.jsonl")
    columns = {f"{n:.0%} wrong labels": kind for n, kind in kinds[2].items()}
    columns |= {f"{noise:.0%}, three replies": kind for noise, kind in kinds[3].items()}
    text = [
        TOY_TEXT,
        claims(kinds),
        READING.read_text() if READING.is_file() else "",
        "## Table 2 on the toy world\n\n20 % wrong labels, two replies a query:\n",
        main_table(main, "gold"),
        "What a reply is made of: words, right steps out of three, the share that has the usual mistake, "
        "and sentences that the grammar of the world never says.\n",
        anatomy_table(main),
        "Three replies a query:\n",
        main_table(kinds[3][study.NOISE], "gold"),
        "## Noise\n",
        plot_noise(kinds, pictures / "noise.png"),
        "Gold reward, two replies a query:\n",
        noise_table(kinds[2]),
        "Three replies:\n",
        noise_table(kinds[3]),
        "## Table 3: what each part is worth\n\nGold reward, paired:\n",
        ablation_table(columns),
        "What rescoring sees of the training data, two replies a query:\n",
        rescoring_table(kinds[2]),
        "## Sweeps\n\nOne setting at a time, 20 % wrong labels, two replies.\n",
        plot_sweeps(main, pictures / "sweeps.png"),
        sweep_table(main),
        LIKELIHOOD_TEXT,
        plot_likelihoods(main, pictures / "likelihoods.png"),
    ]
    if real.runs:
        text += real_section(out, real)
    Path("RESULTS.md").write_text("\n".join(text))
    print(
        f"RESULTS.md, and {pictures} with its pictures and scores: {sum(map(len, main.runs.values()))} runs"
    )
