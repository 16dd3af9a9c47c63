"""skills.py: what a model is asked, and what comes of its answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Skills, Step, Trajectory
from skills import analysis_prompt, write_skills

GOOD = '{"episode_summary": "It won.", "episode_skill": "Look first.", "step_skills": {"0": "Go.", "2": "Take it."}}'
READ = Skills("It won.", "Look first.", {0: "Go.", 2: "Take it."})


def trajectory(success=True, observations=("a shelf", "a drawer", "a lamp"), task="put a pen on the desk"):
    steps = [
        Step(prompt=(o,), observation=o, context=[1], response=[2], text="", action=f"act {t}", valid=True)
        for t, o in enumerate(observations)
    ]
    return Trajectory(task, 0, steps, success)


# --- the prompt ---


def test_prompt_shows_task_outcome_and_numbered_steps():
    prompt = analysis_prompt(trajectory(observations=("You see\n\n  a {shelf}.", "{0} {task} %s")), 5)
    assert "Task: put a pen on the desk\nOutcome: success\n" in prompt
    assert "\nstep 0: You see a {shelf}. -> act 0\nstep 1: {0} {task} %s -> act 1\n\n" in prompt
    assert "at most 2 critical steps" in prompt  # there are no more than two
    assert '{"episode_summary": "...", "episode_skill": "...", "step_skills": {"<step>": "..."}}' in prompt


def test_success_asks_for_a_workflow_and_failure_for_what_to_avoid():
    won, lost = (analysis_prompt(trajectory(success), 1) for success in (True, False))
    assert "workflow that made it succeed" in won and "warning signs" not in won
    assert "what to avoid: the mistake" in lost and "warning signs" in lost and "Outcome: failure" in lost
    assert "workflow" not in lost


def test_the_general_prompt_forbids_hindsight():
    prompt = analysis_prompt(trajectory(), 5)
    assert "Never state what only hindsight knows" in prompt and "known at that step" in prompt


def test_a_template_of_the_environment():
    template = "{outcome} {task} {{}} {max_step_skills}\n{steps}"
    prompt = analysis_prompt(trajectory(False, ("x",), task="find {it}"), 3, template)
    assert prompt == "failure find {it} {} 1\nstep 0: x -> act 0"


_line = st.text(max_size=12) | st.sampled_from(["{", "}", "{task}", "{{}}", "%s", "\n", "\ud800"])


@given(st.lists(_line, max_size=4), _line, st.booleans(), st.integers(0, 6))
def test_fuzz_whatever_an_episode_says_is_shown_as_it_is(observations, task, success, most):
    prompt = analysis_prompt(trajectory(success, observations, task), most)
    lines = "".join(f"step {t}: {' '.join([*o.split(), '->', 'act', str(t)])}\n" for t, o in enumerate(observations))
    assert f"\nTask: {task}\nOutcome: {'success' if success else 'failure'}\n" in prompt
    assert f"each as observation -> action:\n{lines or chr(10)}\nWrite three things" in prompt
    assert f"at most {min(most, len(observations))} critical steps" in prompt


_parts = [
    "{",
    "}",
    "{{",
    "}}",
    "{task}",
    "{steps}",
    "{outcome}",
    "{focus}",
    "{max_step_skills}",
    "{task",
    ":",
    "!",
    ".",
]
_parts += [
    "!r",
    "[",
    "]",
    "0",
    "x",
    "task",
    '{"a": "b"}',
    "{0}",
    "{}",
    "{task[x]}",
    "{max_step_skills[0]}",
    ":>9",
    "\n",
]


@given(st.lists(st.sampled_from(_parts) | st.text(max_size=3), max_size=12).map("".join))
def test_fuzz_any_template_is_filled_or_refused_with_its_fields(template):
    try:
        assert isinstance(analysis_prompt(trajectory(), 3, template), str)
    except ValueError as error:
        assert str(error).startswith("bad analysis template") and "focus" in str(error)


@pytest.mark.parametrize("template", ["{tusk}", "{0}", "{", "{task.nothing}", "{task[x]}", '{"a": "b"} {task}'])
def test_a_bad_template_names_the_fields(template):
    with pytest.raises(ValueError, match="task, outcome, steps, max_step_skills, focus"):
        analysis_prompt(trajectory(), 3, template)


# --- asking, and asking again ---


class Script:
    """A writer that answers from a list of batches and remembers what it was asked."""

    def __init__(self, *batches):
        self.batches, self.asked = list(batches), []

    def __call__(self, prompts):
        self.asked.append(prompts)
        return self.batches.pop(0)


def test_one_batch_one_batched_retry_and_hand_computed_metrics():
    # trajectory        0: parsed   1: parsed on retry   2: never   3: too long   4: too long on retry
    script = Script([GOOD, "no idea", '{"episode_skill": 1}', None, "hm"], ['{"episode_skill": "B"}', "x" * 5000, None])
    trajectories = [trajectory(task=f"task {i}") for i in range(5)]
    written, metrics = write_skills(trajectories, script, max_step_skills=5, template=None)
    assert written == [READ, Skills("", "B", {}), None, None, None]
    assert metrics == {
        "skills/parse_rate": 2 / 5,
        "skills/first_parse_rate": 1 / 5,
        "skills/retried": 3,
        "skills/failed": 2,
        "skills/too_long": 1,
        "skills/step_skills": (2 + 0) / 2,
        "skills/step_keys_dropped": 0,
    }
    first, second = script.asked
    assert first == [analysis_prompt(t, 5) for t in trajectories]
    assert [prompt.startswith(first[i]) for prompt, i in zip(second, (1, 2, 4), strict=True)] == [True] * 3
    assert "no idea" in second[0] and "no JSON object with an episode_skill was found" in second[0]
    assert '{"episode_skill": 1}' in second[1] and "empty or not a text" in second[1]


def test_no_retry_where_all_parse_and_long_answers_are_clipped():
    script = Script([GOOD])
    _, metrics = write_skills([trajectory()], script, max_step_skills=1, template="{task}")
    assert script.asked == [["put a pen on the desk"]]
    assert metrics["skills/parse_rate"] == metrics["skills/step_skills"] == 1 and metrics["skills/retried"] == 0

    script = Script(["x" * 5000], [GOOD])
    write_skills([trajectory()], script, max_step_skills=1, template=None)
    assert "x" * 1000 + " [...]" in script.asked[1][0] and "x" * 1001 not in script.asked[1][0]

    script = Script(["x" * 1000], [GOOD])
    write_skills([trajectory()], script, max_step_skills=1, template=None)
    assert "x" * 1000 in script.asked[1][0] and "[...]" not in script.asked[1][0]


def test_nothing_to_write():
    written, metrics = write_skills([], Script(), max_step_skills=5, template=None)
    assert written == [] and set(metrics.values()) == {0}


def test_a_writer_that_loses_answers_or_dies_is_an_error():
    with pytest.raises(ValueError):
        write_skills([trajectory(), trajectory()], Script([GOOD]), max_step_skills=5, template=None)

    def dead(prompts):
        raise RuntimeError("down")

    with pytest.raises(RuntimeError, match="down"):
        write_skills([trajectory()], dead, max_step_skills=5, template=None)


def test_step_keys_that_name_no_step_are_counted():
    _, metrics = write_skills([trajectory()], Script([GOOD.replace('"2"', '"9"')]), max_step_skills=5, template=None)
    assert metrics["skills/step_keys_dropped"] == 1
