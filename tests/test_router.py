"""The truth table of routing, and where a skill's text goes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.controls import counterparts, shuffle_skills
from data import Guidance, Skills, Slot, Trajectory
from router import RULES, fill, guided_messages, route, rule

SKILLS = Skills("summary", "work in order", {1: "open it"})
EPISODE, STEP = Guidance("episode", "work in order"), Guidance("step", "open it")
PROMPT = ("task\n", Slot("episode", "E:{text}\n"), "now\n", Slot("step", "S:{text}\n"), "act")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("critical-first", [(EPISODE,), (STEP,), (EPISODE,)]),
        ("additive", [(EPISODE,), (EPISODE, STEP), (EPISODE,)]),
        ("episode", [(EPISODE,), (EPISODE,), (EPISODE,)]),
        ("step", [(), (STEP,), ()]),
        ("none", [(), (), ()]),
    ],
)
def test_route(mode, expected):
    assert route(SKILLS, 3, mode) == expected


@pytest.mark.parametrize("mode", RULES)
def test_no_skills_guide_nothing(mode):
    assert route(None, 2, mode) == [(), ()]


@pytest.mark.parametrize(
    ("mode", "level", "expected"),
    [
        ("critical-first", "episode", [(EPISODE,), (EPISODE,)]),  # a critical step falls back to the episode skill
        ("critical-first", "step", [(), (STEP,)]),
        ("additive", "episode", [(EPISODE,), (EPISODE,)]),
        ("step", "episode", [(), ()]),
    ],
)
def test_a_level_that_is_left_out_counts_as_absent(mode, level, expected):
    assert route(SKILLS, 2, mode, levels=(level,)) == expected


@pytest.fixture
def own_rule():
    """Registers rules for one test."""
    before = dict(RULES)
    yield rule
    RULES.clear()
    RULES.update(before)


def test_a_rule_gets_what_it_asks_for(own_rule):
    @own_rule("unsure")
    def unsure(episode, step, success, logprobs):
        return step if min(logprobs) < -1 and not success else episode

    logprobs = [[-0.1], [-0.5, -2.0], [-3.0]]
    assert route(SKILLS, 3, "unsure", success=False, logprobs=logprobs) == [(EPISODE,), (STEP,), ()]
    assert route(SKILLS, 3, "unsure", success=True, logprobs=logprobs) == [(EPISODE,)] * 3


def test_two_skills_of_one_level_are_an_error(own_rule):
    own_rule("twice")(lambda episode, step: episode + episode)
    with pytest.raises(ValueError, match="gives step 0 two skills of one level"):
        route(SKILLS, 1, "twice")


def test_blank_skills_guide_nothing():
    assert route(Skills("", " ", {0: ""}), 1, "additive") == [()]


def test_unknown_mode():
    with pytest.raises(ValueError, match="critical-first"):
        route(SKILLS, 1, "critical")


def test_fill_puts_each_level_in_its_slot_and_leaves_the_rest():
    assert fill(PROMPT) == "task\nnow\nact"
    assert fill(PROMPT, EPISODE) == "task\nE:work in order\nnow\nact"
    assert fill(PROMPT, STEP) == "task\nnow\nS:open it\nact"


def test_fill_keeps_braces_of_a_skill():
    assert fill(PROMPT, Guidance("step", "{0} {text}")) == "task\nnow\nS:{0} {text}\nact"


_words = st.text(max_size=6) | st.sampled_from(["{", "}", "{text}", "{0}", "{{}}", "%s", "\\1", "\n"])
_slots = st.builds(
    lambda level, before, after: Slot(level, f"{before}{{text}}{after}"),
    st.sampled_from(["episode", "step"]),
    *[_words.filter(lambda word: "{text}" not in word and not word.endswith("{"))] * 2,
)
_guidances = st.lists(st.builds(Guidance, st.sampled_from(["episode", "step"]), _words), max_size=3)


@given(st.lists(_words | _slots, max_size=6).map(tuple), _guidances)
def test_fuzz_a_prompt_differs_by_its_skills_and_by_nothing_else(prompt, guidances):
    told, slots = [g.level for g in guidances], [piece.level for piece in prompt if isinstance(piece, Slot)]
    if len(set(told)) < len(told) or not set(told) <= set(slots):
        with pytest.raises(ValueError, match=r"two skills of one level|this prompt has no"):
            fill(prompt, *guidances)
        return
    texts, expected = {g.level: g.text for g in guidances}, ""
    for piece in prompt:
        if isinstance(piece, str):
            expected += piece
        elif piece.level in texts:
            before, after = piece.template.split("{text}")
            expected += before + texts[piece.level] + after
    assert fill(prompt, *guidances) == expected
    assert fill(prompt) == "".join(piece for piece in prompt if isinstance(piece, str))


@given(st.lists(_words, max_size=5).map("".join))
def test_fuzz_a_slot_has_one_place(template):
    if template.count("{text}") == 1:
        filled = fill((Slot("step", template),), Guidance("step", "GO"))
        assert "GO".join(template.split("{text}")) == filled
    else:
        with pytest.raises(ValueError, match="once"):
            Slot("step", template)


def test_braces_of_a_slot_stand_for_themselves():
    assert fill(("a", Slot("step", ' {"hint": "{text}", {0}}')), Guidance("step", "go")) == 'a {"hint": "go", {0}}'
    for template in ("no place", "{text} {text}"):
        with pytest.raises(ValueError, match="once"):
            Slot("step", template)


def test_two_skills_of_one_level_do_not_fit_in_a_prompt():
    with pytest.raises(ValueError, match="two skills of one level"):
        fill(PROMPT, STEP, Guidance("step", "close it"))


def test_a_skill_without_a_slot_is_an_error_not_a_plain_prompt():
    with pytest.raises(ValueError, match=r"no episode slot \(it has: \['step'\]\)"):
        fill(("task", Slot("step", "{text}")), EPISODE)
    with pytest.raises(ValueError, match=r"no step slot \(it has: none\)"):
        fill(("task",), STEP)


def test_window_holds_both_levels_in_its_one_message():
    earlier = [("first", *PROMPT), ("second", *PROMPT)]
    assert guided_messages([*earlier, PROMPT], EPISODE, "window") == ["task\nE:work in order\nnow\nact"]


def test_chat_puts_the_episode_skill_first_and_the_step_skill_last():
    later = ("seen\n", Slot("step", "S:{text}\n"))
    prompts = [PROMPT, later, later]
    plain = ["task\nnow\nact", "seen\n", "seen\n"]
    assert guided_messages(prompts, None, "chat") == plain
    assert guided_messages(prompts, EPISODE, "chat") == ["task\nE:work in order\nnow\nact", *plain[1:]]
    assert guided_messages(prompts, STEP, "chat") == [*plain[:2], "seen\nS:open it\n"]


def played(*tasks: tuple[int, str]) -> list[Trajectory]:
    """One trajectory for each (task, type)."""
    return [Trajectory("", group, [], True, task_type=kind) for group, kind in tasks]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=2, max_size=9), st.integers(0, 99))
def test_shuffled_skills_come_from_another_type_where_there_is_one(tasks, seed):
    trajectories = played(*((group, kind + str(group % 2)) for group, kind in tasks))
    skills = [Skills("", str(i), {}) for i in range(len(tasks))]
    if len({t.group for t in trajectories}) == 1:  # the other tasks' prompts were too long: no skill, and no end
        assert shuffle_skills(skills, trajectories, random.Random(seed)) == [None] * len(tasks)
        return
    got = shuffle_skills(skills, trajectories, random.Random(seed))
    assert got == shuffle_skills(skills, trajectories, random.Random(seed))
    for own, taken in zip(trajectories, got, strict=True):
        source = trajectories[int(taken.episode)]
        assert source.group != own.group
        others = {t.task_type for t in trajectories if t.group != own.group}
        assert source.task_type != own.task_type or others == {own.task_type}


def test_shuffling_depends_on_the_seed_and_passes_over_those_without_skills():
    trajectories = played((0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "c"), (2, "c"))
    skills = [Skills("", str(i), {}) for i in range(6)]
    assert len({str(shuffle_skills(skills, trajectories, random.Random(seed))) for seed in range(9)}) > 3
    assert shuffle_skills([None, SKILLS], played((0, "a"), (1, "b")), random.Random(0)) == [SKILLS, None]


def test_counterparts_keep_the_routes_and_take_the_words_of_another_task():
    trajectories = played((0, "a"), (1, "b"), (2, "a"))
    skills = [Skills("", "E0", {1: "S0"}), Skills("", "E1", {0: "S1", 4: "T1"}), None]
    routes = [[(EPISODE,), (STEP,), (EPISODE, STEP)], [(EPISODE,)], [()]]
    swapped = counterparts(routes, skills, trajectories, random.Random(0))
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
        swapped = counterparts(routes, [SKILLS, other], trajectories, random.Random(0))
        assert swapped[0] == [(Guidance("episode", "E1"),), ()]
    assert counterparts(routes, [SKILLS, None], trajectories, random.Random(0))[0] == [(), ()]
