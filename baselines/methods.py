"""The family of methods that `--algo` picks from: GRPO, OPID, its controls, and its relatives. A line each.

What a method adds to the advantage is in advantage.py, what it adds to the loss in losses.py. Pure Python.

Notation: A_ep is the outcome advantage, Delta = log pi(y | h with skill) - log pi_old(y | h) the skill shift of a
sampled token. Sources are the authors' releases, jinyangwu/OPID (37a15a5) and ZJU-REAL/SDAR (8b85c23).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """How one method departs from plain GRPO, whose advantage is A_ep and whose loss is PPO-clip + KL."""

    outcome: bool = True  # A_ep enters the advantage
    states: bool = False  # A_ep gets a step-relative part: steps of one task that start from the same observation
    # Whose skills guide the re-scoring: the writer's (--skill-writer), the writer's of another task's trajectory,
    # or those of a script that knows the game.
    skills: Literal["written", "shuffled", "script"] | None = None
    # What Delta does to the advantage: it is added (weighted by lambda), or it rescales A_ep.
    shift: Literal["add", "scale"] | None = None
    # A term of the loss that pulls towards the teacher, which is the scorer under the skill-augmented context.
    distill: Literal["gated", "ungated", "k3"] | None = None
    teacher: bool = False  # a larger model (--teacher) under the plain context takes the place of the scorer
    acting: bool = False  # an earlier trajectory's episode skill is in the prompt while acting; nothing is re-scored

    @property
    def one_score(self) -> bool:
        """Whether each token can have but one teacher, so that a step cannot be guided by two skills."""
        return self.shift == "scale" or self.distill is not None


METHODS = {
    "opid": Method(skills="written", shift="add"),
    "opid-shuffled": Method(skills="shuffled", shift="add"),
    "opid-oracle": Method(skills="script", shift="add"),
    "grpo": Method(),
    "gigpo": Method(states=True),
    "opd": Method(outcome=False, shift="add", teacher=True),
    "opsd": Method(outcome=False, skills="written", distill="gated"),
    "grpo+opsd": Method(skills="written", distill="ungated"),
    "sdar": Method(skills="written", distill="gated"),
    "rlsd": Method(skills="written", shift="scale"),
    "skill-sd": Method(skills="written", distill="k3"),
    "skill-grpo": Method(skills="written", acting=True),
}
