"""OPID whose skills are written by a script that knows the game: meant as the upper bound."""

from dataclasses import dataclass, replace

from config import Config
from train import OPID


@dataclass
class Settings(Config):
    def __post_init__(self):
        super().__post_init__()
        if self.env != "alfworld":
            raise ValueError(f"--algo {self.algo} has no script that writes skills for --env {self.env}")

    @property
    def writes_skills(self) -> bool:
        return False


def scripted_skills(run, trajectories, rng):
    from tiny.alfworld import hindsight, replay  # it reads ALFWorld's data

    skills = [hindsight(replay(trajectory)) for trajectory in trajectories]
    for own in skills:
        own.steps = dict(sorted(own.steps.items())[: run.config.max_step_skills])
    return skills, {}


VARIANT = replace(OPID, skills=scripted_skills, settings=Settings)
