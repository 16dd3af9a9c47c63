"""On-policy distillation from a larger model: log pi_teacher(y | h) - log pi_old(y | h) in place of A_ep. No skills."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advantage import skill_advantage, where_scored
from baselines.method import SHIFT, Config, Grpo
from data import Batch
from lm.loading import frozen
from lm.obstacles import check_model, check_positions
from lm.states import states_obstacle
from tiny.loading import load_model


class Opd(Grpo):
    whole = True
    idle = (*SHIFT, "skill_iterations")  # --skill-clip bounds the teacher's shift, too

    @staticmethod
    def check(config: Config) -> None:
        if config.teacher is None:
            raise ValueError("--algo opd needs --teacher, the larger model")

    def load(self, tokenizer, device) -> dict[str, Any]:
        return {"teacher": frozen_teacher(self.config, tokenizer, device)}

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        shift, shown = teacher_shift(plain["teacher"], batch)  # (B, R) each
        bound = self.config.skill_clip
        advantages = shift if bound is None else shift.clamp(-bound, bound)  # (B, R)
        if self.config.divergence != "sampled":
            advantages = torch.zeros_like(shift)
        return replace(batch, skill_advantages=shown, advantages=advantages)

    def teachers(self, states: dict[str, Any], iteration: int) -> list[tuple[float, Any]]:
        return [(1.0, states["teacher"])]


def teacher_shift(teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi_teacher(y | h) - log pi_old(y | h), (B, R): 0 where not scored, as it enters a sum, and NaN, as it is
    logged."""
    shift = skill_advantage(teacher, batch.old_logprobs, batch.mask)  # (B, R)
    return shift, where_scored(shift, teacher)


def frozen_teacher(config: Config, tokenizer, device):
    """`--teacher`, as it is kept: in `--frozen-dtype`, on its device. Raises ValueError where its log-probs, or its
    distributions where they are asked for, would be wrong."""
    teacher = load_teacher(config.teacher, tokenizer, env=config.env, dtype=config.dtype)
    try:
        check_positions(teacher, config.context_limit)
        check_model(teacher, config.context_limit)
    except ValueError as error:
        raise ValueError(f"--teacher {config.teacher}: {error}") from None
    if config.divergence != "sampled" and (obstacle := states_obstacle(teacher)):
        raise ValueError(f"--divergence {config.divergence} needs whole distributions of --teacher: {obstacle}")
    return frozen(teacher, config.frozen_dtype, mixed_precision=config.mixed_precision).to(device)


def load_teacher(name: str, tokenizer, *, env: str, dtype: str):
    """The frozen model that the student learns from. Raises ValueError where its tokenizer is not the student's: it has
    to score the student's token ids."""
    teacher, own = load_model(name, env=env, dtype=dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {name} has another tokenizer than --model: it cannot score the model's tokens")
    return frozen(teacher)
