"""Skills of other tasks: whose may stand in for whose (opid-shuffled), and routes with their words (opid-contrast)."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import zeros

from data import Batch, Guidance, Route, Skills, Trajectory
from variants import opid_shuffled
from variants.opid_contrast import other_routes

SKILLS = Skills("summary", "work in order", {1: "open it"})
EPISODE, STEP = Guidance("episode", "work in order"), Guidance("step", "open it")


def played(*tasks: tuple[int, str]) -> list[Trajectory]:
    """One trajectory for each (task, type)."""
    return [Trajectory("", group, [], True, task_type=kind) for group, kind in tasks]


def shuffle_skills(skills: list[Skills | None], trajectories: list[Trajectory], seed: int) -> list[Skills | None]:
    """What opid-shuffled makes of the skills that were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opid_shuffled, "own_skills", lambda run, trajectories: (skills, {"skills/parse_rate": 0.5}))
        shuffled, metrics = opid_shuffled.VARIANT.skills(SimpleNamespace(rng=random.Random(seed)), trajectories)
    assert metrics == {"skills/parse_rate": 0.5}
    return shuffled


def counterparts(routes: list[Route], skills: list[Skills | None], trajectories: list[Trajectory]) -> list[Route]:
    batch = Batch(trajectories, skills, routes, {}, zeros(0, 0), None, {})
    return other_routes(batch, random.Random(0))


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=2, max_size=9), st.integers(0, 99))
def test_shuffled_skills_come_from_another_type_where_there_is_one(tasks, seed):
    trajectories = played(*((group, kind + str(group % 2)) for group, kind in tasks))
    skills = [Skills("", str(i), {}) for i in range(len(tasks))]
    if len({t.group for t in trajectories}) == 1:  # the other tasks' prompts were too long: no skill, and no end
        assert shuffle_skills(skills, trajectories, seed) == [None] * len(tasks)
        return
    got = shuffle_skills(skills, trajectories, seed)
    assert got == shuffle_skills(skills, trajectories, seed)
    for own, taken in zip(trajectories, got, strict=True):
        source = trajectories[int(taken.episode)]
        assert source.group != own.group
        others = {t.task_type for t in trajectories if t.group != own.group}
        assert source.task_type != own.task_type or others == {own.task_type}


def test_shuffling_depends_on_the_seed_and_passes_over_those_without_skills():
    trajectories = played((0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "c"), (2, "c"))
    skills = [Skills("", str(i), {}) for i in range(6)]
    assert len({str(shuffle_skills(skills, trajectories, seed)) for seed in range(9)}) > 3
    assert shuffle_skills([None, SKILLS], played((0, "a"), (1, "b")), 0) == [SKILLS, None]


def test_counterparts_keep_the_routes_and_take_the_words_of_another_task():
    trajectories = played((0, "a"), (1, "b"), (2, "a"))
    skills = [Skills("", "E0", {1: "S0"}), Skills("", "E1", {0: "S1", 4: "T1"}), None]
    routes = [[(EPISODE,), (STEP,), (EPISODE, STEP)], [(EPISODE,)], [()]]
    swapped = counterparts(routes, skills, trajectories)
    assert [[[g.level for g in gs] for gs in route] for route in swapped] == [
        [["episode"], ["step"], ["episode", "step"]],
        [["episode"]],
        [[]],
    ]
    assert {g.text for gs in swapped[0] for g in gs if g.level == "episode"} == {"E1"}
    assert {g.text for gs in swapped[0] for g in gs if g.level == "step"} <= {"S1", "T1"}
    assert swapped[1] == [(Guidance("episode", "E0"),)]


def test_a_level_that_no_other_task_has_a_skill_of_has_no_counterpart():
    trajectories, routes = played((0, "a"), (1, "b")), [[(EPISODE,), (STEP,)], [()]]
    for other in (Skills("", "E1", {}), Skills("", "E1", {0: " "})):
        swapped = counterparts(routes, [SKILLS, other], trajectories)
        assert swapped[0] == [(Guidance("episode", "E1"),), ()]
    assert counterparts(routes, [SKILLS, None], trajectories)[0] == [(), ()]
