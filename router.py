"""Critical-first routing: which skill guides which step, and where its text goes. Pure Python.

Paper: "Critical-first skill routing"; authors' release: opid/prompting.py, select_skill_teacher_sources (whose
"step_priority" is `critical-first` here). To try a routing idea of your own, add a mode to `route`.
"""

from __future__ import annotations

import random

from data import Guidance, Prompt, Skills, Slot

MODES = ("critical-first", "additive", "episode", "step", "none")


def route(skills: Skills | None, num_steps: int, mode: str) -> list[tuple[Guidance, ...]]:
    """The guidance of each of `num_steps` steps: nothing, one skill, or (additive) the episode skill then the step's.

    critical-first  the step skill where one exists, else the episode skill
    additive        both, each scored in a context of its own
    episode, step   one level only
    none            no guidance

    `skills=None` (nothing could be parsed) guides no step. Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown routing mode {mode!r}; known: {', '.join(MODES)}")
    if skills is None:
        return [()] * num_steps
    routes = []
    for t in range(num_steps):
        episode = (Guidance("episode", skills.episode),) if skills.episode.strip() else ()
        step = (Guidance("step", skills.steps[t]),) if skills.steps.get(t, "").strip() else ()
        routes.append(
            {
                "critical-first": step or episode,
                "additive": episode + step,
                "episode": episode,
                "step": step,
                "none": (),
            }[mode]
        )
    return routes


def shuffle_skills(skills: list[Skills | None], groups: list[int], rng: random.Random) -> list[Skills | None]:
    """Each trajectory gets the skills of one of another task: the control that tells a skill's content from the mere
    change of context. Every trajectory's skills are used once; those without skills count as skills, too.

    `groups`: the task of each trajectory. Raises ValueError where one task has more than half of all trajectories.
    """
    sizes = {group: groups.count(group) for group in groups}
    largest = max(sizes.values())
    if 2 * largest > len(groups):
        raise ValueError("a task has more than half of a process's trajectories: skills cannot all go to other tasks")
    tasks, order = rng.sample(sorted(sizes), len(sizes)), rng.sample(range(len(groups)), len(groups))
    order.sort(key=lambda i: tasks.index(groups[i]))
    # Tasks lie in blocks, so that whatever stands one largest block further on, around the end too, is of another one.
    taken = [None] * len(groups)
    for position, i in enumerate(order):
        taken[i] = skills[order[(position + largest) % len(order)]]
    return taken


def fill(prompt: Prompt, *guidances: Guidance) -> str:
    """The user message with each of `guidances` in the slot of its level; every other slot stays empty.

    Raises ValueError where the prompt has no slot for it: a skill that is silently left out would turn OPID into GRPO.
    """
    slots = [piece.level for piece in prompt if isinstance(piece, Slot)]
    texts = {guidance.level: guidance.text for guidance in guidances}
    if missing := texts.keys() - slots:
        raise ValueError(f"this prompt has no {missing.pop()} slot (it has: {slots or 'none'})")

    def text(piece: str | Slot) -> str:
        if isinstance(piece, str):
            return piece
        return piece.template.format(text=texts[piece.level]) if piece.level in texts else ""

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
