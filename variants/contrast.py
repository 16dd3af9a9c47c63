"""OPID whose A_skill is the difference to a skill of another task, so that what any skill does cancels."""

from __future__ import annotations

import random
from dataclasses import replace

from advantage import combine, outcome_advantages, skill_advantage, sum_of_scored
from data import Advantages, Batch, Guidance, Route
from rescore import score
from router import LEVELS
from runlog.start import Run
from train import OPID
from variants.opid_shuffled import Settings, other_tasks


def advantages(run: Run, batch: Batch, rng: random.Random) -> Advantages:
    config = run.config
    outcome = outcome_advantages(batch.trajectories, config)  # (B,)
    foreign, _ = score(run, batch.trajectories, batch.skills, other_routes(batch, rng), readers=())

    # A_skill = log pi(y | h^) - log pi(y | h^ with another task's skill)
    shifts = {
        level: skill_advantage(logprobs, foreign.skill_logprobs[level])
        for level, logprobs in batch.skill_logprobs.items()
    }  # (B, R) each
    weights = {"episode": config.episode_weight, "step": config.step_weight}
    return Advantages(combine(outcome, shifts, weights, batch.mask), outcome, sum_of_scored(shifts, batch.mask))


def other_routes(batch: Batch, rng: random.Random) -> list[Route]:
    """The same routes with the words of other tasks: each skill's place is taken by one of its level that was written
    about a trajectory of another task. One episode skill a trajectory, step skills drawn anew."""
    written = {"episode": [[own.episode] if own else [] for own in batch.skills]}
    written["step"] = [list(own.steps.values()) if own else [] for own in batch.skills]
    texts = {level: [[text for text in own if text.strip()] for own in written[level]] for level in LEVELS}
    having = {level: [bool(own) for own in texts[level]] for level in LEVELS}
    routes = []
    for at, route in enumerate(batch.routes):
        sources = {level: other_tasks(batch.trajectories, at, having[level]) for level in LEVELS}
        sources["episode"] = sources["episode"] and [rng.choice(sources["episode"])]  # one for all steps
        drawn = []  # of each step
        for guidances in route:
            levels = [guidance.level for guidance in guidances if sources[guidance.level]]
            drawn.append(
                tuple(Guidance(level, rng.choice(texts[level][rng.choice(sources[level])])) for level in levels)
            )
        routes.append(drawn)
    return routes


VARIANT = replace(OPID, advantages=advantages, settings=Settings)
