"""A model's answer -> the skills in it, however small the model that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress

import json_repair

from data import Skills

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
