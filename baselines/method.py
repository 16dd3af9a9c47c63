"""The hooks by which a method departs from OPID. Here each of them leaves OPID, as train.py reads, as it is."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from advantage import linear_decay
from data import Batch, Guidance, Level, Skills, Trajectory
from router import LEVELS

Config = Any  # a config.Config, which is made from the table of methods and cannot be imported here


def lambdas(config: Config, iteration: int) -> dict[Level, float]:
    """The weight of A_skill by level: as given, or falling in a line to 0 with `--skill-iterations`."""
    fade = linear_decay(iteration, config.skill_iterations)
    return {"episode": fade * config.episode_weight, "step": fade * config.step_weight}


SHIFT = ("centred", "shift_base")  # the settings of A_skill
LAMBDA = ("skill_clip", "skill_iterations")  # and those of how it enters A


class Method:
    """OPID. Another method is a subclass that overrides the hooks where it differs, and a line in METHODS.

    `check`, `levels` and `writes_skills` are asked before anything is loaded; the others follow the order of a run.
    """

    whole = True  # whether `--divergence` may take the sampled token's place
    idle: tuple[str, ...] = ()  # settings of A_skill and its weight that would do nothing
    one_teacher = False  # whether a token can have but one, so that no step may be guided by two skills
    needs_others = False  # whether `skills` takes those of other tasks
    # whether the skills are about the trajectory itself: else --shift-base other measures nothing, as the other task's
    # skill may be the one about this very task, and words that say nothing are the same for all
    own_skills = True
    loss_weight = 0.0  # of `loss`; 0: there is no such term
    matches_states = False  # whether `matched` is the whole loss

    def __init__(self, config: Config):
        self.config = config

    @staticmethod
    def check(config: Config) -> None:
        """Raises ValueError for settings with which the method cannot run."""

    @staticmethod
    def levels(config: Config) -> tuple[Level, ...]:
        """The levels of skills that the policy's tokens are re-scored under: those whose lambda is not 0. With none, no
        skill is written and nothing is re-scored, which is GRPO bit for bit."""
        given = {"episode": config.episode_weight, "step": config.step_weight}
        return tuple(level for level in LEVELS if given[level] != 0)

    @staticmethod
    def writes_skills(config: Config) -> bool:
        """Whether `--skill-writer` is asked for skills."""
        return bool(config.levels)

    def load(self, tokenizer, device) -> dict[str, Any]:
        """Further frozen models that read the plain contexts, by a name of their own."""
        return {}

    def acts_under(self) -> dict[str, str] | None:
        """Task type -> the episode skill that is in the prompt while the policy acts; None: it acts without."""
        return None

    def skills(
        self, trajectories: list[Trajectory], written: list[Skills | None], rng: random.Random
    ) -> list[Skills | None]:
        """The skills that guide each trajectory's steps, in place of those that were written about it."""
        return written

    def check_routes(self, routes: list[list[tuple[Guidance, ...]]]) -> None:
        """Raises ValueError where a step has two teachers and the method can use but one."""
        if self.one_teacher and any(len(guidances) > 1 for route in routes for guidances in route):
            raise ValueError(
                f"--algo {self.config.algo} has one teacher per token: --routing {self.config.routing} gives a step two"
            )

    def outcome(self, outcome: Tensor, trajectories: list[Trajectory]) -> tuple[Tensor, dict[str, float]]:
        """A_ep (B,) -> what takes its place (B,), and metrics."""
        return outcome, {}

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        """The batch with the method's own advantages or teacher. `outcome` (B,); log-probs (B, R): `plain` by reader,
        `guided` by level, NaN where not scored."""
        return batch

    def teachers(self, states: dict[str, Any], iteration: int) -> list[tuple[float, Any]]:
        """(weight, hidden states) of whoever `--divergence` is measured to; `states`: by reader and by level."""
        weights = lambdas(self.config, iteration)
        return [(weights[level], states[level]) for level in self.config.levels]

    def loss(self, new: Tensor, old: Tensor, teacher: Tensor | None) -> Tensor:
        """A further term of the loss, before `loss_weight`. Log-probs (N,) -> (N,). `teacher`: of the batch that
        `adjust` returned; None where that has none."""
        raise NotImplementedError(f"--algo {self.config.algo} has a loss_weight and no loss")

    def matched(self, policy, scorer, micro: list, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """With `matches_states` the loss of each response token of a micro-batch (N,), and the terms to be logged."""
        raise NotImplementedError(f"--algo {self.config.algo} matches no hidden states")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps for `restore`: plain values only."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""


class Grpo(Method):
    """The zero of OPID: no skills."""

    whole = False

    @staticmethod
    def levels(config: Config) -> tuple[Level, ...]:
        return ()
