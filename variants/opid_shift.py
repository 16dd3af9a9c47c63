"""OPID whose A_skill is the effect of the skill alone, without a pull towards the frozen scorer.

With a frozen scorer log pi_ref(y | h^) - log pi_old(y | h) also holds how far the two models are apart without any
skill. Here both terms are the scorer's.
"""

from __future__ import annotations

from dataclasses import replace

from advantage import combine, skill_advantage, sum_of_scored
from data import Advantages, Batch
from lm.scoring import response_logprobs
from runlog.start import Run
from train import OPID, outcomes


def advantages(run: Run, batch: Batch) -> Advantages:
    config, mask, plain = run.config, batch.mask, batch.old_logprobs
    outcome = outcomes(config, batch.trajectories)  # (B,)
    if config.scorer == "reference":
        plain = batch.reference_logprobs  # (B, R) log pi_ref(y | h), which a KL term needs, too
        if plain is None:
            contexts, responses = [step.context for step in batch.steps], [step.response for step in batch.steps]
            scorer = run.models["reference"]
            with run.reading(scorer):
                plain = response_logprobs(
                    scorer, contexts, responses, temperature=config.temperature, token_budget=config.token_budget
                )

    # A_skill = (log pi(y | h^) - log pi(y | h)) * m, both of the scorer
    shifts = {level: skill_advantage(logprobs, plain, mask) for level, logprobs in batch.skill_logprobs.items()}
    total = combine(outcome, shifts, {"episode": config.episode_weight, "step": config.step_weight}, mask)
    return Advantages(total, outcome, sum_of_scored(shifts, batch.skill_logprobs, mask))


VARIANT = replace(OPID, advantages=advantages)
