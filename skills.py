"""Hindsight skills: ask a model what a finished trajectory teaches, and read its answer.

    Trajectory -> analysis_prompt -> write (a batch of prompts -> a batch of answers) -> parse_skills -> Skills | None

Who writes is the business of lm/writers.py. Paper: "skill extraction"; authors' release: opid/analysis.py
(OPIDEpisodeAnalyzer), which asks an external LLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress

import json_repair

from data import Skills, Trajectory
from lm.writers import Writer

# Why the rules at its end: the re-scored policy sees a skill, but the trained one never does. A skill that states what
# only hindsight knows (where the object lay in this very game) teaches it to act on facts that it cannot see, and at
# larger skill weights training collapses to zero, however correct such skills are. General skills can be learned.
GENERAL_TEMPLATE = """\
Below is one finished episode of an agent. Write down what it teaches for other attempts at tasks of this kind.

Task: {task}
Outcome: {outcome}
Steps, numbered from 0, each as observation -> action:
{steps}

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

_SUCCESS_FOCUS = "the workflow that made it succeed: in which order to work, and what to check before moving on."
_FAILURE_FOCUS = "what to avoid: the mistake that made it fail, its warning signs, and what to do when they appear."

_MAX_CHARS = 30_000  # of an answer that are read at all; answers are a few hundred characters long
_MAX_REPAIR_CHARS = 6_000  # json-repair takes quadratic time on nested garbage: about a second for this many

_NO_SKILL = re.compile(r"\W*")  # blank, or a placeholder such as "..." copied from the prompt
# "3", "step 3", "Step_3: look", "<3>", "#3", "step-3", "Step 3 (critical)", "**Step 3:** look", "3. look"
_STEP_KEY = re.compile(
    r"[\s*<#(\[]*(?:step[\s_<#*-]*)?([0-9]{1,6})[>)\]*]*[\s_]*(?:\([^()]*\)\s*)?"
    r"(?:\.?\s*\Z|:[\s*]*|[.-][\s_](?![\s_]*[0-9]))",  # "1.5" and "2 - 3" are no steps
    re.IGNORECASE,
)
_STEP_NAMES = ("step", "step_index", "step_number", "step_idx", "step_id", "index")
_SKILL_NAMES = ("skill", "step_skill", "text")
_BETWEEN_OBJECTS = re.compile(r'(?<=\})(?!\s*,)[^{}"]*(?=\{)')  # what may stand between two objects: } here {


def analysis_prompt(trajectory: Trajectory, max_step_skills: int, template: str | None = None) -> str:
    """The prompt that asks for one trajectory's skills (authors': _build_episode_analysis_prompt).

    `template` is a str.format string with any of the fields {task} {outcome} {steps} {max_step_skills} and {focus}
    (what to write for this outcome: a workflow or what to avoid); None takes the general one. Raises ValueError for
    a template with other fields. Values are not formatted again, so braces in an observation stay as they are.
    """
    lines = [" ".join(f"step {t}: {s.observation} -> {s.action}".split()) for t, s in enumerate(trajectory.steps)]
    fields = {
        "task": trajectory.task,
        "outcome": "success" if trajectory.success else "failure",
        "steps": "\n".join(lines),
        "max_step_skills": min(max_step_skills, len(lines)),
        "focus": _SUCCESS_FOCUS if trajectory.success else _FAILURE_FOCUS,
    }
    try:
        return (template or GENERAL_TEMPLATE).format(**fields)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"bad analysis template: {error!r}; fields: {', '.join(fields)}; double the rest") from error


def parse_skills(text: str, num_steps: int, max_step_skills: int) -> Skills:
    """A model's answer -> its skills: the first object with a non-empty `episode_skill`, and its first
    `max_step_skills` steps in the writer's order, as in the authors' release.

    Accepts what small models print: code fences, prose, trailing commas, single quotes, answers cut off, several
    objects, steps as {"3": ...}, {"step 3": ...}, {"<3>": {"skill": ...}}, [{"step_index": 3, "skill": ...}] or
    ["Step 3: ..."]. Whatever is not plainly a skill is dropped and, unless it is blank, counted in `dropped`: what
    names no step of the episode (0-based), or has no text. Raises ValueError, worded for the retry prompt, where no
    episode skill can be found; never anything else.
    """
    problem = "no JSON object with an episode_skill was found"
    for fields in map(_by_name, _objects(text)):
        if episode := _skill_text(fields.get("episode_skill")):
            steps, dropped = _step_skills(fields.get("step_skills"), num_steps)
            first = dict(list(steps.items())[: max(0, max_step_skills)])
            return Skills(_skill_text(fields.get("episode_summary")), episode, first, dropped)
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
                yield from (inner for inner in value.values() if isinstance(inner, dict))  # {"skills": {...}}
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


def _step_skills(raw: object, num_steps: int) -> tuple[dict[int, str], int]:
    """-> (step -> skill, how many entries say something that is not the skill of a step)."""
    pairs: list[tuple] = []  # (step key, skill)
    for item in raw if isinstance(raw, list) else [raw]:
        if isinstance(item, dict):
            item = _by_name(item)
            name = next((name for name in _STEP_NAMES if name in item), None)
            pairs += item.items() if name is None else [(item.pop(name), item)]
        else:
            match = _STEP_KEY.match(item) if isinstance(item, str) else None
            pairs.append((match[1], item[match.end() :]) if match else (None, item))
    steps, dropped = {}, 0
    for key, value in pairs:
        if isinstance(value, dict):
            fields = _by_name(value)
            value = next((fields[name] for name in _SKILL_NAMES if name in fields), value)
        match = _STEP_KEY.match(str(key)) if isinstance(key, str | int) else None
        skill = _skill_text(value)
        if skill and match and int(match[1]) < num_steps:
            steps[int(match[1])] = skill
        elif skill or (value and not isinstance(value, str)):
            dropped += 1
    return steps, dropped


def write_skills(
    trajectories: list[Trajectory], write: Writer, *, max_step_skills: int, template: str | None
) -> tuple[list[Skills | None], dict[str, float]]:
    """Skills of each trajectory, None where there are none, and metrics. Answers that do not parse get one retry.

    skills/parse_rate, skills/first_parse_rate   share of all trajectories that have skills, after and before the retry
    skills/retried, skills/failed                answers asked for again, and trajectories given up after that
    skills/too_long                              prompts that the writer could not read or refused (not retried)
    skills/step_skills                           step skills per trajectory that has skills
    skills/step_keys_dropped                     step skills that name no step of their episode or are no text, in all

    Raises what `write` raises: a writer that is down must not look like a policy that has nothing to say.
    """
    skills: list[Skills | None] = [None] * len(trajectories)

    def read(i: int, answer: str) -> ValueError | None:
        try:
            skills[i] = parse_skills(answer, len(trajectories[i].steps), max_step_skills)
        except ValueError as error:
            return error
        return None

    prompts = [analysis_prompt(trajectory, max_step_skills, template) for trajectory in trajectories]
    answers = write(prompts) if prompts else []
    retries: dict[int, str] = {}  # trajectory -> its second prompt
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer is not None and (error := read(i, answer)):
            retries[i] = _retry_prompt(prompt, answer, error)
    for i, answer in zip(retries, write(list(retries.values())) if retries else [], strict=True):
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
        "skills/step_keys_dropped": sum(s.dropped for s in parsed),
    }


def _retry_prompt(prompt: str, answer: str, error: ValueError) -> str:
    return f"{asked_before(prompt, answer)}\n\nIt cannot be used: {error}. Answer again, with correct JSON only."


def asked_before(prompt: str, answer: str) -> str:
    """What a second prompt begins with."""
    shown = answer if len(answer) <= 1000 else answer[:1000] + " [...]"  # the prompt must still fit
    return f"{prompt}\n\nEarlier answer:\n{shown}"
