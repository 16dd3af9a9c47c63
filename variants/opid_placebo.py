"""OPID with fixed, empty words in the place of each skill. A control: is it enough that a skill is there?"""

from __future__ import annotations

from dataclasses import replace

from data import Skills, Trajectory
from runlog.start import Run
from skills import own_skills
from train import OPID

EPISODE, STEP = "first one and then one", "now one"


def placebo_skills(run: Run, trajectories: list[Trajectory]) -> tuple[list[Skills | None], dict[str, float]]:
    written, metrics = own_skills(run, trajectories)
    return [own and Skills("", EPISODE, dict.fromkeys(own.steps, STEP)) for own in written], metrics


VARIANT = replace(OPID, skills=placebo_skills)
