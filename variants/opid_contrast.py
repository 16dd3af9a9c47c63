"""OPID whose A_skill compares the own skill with a skill of another task. What every skill does cancels out: the idea
of RLCSD (arXiv 2606.11709)."""

from __future__ import annotations

import random
from dataclasses import replace

from advantage import combine, skill_advantage, sum_of_scored
from data import Advantages, Batch, Guidance, Route
from rescore import rescore
from router import LEVELS
from runlog.start import Run
from train import OPID, outcomes
from variants.opid_shuffled import Settings, other_tasks


def advantages(run: Run, batch: Batch) -> Advantages:
    config, mask = run.config, batch.mask
    outcome = outcomes(config, batch.trajectories)  # (B,)
    other, _ = rescore(run, batch.trajectories, batch.skills, other_routes(batch, run.rng), plain=False)

    # A_skill = (log pi(y | h^) - log pi(y | h^ with another task's skill)) * m
    shifts = {
        level: skill_advantage(logprobs, other.skill_logprobs[level], mask)
        for level, logprobs in batch.skill_logprobs.items()
    }  # (B, R) each
    both = {level: logprobs + other.skill_logprobs[level] for level, logprobs in batch.skill_logprobs.items()}  # or NaN
    total = combine(outcome, shifts, {"episode": config.episode_weight, "step": config.step_weight}, mask)
    return Advantages(total, outcome, sum_of_scored(shifts, both, mask))


def other_routes(batch: Batch, rng: random.Random) -> list[Route]:
    """The same routes with skills of other tasks: each skill is replaced by one of its level that was written about a
    trajectory of another task. An episode skill is drawn once a trajectory, a step skill once a step."""
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
