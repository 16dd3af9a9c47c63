"""OPID with fixed words that say nothing where the own skills would stand: a skill is there, and has no content."""

from dataclasses import replace

from data import Skills
from skills import own_skills
from train import OPID

EPISODE, STEP = "first one and then one", "now one"


def placebo_skills(run, trajectories, rng):
    written, metrics = own_skills(run, trajectories, rng)
    return [own and Skills("", EPISODE, dict.fromkeys(own.steps, STEP)) for own in written], metrics


VARIANT = replace(OPID, skills=placebo_skills)
