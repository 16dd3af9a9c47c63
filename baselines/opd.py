"""On-policy distillation from a larger model: log pi_teacher(y | h) - log pi_old(y | h) in place of A_ep. No skills."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advantage import skill_advantage, where_scored
from baselines.method import Config, Grpo
from data import Batch
from lm.loading import frozen
from tiny.loading import load_model


class Opd(Grpo):
    whole = True

    @staticmethod
    def check(config: Config) -> None:
        if config.teacher is None:
            raise ValueError("--algo opd needs --teacher, the larger model")

    def load(self, tokenizer, device) -> dict[str, Any]:
        config = self.config
        teacher = load_teacher(config.teacher, tokenizer, dtype=config.dtype)
        return {"teacher": frozen(teacher, config.frozen_dtype, mixed_precision=config.mixed_precision).to(device)}

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        shift = skill_advantage(plain["teacher"], batch.old_logprobs, batch.mask)  # (B, R)
        bound = self.config.skill_clip
        advantages = shift if bound is None else shift.clamp(-bound, bound)  # (B, R)
        if self.config.divergence != "sampled":
            advantages = torch.zeros_like(shift)
        return replace(batch, skill_advantages=where_scored(shift, plain["teacher"]), advantages=advantages)

    def teachers(self, states: dict[str, Any], iteration: int) -> list[tuple[float, Any]]:
        return [(1.0, states["teacher"])]


def load_teacher(name: str, tokenizer, *, dtype: str):
    """The frozen model that the student learns from. Raises ValueError where its tokenizer is not the student's: it has
    to score the student's token ids."""
    teacher, own = load_model(name, dtype=dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {name} has another tokenizer than --model: it cannot score the model's tokens")
    return frozen(teacher)
