"""OPID with each trajectory guided by another task's skills, of another type where there is one. A control: does it
matter what a skill says, or only that the context changes?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from config import Config
from data import Skills, Trajectory
from runlog.start import Run
from skills import own_skills
from train import OPID


@dataclass
class Settings(Config):
    @property
    def least_tasks(self) -> int:
        return 2


def shuffled_skills(run: Run, trajectories: list[Trajectory]) -> tuple[list[Skills | None], dict[str, float]]:
    written, metrics = own_skills(run, trajectories)
    return exchanged(run, trajectories, written, other_tasks), metrics


def exchanged(
    run: Run, trajectories: list[Trajectory], written: list[Skills | None], sources: Callable[..., list[int]]
) -> list[Skills | None]:
    """For each trajectory, also one that has no skills of its own, what was written of another one, drawn from its
    `sources(trajectories, at, having)`; None where there are none."""
    having = [own is not None for own in written]
    found = [sources(trajectories, at, having) for at in range(len(trajectories))]
    return [written[run.rng.choice(source)] if source else None for source in found]


def other_tasks(trajectories: list[Trajectory], at: int, having: list[bool]) -> list[int]:
    """The trajectories whose skills may replace those of trajectory `at`: of those that have skills (`having`), the
    ones of another task type, else of another task. Empty where only one task was played."""
    own = trajectories[at]
    others = [i for i, t in enumerate(trajectories) if having[i] and t.group != own.group]
    return [i for i in others if trajectories[i].task_type != own.task_type] or others


VARIANT = replace(OPID, skills=shuffled_skills, settings=Settings)
