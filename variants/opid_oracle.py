"""OPID whose skills are written by a script that knows the game. A control, meant as the upper bound."""

from __future__ import annotations

from dataclasses import dataclass, replace

from config import Config
from data import Skills, Trajectory
from runlog.start import Run
from train import OPID


@dataclass
class Settings(Config):
    def __post_init__(self):
        super().__post_init__()
        if self.env != "alfworld":
            raise ValueError(
                f"--algo {self.algo} needs a script that writes skills: there is none for --env {self.env}"
            )

    @property
    def writes_skills(self) -> bool:
        return False


def oracle_skills(run: Run, trajectories: list[Trajectory]) -> tuple[list[Skills | None], dict[str, float]]:
    return [scripted_skills(trajectory, run.config.max_step_skills) for trajectory in trajectories], {}


def scripted_skills(trajectory: Trajectory, max_step_skills: int) -> Skills:
    """What a script that knows the game writes about a finished ALFWorld episode. The same script wrote the
    demonstrations of the tiny model."""
    from tiny.alfworld import hindsight, replay  # it reads ALFWorld's data

    skills = hindsight(replay(trajectory))
    skills.steps = dict(sorted(skills.steps.items())[:max_step_skills])
    return skills


VARIANT = replace(OPID, skills=oracle_skills, settings=Settings)
