"""Controls of OPID: skills of other tasks, words that say nothing, skills of a script that knows the game."""

from __future__ import annotations

import random

from baselines.method import Config, Method
from data import Guidance, Skills, Trajectory
from router import LEVELS


class Shuffled(Method):
    """Each trajectory is guided by the skills of one of another task, of another type where there is one: content
    against the mere change of context."""

    needs_others = True
    own_skills = False

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        return shuffle_skills(written, trajectories, rng)


class Placebo(Method):
    """Fixed words that say nothing stand where the own skills would: a skill is there, and has no content."""

    own_skills = False
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


def foreign(trajectories: list[Trajectory], at: int, having: list[bool]) -> list[int]:
    """Which trajectories' skills may stand in for those of trajectory `at`: of those `having` some, the ones of another
    task type; where there are none, of another task; none where only one task was played, which a run has where the
    prompts of all others are too long."""
    own = trajectories[at]
    others = [i for i, t in enumerate(trajectories) if having[i] and t.group != own.group]
    return [i for i in others if trajectories[i].task_type != own.task_type] or others


def counterparts(
    routes: list[list[tuple[Guidance, ...]]],
    skills: list[Skills | None],
    trajectories: list[Trajectory],
    rng: random.Random,
) -> list[list[tuple[Guidance, ...]]]:
    """The same routes with the words of other tasks: each skill's place is taken by one of its level that was written
    about a `foreign` trajectory. One episode skill a trajectory, step skills drawn anew; nothing where there is none.
    """
    written = {"episode": [[own.episode] if own else [] for own in skills]}
    written["step"] = [list(own.steps.values()) if own else [] for own in skills]
    texts = {level: [[text for text in own if text.strip()] for own in written[level]] for level in LEVELS}
    having = {level: [bool(own) for own in texts[level]] for level in LEVELS}
    swapped = []
    for at, route in enumerate(routes):
        sources = {level: foreign(trajectories, at, having[level]) for level in LEVELS}
        sources["episode"] = sources["episode"] and [rng.choice(sources["episode"])]  # one for all steps
        drawn = []  # of each step
        for guidances in route:
            levels = [guidance.level for guidance in guidances if sources[guidance.level]]
            drawn.append(
                tuple(Guidance(level, rng.choice(texts[level][rng.choice(sources[level])])) for level in levels)
            )
        swapped.append(drawn)
    return swapped


def shuffle_skills(
    skills: list[Skills | None], trajectories: list[Trajectory], rng: random.Random
) -> list[Skills | None]:
    """Each trajectory gets the skills that were written about a `foreign` one, drawn anew for each; None where no other
    task has skills."""
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
