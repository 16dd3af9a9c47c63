"""On-policy distillation from a larger model: log pi_teacher(y | h) - log pi_old(y | h) in place of A_ep. No skills."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from torch import Tensor

from advantage import combine, outcome_advantages, skill_advantage
from config import OWN
from data import Advantages, Batch
from lm.scoring import response_logprobs
from runlog.start import Run
from train import OPID
from variants.grpo import Settings as GrpoSettings


@dataclass
class Settings(GrpoSettings):
    teacher: str | None = OWN(None, "the larger model, named as --model is; it must have the same tokenizer")

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("--algo opd needs --teacher, the larger model")


def advantages(run: Run, batch: Batch, rng: random.Random) -> Advantages:
    outcome = outcome_advantages(batch.trajectories, run.config)  # (B,) logged, and no more
    shift = teacher_shift(run, batch)  # (B, R)
    total = combine(outcome * 0, {"teacher": shift}, {"teacher": 1.0}, batch.mask)
    return Advantages(total, outcome, shift)


def teacher_shift(run: Run, batch: Batch) -> Tensor:
    """log pi_teacher(y | h) - log pi_old(y | h). -> (B, R)"""
    contexts, responses = [step.context for step in batch.steps], [step.response for step in batch.steps]
    with run.reading(run.models["teacher"]):
        teacher = response_logprobs(run.models["teacher"], contexts, responses, run.config.limits)  # (B, R)
    return skill_advantage(teacher, batch.old_logprobs)


VARIANT = replace(OPID, advantages=advantages, settings=Settings)
