"""OPID with whole distributions instead of sampled tokens: lambda KL(pi_theta(. | h) || pi(. | h^)) in the loss.

    E over y ~ pi of grad log pi(y) (log pi(y | h^) - log pi(y | h))  =  -grad KL(pi(. | h) || pi(. | h^))

So lambda A_skill on sampled tokens, and lambda times this KL in the loss, have the same gradient on average, for a h^
that does not depend on y: a hindsight skill does. The loss has it without the noise of sampling. The frozen scorer
reads h^ again in each loss, so nothing is stored.

Shapes: n tokens of a micro-batch of the policy's, m of one of the scorer's, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from config import OWN, Config
from data import Batch, Contexts, Level
from lm.distributions import DIVERGENCES, divergence, divergences, sequence_states, states_and_logprobs, states_obstacle
from lm.scoring import At, Sequence, micro_batches, pack
from runlog.start import Run
from train import OPID, Terms, grpo_loss
from variants.sdar import outcome_only


@dataclass
class Settings(Config):
    scorer: str = OWN("reference", "must be frozen: the policy changes with each gradient step", ("reference",))
    divergence: str = OWN("reverse", "KL(pi_theta || pi), KL(pi || pi_theta), or Jensen-Shannon", DIVERGENCES)
    jsd_beta: float = OWN(0.5, "of jsd: near 0 it is like forward, near 1 like reverse", bounds=(0.001, 0.999))

    def __post_init__(self):
        super().__post_init__()
        if self.shard:
            raise ValueError(f"--algo {self.algo} reads whole distributions of a frozen scorer: no --shard")

    @property
    def read_in_loss(self) -> tuple[str, ...]:
        return (self.scorer,)

    def check_model(self, model) -> None:
        if obstacle := states_obstacle(model):
            raise ValueError(
                f"--algo {self.algo} needs whole distributions, which {self.model} does not give: {obstacle}"
            )


def full_loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    config = run.config
    states, new, at = states_and_logprobs(run.policy, micro, config.temperature)  # (n, H), (n,)
    losses, terms = grpo_loss(new, at, batch, config)

    # lambda D(pi_theta(. | h), pi(. | h^)), by the level of the skill in h^
    exact = torch.zeros_like(losses)  # (n,)
    for level, weight in (("episode", config.episode_weight), ("step", config.step_weight)):
        if level in batch.skill_contexts:
            exact = exact + weight * distance_to_scorer(run, batch, level, states, at)
    return losses + exact, terms | {"loss/distill": exact}


def distance_to_scorer(run: Run[Settings], batch: Batch, level: Level, states: Tensor, at: At) -> Tensor:
    """D between the policy, whose hidden states (n, H) lie `at` these rows and columns, and the scorer under the skill.
    -> (n,), 0 where no skill of the level guides the step."""
    config, scorer = run.config, run.models[run.config.scorer]
    measure = partial(divergence, config.divergence, beta=config.jsd_beta)
    heads = run.policy.get_output_embeddings(), scorer.get_output_embeddings()
    total = torch.zeros(len(states), device=states.device)  # (n,)
    for micro, place in guided_micro_batches(batch, batch.skill_contexts[level], at, config.token_budget):
        with torch.no_grad():
            theirs, _, where = sequence_states(scorer, micro)  # (m, H)
        here = place[where].to(states.device)  # (m,)
        term = divergences(heads[0], states[here], heads[1], theirs, measure, config.temperature)  # (m,)
        total = total.index_add(0, here, term)
    return total


def guided_micro_batches(
    batch: Batch, contexts: Contexts, at: At, token_budget: int
) -> Iterator[tuple[list[Sequence], Tensor]]:
    """The teacher's micro-batches for one of the policy's, whose n tokens lie `at` these rows and columns: the same
    responses under h^. With each comes `place` (B, R): which of the n tokens is at that row and column, -1 for none."""
    place = torch.full(batch.mask.shape, -1)  # (B, R)
    place[at] = torch.arange(len(at[0]))
    rows = {row for row in at[0].tolist() if contexts[row] is not None}
    held = [context if row in rows else None for row, context in enumerate(contexts)]
    for micro in micro_batches(pack(held, [step.response for step in batch.steps]), token_budget):
        yield micro, place


VARIANT = replace(OPID, advantages=outcome_only, loss=full_loss, settings=Settings)
