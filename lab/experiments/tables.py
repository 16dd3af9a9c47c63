"""What a comparison reports: tables in Markdown and the learning curves, from the result files of compare.py.

The unit of replication is the training of the starting model: runs that begin from one training share its luck, so they
are averaged first, and intervals are over trainings. Where there is one training alone, the unit is the seed.

Runs of one training and seed meet the same tasks: arms are compared pair by pair. Equal cost means that an arm is
looked at when it has used up what the baseline's run of its pair used in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from lab.experiments.estimates import FEWEST, Estimate, bootstrap_interval, estimate, holm

LONGER = "grpo-longer"  # an arm that plays on until it has used what OPID's run uses, and so has other iterations
# Without skills, for as long or as much; skills of other tasks; words that say nothing.
CONTROLS = ("grpo", LONGER, "opid-shuffled", "opid-placebo")
NOT_SPLITS = {"iteration", "sampled", "skills", "seconds", "writing"}  # what a point of a curve holds beside its splits
# Their skills are the same words whatever the writer wrote, so it is not charged: a real run of them would have none.
WITHOUT_WRITER = {"opid-placebo"}
BANDS = 5  # most arms whose intervals are drawn: more hide one another
EPISODES, TOKENS, SECONDS = "episodes", "sampled tokens", "training seconds"  # what a run costs


@dataclass(frozen=True)
class Run:
    """One result, success in % as the mean of its splits."""

    training: int  # of the starting model
    seed: int
    unit: int  # the training; where all runs of the tables have the same one, the seed
    success: np.ndarray  # (points,) at each evaluation
    end: float  # of the final games, where all runs of the tables have the same; else the last of `success`
    games: str | None  # the numbers of its final games, split by split; None: it has none
    cost: dict[str, np.ndarray]  # (points,) what was used so far; EPISODES alone where a run of the tables has no other
    splits: list[str]
    tables: list[str]  # success by type before and after training, as evaluate.py prints it; older results have none


Runs = dict[str, list[Run]]  # arm -> its runs
Difference = Callable[[Run, Run], float]  # of our run and theirs


def runs_of(results: dict[str, list[dict]]) -> Runs:
    """Arm -> its results, as compare.py stores them."""
    lines = [result for arm in results.values() for result in arm]
    alike = len({games_of(line) for line in lines}) == 1
    costs = all("sampled" in point for line in lines for point in line["curve"])
    several = len({training_of(line) for line in lines}) > 1

    def run(line: dict) -> Run:
        splits, training, seed = splits_of(line), training_of(line), line["config"]["seed"]
        success = np.array([mean_of(point, splits) for point in line["curve"]])
        games = games_of(line)
        end = mean_of(line["final"], splits) if games and alike else float(success[-1])
        cost = costs_of(line) if costs else {EPISODES: episodes_of(line)}
        unit, tables = training if several else seed, line.get("tables", [])
        return Run(training, seed, unit, success, end, games, cost, splits, tables)

    return {arm: [run(line) for line in own] for arm, own in results.items()}


def training_of(result: dict) -> int:
    return result.get("training", 0)


def games_of(result: dict) -> str | None:
    """'347 + 507' final games of two splits."""
    return " + ".join(map(str, result["final"]["games"].values())) if "final" in result else None


def splits_of(result: dict) -> list[str]:
    """The held-out splits, acting without skills."""
    return [name for name in result["curve"][-1] if name not in NOT_SPLITS and not name.endswith("+skill")]


def mean_of(shares: dict, splits: list[str]) -> float:
    """In %."""
    return 100 * float(np.mean([shares[split] for split in splits]))


def episodes_of(result: dict) -> np.ndarray:
    """Played until each evaluation. -> (points,)"""
    each = result["episodes"] / len(result["train"])
    return np.array([point["iteration"] * each for point in result["curve"]])


def costs_of(result: dict) -> dict[str, np.ndarray]:
    """Kind of cost -> what was used until each evaluation (points,)."""
    used = {name: np.array([point[name] for point in result["curve"]], float) for name in NOT_SPLITS}
    if result["config"]["algo"] in WITHOUT_WRITER:
        tokens, seconds = used["sampled"], used["seconds"] - used["writing"]
    else:
        tokens, seconds = used["sampled"] + used["skills"], used["seconds"]
    return {EPISODES: episodes_of(result), TOKENS: tokens, SECONDS: seconds}


# ---- one number a unit -----------------------------------------------------------------------------------------------


def by_unit(runs: list[Run], values: list) -> np.ndarray:
    """A value of each run, (runs, ...) -> the mean over the runs of each unit (units, ...)."""
    units, of_runs = np.array([run.unit for run in runs]), np.array(values, float)
    return np.stack([of_runs[units == unit].mean(axis=0) for unit in np.unique(units)])


def ends_of(runs: list[Run]) -> np.ndarray:
    """(units,)"""
    return by_unit(runs, [run.end for run in runs])


def pairs(ours: list[Run], theirs: list[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same training and seed."""
    other = {(run.training, run.seed): run for run in theirs}
    return [(run, other[run.training, run.seed]) for run in ours if (run.training, run.seed) in other]


def differences(runs: Runs, other: str, difference: Difference) -> dict[str, np.ndarray]:
    """Arm -> how far it is ahead of the arm `other`, in points (units,); without those that share no pair with it."""
    paired = {arm: pairs(own, runs.get(other, [])) for arm, own in runs.items() if arm != other}
    return {
        arm: by_unit([ours for ours, _ in both], [difference(*both_runs) for both_runs in both])
        for arm, both in paired.items()
        if both
    }


def success_at(run: Run, kind: str, spent: float) -> float:
    """In the evaluations, when a run had cost that much: linear between them, the last one after its end, before the
    first one NaN."""
    return float(np.interp(spent, run.cost[kind], run.success, left=np.nan))


def mean_until(run: Run, kind: str, spent: float) -> float:
    """Mean success over training until it had cost that much: the area under the curve, which stays where it ends. NaN
    where it was not evaluated before training."""
    cost = run.cost[kind]
    if cost[0] > 0 or spent <= 0:
        return float("nan")
    at = np.array([*cost[cost < spent], spent])
    return float(np.trapezoid(np.interp(at, cost, run.success), at) / spent)


def at_the_end(ours: Run, theirs: Run) -> float:
    return ours.end - theirs.end


def at_equal(kind: str) -> Difference:
    """Ours when it has used up what theirs used in all, minus the end of theirs. Both play the same games: the final
    ones where ours had ended by then, else those of the evaluations."""

    def difference(ours: Run, theirs: Run) -> float:
        spent, whole = theirs.cost[kind][-1], ours.cost[kind][-1]
        if spent > whole or np.isclose(spent, whole):
            return at_the_end(ours, theirs)
        return success_at(ours, kind, spent) - float(theirs.success[-1])

    return difference


def over_training(kind: str) -> Difference:
    """Of the means over training, up to the whole cost of theirs."""
    whole = lambda theirs: theirs.cost[kind][-1]
    return lambda ours, theirs: mean_until(ours, kind, whole(theirs)) - mean_until(theirs, kind, whole(theirs))


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table with a line under its head."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in [head, *rows])
    return "\n".join([first, "|" + "---|" * len(head), *others])


def show(number: float, digits: int = 1) -> str:
    """Rounded after its last digits are, in which sums of another order differ; + 0.0: no minus before a zero."""
    return "-" if np.isnan(number) else f"{round(round(number, 6), digits) + 0.0:.{digits}f}"


def interval(low: float, high: float) -> str:
    return "[-]" if np.isnan(low) else f"[{show(low)}, {show(high)}]"


def with_interval(e: Estimate) -> str:
    return "-" if np.isnan(e.mean) else f"{show(e.mean)} {interval(e.low, e.high)}"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else show(p, 3)


def compared(values: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Arm -> two cells for its differences (units,): their mean and interval; p, and what Holm makes of it in this
    column."""
    estimates = {arm: estimate(own) for arm, own in values.items()}
    corrected = holm([e.p for e in estimates.values()])
    told = zip(estimates.items(), corrected, strict=True)
    return {arm: [with_interval(e), "-" if np.isnan(e.p) else f"{p_value(e.p)} ({p_value(p)})"] for (arm, e), p in told}


def ends(runs: Runs, baseline: str) -> str:
    """One row an arm: where it ends, and how far it is ahead of the baseline at equal cost of each kind."""
    kinds, games = kinds_of(runs), games_played(runs)
    end = f"end of {next(iter(games))} games, %" if len(games) == 1 and None not in games else "end, %"
    head = ["arm", units_title(runs), end]
    rows = {arm: [units_of(runs, arm), with_interval(estimate(ends_of(own)))] for arm, own in runs.items()}
    columns = [(f"ahead of {baseline} at equal {kind}", kind, at_equal(kind)) for kind in kinds]
    if TOKENS in kinds:
        columns.append((f"over training, at equal {TOKENS}", TOKENS, over_training(TOKENS)))
    for title, kind, difference in columns:
        values = differences(runs, baseline, difference)
        told = compared(values)
        head += [title, "p (Holm)"]
        for arm, row in rows.items():
            mean, p = told.get(arm, ["-", "-"])
            row += [mean + (cheaper(runs[arm], runs[baseline], kind) if arm in told else ""), p]
        if kind == EPISODES:
            head.append("bootstrap")
            for arm, row in rows.items():
                row.append(_bootstrap(values[arm]) if arm in values else "-")
    text = markdown(head, [[arm, *row] for arm, row in rows.items()])
    return "\n".join([text, "", *notes(runs, baseline, " cheaper)" in text)])


def _bootstrap(values: np.ndarray) -> str:
    return interval(*bootstrap_interval(np.mean, values)) if len(values) >= FEWEST else "-"


def cheaper(ours: list[Run], theirs: list[Run], kind: str) -> str:
    """What is said of runs that cost less over their whole training than the runs that they are compared with."""
    both = [(a.cost[kind][-1], b.cost[kind][-1]) for a, b in pairs(ours, theirs)]
    count = sum(own < other and not np.isclose(own, other) for own, other in both)
    return f" ({count} of {len(both)} cheaper)" if count else ""


def kinds_of(runs: Runs) -> list[str]:
    return list(next(iter(runs.values()))[0].cost)


def games_played(runs: Runs) -> set[str | None]:
    """In the end, as `Run.games`."""
    return {run.games for own in runs.values() for run in own}


def by_training(runs: Runs) -> bool:
    """Whether the unit is the training of the starting model, and not the seed."""
    return len({run.training for own in runs.values() for run in own}) > 1


def units_title(runs: Runs) -> str:
    return "trainings x seeds" if by_training(runs) else "seeds"


def units_of(runs: Runs, arm: str) -> str:
    """'5' seeds; '4 x 2' where the unit is the training, '4 x 1-2' where they have not the same number of seeds."""
    units, counts = np.unique([run.unit for run in runs[arm]], return_counts=True)
    seeds = "-".join(str(count) for count in sorted({counts.min(), counts.max()}))
    return f"{len(units)} x {seeds}" if by_training(runs) else str(len(units))


def notes(runs: Runs, baseline: str, some_cheaper: bool) -> list[str]:
    """How to read `ends`."""
    unit = "training of the starting model, its seeds averaged first" if by_training(runs) else "seed"
    lines = [f"The unit is the {unit}. In brackets: 95% t intervals over units, none under {FEWEST} of them."]
    lines.append("Ahead: in points, from runs of one training and seed. p: paired t test; after Holm, over a column.")
    if len(games_played(runs)) > 1:
        lines.append("Ends are of the last evaluation: not all runs played the same games after it.")
    if TOKENS in kinds_of(runs):
        lines.append(f"Equal cost: an arm when it had used what {baseline}'s run used in all, its skills included.")
    if some_cheaper:
        lines.append("Cheaper: runs that used less in all. They count by their end, and their curve stays there.")
    return lines


def costs(runs: Runs, baseline: str) -> str:
    """One row an arm: what a run uses, and how many times as much as the baseline's of its pair. Older results do not
    say."""
    kinds, rows = kinds_of(runs), []
    if TOKENS not in kinds:
        return ""
    for arm, own in runs.items():
        both, row = pairs(own, runs.get(baseline, [])), [arm]
        for kind in kinds:
            mean = by_unit(own, [run.cost[kind][-1] for run in own]).mean()
            ratio = [sum(run.cost[kind][-1] for run in side) for side in zip(*both, strict=True)]
            row.append(f"{mean:.0f}" + (f" ({ratio[0] / ratio[1]:.2f})" if both else ""))
        rows.append(row)
    return markdown([f"a run uses (times {baseline}'s)", *kinds], rows)


def leads(runs: Runs, baseline: str) -> str:
    """How far each arm is ahead of each of CONTROLS that is there, where they end; the baseline stands in `ends`."""
    head, rows = ["ahead at the end"], {arm: [arm] for arm in runs}
    for control in CONTROLS:
        if control in runs and control != baseline:
            head += [f"of {control}", "p (Holm)"]
            told = compared(differences(runs, control, at_the_end))
            for arm, row in rows.items():
                row += told.get(arm, ["-", "-"])
    return markdown(head, list(rows.values())) if len(head) > 1 else ""


def by_episodes(runs: Runs) -> str:
    """One row an arm: success at each evaluation, the mean over units; each unit by itself where they are few."""
    played, rows = next(iter(runs.values()))[0].cost[EPISODES], []
    for arm, own in runs.items():
        if not np.array_equal(own[0].cost[EPISODES], played):
            continue
        success = by_unit(own, [run.success for run in own])  # (units, points)
        few = 1 < len(success) < FEWEST
        rows.append([arm, *(", ".join(map(show, at)) if few else show(at.mean()) for at in success.T)])
    return markdown(["success after episodes, %", *(f"{episodes:.0f}" for episodes in played)], rows)


def by_run(runs: Runs) -> str:
    """Where each run ends, and its last evaluation in the task type that is solved least at the first one: a mean over
    types hides what only some runs learn. One row an arm, the seeds of one training side by side. Where seeds are the
    units: none."""
    if not by_training(runs):
        return ""
    grids = [each_run(runs, "end of each run", lambda run: run.end)]
    lines = [run for own in runs.values() for run in own]
    if all(run.tables for run in lines):
        first = {name: shares.mean() for name, shares in by_types(lines, 0).items()}
        hardest = min(first, key=lambda name: (np.isnan(first[name]), first[name]))  # NaN: a split has none of the type
        grids.append(each_run(runs, f"{hardest} of each run", lambda run: by_types([run], -1)[hardest].mean()))
    return "\n\n".join(grids)


def each_run(runs: Runs, title: str, share: Callable[[Run], float]) -> str:
    trainings = sorted({run.training for own in runs.values() for run in own})
    rows = []
    for arm, own in runs.items():
        in_order = sorted(own, key=lambda run: run.seed)
        cells = [" / ".join(show(share(run)) for run in in_order if run.training == training) for training in trainings]
        rows.append([arm, *(cell or "-" for cell in cells)])
    return markdown([f"{title}, %", *(f"start {training}" for training in trainings)], rows)


def by_type(runs: Runs) -> str:
    """Success by task type, mean over units, split by split: one row before training, and one an arm at its end."""
    lines = [run for own in runs.values() for run in own if run.tables]
    untrained = [run for run in lines if run.cost[EPISODES][0] == 0]  # else it was evaluated at the end alone
    told = {"before training": by_types(untrained, 0)} if untrained else {}
    told |= {arm: by_types(own, -1) for arm, own in runs.items() if all(run.tables for run in own)}
    if not told:
        return ""
    rows = [[name, *(" / ".join(show(x, 0) for x in shares) for shares in of.values())] for name, of in told.items()]
    types = next(iter(told.values()))
    return markdown([f"success by type, {' / '.join(lines[0].splits)}, %", *types], rows)


def by_types(runs: list[Run], at: int) -> dict[str, np.ndarray]:
    """Task type -> success in % of each split (splits,), mean over units; `at` 0: first evaluation, -1: last."""
    tables = [(run.splits, read_table(run.tables[at])) for run in runs]
    types = list(tables[0][1][tables[0][0][0]])
    shares = [[[table[split][name] for split in splits] for name in types] for splits, table in tables]
    return dict(zip(types, by_unit(runs, shares).mean(axis=0), strict=True))


def read_table(text: str) -> dict[str, dict[str, float]]:
    """What evaluate.format_table wrote -> split -> task type -> success in %, NaN where none was played."""
    head, *lines = text.splitlines()
    types = head.split()[1 : head.split().index("All")]
    rows = [line.split() for line in lines]
    return {row[0]: dict(zip(types, (float(c.replace("-", "nan")) for c in row[1:]), strict=False)) for row in rows}


def read_shares(text: str) -> dict[str, float]:
    """What evaluate.py printed -> "games" by split, and success by split."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("split "))
    column = lines[head].split().index("All")
    rows = [line.split() for line in lines[head + 1 :] if line and not line.startswith("WARNING")]
    shares = {row[0]: round(float(row[column]) / 100, 4) for row in rows}
    return {"games": {row[0]: int(row[-1]) for row in rows}, **shares}


def draw(runs: Runs, path: Path) -> None:
    """Success by each kind of cost, a panel each: mean over units, of few arms with its t interval, at the mean cost of
    each evaluation. The legend is in the order of ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = kinds_of(runs)
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds) + 4, 5), sharey=True, squeeze=False)
    looks = [{"color": f"C{i}", "linestyle": line} for line in ("-", "--", ":") for i in range(10)]
    for arm, look in zip(sorted(runs, key=lambda arm: -ends_of(runs[arm]).mean()), cycle(looks), strict=False):
        own = runs[arm]
        estimates = [estimate(at) for at in by_unit(own, [run.success for run in own]).T]  # of each point
        low, high = np.array([(e.low, e.high) if e.low == e.low else (e.mean, e.mean) for e in estimates]).T
        for kind, axis in zip(kinds, axes[0], strict=True):
            at = by_unit(own, [run.cost[kind] for run in own]).mean(axis=0)  # (points,)
            axis.plot(at, [e.mean for e in estimates], label=f"{arm} ({units_of(runs, arm)})", **look)
            if len(runs) <= BANDS:
                axis.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)
    for kind, axis in zip(kinds, axes[0], strict=True):
        axis.set_xlabel(kind)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="held-out success (%)")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), title=f"arm ({units_title(runs)})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
