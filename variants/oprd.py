"""OPRD, on-policy representation distillation: the policy's hidden states are drawn to a teacher's, layer by layer.

    L = mean over layers, response tokens, dimensions of (h_policy - h_teacher)^2

Paper: arXiv 2606.06021; release (ShenzhiYang2000/OPRD): verl/utils/rep_distillation.py. It reads no output layer and no
outcome. Its only noise is which tokens were sampled. The teacher is a larger model under the plain context
(`--teacher`), or, without one, the scorer under the skill.

The states of a response token are those at its own position. The release normalises each state to length 1; the paper's
numbers are without (`--oprd-normalize`). It projects where teacher and student differ in width; here they must not.

Shapes: n response tokens of a micro-batch, K layers, H hidden size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import OWN
from data import Advantages, Batch, Level
from lm.distributions import layer_states
from lm.scoring import At, Sequence
from router import LEVELS
from runlog.start import Run
from train import OPID, Terms, opid_advantages
from variants.opd import frozen_teacher, teacher_shift
from variants.opid_full import guided_micro_batches
from variants.sdar import OneTeacher


@dataclass
class Settings(OneTeacher):
    teacher: str | None = OWN(None, "a larger model, named as --model is; none: the scorer under the skill")
    oprd_layers: str = OWN(
        "all", "layers whose states are matched; even: the first, third, ...", ("last", "all", "even", "odd")
    )
    oprd_positions: str = OWN("all", "tokens of a response that count: all, first-K or last-K, as in last-32")
    oprd_normalize: bool = OWN(False, "states of length 1 (the release), not as they are (the paper's numbers)")
    oprd_weight: float = OWN(1.0, "weight of the loss (the release: 1)", bounds=(0, None))

    def __post_init__(self):
        self.kl = 0.0  # its loss has no KL term
        super().__post_init__()
        if self.shard:
            raise ValueError("--algo oprd reads hidden states of whole models: no --shard")
        if self.teacher is None and self.scorer == "old":
            raise ValueError("--algo oprd reads its teacher in each step: --scorer reference, or --teacher")
        if not re.fullmatch(r"all|(first|last)-[1-9]\d*", self.oprd_positions):
            raise ValueError(f"--oprd-positions must be all, first-K or last-K, not {self.oprd_positions!r}")

    @property
    def levels(self) -> tuple[Level, ...]:
        return () if self.teacher else LEVELS

    @property
    def read_in_loss(self) -> tuple[str, ...]:
        return ("teacher" if self.teacher else self.scorer,)

    def further_models(self, tokenizer, device) -> dict:
        return {"teacher": frozen_teacher(self.teacher, self, tokenizer, device)} if self.teacher else {}


def no_advantages(run: Run[Settings], batch: Batch) -> Advantages:
    """The loss uses no advantage. What is logged as A_skill is the teacher's log-prob less the policy's."""
    opid = opid_advantages(run, batch)
    shift = teacher_shift(run, batch)[1] if run.config.teacher else opid.skill  # (B, R)
    return replace(opid, total=torch.zeros_like(opid.total), skill=shift)


def oprd_loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    config = run.config
    own, at = layer_states(run.policy, micro, config.oprd_layers)  # (n, K, H)
    theirs = teacher_states(run, micro, batch, own.detach(), at)  # (n, K', H)
    if own.shape[-1] != theirs.shape[-1]:
        raise ValueError("--algo oprd: policy and teacher differ in hidden size, and nothing here projects")
    theirs = theirs[:, proportional(own.shape[1], theirs.shape[1])]  # (n, K, H)
    distances = representation_loss(own.float(), theirs.float(), config.oprd_normalize)  # (n,)
    counted = positions(at[1], lengths(batch, at[0]), config.oprd_positions).to(distances.device)  # (n,)
    losses = config.oprd_weight * distances.where(counted, torch.zeros_like(distances))
    zero = torch.zeros_like(losses)
    return losses, {"loss/policy": zero, "loss/kl": zero, "clip_fraction": zero, "loss/distill": losses}


@torch.no_grad()
def teacher_states(run: Run[Settings], micro: list[Sequence], batch: Batch, own: Tensor, at: At) -> Tensor:
    """The teacher's states of these response tokens, (n, K, H); the policy's `own` where no skill guides it."""
    config, layers = run.config, run.config.oprd_layers
    teacher, states = run.models["teacher" if config.teacher else config.scorer], own.clone()
    if config.teacher:
        return layer_states(teacher, micro, layers)[0]  # the same sequences, hence the same order
    contexts = [one or other for one, other in zip(*(batch.skill_contexts[level] for level in LEVELS), strict=True)]
    for part, place in guided_micro_batches(batch, contexts, at, config.token_budget):
        read, where = layer_states(teacher, part, layers)  # (m, K, H)
        states[place[where]] = read.to(states.dtype)
    return states


def lengths(batch: Batch, rows: Tensor) -> Tensor:
    """The length of each token's response. -> (n,)"""
    steps = batch.steps
    return torch.tensor([len(steps[row].response) for row in rows.tolist()])


def positions(columns: Tensor, lengths: Tensor, which: str) -> Tensor:
    """Which tokens count: "all", "first-K" or "last-K" of each response. (n,), (n,) -> (n,) bool"""
    if which == "all":
        return torch.ones_like(columns, dtype=torch.bool)
    end, _, k = which.partition("-")
    return columns < int(k) if end == "first" else columns >= lengths - int(k)


def proportional(count: int, of: int) -> Tensor:
    """The teacher's layer, of its `of`, for each of the student's `count` layers: evenly spaced, first to first and
    last to last. -> (count,)"""
    if count == 1:
        return torch.tensor([of - 1])
    return torch.linspace(0, of - 1, count).round().long()


def representation_loss(student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    """Mean squared difference over layers and dimensions, (n, K, H) each -> (n,). `normalize`: of length 1 each."""
    if normalize:
        student, teacher = (torch.nn.functional.normalize(states, dim=-1) for states in (student, teacher))
    return ((student - teacher.detach()) ** 2).mean((-1, -2))


VARIANT = replace(OPID, advantages=no_advantages, loss=oprd_loss, settings=Settings)
