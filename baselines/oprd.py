"""OPRD, on-policy representation distillation: the policy's hidden states are drawn to a teacher's, layer by layer.

    L = mean over layers, response tokens, dimensions of (h_policy - h_teacher)^2

Paper: arXiv 2606.06021; release (ShenzhiYang2000/OPRD): verl/utils/rep_distillation.py. No output layer, no outcome, no
sampling noise but that of the tokens themselves. The teacher is a larger model under the plain context (`--teacher`),
or, without one, the scorer under the skill.

The states of a response token are those at its own position. The release normalises each state to length 1; the paper's
numbers are without (`--oprd-normalize`). It projects where teacher and student differ in width; here they must not.

Shapes: N response tokens, K layers, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baselines.method import LAMBDA, SHIFT, Config, Method
from baselines.opd import frozen_teacher, teacher_shift
from data import Batch, Level
from lm.packing import Sequence, micro_batches, pack
from lm.states import layer_states
from router import LEVELS


class Oprd(Method):
    whole = False
    one_teacher = True
    matches_states = True
    idle = SHIFT + LAMBDA
    loss_weight = 1.0  # logged as loss/distill; `distance` holds --oprd-weight

    def __init__(self, config: Config):
        super().__init__(config)
        self.teacher = None

    @staticmethod
    def check(config: Config) -> None:
        if config.shard:
            raise ValueError("--algo oprd reads hidden states of whole models: no --shard")
        if config.teacher is None and config.scorer == "old":
            raise ValueError("--algo oprd reads its teacher in each step: --scorer reference or ema, or --teacher")

    @staticmethod
    def levels(config: Config) -> tuple[Level, ...]:
        return () if config.teacher else LEVELS

    def load(self, tokenizer, device) -> dict[str, Any]:
        if self.config.teacher is None:
            return {}
        self.teacher = frozen_teacher(self.config, tokenizer, device)
        return {"teacher": self.teacher}

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        """No advantage; what is logged as A_skill is how far the teacher's log-probs are off."""
        shifts = batch.skill_advantages
        if self.teacher is not None:
            _, shifts = teacher_shift(plain["teacher"], batch)
        return replace(batch, skill_advantages=shifts, advantages=torch.zeros_like(batch.advantages))

    def matched(self, policy, scorer, micro: list[Sequence], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distance = self.distance(policy, scorer, micro, batch)  # (N,)
        zero = torch.zeros_like(distance)
        return distance, {"loss/policy": zero, "loss/kl": zero, "clip_fraction": zero, "loss/distill": distance}

    def distance(self, policy, scorer, micro: list[Sequence], batch: Batch) -> Tensor:
        config = self.config
        own, rows, columns = layer_states(policy, micro, config.oprd_layers)  # (N, K, H), (N,), (N,)
        asked = positions(columns, lengths(batch, rows), config.oprd_positions)  # (N,)
        theirs = self.read(scorer, micro, batch, own.detach(), rows, columns)  # (N, K', H)
        if own.shape[-1] != theirs.shape[-1]:
            raise ValueError("--algo oprd: policy and teacher differ in hidden size, and nothing here projects")
        theirs = theirs[:, proportional(own.shape[1], theirs.shape[1])]  # (N, K, H)
        distances = representation_loss(own.float(), theirs.float(), normalize=config.oprd_normalize)  # (N,)
        return config.oprd_weight * distances.where(asked, torch.zeros_like(distances))

    @torch.no_grad()
    def read(self, scorer, micro: list[Sequence], batch: Batch, own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The teacher's states of these response tokens, (N, K, H); the policy's `own` where no skill guides it."""
        layers = self.config.oprd_layers
        if self.teacher is not None:
            return layer_states(self.teacher, micro, layers)[0]  # the same sequences, hence the same order
        place = {at: i for i, at in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))}
        held = sorted({row for row in rows.tolist() if batch.guided[row] is not None})
        sequences = pack([batch.guided[row] for row in held], [batch.responses[row] for row in held])
        states, training = own.clone(), scorer.training
        scorer.eval()
        for part in micro_batches(sequences, self.config.token_budget):
            read, r, c = layer_states(scorer, part, layers)  # (n, K, H), (n,), (n,)
            at = torch.tensor([place[held[i], j] for i, j in zip(r.tolist(), c.tolist(), strict=True)])
            states[at] = read.to(states.dtype)
        scorer.train(training)
        return states


def lengths(batch: Batch, rows: Tensor) -> Tensor:
    """Of the response that each token belongs to, (N,)."""
    return torch.tensor([len(batch.responses[row]) for row in rows.tolist()], device=rows.device)


def positions(columns: Tensor, lengths: Tensor, which: str) -> Tensor:
    """Which tokens count: "all", "first-K" or "last-K" of each response. (N,), (N,) -> (N,) bool"""
    if which == "all":
        return torch.ones_like(columns, dtype=torch.bool)
    end, _, k = which.partition("-")
    return columns < int(k) if end == "first" else columns >= lengths - int(k)


def proportional(count: int, of: int) -> Tensor:
    """Which of a teacher's `of` layers each of a student's `count` is paired with: evenly spaced, the first with the
    first and the last with the last. -> (count,)"""
    if count == 1:
        return torch.tensor([of - 1])
    return torch.linspace(0, of - 1, count).round().long()


def representation_loss(student: Tensor, teacher: Tensor, *, normalize: bool) -> Tensor:
    """Mean squared difference over layers and dimensions, (N, K, H) each -> (N,). `normalize`: of length 1 each."""
    if normalize:
        student, teacher = (torch.nn.functional.normalize(states, dim=-1) for states in (student, teacher))
    return ((student - teacher.detach()) ** 2).mean((-1, -2))
