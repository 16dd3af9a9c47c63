"""On-policy distillation from a larger model: log pi_teacher(y | h) - log pi_old(y | h) in place of A_ep. No skills.

With --divergence the whole distributions are compared in the loss instead of the sampled tokens in the advantage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from advantage import combine, skill_advantage
from config import OWN, Config
from data import Advantages, Batch
from lm.distributions import DIVERGENCES, divergence, divergences, sequence_states, states_and_logprobs, states_obstacle
from lm.loading import frozen
from lm.obstacles import check_model, check_positions, untrained_positions
from lm.scoring import Sequence, response_logprobs
from runlog.start import Run
from tiny.loading import load_model
from train import OPID, Terms, grpo_loss, opid_loss, outcomes
from variants.grpo import Settings as GrpoSettings


@dataclass
class Settings(GrpoSettings):
    teacher: str | None = OWN(None, "the larger model, named as --model is; it must have the same tokenizer")
    divergence: str = OWN(
        "sampled",
        "how the policy follows the teacher. sampled: the advantage of sampled tokens; the others: a loss on whole "
        "distributions",
        ("sampled", *DIVERGENCES),
    )
    jsd_beta: float = OWN(0.5, "of jsd: near 0 it is like forward, near 1 like reverse", bounds=(0.001, 0.999))

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            raise ValueError(f"--algo {self.algo} needs --teacher, the larger model")
        if self.divergence != "sampled" and self.shard:
            raise ValueError(f"--divergence {self.divergence} needs the teacher's output layer whole: no --shard")

    @property
    def read_in_loss(self) -> tuple[str, ...]:
        return () if self.divergence == "sampled" else ("teacher",)

    def check_model(self, model) -> None:
        if self.divergence != "sampled" and (obstacle := states_obstacle(model)):
            raise ValueError(f"--divergence {self.divergence} needs whole distributions of both models: {obstacle}")

    def further_models(self, tokenizer, device) -> dict:
        assert self.teacher is not None  # __post_init__ refuses to go without
        return {"teacher": frozen_teacher(self.teacher, self, tokenizer, device)}


def advantages(run: Run[Settings], batch: Batch) -> Advantages:
    outcome = outcomes(run.config, batch.trajectories)  # (B,) only logged
    shift, shown = teacher_shift(run, batch)  # (B, R) each
    if run.config.divergence != "sampled":
        shift = torch.zeros_like(shift)
    return Advantages(combine(outcome * 0, {"teacher": shift}, {"teacher": 1.0}, batch.mask), outcome, shown)


def opd_loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    config, teacher = run.config, run.models["teacher"]
    if config.divergence == "sampled":
        return opid_loss(run, micro, batch)
    states, new, at = states_and_logprobs(run.policy, micro, config.temperature)  # (n, H), (n,)
    losses, terms = grpo_loss(new, at, batch, config)
    with torch.no_grad():
        theirs, _, _ = sequence_states(teacher, micro)  # (n, H): the same sequences, hence the same order
    measure = partial(divergence, config.divergence, beta=config.jsd_beta)
    heads = run.policy.get_output_embeddings(), teacher.get_output_embeddings()
    exact = divergences(heads[0], states, heads[1], theirs, measure, config.temperature)  # (n,)
    return losses + exact, terms | {"loss/distill": exact}


def teacher_shift(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi_teacher(y | h) - log pi_old(y | h), (B, R), twice: where not scored 0, to be added, and NaN, to be
    logged."""
    config, teacher = run.config, run.models["teacher"]
    contexts, responses = [step.context for step in batch.steps], [step.response for step in batch.steps]
    with run.reading(teacher):
        logprobs = response_logprobs(
            teacher, contexts, responses, temperature=config.temperature, token_budget=config.token_budget
        )  # (B, R)
    shift = skill_advantage(logprobs, batch.old_logprobs, batch.mask)  # (B, R)
    return shift, shift.masked_fill(logprobs.isnan(), float("nan"))


def frozen_teacher(name: str, config: Config, tokenizer, device):
    """Load `--teacher`, frozen, in `--frozen-dtype`, on the device. Raises ValueError where its log-probs would be
    wrong, or the distributions that `--divergence` needs."""
    teacher = load_teacher(name, tokenizer, env=config.env, dtype=config.dtype)
    try:
        check_positions(teacher, config.context_limit)
        check_model(teacher, config.context_limit)
        config.check_model(teacher)
    except ValueError as error:
        raise ValueError(f"--teacher {name}: {error}") from None
    if warning := untrained_positions(teacher, {"--context-limit": config.context_limit}):
        print(f"--teacher {name}: {warning}", flush=True)
    return frozen(teacher, config.frozen_dtype, mixed_precision=config.mixed_precision).to(device)


def load_teacher(name: str, tokenizer, *, env: str, dtype: str):
    """The frozen model that the student learns from. Raises ValueError where its tokenizer is not the student's: it has
    to score the student's token ids."""
    teacher, own = load_model(name, env=env, dtype=dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {name} has another tokenizer than --model: it cannot score the model's tokens")
    return frozen(teacher)


VARIANT = replace(OPID, advantages=advantages, loss=opd_loss, settings=Settings)
