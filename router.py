"""Critical-first routing: which skill guides which step, and where its text goes. Pure Python.

Paper: "Critical-first skill routing"; authors' release: opid/prompting.py, select_skill_teacher_sources (whose
"step_priority" is `critical-first` here). To try an idea of your own, write one more rule below.
"""

from __future__ import annotations

from collections.abc import Callable

from data import Guidance, Level, Prompt, Route, Skills, Slot, Trajectory

LEVELS: tuple[Level, ...] = ("episode", "step")

# --routing -> its rule, called once a step. `episode` and `step` are tuples that hold the skill of that level, or are
# empty; the rule returns those that guide step t. It may look at the trajectory: its outcome, its steps[t].logprobs.
RULES: dict[str, Callable[..., tuple[Guidance, ...]]] = {
    "critical-first": lambda trajectory, t, episode, step: step or episode,  # a critical step has a skill of its own
    "additive": lambda trajectory, t, episode, step: episode + step,  # both, each scored in a context of its own
    "episode": lambda trajectory, t, episode, step: episode,
    "step": lambda trajectory, t, episode, step: step,
    "none": lambda trajectory, t, episode, step: (),
}


def route(trajectory: Trajectory, skills: Skills | None, mode: str, levels: tuple[Level, ...] = LEVELS) -> Route:
    """The guidance of each step, by the rule `mode`: nothing, one skill, or one of each level.

    Skills of a level that is not among `levels` are taken for absent: where lambda_step is 0, a critical step is guided
    by the episode skill, as in the authors' release. `skills=None` (nothing could be parsed) guides no step. Raises
    ValueError for an unknown rule, and for one that gives a step two skills of one level.
    """
    if mode not in RULES:
        raise ValueError(f"unknown routing mode {mode!r}; known: {', '.join(RULES)}")
    if skills is None:
        return [()] * len(trajectory.steps)
    guided = []
    for t in range(len(trajectory.steps)):
        texts = {"episode": skills.episode, "step": skills.steps.get(t, "")}
        found = {level: (Guidance(level, texts[level]),) for level in levels if texts[level].strip()}
        guidances = RULES[mode](trajectory, t, found.get("episode", ()), found.get("step", ()))
        if len({guidance.level for guidance in guidances}) < len(guidances):
            raise ValueError(f"routing {mode!r} gives step {t} two skills of one level: {guidances}")
        guided.append(guidances)
    return guided


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
