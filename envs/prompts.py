"""What the prompts of all environments share: the authors' skill slots, and the compact style of small models."""

from __future__ import annotations

import re

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


def tagged_action(response: str, last: int) -> tuple[str, bool]:
    """As the authors parse (projection.py of ALFWorld and WebShop): the text between the first <action> and the first
    </action>, lower case; valid if a <think> block is there and no Chinese characters are. Without both tags the `last`
    characters, invalid."""
    text = response.lower()
    start, end = text.find("<action>"), text.find("</action>")
    if start == -1 or end == -1:
        return text[-last:], False
    thought = "<think>" in response and "</think>" in response
    return text[start + len("<action>") : end].strip(), thought and not re.search(r"[\u4e00-\u9fff]", response)


def compact_prompt(style: str, task: str, history: list[tuple[str, str]], observation: str, limit: int) -> Prompt:
    """A turn in few words, with the last `limit` of `history` in its opening message."""
    if style == "chat" and history:
        return (observation, COMPACT_STEP_SLOT)
    recent = history[max(0, len(history) - limit) :]
    past = "".join(f" before {seen} did {action}" for seen, action in recent)
    return (f"task {task}", COMPACT_EPISODE_SLOT, f"{past} now {observation}", COMPACT_STEP_SLOT)
