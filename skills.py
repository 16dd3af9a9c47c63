"""Hindsight skills: ask a model what a finished trajectory teaches, and read its answer.

    Trajectory -> analysis_prompt -> write (a batch of prompts -> a batch of answers) -> parse_skills -> Skills | None

Who writes is the business of writers.py. Paper: "skill extraction"; authors' release: opid/analysis.py
(OPIDEpisodeAnalyzer), which asks an external LLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

import json_repair

from data import Skills, Trajectory

Writer = Callable[[list[str]], list[str | None]]  # prompts -> answers in order; None: longer than the writer can read
ConversationWriter = Callable[[list[tuple[int, str]]], list[str | None]]  # (which trajectory, request) -> answers

# Why the rules at its end: the re-scored policy sees a skill, but the trained one never does. A skill that states what
# only hindsight knows (where the object lay in this very game) teaches it to act on facts that it cannot see, and at
# larger skill weights training collapses to zero, however correct such skills are. General skills can be learned.
_REQUEST = """\
Write three things:
1. episode_summary: one or two sentences on what happened.
2. episode_skill: {focus}
3. step_skills: for at most {max_step_skills} critical steps, one short imperative sentence each: what to do there.

Rules for skills:
- Be general: the order of work, what to check, what to avoid, where such things are usually found.
- Never state what only hindsight knows, such as where the object turned out to be: the reader cannot see that.
- A step skill may use only what could be known at that step: the task and the observations up to it.

Answer with one JSON object and nothing else, its step_skills keyed by step number:
{{"episode_summary": "...", "episode_skill": "...", "step_skills": {{"<step>": "..."}}}}"""

GENERAL_TEMPLATE = (
    """\
Below is one finished episode of an agent. Write down what it teaches for other attempts at tasks of this kind.

Task: {task}
Outcome: {outcome}
Steps, numbered from 0, each as observation -> action:
{steps}

"""
    + _REQUEST
)
CONVERSATION_TEMPLATE = (
    """\
The episode is over. Write down what it teaches for other attempts at tasks of this kind.

Task: {task}
Outcome: {outcome}
Steps: your replies above, numbered from 0 in their order.

"""
    + _REQUEST
)

_SUCCESS_FOCUS = "the workflow that made it succeed: in which order to work, and what to check before moving on."
_FAILURE_FOCUS = "what to avoid: the mistake that made it fail, its warning signs, and what to do when they appear."

_MAX_CHARS = 30_000  # of an answer that are read at all; answers are a few hundred characters long
_MAX_REPAIR_CHARS = 6_000  # json-repair takes quadratic time on nested garbage: about a second for this many

_NO_SKILL = re.compile(r"\W*")  # blank, or a placeholder such as "..." copied from the prompt
_STEP_KEY = re.compile(r"\s*(?:step)?[\s_]*([0-9]{1,6})\s*(?::|\Z)", re.IGNORECASE)  # "3", "step 3", "Step_3: look"
_BETWEEN_OBJECTS = re.compile(r'(?<=\})(?!\s*,)[^{}"]*(?=\{)')  # what may stand between two objects: } here {


def analysis_prompt(
    trajectory: Trajectory, max_step_skills: int, template: str | None = None, *, conversation: bool = False
) -> str:
    """The prompt that asks for one trajectory's skills (authors': _build_episode_analysis_prompt).

    `template` is a str.format string with any of the fields {task} {outcome} {steps} {max_step_skills} and {focus}
    (what to write for this outcome: a workflow or what to avoid); None takes the general one. Raises ValueError for
    a template with other fields. Values are not formatted again, so braces in an observation stay as they are.
    `conversation`: the reader has just seen the steps, so {steps} is empty, and the general template another one.
    """
    lines = [" ".join(f"step {t}: {s.observation} -> {s.action}".split()) for t, s in enumerate(trajectory.steps)]
    fields = {
        "task": trajectory.task,
        "outcome": "success" if trajectory.success else "failure",
        "steps": "" if conversation else "\n".join(lines),
        "max_step_skills": min(max_step_skills, len(lines)),
        "focus": _SUCCESS_FOCUS if trajectory.success else _FAILURE_FOCUS,
    }
    try:
        return (template or (CONVERSATION_TEMPLATE if conversation else GENERAL_TEMPLATE)).format(**fields)
    except (LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"bad analysis template: {error!r}; fields: {', '.join(fields)}; double the rest") from error


def parse_skills(text: str, num_steps: int, max_step_skills: int) -> Skills:
    """A model's answer -> its skills: the first object with a non-empty `episode_skill`, first `max_step_skills` steps.

    Accepts what small models print: code fences, prose, trailing commas, single quotes, answers cut off, several
    objects, steps as {"3": ...}, {"step 3": ...}, [{"step": 3, "skill": ...}] or ["Step 3: ..."]. Whatever is not
    plainly a skill is dropped: blank or non-text values, steps out of range (0-based), lists that name no steps.
    Raises ValueError, worded for the retry prompt, where no episode skill can be found; never anything else.
    """
    problem = "no JSON object with an episode_skill was found"
    for fields in map(_by_name, _objects(text)):
        if episode := _skill_text(fields.get("episode_skill")):
            steps = sorted(_step_skills(fields.get("step_skills"), num_steps).items())
            return Skills(_skill_text(fields.get("episode_summary")), episode, dict(steps[: max(0, max_step_skills)]))
        if "episode_skill" in fields:
            problem = "the episode_skill is empty or not a text"
    raise ValueError(problem)


def _by_name(fields: dict) -> dict:
    return {"_".join(str(key).lower().split()): value for key, value in fields.items()}


def _objects(text: str) -> Iterator[dict]:
    """Every JSON object in `text`: what follows a <think> block first, well-formed objects before repaired ones."""
    decoder = json.JSONDecoder(strict=False)  # not strict: raw line breaks inside strings pass
    for part in dict.fromkeys((text.rpartition("</think>")[2], text)):
        part = part[part.find("{") :][:_MAX_CHARS]
        start = part.find("{")
        while start >= 0:
            try:
                value, end = decoder.raw_decode(part, start)
                yield value
            except (ValueError, RecursionError):
                end = start + 1
            start = part.find("{", end)
        if "skill" in part.lower():  # else the slow path is pointless
            yield from _repaired_objects(part[:_MAX_REPAIR_CHARS])


def _repaired_objects(text: str) -> Iterator[dict]:
    # The whole first. It takes a later object for a correction of an earlier one, so then each object by itself.
    for piece in dict.fromkeys((text, *_BETWEEN_OBJECTS.split(text))):
        value = None
        with suppress(Exception):  # garbage that trips the library up (too deep, say) is an answer without skills
            value = json_repair.loads(piece, skip_json_loads=True)
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict))


def _skill_text(value: object) -> str:
    """`value` stripped, or "" where it is no text or says nothing. A number or an object never becomes a skill."""
    if not isinstance(value, str) or _NO_SKILL.fullmatch(value):
        return ""
    return value.encode("utf-8", "replace").decode("utf-8").strip()  # lone surrogates would crash a tokenizer


def _step_skills(raw: object, num_steps: int) -> dict[int, str]:
    pairs: list[tuple] = []  # (step key, skill) of the entries that say which step they are for
    for item in raw if isinstance(raw, list) else [raw]:
        if isinstance(item, str) and (match := _STEP_KEY.match(item)):
            pairs.append((match[1], item[match.end() :]))
        elif isinstance(item, dict):
            item = _by_name(item)
            pairs += [(item["step"], item.get("skill"))] if "step" in item else item.items()
    found = ((_STEP_KEY.match(str(key)), _skill_text(skill)) for key, skill in pairs if isinstance(key, str | int))
    return {int(key[1]): skill for key, skill in found if key and skill and int(key[1]) < num_steps}


def write_skills(
    trajectories: list[Trajectory],
    write: Writer | ConversationWriter,
    *,
    max_step_skills: int,
    template: str | None = None,
    conversation: bool = False,
) -> tuple[list[Skills | None], dict[str, float]]:
    """Skills of each trajectory, None where there are none, and metrics. Answers that do not parse get one retry.

    `conversation`: `write` is a ConversationWriter, which is told to whose conversation a request belongs.

    skills/parse_rate, skills/first_parse_rate   share of all trajectories that have skills, after and before the retry
    skills/retried, skills/failed                answers asked for again, and trajectories given up after that
    skills/too_long                              prompts that did not fit the writer's context (not retried)
    skills/step_skills                           step skills per trajectory that has skills

    Raises what `write` raises: a writer that is down must not look like a policy that has nothing to say.
    """
    skills: list[Skills | None] = [None] * len(trajectories)

    def read(i: int, answer: str) -> ValueError | None:
        try:
            skills[i] = parse_skills(answer, len(trajectories[i].steps), max_step_skills)
        except ValueError as error:
            return error
        return None

    def ask(asked: dict[int, str]) -> list[str | None]:
        return write(list(asked.items()) if conversation else list(asked.values())) if asked else []

    prompts = [analysis_prompt(t, max_step_skills, template, conversation=conversation) for t in trajectories]
    answers = ask(dict(enumerate(prompts)))
    retries: dict[int, str] = {}  # trajectory -> its second prompt
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer is not None and (error := read(i, answer)):
            retries[i] = _retry_prompt(prompt, answer, error)
    for i, answer in zip(retries, ask(retries), strict=True):
        read(i, answer or "")  # None: the longer second prompt no longer fits
    parsed = [s for s in skills if s is not None]
    total, too_long = max(1, len(prompts)), sum(answer is None for answer in answers)
    return skills, {
        "skills/parse_rate": len(parsed) / total,
        "skills/first_parse_rate": (len(prompts) - too_long - len(retries)) / total,
        "skills/retried": len(retries),
        "skills/failed": len(prompts) - too_long - len(parsed),
        "skills/too_long": too_long,
        "skills/step_skills": sum(len(s.steps) for s in parsed) / max(1, len(parsed)),
    }


def _retry_prompt(prompt: str, answer: str, error: ValueError) -> str:
    shown = answer if len(answer) <= 1000 else answer[:1000] + " [...]"  # the prompt must still fit
    return f"{prompt}\n\nEarlier answer:\n{shown}\n\nIt cannot be used: {error}. Answer again, with correct JSON only."


def lessons(trajectories: list[Trajectory], skills: list[Skills | None]) -> list[tuple[bool, str, str]]:
    """What is worth remembering for other tasks of a kind: (success, task type, episode skill)."""
    pairs = zip(trajectories, skills, strict=True)
    return [(t.success, t.task_type, s.episode) for t, s in pairs if s is not None]


def remember(known: dict[str, str], new: list[tuple[bool, str, str]]) -> dict[str, str]:
    """Task type -> its newest episode skill; of one iteration's `lessons`, the last success before any failure."""
    return known | {task_type: text for _, task_type, text in sorted(new, key=lambda lesson: lesson[0])}
