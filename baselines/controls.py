"""Controls of OPID: skills of other tasks, words that say nothing, skills of a script that knows the game."""

from __future__ import annotations

import random

from baselines.method import Config, Method
from data import Skills, Trajectory
from router import foreign


class Shuffled(Method):
    """Each trajectory is guided by the skills of one of another task, of another type where there is one: content
    against the mere change of context."""

    needs_others = True

    @staticmethod
    def check(config: Config) -> None:
        if config.tasks < 2:
            raise ValueError("--algo opid-shuffled takes skills from other tasks: --tasks must be at least 2")

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        return shuffle_skills(written, trajectories, rng)


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


def shuffle_skills(
    skills: list[Skills | None], trajectories: list[Trajectory], rng: random.Random
) -> list[Skills | None]:
    """Each trajectory gets the skills that were written about a `foreign` one, drawn anew for each; None where no other
    task has skills. Raises ValueError where all are of one task."""
    having = [own is not None for own in skills]
    sources = [foreign(trajectories, at, having) for at in range(len(trajectories))]
    return [skills[rng.choice(source)] if source else None for source in sources]


def scripted_skills(trajectory: Trajectory, max_step_skills: int) -> Skills:
    """What a script that knows the game writes about a finished ALFWorld episode. The same script wrote the
    demonstrations of the tiny model."""
    from tiny.alfworld import hindsight, replay  # it reads ALFWorld's data

    skills = hindsight(replay(trajectory))
    skills.steps = dict(sorted(skills.steps.items())[:max_step_skills])
    return skills
