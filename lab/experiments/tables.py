"""What a comparison reports: tables in Markdown and the learning curves, from the result files of compare.py.

`results` is arm -> the results of its seeds. Estimates are interquartile means over seeds with 95% bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab.experiments.estimates import bootstrap_interval, interquartile_mean, probability_of_improvement

NO_SPLITS = ("iteration", "sampled", "skills", "seconds", "writing")  # of a point of a curve: where, and at what cost
GOALS = (0.5, 0.6, 0.7, 0.8)  # held-out success that sample efficiency is counted to
CONTROLS = ("grpo", "opid-shuffled", "opid-placebo")  # no skills, skills of other tasks, words that say nothing


def splits_of(results: list[dict]) -> list[str]:
    """The held-out splits, acting without skills."""
    return [k for k in results[0]["curve"][-1] if k not in NO_SPLITS and not k.endswith("+skill")]


def scores(results: list[dict], point: int = -1) -> np.ndarray:
    """Held-out success of each run at one point of its curve, acting without skills. -> (runs, splits)"""
    return np.array([[r["curve"][point][split] for split in splits_of(results)] for r in results])


def area(results: list[dict]) -> np.ndarray:
    """Area under each run's curve: the mean over its evaluations, the one before training included. (runs, splits)"""
    return np.mean([scores(results, point) for point in range(len(results[0]["curve"]))], axis=0)


def episodes_to_reach(run: dict, goal: float) -> float:
    """Episodes played until the first evaluation whose success, mean of the splits, is at least `goal`; inf: never."""
    point = points_to_reach(curves([run]), goal)
    return point if np.isinf(point) else episodes_played(run)[int(point)]


def episodes_played(run: dict) -> list[float]:
    """Until each of a run's evaluations."""
    return [point["iteration"] * (run["episodes"] / len(run["train"])) for point in run["curve"]]


def curves(results: list[dict]) -> np.ndarray:
    """Held-out success of each run at each evaluation, mean of the splits. -> (runs, points)"""
    points = range(len(results[0]["curve"]))
    return np.stack([scores(results, point).mean(axis=1) for point in points], axis=1)


def points_to_reach(curve: np.ndarray, goal: float) -> float:
    """First point at which the interquartile mean of runs (runs, points) is at least `goal`; inf: never."""
    reached = [interquartile_mean(at) >= goal - 1e-9 for at in curve.T]  # a mean of shares is rounded
    return float(reached.index(True)) if True in reached else float("inf")


def share_of_points(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How much of what they needed we need to reach their final success, the mean over their last quarter of
    evaluations: both by the first point of the interquartile mean of the runs (runs, points). With evaluations at equal
    distances this is a share of episodes. The goal is theirs, noise included, so two equal methods come out above 1.
    """
    last = theirs[:, -max(1, theirs.shape[1] // 4) :]  # (runs, last points)
    goal = float(np.mean([interquartile_mean(at) for at in last.T]))
    own, needed = points_to_reach(ours, goal), points_to_reach(theirs, goal)
    return own / needed if needed else 1.0 if own == 0 else float("inf")  # there from the start


def percent(own: np.ndarray) -> list[str]:
    """(runs, splits) -> two cells: interquartile mean in % and its 95% interval."""
    low, high = bootstrap_interval(interquartile_mean, own)
    return [f"{100 * interquartile_mean(own):.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"]


def split_titles(splits: list[str]) -> list[str]:
    """Above what `split_cells` fills."""
    return [title for split in splits for title in (f"{split}, IQM, %", "95%")]


def split_cells(own: np.ndarray) -> list[str]:
    """(runs, splits) -> the two cells of `percent` for each split by itself."""
    return [cell for i in range(own.shape[1]) for cell in percent(own[:, [i]])]


def against(
    theirs: list[dict] | None,
    ours: list[dict],
    values: Callable[[list[dict]], np.ndarray],
    statistic: Callable[[np.ndarray, np.ndarray], float],
    show: Callable[[float], str],
) -> list[str]:
    """Two cells: `statistic` of our `values` and those of the baseline, and its 95% interval; "-" for the baseline
    itself, or where there is none."""
    if theirs is None or theirs is ours:
        return ["-", "-"]
    pair = values(ours), values(theirs)
    low, high = bootstrap_interval(statistic, *pair)
    return [show(statistic(*pair)), f"[{show(low)}, {show(high)}]"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table with a line under its head."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in [head, *rows])
    return "\n".join([first, "|" + "---|" * len(head), *others])


def table(results: dict[str, list[dict]], baseline: str) -> str:
    """One row an arm: final held-out success by split and over all, success over training, and how likely a run of it
    ends better than one of the baseline."""
    splits = splits_of(next(iter(results.values())))
    head = ["method", "seeds", *split_titles(splits), "held-out success, IQM, %", "95%"]
    head += ["mean over training, IQM, %", "95%", f"P(better than {baseline})", "95%", "seconds a run"]
    rows = []
    for arm, runs in results.items():
        own = scores(runs)  # (runs, splits)
        cells = [arm, str(len(runs)), *split_cells(own), *percent(own), *percent(area(runs))]
        cells += against(results.get(baseline), runs, scores, probability_of_improvement, "{:.2f}".format)
        rows.append([*cells, f"{np.mean([r['seconds'] for r in runs]):.0f}"])
    return markdown(head, rows)


def efficiency(results: dict[str, list[dict]], baseline: str) -> str:
    """One row an arm: episodes until held-out success, mean of the splits, reached each of GOALS; a run that never got
    there counts as infinitely many. And the share of the baseline's episodes after which an arm is where it ends."""
    head = ["episodes to reach, IQM [95%]", *(f"{100 * goal:.0f}%" for goal in GOALS)]
    head += [f"episodes to {baseline}'s final level, % of its own", "95%"]
    rows = []
    for arm, runs in results.items():
        reached = [np.array([[episodes_to_reach(run, goal)] for run in runs]) for goal in GOALS]  # (runs, 1) each
        cells = [arm, *map(_episodes, reached)]
        rows.append([*cells, *against(results.get(baseline), runs, curves, share_of_points, _share)])
    return markdown(head, rows)


def leads(results: dict[str, list[dict]], baseline: str) -> str:
    """By how many points each arm is above the baseline, and above each of CONTROLS that is there: a table for where
    they end, and one for the mean over training."""
    others = [arm for arm in dict.fromkeys([baseline, *CONTROLS]) if arm in results]
    above = [title for other in others for title in (f"of {other}", "95%")]
    parts = []
    for when, values in {"at the end": scores, "over training": area}.items():
        head = [f"points ahead {when}, seed by seed", *above]
        rows = [[arm, *(c for o in others for c in _lead(runs, results[o], values))] for arm, runs in results.items()]
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def _lead(ours: list[dict], theirs: list[dict], values: Callable[[list[dict]], np.ndarray]) -> list[str]:
    """Two cells from the seeds that both have: runs of one seed met the same tasks, so their scores are paired."""
    other = {run["config"]["seed"]: run for run in theirs}
    pairs = [(run, other[run["config"]["seed"]]) for run in ours if run["config"]["seed"] in other]
    if ours is theirs or not pairs:
        return ["-", "-"]
    return percent(values([run for run, _ in pairs]) - values([run for _, run in pairs]))


def by_episodes(results: dict[str, list[dict]]) -> str:
    """One row an arm: success at each evaluation, mean of the splits."""
    played = [round(episodes) for episodes in episodes_played(next(iter(results.values()))[0])]
    rows = [[arm, *(f"{100 * interquartile_mean(at):.1f}" for at in curves(runs).T)] for arm, runs in results.items()]
    return markdown(["success after episodes, IQM, %", *map(str, played)], rows)


def by_type(results: dict[str, list[dict]]) -> str:
    """Success by task type, mean over seeds, split by split: one row before training, and one an arm at its end."""
    runs = [run for arm in results.values() for run in arm if "tables" in run]
    if not runs:
        return ""
    types = list(read_table(runs[0]["tables"][0])[splits_of(runs)[0]])
    untrained = [run for run in runs if run["curve"][0]["iteration"] == 0]  # else it was evaluated at the end alone
    rows = [["before training", *_by_type(untrained, 0, types)]] if untrained else []
    rows += [[arm, *_by_type(own, -1, types)] for arm, own in results.items() if all("tables" in run for run in own)]
    return markdown([f"success by type, {' / '.join(splits_of(runs))}, %", *types], rows)


def _by_type(runs: list[dict], at: int, types: list[str]) -> list[str]:
    splits, tables = splits_of(runs), [read_table(run["tables"][at]) for run in runs]
    shares = np.array([[[table[split][name] for name in types] for split in splits] for table in tables])
    return [" / ".join(f"{share:.0f}" for share in column) for column in shares.mean(axis=0).T]  # of (splits, types)


def read_table(text: str) -> dict[str, dict[str, float]]:
    """What evaluate.format_table wrote -> split -> task type -> success in %, NaN where none was played."""
    head, *lines = text.splitlines()
    types = head.split()[1 : head.split().index("All")]
    rows = [line.split() for line in lines]
    return {row[0]: dict(zip(types, (float(c.replace("-", "nan")) for c in row[1:]), strict=False)) for row in rows}


def read_shares(text: str) -> dict[str, float]:
    """What evaluate.py printed -> "games" of a split, and its success by split."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("split "))
    column = lines[head].split().index("All")
    rows = [line.split() for line in lines[head + 1 :] if line and not line.startswith("WARNING")]
    shares = {row[0]: round(float(row[column]) / 100, 4) for row in rows}
    return {"games": int(rows[0][-1]), **shares}


def _share(share: float) -> str:
    return "never" if np.isinf(share) else f"{100 * share:.0f}"


def _episodes(reached: np.ndarray) -> str:
    never, runs = int(np.isinf(reached).sum()), len(reached)
    if never == runs:
        return f"{never} of {runs} never"
    estimates = interquartile_mean(reached), *bootstrap_interval(interquartile_mean, reached)
    middle, low, high = ("never" if np.isinf(e) else f"{e:.0f}" for e in estimates)
    return f"{middle} [{low}, {high}]" + (f", {never} of {runs} never" if never else "")


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Interquartile mean of held-out success by iteration, with its 95% interval; the legend in the order of ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5))
    for arm, runs in sorted(results.items(), key=lambda item: -interquartile_mean(scores(item[1]))):
        points = range(len(runs[0]["curve"]))
        at = [runs[0]["curve"][p]["iteration"] for p in points]
        bounds = [bootstrap_interval(interquartile_mean, scores(runs, p), samples=500) for p in points]
        axis.plot(at, [100 * interquartile_mean(scores(runs, p)) for p in points], label=f"{arm} ({len(runs)})")
        axis.fill_between(at, *(100 * np.array(bounds)).T, alpha=0.15)
    axis.set(xlabel="iteration", ylabel="held-out success, interquartile mean (%)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="arm (seeds)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
