"""lm/answers.py: what is read from a model's answer, however sloppy, and what is refused."""

import json
import time
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import Skills
from lm.answers import parse_skills

GOOD = '{"episode_summary": "It won.", "episode_skill": "Look first.", "step_skills": {"0": "Go.", "2": "Take it."}}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"Sure! Here's the {{JSON}} object you asked for:\n\n{GOOD}\n\nI hope it's helpful {{:",
        GOOD.replace("}", ",}"),  # trailing commas
        GOOD.replace('"', "'"),
        f"```json\n{GOOD.replace(chr(34), chr(39))}\n```\nDone.",
        GOOD[:-2],  # cut off after the last skill
        GOOD[:-3],  # cut off inside it
        GOOD.replace('"0"', "0").replace('"2"', "2"),
        GOOD.replace('"0"', '"step 0"').replace('"2"', '"Step 2:"'),
        GOOD.replace('"0"', '"Step_0"').replace('"2"', '" 2 "'),
        GOOD.replace('"episode_skill"', '" episode_skill "').replace('"step_skills"', '"Step Skills"'),
        GOOD.replace("Look first.", "\\n Look first.  ").replace("Go.", " Go."),
        GOOD.replace(" ", "\n"),
        f"[{GOOD}]",
        f'{{"skills": {GOOD}}}',
        f'{{"note": {{"about": "it"}}, "answer": {GOOD}}}',
        '{"episode_skill": "  "} ' + GOOD,
        '{"episode_skill": ""}\n' + GOOD.replace("}", ",}"),
        GOOD + '\n{"episode_summary": "", "episode_skill": "", "step_skills": {}}',
        GOOD.replace("}", ",}") + "\nOr, for {another}:\n" + '{"episode_summary": "", "episode_skill": "",}',
        # the form of the prompt copied, then filled in
        '{"episode_summary": "...", "episode_skill": "...", "step_skills": {"<step>": "..."}}\n' + GOOD,
        '<think>Maybe {"episode_skill": "a draft"}?</think>' + GOOD,
    ],
)
def test_sloppy_answers_are_read(text):
    read = parse_skills(text, num_steps=3, max_step_skills=5)
    words = [read.summary, read.episode, *read.steps.values()]
    assert [" ".join(w.split()).rstrip(".") for w in words] == ["It won", "Look first", "Go", "Take it"]
    assert list(read.steps) == [0, 2]


def test_a_quote_inside_a_skill_and_raw_line_breaks():
    assert parse_skills('{"episode_skill": "Say "open" first"}', 1, 1).episode == 'Say "open" first'
    assert parse_skills('{"episode_skill": "Look,\nthen go", "step_skills": null}', 1, 1).episode == "Look,\nthen go"


def test_of_several_objects_the_first_with_a_skill_is_taken():
    assert parse_skills('{"episode_skill": "A"} User: next\n{"episode_skill": "B"}', 1, 1).episode == "A"
    assert parse_skills("{'episode_skill': 'A',} User: next\n{'episode_skill': '',}", 1, 1).episode == "A"
    assert parse_skills("{'episode_skill': '',} User: next\n{'episode_skill': 'B',}", 1, 1).episode == "B"


@pytest.mark.parametrize(
    ("step_skills", "kept"),
    [
        ({"0": "a", "2": "b"}, {0: "a", 2: "b"}),
        ({"3": "a", "-1": "b", "99999999999": "c", "first": "d", "1.5": "e", "2": "f"}, {2: "f"}),  # out of range
        ({"2": "c", "0": "a", "1": "b"}, {2: "c", 0: "a"}),  # more than two: the first two
        ({"0": " ", "1": "...", "2": "c"}, {2: "c"}),  # blank ones take no place
        ({"0": 7, "1": {"why": "b"}, "2": ["c"]}, {}),  # never str(dict)
        ({"0": None, "1": True}, {}),
        ([{"step": 1, "skill": "b"}, {"step": "Step 0", "skill": "a"}], {0: "a", 1: "b"}),
        ([{"step": True, "skill": "a"}, {"step": 1.0, "skill": "b"}, {"step": [1], "skill": "c"}, {"step": 1}], {}),
        ([{"2": "c"}, {"step 0": "a"}], {0: "a", 2: "c"}),
        (["Step 2: look", "step 0:go", "take it", 5, None], {0: "go", 2: "look"}),
        ({"step": 2, "skill": "c"}, {2: "c"}),
        (["look", "go"], {}),  # a place in a list is not a step
        ([{"step": 2, "skill": "a"}, {"step": 2, "skill": "c"}], {2: "c"}),  # as JSON does: the last one counts
        ("look", {}),
        (None, {}),
        (3, {}),
    ],
)
def test_step_skills(step_skills, kept):
    text = json.dumps({"episode_skill": "Look.", "step_skills": step_skills})
    assert parse_skills(text, num_steps=3, max_step_skills=2) == Skills("", "Look.", kept)


def test_limits_of_none():
    assert parse_skills(GOOD, 0, 5).steps == {} == parse_skills(GOOD, 3, 0).steps


def test_a_summary_that_is_no_text_is_empty_and_lone_surrogates_are_replaced():
    text = '{"episode_summary": {"a": 1}, "episode_skill": "go \\ud83d on"}'
    assert parse_skills(text, 1, 1) == Skills("", "go ? on", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("I cannot help with that.", "no JSON object"),
        ('{"skill": "go"}', "no JSON object with an episode_skill"),
        ('{"episode_skill": ""}', "empty or not a text"),
        ('{"episode_skill": "..."}', "empty or not a text"),
        ('{"episode_skill": 5}', "empty or not a text"),
        ('{"episode_skill": {"text": "go"}}', "empty or not a text"),
        ('{"episode_skill": ["go"]}', "empty or not a text"),
        ("{'episode_skill': null,}", "empty or not a text"),
        ('"episode_skill"', "no JSON object"),
        ('{"episode_skill":' * 1000, "no JSON object"),  # too deep for the repair library
    ],
)
def test_no_skill_is_an_error_that_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_skills(text, 3, 5)


@pytest.mark.parametrize("key", ["", '"episode_skill'])
@pytest.mark.parametrize("unit", ["{", "[", '{"', "{'", '{"a":', '{"a" ', '{"a":[', '("', "\\", "x ", '{"a":1}', "}{"])
def test_long_garbage_is_refused_quickly(unit, key):
    start = time.perf_counter()
    with pytest.raises(ValueError):
        parse_skills("{" + key + unit * 200_000, 3, 5)
    assert time.perf_counter() - start < 100  # the worst takes about a second; unbounded, it would be hours


@pytest.mark.parametrize("around", ["{}", "<think>{}</think>", '{{"a": "{}"}}'])
@pytest.mark.parametrize(
    "unit", ["x", '{"episode_skill": "go"} ', "{", "</think>", "\x00\x1b", "\ud800", "\n- step 1: go"]
)
def test_an_answer_of_ten_megabytes_is_read_or_refused_in_seconds_and_little_memory(unit, around):
    text = around.format(unit * (10_000_000 // len(unit)))
    start = time.perf_counter()
    tracemalloc.start()
    with suppress(ValueError):
        skills = parse_skills(text, 3, 5)
        assert len(skills.episode) <= 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6 and time.perf_counter() - start < 60


_punctuation = ["{", "}", "[", "]", ":", ",", '"', "'", "\\", "\n", " ", "//", "/*", "```", "</think>"]
_words = ['"episode_skill"', "episode_skill", '"step_skills"', '"step"', '"skill"', '"0"', "3", "Step 1:", "go", GOOD]
_pieces = st.sampled_from([*_punctuation, *_words, "null", "1e999", "NaN", "\ud800"])
_answers = st.text(max_size=60) | st.lists(_pieces, max_size=40).map("".join)


def check(read, num_steps, max_step_skills):
    assert read.episode
    assert len(read.steps) <= max_step_skills
    assert all(type(t) is int and 0 <= t < num_steps for t in read.steps)
    for skill in (read.episode, read.summary, *read.steps.values()):
        assert skill == skill.strip()
        assert skill.encode() is not None  # a tokenizer can read it
    assert all(read.steps.values()) and type(read.dropped) is int and read.dropped >= 0


@given(_answers, st.integers(0, 4), st.integers(0, 3))
@example("{" * 5000 + "episode_skill", 3, 3)
@example("episode_skill" + '{"a":' * 5000, 3, 3)
@example('{"episode_skill": "a", "step_skills": [{"step": ' + "[" * 900 + "]" * 900 + ', "skill": "b"}]}', 3, 3)
def test_fuzz_any_text_gives_wellformed_skills_or_a_value_error(text, num_steps, max_step_skills):
    try:
        read = parse_skills(text, num_steps, max_step_skills)
    except ValueError as error:
        assert str(error)
        return
    check(read, num_steps, max_step_skills)


_keys = st.sampled_from(
    ["step", "step_index", "index", "skill", "text", "0", "<1>", "Step 2 (critical)", "9", "-1", ""]
)
_leaves = st.none() | st.booleans() | st.integers(-2, 10**7) | st.floats() | st.text(max_size=8) | _keys
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys | st.text(max_size=8), inner, max_size=4)
)


@given(_values, st.integers(0, 4), st.integers(0, 3), st.integers(0, 200), st.integers(0, 3))
def test_fuzz_any_step_skills_are_read_or_counted(value, num_steps, max_step_skills, place, cut):
    """Well-formed answers, and the same with a few characters lost."""
    text = json.dumps({"episode_skill": "look", "step_skills": value})
    read = parse_skills(text, num_steps, max_step_skills)
    check(read, num_steps, max_step_skills)
    assert read.episode == "look"
    entries = value if isinstance(value, list) else [value]
    most = sum(len(entry) if isinstance(entry, dict) else 1 for entry in entries)
    assert len(read.steps) + read.dropped <= most
    with suppress(ValueError):
        check(parse_skills(text[:place] + text[place + cut :], num_steps, max_step_skills), num_steps, max_step_skills)


_forms = ["%d", "step %d", "Step_%d", "STEP-%d", "<%d>", "<step %d>", "#%d", "Step #%d", "[%d]", "(%d)", "%d.", "%d)"]
_forms += ["Step %d:", "**Step %d**", "Step %d (critical)", " %d ", "step %d: the shelf", "Step %d - the shelf"]


@given(st.dictionaries(st.integers(0, 12), st.text("abc", min_size=1)), st.sampled_from(_forms), st.integers(0, 9))
def test_fuzz_every_form_of_a_step_key_is_read(steps, form, num_steps):
    answer = {"episode_skill": "look", "step_skills": {form % t: skill for t, skill in steps.items()}}
    read = parse_skills(json.dumps(answer), num_steps, 99)
    assert read.steps == {t: skill for t, skill in steps.items() if t < num_steps}
    assert list(read.steps) == [t for t in steps if t < num_steps]  # in the writer's order
    assert read.dropped == sum(t >= num_steps for t in steps)


_skill = st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: f"a{text}b")
_skills = st.builds(Skills, _skill | st.just(""), _skill, st.dictionaries(st.integers(0, 9), _skill, max_size=5))


@given(_skills, st.sampled_from(["%s", "```json\n%s\n```", "Sure, here's it:\n\n%s\n\nIs that {all}?"]), st.booleans())
def test_fuzz_round_trip(written, around, ascii_only):
    answer = {"episode_summary": written.summary, "episode_skill": written.episode, "step_skills": written.steps}
    text = around.replace("%s", json.dumps(answer, ensure_ascii=ascii_only))
    assert parse_skills(text, 10, 5) == written


def test_an_object_after_a_comma_in_a_broken_answer_is_read():
    assert parse_skills('{"a": 1}, {"episode_skill": "look"', 1, 5).episode == "look"


@pytest.mark.parametrize(
    "steps",
    [
        '{"<1>": "look"}',
        '{"#1": "look"}',
        '{"step-1": "look"}',
        '{"Step 1 (critical)": "look"}',
        '{"[1]": "look"}',
        '[{"step_index": 1, "skill": "look"}]',
        '[{"step": "<1>", "text": "look"}]',
        '[{"Step Number": 1, "why": "lost time", "Step Skill": "look"}]',
        '{"**Step 1**": "look"}',
        '{"Step 1.": "look"}',
        '{"Step 1: the shelf": "look"}',
        '{"Step 1 - the shelf": "look"}',
        '["**Step 1:** look"]',
        '["1. look"]',
        '{"1": {"skill": "look"}}',
        '["Step 1: look"]',
    ],
)
def test_step_keys_that_models_print(steps):
    skills = parse_skills(f'{{"episode_skill": "e", "step_skills": {steps}}}', 3, 5)
    assert skills.steps == {1: "look"}
    assert skills.dropped == 0


@pytest.mark.parametrize(
    ("steps", "dropped"),
    [
        ('{"1": {"why": "lost time"}, "2": ["look"], "0": 7}', 3),
        ('[{"skill": "look"}, {"step": true, "skill": "look"}, "look", 5]', 4),
        ('{"steps": [{"step": 1, "skill": "look"}]}', 1),
        ('["2 - 3 look", "1.5 look", "3 apples lie there"]', 3),
        ('"look"', 1),
        ('[{"step": 1}, {"step": 2, "skill": ""}, {"1": {"text": "..."}}, {"1": null}, [], null, ""]', 0),
        ("{}", 0),
        ("null", 0),
    ],
)
def test_what_says_something_but_is_no_skill_of_a_step_is_counted(steps, dropped):
    skills = parse_skills(f'{{"episode_skill": "e", "step_skills": {steps}}}', 4, 5)
    assert (skills.steps, skills.dropped) == ({}, dropped)


def test_step_keys_that_name_no_step_are_counted():
    steps = '{"<step>": "a", "7": "b", "-1": "c", "first": "d", "1.5": "e", "1": "look", "2": ""}'
    skills = parse_skills(f'{{"episode_skill": "e", "step_skills": {steps}}}', 3, 5)
    assert skills.steps == {1: "look"}
    assert skills.dropped == 5  # a blank skill is none


def test_the_writers_order_decides_which_steps_stay():
    text = '{"episode_skill": "e", "step_skills": {"2": "c", "0": "a", "1": "b"}}'
    assert list(parse_skills(text, 3, 2).steps) == [2, 0]
