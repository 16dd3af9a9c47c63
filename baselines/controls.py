"""Controls of OPID: skills of other tasks, words that say nothing, skills of a script that knows the game."""

from __future__ import annotations

import random

from baselines.method import Config, Method
from data import Skills, Trajectory


class Shuffled(Method):
    """Each trajectory is guided by the skills of another task's: content against the mere change of context."""

    @staticmethod
    def check(config: Config) -> None:
        if config.tasks < 2:
            raise ValueError("--algo opid-shuffled takes skills from other tasks: --tasks must be at least 2")

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        return shuffle_skills(written, [trajectory.group for trajectory in trajectories], rng)


class Placebo(Method):
    """Fixed words that say nothing stand where the own skills would: a skill is there, and has no content."""

    EPISODE, STEP = "first one and then one", "now one"

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        return [own and Skills("", self.EPISODE, dict.fromkeys(own.steps, self.STEP)) for own in written]


class Oracle(Method):
    """A script that knows the game writes the skills: meant as the upper bound."""

    @staticmethod
    def check(config: Config) -> None:
        if config.env != "alfworld":
            raise ValueError(
                f"--algo opid-oracle needs a script that writes skills: there is none for --env {config.env}"
            )

    @staticmethod
    def writes_skills(config: Config) -> bool:
        return False

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        return [scripted_skills(trajectory, self.config.max_step_skills) for trajectory in trajectories]


def shuffle_skills(skills: list[Skills | None], groups: list[int], rng: random.Random) -> list[Skills | None]:
    """Each trajectory gets the skills of one of another task. Every trajectory's skills are used once; those without
    skills count as skills, too.

    `groups`: the task of each trajectory. Raises ValueError where one task has more than half of all trajectories.
    """
    sizes = {group: groups.count(group) for group in groups}
    largest = max(sizes.values())
    if 2 * largest > len(groups):
        raise ValueError("a task has more than half of a process's trajectories: skills cannot all go to other tasks")
    tasks, order = rng.sample(sorted(sizes), len(sizes)), rng.sample(range(len(groups)), len(groups))
    order.sort(key=lambda i: tasks.index(groups[i]))
    # Tasks lie in blocks, so that whatever stands one largest block further on, around the end too, is of another one.
    taken = [None] * len(groups)
    for position, i in enumerate(order):
        taken[i] = skills[order[(position + largest) % len(order)]]
    return taken


def scripted_skills(trajectory: Trajectory, max_step_skills: int) -> Skills:
    """What a script that knows the game writes about a finished ALFWorld episode. The same script wrote the
    demonstrations of the tiny model."""
    from tiny.alfworld import hindsight, replay  # it reads ALFWorld's data

    skills = hindsight(replay(trajectory))
    skills.steps = dict(sorted(skills.steps.items())[:max_step_skills])
    return skills
