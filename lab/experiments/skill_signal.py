"""What the skill advantage says about steps, beside the outcome: python lab/experiments/skill_signal.py [--run RUN]

A policy (the warm start, or a run's last checkpoint) plays one training batch; the configured writer writes skills, the
configured scorer scores A_skill, all by train.py. Then each step is held against what a good player would have done:

    alfworld   it is good if it leaves one step less of a shortest plan
    search     it is good if it is what the adviser of tiny/search.py would do next, given what was seen: search for the
               next hop in its words (case, articles and punctuation aside), or answer. Another wording, and an answer
               that nothing seen so far gives, count as bad. Steps of questions that were not generated count as neither

Reported for all guided steps, those of each level, and those of groups without an outcome signal (all rollouts equal),
where the skills are all that there is:

    AUC        P(A_skill, mean over a step's tokens, is higher on a good step than on another one)
    alike      the same, of steps of the same turn in episodes that ended alike: a context may favour all first turns,
               good or bad, and one that tells the outcome all steps of a success
    agreement  share of steps where A_skill and A_ep have the same sign, of those where neither is 0
    |A|        mean size a token in nats (A_skill) and of A_ep

With --against ALGO the same episodes are scored under its contexts, too, and the differences of both are told.

The numbers are a line of lab/results/skill-signal.jsonl, and all lines' tables are in skill-signal.md. Flags of
train.py are taken, too, such as --env search --tasks 64 --algo lab.experiments.controls:FACTS; without a --recipe or
--run the laptop's are the others.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lm  # noqa: F401  # isort: skip

import numpy as np

from config import CommandLine, Config, default_recipe, parse_args, variant_of
from data import Batch, Trajectory
from envs.alfworld import AlfworldEnv
from envs.alfworld.expert import shortest_plan
from envs.search.env import read_action
from envs.search.text import normalize, words
from evaluate import environment
from lab.experiments.estimates import bootstrap_interval, probability_of_superiority
from lab.experiments.runs import RESULTS, commit, config_of, on_the_laptop, settings
from lab.experiments.stored import add, read
from lab.experiments.tables import markdown
from rescore import rescore
from router import route
from runlog.metrics import silent_groups
from runlog.start import start
from tiny.search import Adviser

ROUNDING = 1e-6  # |A_ep| of a group of equal outcomes, where their mean is not exact


@dataclass(frozen=True)
class Guided:
    """One step that a skill was scored on."""

    level: str  # "episode" or "step"; with --routing additive also "episode+step"; of a method without skills "none"
    group: int
    turn: int  # of its episode
    silent: bool  # all rollouts of its task had the same outcome
    won: bool  # its episode
    good: bool | None  # None: nobody knows what a good player would have done
    skill: float  # A_skill, mean over the step's tokens
    size: float  # |A_skill|, mean over the step's tokens
    tokens: int
    outcome: float  # A_ep


# ---- one batch ------------------------------------------------------------------------------------------------------


def batch_of(config: Config, run: Path | None) -> Batch:
    """Play, write, route and score one iteration of training.

    With `run` it is the one after its newest checkpoint: the policy as trained, the reference as the run had it.
    """
    if config.env not in ("alfworld", "search") or not config.levels:
        asked = f"--algo {config.algo} --env {config.env}"
        raise ValueError(f"needs ALFWorld or Search QA, and a method that scores skills, not {asked}")
    with tempfile.TemporaryDirectory() as folder:
        if run is not None:
            newest = max((run / "checkpoints").glob("[0-9]*.pt"), default=None)
            if newest is None:
                raise FileNotFoundError(f"{run} holds no checkpoint")
            (Path(folder) / "checkpoints").mkdir()
            for file in (newest, run / "start.json"):  # the policy, and what the run started from: weights and day
                (Path(folder) / file.relative_to(run)).symlink_to(file.absolute())
        config = replace(config, out=folder, resume=run is not None, eval_every=0, tracker="none")
        run, variant = start(config), variant_of(config.algo)
        run.begin(run.log.first_iteration)  # from here on as train.train does it
        games = run.rng.sample(run.games, min(config.tasks, len(run.games)))
        trajectories, _ = variant.play(run, games)
        skills, _ = variant.skills(run, trajectories)
        pairs = zip(trajectories, skills, strict=True)
        routes = [route(trajectory, own, config.routing, run.levels) for trajectory, own in pairs]
        batch, _ = rescore(run, trajectories, skills, routes)
        batch.advantages = variant.advantages(run, batch)
        return batch


def judge(config: Config) -> Callable[[Trajectory], list[bool | None]]:
    """-> a function that says of each step whether it is good; None where that is not known."""
    if config.env == "search":
        return as_advised
    env = environment(replace(config, env_options=config.env_options | {"engine": "fast"}))()
    return partial(on_shortest_plan, env)


def as_advised(trajectory: Trajectory) -> list[bool | None]:
    """For each step of Search QA, whether it is what the adviser would do; None where it does not know the question."""
    adviser = Adviser(random.Random(0))
    try:
        adviser.reset(trajectory.task)
    except ValueError:
        return [None] * len(trajectory.steps)
    marks: list[bool | None] = []
    for step in trajectory.steps:
        marks.append(meaning(step.action) == meaning(adviser.advise(step.observation)))
        adviser.command = step.action
    return marks


def meaning(action: str) -> tuple[str, str]:
    """("search" or "answer", its words) of an action in either style, less articles; ("", "") of no action."""
    kind, text = read_action(action) or ("", "")
    return kind, normalize(words(text))


def on_shortest_plan(env: AlfworldEnv, trajectory: Trajectory) -> list[bool | None]:
    """For each step, whether it left one step less to the goal; None where no plan was known before it."""

    def left() -> int | None:
        try:
            return len(shortest_plan(env.engine))
        except ValueError:
            return None

    env.reset(options={"game": trajectory.game})
    before, marks = left(), []
    for step in trajectory.steps:
        env.step(step.action)
        after = left()
        marks.append(None if before is None else after == before - 1)
        before = after
    return marks


def silent_of(trajectories: list[Trajectory]) -> dict[int, bool]:
    return silent_groups([t.group for t in trajectories], [t.success for t in trajectories])


def guided_steps(config: Config, batch: Batch) -> list[Guided]:
    marks, silent = judge(config), silent_of(batch.trajectories)
    steps, b = [], 0
    for trajectory, guidances in zip(batch.trajectories, batch.routes, strict=True):
        for turn, (good, guidance) in enumerate(zip(marks(trajectory), guidances, strict=True)):
            shift = batch.advantages.skill[b]  # (R,)
            shift = shift[~shift.isnan()]  # (tokens,)
            if len(shift):
                level = "+".join(g.level for g in guidance if g.level in config.levels) or "none"
                means = shift.mean().item(), shift.abs().mean().item()
                group, outcome = trajectory.group, batch.advantages.outcome[b].item()
                won, tokens = trajectory.success, len(shift)
                steps.append(Guided(level, group, turn, silent[group], won, good, *means, tokens, outcome))
            b += 1
    return steps


# ---- what is said about it ------------------------------------------------------------------------------------------


def auc(steps: list[Guided], kind_of: Callable[[Guided], tuple] = lambda step: ()) -> float:
    """P(A_skill of a good step > that of another step), ties counted half, over all pairs of one kind; NaN without a
    pair."""
    won = pairs = 0.0
    for kind in {kind_of(step) for step in steps}:
        of_kind = [step for step in steps if kind_of(step) == kind]
        good, bad = (np.array([s.skill for s in of_kind if s.good is mark]) for mark in (True, False))  # (n,), (m,)
        if len(good) and len(bad):
            won += len(good) * len(bad) * probability_of_superiority(good, bad)
            pairs += len(good) * len(bad)
    return won / pairs if pairs else math.nan


def auc_alike(steps: list[Guided]) -> float:
    return auc(steps, lambda step: (step.turn, step.won))


MEASURES = {"auc": auc, "auc_alike": auc_alike}
COLUMNS = {"auc": "AUC", "auc_turn": "in a turn", "auc_alike": "alike"}  # lines of older commits have the second


def interval(measure: Callable[..., float], *scored: list[Guided], samples: int = 200) -> tuple[float, float]:
    """95% bootstrap interval of `measure(*scored)`; whole task groups are drawn, as steps of one game are no
    independent samples, and the same ones from each list."""
    by_group: list[dict[int, list[Guided]]] = [{} for _ in scored]
    for steps, of_group in zip(scored, by_group, strict=True):
        for step in steps:
            of_group.setdefault(step.group, []).append(step)
    every = np.array(sorted({group for of_group in by_group for group in of_group}))

    def statistic(groups: np.ndarray) -> float:
        return measure(*([step for group in groups for step in of.get(group, [])] for of in by_group))

    return bootstrap_interval(statistic, every, samples=samples) if len(every) else (math.nan, math.nan)


def estimates(measures: dict[str, Callable[..., float]], *scored: list[Guided]) -> dict[str, float]:
    """Each measure under its name, and the bounds of its interval."""
    found = {}
    for name, measure in measures.items():
        found[name] = measure(*scored)
        found[f"{name}_low"], found[f"{name}_high"] = interval(measure, *scored)
    return found


def differences(own: list[Guided], other: list[Guided]) -> dict[str, float]:
    """By how much the AUC of `own` is above that of `other`, in the same episodes."""
    above = {name: lambda a, b, measure=measure: measure(a) - measure(b) for name, measure in MEASURES.items()}
    return estimates(above, own, other)


def describe(steps: list[Guided]) -> dict[str, float | None]:
    """The numbers of one table row; None where there is nothing to count."""
    judged = [s.good for s in steps if s.good is not None]
    agree = [s.skill * s.outcome > 0 for s in steps if s.skill and abs(s.outcome) > ROUNDING]
    tokens = sum(s.tokens for s in steps)
    numbers = {
        "steps": len(steps),
        "good": np.mean(judged) if judged else math.nan,
        **estimates(MEASURES, steps),
        "agreement": np.mean(agree) if agree else math.nan,
        "skill_abs": sum(s.size * s.tokens for s in steps) / tokens if tokens else math.nan,
        "outcome_abs": sum(abs(s.outcome) * s.tokens for s in steps) / tokens if tokens else math.nan,
    }
    return known(numbers)


def known(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else float(value) for name, value in numbers.items()}


def rows_of(steps: list[Guided]) -> dict[str, dict]:
    levels = sorted({s.level for s in steps})
    chosen: dict[str, Callable[[Guided], bool]] = {"all": lambda s: True}
    chosen |= {level: lambda s, level=level: s.level == level for level in levels}
    chosen |= {"no outcome signal": lambda s: s.silent, "outcome signal": lambda s: not s.silent}
    return {name: describe([s for s in steps if keep(s)]) for name, keep in chosen.items()}


def rounded(numbers: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else float(f"{value:.4g}") for name, value in numbers.items()}


def with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def table(result: dict) -> str:
    kinds = {kind: name for kind, name in COLUMNS.items() if kind in result["rows"]["all"]}
    head = ["guided steps", "number", "good steps, %", *(text for name in kinds.values() for text in (name, "95%"))]
    head += ["agreement, %", "|A_skill|", "|A_ep|"]
    rows = []
    for name, numbers in result["rows"].items():
        n = with_nan(numbers)
        good = n.get("good", n.get("on_plan", math.nan))  # older lines were of ALFWorld alone
        cells = [name, f"{n['steps']:.0f}", f"{100 * good:.1f}"]
        for kind in kinds:
            cells += [f"{n[kind]:.3f}", bounds(n, kind)]
        cells += [f"{100 * n['agreement']:.1f}", f"{n['skill_abs']:.4f}", f"{n['outcome_abs']:.3f}"]
        rows.append([cell.replace("nan", "-") for cell in cells])
    shares = f"success {100 * result['success']:.1f}%, groups without outcome signal {100 * result['silent']:.1f}%"
    text = f"{result['name']}: {shares} of {result['groups']}\n\n" + markdown(head, rows)
    for algo, numbers in result.get("against", {}).items():
        n = with_nan(numbers)
        told = [f"{name} {n[kind]:+.3f} {bounds(n, kind)}" for kind, name in kinds.items()]
        text += f"\n\nLess that of {algo}: {', '.join(told)}"
    return text


def bounds(numbers: dict[str, float], kind: str) -> str:
    return f"[{numbers[f'{kind}_low']:.3f}, {numbers[f'{kind}_high']:.3f}]"


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, help="run folder whose newest checkpoint plays (default: the warm start)")
    parser.add_argument("--against", metavar="ALGO", help="another method, whose contexts score the same episodes")
    parser.add_argument("--results", type=Path, default=RESULTS / "skill-signal.jsonl", help="NAME.jsonl")
    parser.add_argument("--name", help="of the line (default: the run folder's, else start)")
    args, flags = parser.parse_known_args(argv)
    recipe = default_recipe("tiny", CommandLine.read(flags).env or "alfworld")

    def parse(flags: list[str]) -> Config:
        return config_of(args.run, flags) if args.run else parse_args(on_the_laptop(flags, recipe))

    config = parse(flags)
    batch = batch_of(config, args.run)
    steps = guided_steps(config, batch)
    compared = {}
    if args.against:
        other = parse([*flags, "--algo", args.against])
        again = batch_of(other, args.run)
        if [step.response for step in again.steps] != [step.response for step in batch.steps]:
            raise RuntimeError(f"--algo {args.against} plays other episodes")
        compared["against"] = {args.against: rounded(known(differences(steps, guided_steps(other, again))))}
    silent = silent_of(batch.trajectories)
    result = {
        "name": args.name or (args.run.name if args.run else "start"),
        "commit": commit(),
        "config": settings(config),
        "success": float(np.mean([t.success for t in batch.trajectories])),
        "groups": len(silent),
        "silent": sum(silent.values()) / len(silent),
        "rows": rows_of(steps),
        **compared,
    }
    add(args.results, result | {"rows": {name: rounded(numbers) for name, numbers in result["rows"].items()}})
    args.results.with_suffix(".md").write_text("\n\n".join(map(table, read(args.results))) + "\n")
    print(text := table(result))
    return text


if __name__ == "__main__":
    main()
