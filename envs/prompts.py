"""What the prompts of all environments share: the authors' skill slots, and the compact style of small models."""

from __future__ import annotations

from data import Prompt, Slot

EPISODE_SLOT = Slot(
    "episode",
    "\n**Episode-Level Skill**\nRefer to this episode-level skill when deciding what action to take in the current "
    "episode:\n[{text}]\n\n",
)
STEP_SLOT = Slot("step", "**Critical-Step Skill**\nUse this current-step skill for this decision only:\n[{text}]\n\n")

COMPACT_EPISODE_SLOT, COMPACT_STEP_SLOT = Slot("episode", " skill {text}"), Slot("step", " hint {text}")
COMPACT_ANALYSIS = "task {task} outcome {outcome} {steps} write skills"


def past_steps(history: list[tuple[str, str]], limit: int) -> str:
    """The authors' words for the last `limit` of `history`, up to where the current observation comes."""
    recent = history[max(0, len(history) - limit) :]
    first = len(history) - len(recent) + 1
    shown = "\n".join(
        f"[Observation {i}: '{seen}', Action {i}: '{action}']" for i, (seen, action) in enumerate(recent, first)
    )
    return (
        f"Prior to this step, you have already taken {len(history)} step(s). Below are the most recent "
        f"{len(recent)} observations and the corresponding actions you took: {shown}\n"
        f"You are now at step {len(history) + 1} and your current observation is: "
    )


def compact_prompt(style: str, task: str, history: list[tuple[str, str]], observation: str, limit: int) -> Prompt:
    """A turn in few words, with the last `limit` of `history` in its opening message."""
    if style == "chat" and history:
        return (observation, COMPACT_STEP_SLOT)
    recent = history[max(0, len(history) - limit) :]
    past = "".join(f" before {seen} did {action}" for seen, action in recent)
    return (f"task {task}", COMPACT_EPISODE_SLOT, f"{past} now {observation}", COMPACT_STEP_SLOT)
