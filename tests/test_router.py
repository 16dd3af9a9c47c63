"""The truth table of routing, and where a skill's text goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Guidance, Skills, Slot, Step, Trajectory
from router import RULES, fill, guided_messages, route

SKILLS = Skills("summary", "work in order", {1: "open it"})
EPISODE, STEP = Guidance("episode", "work in order"), Guidance("step", "open it")
PROMPT = ("task\n", Slot("episode", "E:{text}\n"), "now\n", Slot("step", "S:{text}\n"), "act")


def played(steps: int, success: bool = True, logprobs: list[list[float]] | None = None) -> Trajectory:
    """A trajectory of so many steps."""
    made = [Step((), "", [1], [2], "", "", True, logprobs[t] if logprobs else [-0.1]) for t in range(steps)]
    return Trajectory("", 0, made, success)


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
    assert route(played(3), SKILLS, mode) == expected


@pytest.mark.parametrize("mode", RULES)
def test_no_skills_guide_nothing(mode):
    assert route(played(2), None, mode) == [(), ()]


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
    assert route(played(2), SKILLS, mode, levels=(level,)) == expected


def test_a_rule_sees_how_each_step_was_sampled_and_how_it_ended(monkeypatch):
    def unsure(trajectory, t, episode, step):
        return step if min(trajectory.steps[t].logprobs) < -1 and not trajectory.success else episode

    monkeypatch.setitem(RULES, "unsure", unsure)
    logprobs = [[-0.1], [-0.5, -2.0], [-3.0]]
    assert route(played(3, False, logprobs), SKILLS, "unsure") == [(EPISODE,), (STEP,), ()]
    assert route(played(3, True, logprobs), SKILLS, "unsure") == [(EPISODE,)] * 3


def test_two_skills_of_one_level_are_an_error(monkeypatch):
    monkeypatch.setitem(RULES, "twice", lambda trajectory, t, episode, step: episode + episode)
    with pytest.raises(ValueError, match="gives step 0 two skills of one level"):
        route(played(1), SKILLS, "twice")


def test_blank_skills_guide_nothing():
    assert route(played(1), Skills("", " ", {0: ""}), "additive") == [()]


def test_unknown_mode():
    with pytest.raises(ValueError, match="critical-first"):
        route(played(1), SKILLS, "critical")


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
