"""RESULTS.md and its picture, from the rows of the study: all numbers and verdicts follow from them.

    python -m study.report                     from the committed rows, in docs/study
    python -m study.report --rows out/study    from those of study.run; the page is written there

docs/study/protocol.md says what is asked. A difference is paired: it is first taken within each seed.
Intervals are Student's t over seeds; the endpoints' p-values are corrected together by Holm's method.
"""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

import clha
import reward
from clha import InputError, Record
from study import run, toy

Seeds = dict[int, Record]  # the rows of one method by seed

TEMPLATE = Path(__file__).with_name("template.md")  # the prose of RESULTS.md
ENDPOINTS = {  # of the protocol: the question, and the row that should be worse than CLHA
    "CLHA - PRO": "PRO",
    "the gate": "CLHA w/o gate",
    "the filter": "CLHA w/o filter",
    "the contrast": "gated SFT",
}
CLAIMS = {  # what it means that they hold
    "CLHA - PRO": "CLHA has a higher gold than PRO, both tuned",
    "the gate": "Leaving out the imitation of bad best responses helps, next to the contrast",
    "the filter": "Leaving out pairs that are close in reward helps",
    "the contrast": "CLHA has a higher gold than gated SFT, each tuned",
}
NEITHER = "CLHA w/o gate and filter"
EXPLORATORY = {  # what is asked, and the row with it and the one without
    f"the gate{run.PAPERS}": (f"CLHA{run.PAPERS}", f"CLHA w/o gate{run.PAPERS}"),
    f"the filter{run.PAPERS}": (f"CLHA{run.PAPERS}", f"CLHA w/o filter{run.PAPERS}"),
    f"gate and filter{run.PAPERS}": (f"CLHA{run.PAPERS}", NEITHER + run.PAPERS),
    "the gate, without the contrast": ("CLHA w/o contrast", "CLHA w/o contrast and gate"),
    "the gate, in tuned SFT": ("gated SFT", "SFT"),
}
LEVEL = 0.05  # of the endpoints' tests, together
EQUAL = 0.1  # gold; an effect is called equal to zero if its 90 % interval lies within this
RESAMPLES = 20_000

# Numbers ----------------------------------------------------------------------------------------------------


def tail(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t with so many degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    theta = math.atan(t / freedom**0.5)
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= (2 * k + 1 + odd) / (2 * k + 2 + odd) * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    return 1 - ((theta + inside) * 2 / math.pi if odd else inside)


def quantile(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = share, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > 1 - share else (low, middle)
    return low


class Mean(NamedTuple):
    """A mean over seeds, and its standard error."""

    mean: float
    error: float  # infinite for a single seed
    seeds: int

    def half(self, share: float = 0.95) -> float:
        """Half the width of its interval."""
        return quantile(share, self.seeds - 1) * self.error if self.seeds > 1 else math.inf

    def p(self) -> float:
        """Of the two-sided test that the true mean is zero."""
        if self.seeds < 2:
            return 1.0
        return tail(abs(self.mean) / self.error, self.seeds - 1) if self.error else float(self.mean == 0)


def mean_of(values: list[float]) -> Mean | None:
    """The mean of one value per seed; None without any."""
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return Mean(statistics.mean(values), error, len(values))


def difference(first: Seeds, second: Seeds) -> Mean | None:
    """The gold of `first` minus that of `second`, over the seeds that both have."""
    return mean_of([row["gold"] - second[seed]["gold"] for seed, row in first.items() if seed in second])


def lead(rows: dict[str, Seeds], label: str, other: str) -> Mean | None:
    """The same of two methods; None where one of them has no rows."""
    return difference(rows.get(label, {}), rows.get(other, {}))


def holm(values: list[float]) -> list[float]:
    """p-values corrected together: the smallest times their number, the next times one less, and so on."""
    p, order = torch.tensor(values, dtype=torch.float64).sort()
    corrected = (p * torch.arange(len(p), 0, -1)).cummax(0).values.clamp(max=1)
    return corrected[order.argsort()].tolist()


def verdict(gain: Mean, p: float) -> str:
    """What a difference, claimed to be above zero, and its corrected p-value say: one of four."""
    if p < LEVEL:
        return "holds" if gain.mean > 0 else "fails"
    if abs(gain.mean) + gain.half(0.9) <= EQUAL:
        return f"equal within {EQUAL:g}"
    return "not shown"


def over_tasks(first: Seeds, second: Seeds) -> tuple[float, float]:
    """A 95 % interval of a difference in gold that draws seeds again, and tasks, which prompts share."""
    seeds = sorted(first.keys() & second.keys())
    tasks = [*first[seeds[0]]["tasks"]]
    sums = torch.tensor([[first[s]["tasks"][t][1] - second[s]["tasks"][t][1] for t in tasks] for s in seeds])
    counts = torch.tensor([[first[s]["tasks"][t][0] for t in tasks] for s in seeds])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(seeds), (RESAMPLES, len(seeds), 1), generator=generator)
    columns = torch.randint(len(tasks), (RESAMPLES, 1, len(tasks)), generator=generator)
    means = sums[rows, columns].sum((1, 2)) / counts[rows, columns].sum((1, 2))
    low, high = means.double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


# Tables -----------------------------------------------------------------------------------------------------


def cell(value: Mean | None, form: str = ".2f") -> str:
    """A mean with its 95 % interval; nothing where there is none."""
    if value is None:
        return ""
    interval = f"± {value.half():.2f}" if value.seeds > 1 else "(one seed)"
    return f"{value.mean:{form}} {interval}"


def score(seeds: Seeds, name: str) -> Mean | None:
    """A score over all seeds; None where no seed has it."""
    return mean_of([row[name] for row in seeds.values() if name in row])


def shown(p: float) -> str:
    """A p-value for a table."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


class Endpoint(NamedTuple):
    """One of the protocol's questions, and its answer."""

    name: str
    gain: Mean
    p: float  # corrected
    verdict: str


def endpoints(rows: dict[str, Seeds]) -> list[Endpoint]:
    """The answers to the protocol's questions. Raises InputError if a row is missing."""
    gains = [lead(rows, "CLHA", worse) for worse in ENDPOINTS.values()]
    if None in gains:
        missing = [*ENDPOINTS.values()][gains.index(None)]
        told = f"has no seed with CLHA and {missing}; `python -m study.run compare` makes them"
        raise InputError(f"fresh.jsonl: {told}")
    corrected = holm([gain.p() for gain in gains])
    found = zip(ENDPOINTS, gains, corrected, strict=True)
    return [Endpoint(name, gain, p, verdict(gain, p)) for name, gain, p in found]


def endpoint_table(found: list[Endpoint], rows: dict[str, Seeds]) -> str:
    """The endpoints, their tests, and intervals that know that prompts share tasks."""
    header = ["endpoint", "gold", "90 % interval", "p", "p, corrected", "with tasks drawn again"]
    lines = [[*header, "verdict", "without any one seed"]]
    others = without_a_seed(found, rows)
    for endpoint in found:
        low, high = over_tasks(rows["CLHA"], rows[ENDPOINTS[endpoint.name]])
        gain = endpoint.gain
        half = gain.half(0.9)
        inner = f"{gain.mean - half:+.2f} to {gain.mean + half:+.2f}" if gain.seeds > 1 else ""
        numbers = [
            cell(gain, "+.2f"),
            inner,
            shown(gain.p()),
            shown(endpoint.p),
            f"{low:+.2f} to {high:+.2f}",
        ]
        lines.append([endpoint.name, *numbers, f"**{endpoint.verdict}**", others[endpoint.name]])
    return reward.markdown(lines)


def without(rows: dict[str, Seeds], left_out: int) -> dict[str, Seeds]:
    """All rows but those of a seed."""
    return {label: {s: row for s, row in seeds.items() if s != left_out} for label, seeds in rows.items()}


def without_a_seed(found: list[Endpoint], rows: dict[str, Seeds]) -> dict[str, str]:
    """How the verdict on each endpoint changes when one of the seeds is left out."""
    told: dict[str, list[str]] = {endpoint.name: [] for endpoint in found}
    for left_out in rows["CLHA"]:
        fewer = without(rows, left_out)
        if all(lead(fewer, "CLHA", worse) for worse in ENDPOINTS.values()):
            for before, after in zip(found, endpoints(fewer), strict=True):
                if after.verdict != before.verdict:
                    told[before.name].append(f"{after.verdict} without {left_out}")
    same = "the same" if len(rows["CLHA"]) > 1 else "(one seed)"
    return {name: "; ".join(changed) or same for name, changed in told.items()}


def answer(found: list[Endpoint], rows: dict[str, Seeds]) -> str:
    """The page in a few lines."""
    lines = []
    for endpoint in found:
        told = f"{cell(endpoint.gain, '+.2f')} gold, corrected p {shown(endpoint.p)}"
        lines.append(f"- *{CLAIMS[endpoint.name]}*: **{endpoint.verdict}** ({told}).")
    places = rivals(rows)
    behind, ahead, level = map(listed, places)
    told = f"behind it: {behind}. Ahead of it: {ahead}. Not told apart from it: {level}"
    lines.append(f"- The tuned methods against CLHA, by t tests corrected together: {told}.")
    moved: set[str] = set()
    for seed in rows["CLHA"]:
        for before, after in zip(places, rivals(without(rows, seed)), strict=True):
            moved |= {*after} - {*before}
    lines.append(f"- In another of these three lists without one of the seeds: {listed(sorted(moved))}.")
    more = {label: lead(rows, "CLHA", label) for label in run.ADDED_LATER}
    told = "; ".join(f"*{label}* {cell(gain, '+.2f')}" for label, gain in more.items() if gain)
    if told:
        lines.append(f"- CLHA minus rows of settings that were added later, exploratory: {told}.")
    return "\n".join(lines) + "\n"


def rivals(rows: dict[str, Seeds]) -> tuple[list[str], list[str], list[str]]:
    """The other tuned methods that are behind CLHA, ahead of it, and neither, corrected together."""
    others = [label for label in run.GRIDS if label != "CLHA" and label not in run.ADDED_LATER]
    return sides({label: lead(rows, "CLHA", label) for label in others}, correct=True)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence; some have commas."""
    return "; ".join(names) or "none"


def sides(gains: dict[str, Mean | None], correct: bool = False) -> tuple[list[str], list[str], list[str]]:
    """The names whose mean is above zero, below it, and neither, by p < 0.05, corrected together or not."""
    found = {name: gain for name, gain in gains.items() if gain}
    values = [gain.p() for gain in found.values()]
    p = dict(zip(found, holm(values) if correct else values, strict=True))
    above = [name for name, gain in found.items() if p[name] < LEVEL and gain.mean > 0]
    below = [name for name, gain in found.items() if p[name] < LEVEL and gain.mean < 0]
    return above, below, [name for name in found if name not in above + below]


def method_table(rows: dict[str, Seeds]) -> str:
    """Every row: its scores, CLHA minus it, and what its training cost as a multiple of CLHA's."""
    names = {"gold": "gold", "reward": "reward", "char_bleu": "char BLEU", "word_bleu": "word BLEU"}
    lines = [["method", *names.values(), "CLHA minus it, gold", "tokens", "time", "seeds"]]
    clha_rows = rows["CLHA"]
    for label, seeds in rows.items():
        ahead = "" if label == "CLHA" else cell(difference(clha_rows, seeds), "+.2f")
        costs = []
        for name, typical in (("tokens", statistics.median), ("seconds", min)):  # other work only adds time
            values = [row[name] for row in seeds.values() if name in row]
            least = [row[name] for row in clha_rows.values()]
            costs.append(f"{typical(values) / typical(least):.1f}" if values else "")
        cells = [cell(score(seeds, name)) for name in names]
        lines.append([f"**{label}**" if label == "CLHA" else label, *cells, ahead, *costs, str(len(seeds))])
    return reward.markdown(lines)


def exploratory(rows: dict[str, Seeds]) -> dict[str, Mean | None]:
    """What parts of the method add, elsewhere than in the endpoints and in CLHA minus a row."""
    return {name: lead(rows, *two) for name, two in EXPLORATORY.items()}


def exploratory_table(rows: dict[str, Seeds]) -> str:
    """The same as a table."""
    lines = [[name, cell(gain, "+.2f"), str(gain.seeds)] for name, gain in exploratory(rows).items() if gain]
    return reward.markdown([["exploratory", "gold", "seeds"], *lines])


def subset_table(rows: dict[str, Seeds], name: str) -> str:
    """A score by subset, as in the columns of the paper's Tables 2 and 3."""
    lines = [["method", *toy.SUBSETS, "Total"]]
    for label, seeds in rows.items():
        found = [[row["subsets"][subset][name] for row in seeds.values()] for subset in toy.SUBSETS]
        lines.append([label, *(cell(mean_of(values)) for values in found), cell(score(seeds, name))])
    return reward.markdown(lines)


def parts_table(rows: dict[str, Seeds], key: str) -> str:
    """The means over seeds of each number that rows keep under `key`."""
    lines: list[list[str]] = []
    for label, seeds in rows.items():
        found = [row[key] for row in seeds.values() if key in row]
        if found:
            lines = lines or [["method", *found[0]]]
            means = [statistics.mean(row[name] for row in found) for name in found[0]]
            lines.append([label, *(f"{mean:.2f}" for mean in means)])
    return reward.markdown(lines) if lines else ""


def likelihood_table(rows: dict[str, Seeds]) -> str:
    """Dev log-probs per token at the end of training, of the best and the worst response by reward."""
    lines = [["method", "best", "worst", "best - worst"]]
    for label, seeds in rows.items():
        best, worst = score(seeds, "logps/chosen"), score(seeds, "logps/rejected")
        if best and worst and label != "CoH":  # whose texts are others
            values = (best.mean, worst.mean, best.mean - worst.mean)
            lines.append([label, *(f"{value:.2f}" for value in values)])
    return reward.markdown(lines)


def worlds_of(rows: list[Record]) -> dict[str, dict[str, Seeds]]:
    """The rows of other worlds: {world: {method: {seed: row}}}."""
    worlds: dict[str, dict[str, Seeds]] = {}
    for row in rows:
        worlds.setdefault(row["world"], {}).setdefault(row["method"], {})[row["seed"]] = row
    return {world: worlds[world] for world in run.WORLDS if world in worlds}


GAINS = {"gate": "CLHA w/o filter", "filter": "CLHA w/o gate", "both": "CLHA"}  # what has it, and not more


def worlds_answer(worlds: dict[str, dict[str, Seeds]]) -> str:
    """Where gate, filter and both raise or lower gold."""
    lines = []
    for name, label in GAINS.items():
        above, below, _ = sides({world: lead(rows, label, NEITHER) for world, rows in worlds.items()})
        lines.append(f"- *{name}*: **raises** gold in: {listed(above)}. **Lowers** it in: {listed(below)}.")
    control = lead(worlds.get("even errors", {}), "CLHA", "SFT")
    if control:
        found = "as expected" if abs(control.mean) <= control.half() else "against what was expected"
        lines.append(f"- *the control, even errors*: CLHA - SFT is {cell(control, '+.2f')}, **{found}**.")
    return "\n".join(lines) + "\n"


def worlds_table(worlds: dict[str, dict[str, Seeds]]) -> str:
    """What rescoring adds in each world."""
    lines = [["world", "SFT", "neither", *(f"{name} - neither" for name in GAINS), "CLHA - SFT", "seeds"]]
    for world, rows in worlds.items():
        neither = rows.get(NEITHER, {})
        sft = {seed: row for seed, row in rows.get("SFT", {}).items() if seed in neither}
        gains = [lead(rows, label, NEITHER) for label in GAINS.values()]
        gains.append(difference(rows.get("CLHA", {}), sft))
        cells = [cell(score(seeds, "gold")) for seeds in (sft, neither)]
        cells += [cell(gain, "+.2f") for gain in gains]
        lines.append([world, *cells, str(len(neither))])
    return reward.markdown(lines)


def plot_worlds(worlds: dict[str, dict[str, Seeds]], path: Path) -> None:
    """What gate, filter and both add in each world, with 95 % intervals."""
    pyplot = reward.import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * len(worlds)), layout="constrained")
    axes.axvline(0, color="black", linewidth=0.8)
    styles = {"gate": ("^", "white"), "filter": ("o", "0.6"), "both": ("s", "black")}
    for place, (name, (marker, color)) in enumerate(styles.items()):
        style = {"color": "black", "markerfacecolor": color, "marker": marker}
        for height, rows in enumerate(worlds.values()):
            gain = lead(rows, GAINS[name], NEITHER)
            if gain:  # not every row is run yet
                half = gain.half() if gain.seeds > 1 else 0
                axes.errorbar(gain.mean, height + 0.22 * (place - 1), xerr=half, capsize=2, **style)
        axes.plot([], [], linestyle="", label=name, **style)
    axes.set_yticks(range(len(worlds)), [*worlds])
    axes.invert_yaxis()
    axes.set_xlabel("gold, minus that of neither; 95 % intervals over seeds")
    axes.legend(frameon=False)
    reward.save_picture(figure, str(path))


def tuning_table(tuning: list[Record]) -> str:
    """Mean dev gold of every setting; the chosen ones in bold."""
    golds = run.dev_golds(tuning)
    best = {run.settings_name(settings) for settings in run.chosen(tuning).values()}
    lines = [["method", "settings", "dev gold"]]
    for method, grid in run.GRIDS.items():
        for name in map(run.settings_name, grid):
            if name in golds:
                mark = "**" if name in best else ""
                lines.append([method, f"{mark}{name.split(' ', 1)[1]}{mark}", f"{golds[name]:.2f}"])
    return reward.markdown(lines)


def edges(tuning: list[Record]) -> str:
    """Which chosen values are the smallest or the largest of four that were tried."""
    found = []
    golds = run.dev_golds(tuning)
    runs = [
        settings for grid in run.GRIDS.values() for settings in grid if run.settings_name(settings) in golds
    ]
    for method, settings in run.chosen(tuning).items():
        alike = [other for other in runs if other["objective"] == settings["objective"]]
        for name, value in settings.items():
            tried = sorted({other[name] for other in alike})
            if len(tried) >= 4 and value in (tried[0], tried[-1]):
                found.append(f"{method} ({name} {value:g} of {tried[0]:g} to {tried[-1]:g})")
    return ", ".join(found) or "none"


# The page ---------------------------------------------------------------------------------------------------


def plot(found: list[Endpoint], rows: dict[str, Seeds], path: Path) -> None:
    """A forest plot with 95 % intervals: the endpoints, CLHA minus other tuned rows, and `exploratory`."""
    pyplot = reward.import_pyplot()
    shown_above = ("CLHA", "base", *ENDPOINTS.values())
    others = [label for label in rows if label not in shown_above and run.PAPERS not in label]
    gains = {f"CLHA - {label}": lead(rows, "CLHA", label) for label in others}
    items = [(f"{endpoint.name}: {endpoint.verdict}", endpoint.gain, "s") for endpoint in found]
    items += [(name, gain, "o") for name, gain in (gains | exploratory(rows)).items() if gain]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(items)), layout="constrained")
    axes.axvspan(-EQUAL, EQUAL, color="0.9")
    axes.axvline(0, color="black", linewidth=0.8)
    for height, (_, gain, marker) in enumerate(items):
        half = gain.half() if gain.seeds > 1 else 0
        inside = "black" if marker == "s" else "white"
        style = {"color": "black", "markerfacecolor": inside, "marker": marker, "capsize": 3}
        axes.errorbar(gain.mean, height, xerr=half, **style)
    axes.set_yticks(range(len(items)), [name for name, _, _ in items])
    axes.invert_yaxis()
    axes.set_xlabel("gold of CLHA minus the other, 95 % intervals")
    reward.save_picture(figure, str(path))


def read(folder: Path) -> tuple[list[Record], dict[str, Seeds]]:
    """The rows of tuning, and those on fresh seeds by method in the order of the study."""
    fresh = run.read_rows(folder / "fresh.jsonl")
    tuning = run.read_rows(folder / "tuning.jsonl") or run.read_rows(run.ROWS / "tuning.jsonl")
    rows: dict[str, Seeds] = {}
    for label, settings in run.compared(tuning).items():
        name = run.settings_name(settings)
        own = [row for row in fresh if row["method"] == label and row["settings"] == name]
        if own:
            rows[label] = {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"])}
    return tuning, rows


def write(folder: Path, page: Path) -> None:
    """Writes the page, and its picture into `folder`. Raises InputError without the endpoints' rows."""
    tuning, rows = read(folder)
    found = endpoints(rows)
    plot(found, rows, folder / "endpoints.png")
    seeds = [*rows["CLHA"]]
    planned = [*run.GRIDS, *run.ABLATIONS, "CLHA as released"]
    fewer = [label for label in planned if 0 < len(rows.get(label, {})) < len(seeds)]
    asked = "" if seeds == [*run.FRESH_SEEDS] else f" (not the {len(run.FRESH_SEEDS)} of the protocol)"
    worlds = worlds_of(run.read_rows(folder / "worlds.jsonl"))
    told = "Not run; `python -m study.run vary` does it.\n"
    if worlds:
        worlds = {run.MAIN: rows} | worlds
        plot_worlds(worlds, folder / "worlds.png")
        picture_of = (folder / "worlds.png").relative_to(page.parent)
        told = f"{worlds_answer(worlds)}\n![The same, drawn]({picture_of})\n\n{worlds_table(worlds)}"
    text = TEMPLATE.read_text().format(
        seeds=f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}" + asked,
        picture=(folder / "endpoints.png").relative_to(page.parent),
        equal=EQUAL,
        alpha=run.compared(tuning)["CLHA"]["alpha"],
        level=LEVEL,
        answer=answer(found, rows),
        endpoints=endpoint_table(found, rows),
        exploratory=exploratory_table(rows),
        missing=listed(label for label in planned if label not in rows),
        fewer=listed(fewer),
        methods=method_table(rows),
        gold=subset_table(rows, "gold"),
        rewards=subset_table(rows, "reward"),
        bleu=subset_table(rows, "char_bleu"),
        anatomy=parts_table(rows, "anatomy"),
        rescoring=parts_table(rows, "rescoring"),
        likelihoods=likelihood_table(rows),
        tuning=tuning_table(tuning),
        edges=edges(tuning),
        worlds=told,
    )
    page.write_text(text)


def main() -> None:
    """Parses the command line and writes the report."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument(
        "--rows", type=Path, default=run.ROWS, help="folder with fresh.jsonl, and tuning.jsonl"
    )
    args = parser.parse_args()
    rows = args.rows.resolve()
    page = (rows.parents[1] if rows == run.ROWS.resolve() else rows) / "RESULTS.md"
    write(rows, page)
    print(f"{page} is written, with its picture in {rows}")


if __name__ == "__main__":
    clha.run(main)
