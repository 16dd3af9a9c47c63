"""OPID whose A_skill is the effect of the skill alone, without a pull towards the frozen scorer.

With a frozen scorer log pi_ref(y | h^) - log pi_old(y | h) also holds how far the two models are apart without any
skill. Here both terms are the scorer's.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from advantage import combine, skill_advantage, sum_of_scored
from data import Advantages, Batch
from lm.scoring import response_logprobs
from runlog.start import Run
from train import OPID, outcomes


def advantages(run: Run, batch: Batch) -> Advantages:
    config, mask = run.config, batch.mask
    outcome = outcomes(config, batch.trajectories)  # (B,)
    plain = reference_logprobs(run, batch) if config.scorer == "reference" else batch.old_logprobs  # (B, R)

    # A_skill = (log pi(y | h^) - log pi(y | h)) * m, both of the scorer
    shifts = {level: skill_advantage(logprobs, plain, mask) for level, logprobs in batch.skill_logprobs.items()}
    total = combine(outcome, shifts, {"episode": config.episode_weight, "step": config.step_weight}, mask)
    return Advantages(total, outcome, sum_of_scored(shifts, batch.skill_logprobs, mask))


def reference_logprobs(run: Run, batch: Batch) -> Tensor:
    """log pi_ref(y | h), which a KL term needs, too: read here where there is none. -> (B, R)"""
    if batch.reference_logprobs is not None:
        return batch.reference_logprobs
    config, reference = run.config, run.models["reference"]
    contexts, responses = [step.context for step in batch.steps], [step.response for step in batch.steps]
    with run.reading(reference):
        return response_logprobs(
            reference, contexts, responses, temperature=config.temperature, token_budget=config.token_budget
        )


VARIANT = replace(OPID, advantages=advantages)
