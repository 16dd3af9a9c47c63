"""Critical-first routing: which skill guides which step, and where its text goes. Pure Python.

Paper: "Critical-first skill routing"; authors' release: opid/prompting.py, select_skill_teacher_sources (whose
"step_priority" is `critical-first` here). To try an idea of your own, write one more rule below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from data import Guidance, Level, Prompt, Skills, Slot

LEVELS: tuple[Level, ...] = ("episode", "step")
RULES: dict[str, Callable[..., tuple[Guidance, ...]]] = {}  # --routing -> its rule


def rule(name: str):
    """Makes a function the rule `name` of --routing. It is called once per step with `episode` and `step`, each a tuple
    that holds the skill of that level or is empty, and returns the skills that guide the step. A rule that names them
    among its parameters also gets `success` (the trajectory's outcome) and `logprobs` (log pi_old of each token of the
    step's response)."""

    def add(function):
        RULES[name] = function
        return function

    return add


@rule("critical-first")
def critical_first(episode, step):
    """The step skill where the step is a critical one, else the episode skill."""
    return step or episode


@rule("additive")
def additive(episode, step):
    """Both, each scored in a context of its own."""
    return episode + step


@rule("episode")
def episode_only(episode, step):
    return episode


@rule("step")
def step_only(episode, step):
    return step


@rule("none")
def nothing(episode, step):
    return ()


def asks_for(mode: str, name: str) -> bool:
    """Whether a rule has a parameter of that name. Raises ValueError for an unknown rule."""
    if mode not in RULES:
        raise ValueError(f"unknown routing mode {mode!r}; known: {', '.join(RULES)}")
    return name in inspect.signature(RULES[mode]).parameters


def route(
    skills: Skills | None,
    num_steps: int,
    mode: str,
    *,
    levels: tuple[Level, ...] = LEVELS,
    success: bool | None = None,
    logprobs: list[list[float]] | None = None,  # of each step
) -> list[tuple[Guidance, ...]]:
    """The guidance of each of `num_steps` steps, by the rule `mode`: nothing, one skill, or several.

    Skills of a level that is not among `levels` are taken for absent: where lambda_step is 0, a critical step is guided
    by the episode skill, as in the authors' release. `skills=None` (nothing could be parsed) guides no step. Raises
    ValueError for an unknown rule, and for one that gives a step two skills of one level.
    """
    told = {"success": [success] * num_steps, "logprobs": logprobs or [None] * num_steps}
    told = {name: values for name, values in told.items() if asks_for(mode, name)}
    if skills is None:
        return [()] * num_steps
    routes = []
    for t in range(num_steps):
        texts = {"episode": skills.episode, "step": skills.steps.get(t, "")}
        found = {level: (Guidance(level, texts[level]),) for level in levels if texts[level].strip()}
        asked = {name: values[t] for name, values in told.items()}
        guidances = RULES[mode](found.get("episode", ()), found.get("step", ()), **asked)
        if len({guidance.level for guidance in guidances}) < len(guidances):
            raise ValueError(f"routing {mode!r} gives step {t} two skills of one level: {guidances}")
        routes.append(guidances)
    return routes


def fill(prompt: Prompt, *guidances: Guidance) -> str:
    """The user message with each of `guidances` in the slot of its level; every other slot stays empty.

    Raises ValueError where the prompt has no slot for it (a skill that is silently left out would turn OPID into GRPO),
    and for two of one level.
    """
    slots = [piece.level for piece in prompt if isinstance(piece, Slot)]
    texts = {guidance.level: guidance.text for guidance in guidances}
    if len(texts) < len(guidances):
        raise ValueError(f"two skills of one level for one prompt: {guidances}")
    if missing := texts.keys() - slots:
        raise ValueError(f"this prompt has no {missing.pop()} slot (it has: {slots or 'none'})")

    def text(piece: str | Slot) -> str:
        if isinstance(piece, str):
            return piece
        return piece.template.replace("{text}", texts[piece.level]) if piece.level in texts else ""

    return "".join(text(piece) for piece in prompt)


def guided_messages(prompts: list[Prompt], guidance: Guidance | None, style: str) -> list[str]:
    """The user messages that lead up to (and include) the last of `prompts`, with one skill in place.

    `prompts` are those of steps 0..t of one trajectory. "window": one message, the last prompt, which holds both slots.
    "chat": all of them; the episode skill sits in the opening message, right after the task, the step skill in the last
    message, right before the turn that it guides. Nothing else changes.
    """
    shown = () if guidance is None else (guidance,)
    if style == "window":
        return [fill(prompts[-1], *shown)]
    target = 0 if guidance is not None and guidance.level == "episode" else len(prompts) - 1
    return [fill(prompt, *(shown if t == target else ())) for t, prompt in enumerate(prompts)]
