"""Skill-GRPO: the policy acts under an earlier episode's skill, and nothing is re-scored. SDAR release, with fixed
skill files there."""

from __future__ import annotations

import random
from typing import Any

from accelerate.utils import gather_object

from baselines.method import Config, Grpo
from data import Skills, Trajectory


class SkillGrpo(Grpo):
    def __init__(self, config: Config):
        super().__init__(config)
        self.known: dict[str, str] = {}  # task type -> its newest episode skill

    @staticmethod
    def writes_skills(config: Config) -> bool:
        return True

    def acts_under(self) -> dict[str, str] | None:
        return self.known

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        self.known = remember(self.known, gather_object(lessons(trajectories, written)))
        return written

    def state(self) -> dict[str, Any]:
        return {"episode_skills": self.known}

    def restore(self, state: dict[str, Any]) -> None:
        self.known = state["episode_skills"]


def lessons(trajectories: list[Trajectory], skills: list[Skills | None]) -> list[tuple[bool, str, str]]:
    """What is worth remembering for other tasks of a kind: (success, task type, episode skill)."""
    pairs = zip(trajectories, skills, strict=True)
    return [(t.success, t.task_type, s.episode) for t, s in pairs if s is not None]


def remember(known: dict[str, str], new: list[tuple[bool, str, str]]) -> dict[str, str]:
    """Task type -> its newest episode skill; of one iteration's `lessons`, the last success before any failure."""
    return known | {task_type: text for _, task_type, text in sorted(new, key=lambda lesson: lesson[0])}
