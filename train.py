"""OPID (arXiv 2606.26790): GRPO on an episode's outcome, plus a token-level advantage from skills written in hindsight.

python train.py                                  # the laptop recipe: tiny model, generated ALFWorld games, no GPU
python train.py --model Qwen/Qwen3-0.6B          # the paper's settings for any model, on generated games
accelerate launch train.py --recipe NAME         # many GPUs: each plays its share; with --shard it holds its share, too

`train` is the algorithm, a step a file. Left out of it: other methods, which replace some of its functions (variants/);
loading, checkpoints, evaluation, timing (runlog/start.py); what many processes do together (lm/processes.py).

Shapes: B rows are steps pooled over trajectories, R is the longest response, n is the tokens of a micro-batch.
"""

from __future__ import annotations

import lm  # noqa: F401  # isort: skip
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advantage import combine, outcome_advantage, skill_advantage, sum_of_scored
from config import Config, parse_args, settings_come_from, variant_of
from data import Advantages, Batch, Trajectory
from lm.scoring import At, Sequence, micro_batches, moved, pack, progress, sequence_logprobs
from memory.plan import describe
from rescore import rescore
from rollout import play
from router import route
from runlog.ending import one_line
from runlog.start import Run, start
from skills import own_skills

Terms = dict[str, Tensor]  # (n,) each, by the name of their metric

MAX_LOG_RATIO = 20.0  # of a token's two probabilities, so that no exp overflows: infinity times A = 0 is NaN


def train(run: Run, variant: Variant) -> None:
    """From the first iteration, or the one after the checkpoint, to the last."""
    config = run.config
    for iteration in range(run.log.first_iteration, config.iterations):
        run.begin(iteration)  # every iteration seeds itself, so that resuming is exact

        # 1. Rollout: N episodes of each task, sampled from pi_old
        games = run.processes.share(run.rng.sample(run.games, min(config.tasks, len(run.games))))
        trajectories, metrics = variant.play(run, games)
        run.note("rollout", metrics)

        # 2. Skills: what each finished episode teaches; None where no answer could be read
        skills = [None] * len(trajectories)
        if run.levels:  # of skills that count, their lambda not 0; without one this is GRPO
            skills, metrics = variant.skills(run, trajectories)
            run.note("skills", metrics)

        # 3. Routing: which skill guides which step
        routes = [route(tau, own, config.routing, run.levels) for tau, own in zip(trajectories, skills, strict=True)]

        # 4. Re-scoring: log pi_old(y | h) of the sampled tokens, and log pi(y | h^), where h^ is h with the skill in it
        batch, metrics = rescore(run, trajectories, skills, routes)
        if iteration == 0:
            metrics |= run.check_scores(batch)

        # 5. Advantage: A = A_ep + lambda A_skill of each token
        batch.advantages = variant.advantages(run, batch)
        run.note("rescore", metrics)

        # 6. Update: L = PPO-clip(r, A) + beta KL(pi_theta || pi_ref)
        run.note("update", update(run, batch, variant.loss))

        run.finish(batch)  # evaluation, log, checkpoint
    run.log.finish(run.policy, run.tokenizer)  # the final policy, the curve


# ---- 5. the advantages -----------------------------------------------------------------------------------------------


def opid_advantages(run: Run, batch: Batch) -> Advantages:
    config, mask = run.config, batch.mask
    outcome = outcomes(config, batch.trajectories)  # (B,) A_ep

    # A_skill = (log pi(y | h^) - log pi_old(y | h)) * m, by the level of the skill in h^: (B, R) each
    shifts = {level: skill_advantage(under, batch.old_logprobs, mask) for level, under in batch.skill_logprobs.items()}

    # A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]
    total = combine(outcome, shifts, {"episode": config.episode_weight, "step": config.step_weight}, mask)  # (B, R)
    return Advantages(total, outcome, sum_of_scored(shifts, batch.skill_logprobs, mask))


def outcomes(config: Config, trajectories: list[Trajectory]) -> Tensor:
    """A_ep of each step: R(tau), less the step's own penalty, against its group. -> (B,)"""
    steps = [(i, trajectory, step) for i, trajectory in enumerate(trajectories) for step in trajectory.steps]
    rewards = torch.tensor([config.success_reward * trajectory.success for _, trajectory, _ in steps])  # (B,) R(tau)
    penalties = torch.tensor([config.invalid_penalty * (not step.valid) for _, _, step in steps])  # (B,)
    groups = torch.tensor([trajectory.group for _, trajectory, _ in steps])  # (B,)
    owners = torch.tensor([i for i, _, _ in steps])  # (B,)

    # A_ep = (R(tau) - mean_g) / (std_g + eps)
    return outcome_advantage(rewards - penalties, groups, owners, normalize=config.normalize, over=config.group_over)


# ---- 6. the loss and the update --------------------------------------------------------------------------------------


def opid_loss(run: Run, micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    """The loss of each token of a micro-batch (n,), and its terms."""
    new, at = sequence_logprobs(run.policy, micro, run.config.temperature)  # (n,) log pi_theta(y | h)
    return grpo_loss(new, at, batch, run.config)


def grpo_loss(new: Tensor, at: At, batch: Batch, config: Config) -> tuple[Tensor, Terms]:
    """PPO-clip and KL of the tokens whose log-probs are `new` (n,), `at` these rows and columns of the batch."""
    old = batch.old_logprobs[at].to(new.device)  # (n,) log pi_old(y | h)
    advantages = batch.advantages.total[at].to(new.device)  # (n,)

    # L = PPO-clip(r, A) + beta KL(pi_theta || pi_ref)
    policy, clipped = policy_loss(new, old, advantages, config.clip, config.dual_clip)  # (n,) each
    batch.updated.append((at, new.detach(), clipped))  # for samples.jsonl
    kl = torch.zeros_like(policy)  # (n,)
    if batch.reference_logprobs is not None:
        kl = k3(new, batch.reference_logprobs[at].to(new.device), config.kl_clip)
    return policy + config.kl * kl, {"loss/policy": policy, "loss/kl": kl, "clip_fraction": clipped}


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO-clip per token. All (n,) -> the losses (n,), and 1 where clipping removed the gradient (n,).

    `dual_clip` c bounds the loss of a token with A < 0 by -c A (arXiv 1912.09729; authors' release:
    verl/trainer/ppo/core_algos.py, compute_policy_loss, c = 3).
    """
    # L = -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_theta(y | h) / pi_old(y | h)
    ratio = (new - old).clamp(max=MAX_LOG_RATIO).exp()  # (n,)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (n,)
    losses = -torch.minimum(unclipped, clipped)  # (n,)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, (clipped < unclipped).float()


def k3(new: Tensor, reference: Tensor, bound: float | None = None) -> Tensor:
    """KL(pi_theta || pi_ref) per token, by Schulman's k3 on sampled tokens. Never negative. (n,) -> (n,)

    Its gradient, (1 - pi_ref / pi_theta) grad log pi_theta, is on average that of KL(pi_ref || pi_theta). `bound`: the
    most that a token counts; beyond it a token carries no gradient (the release: kl_penalty, 10).
    """
    # KL = exp(d) - 1 - d,  d = log pi_ref(y | h) - log pi_theta(y | h)
    d = (reference - new).clamp(max=MAX_LOG_RATIO)  # (n,) no gradient beyond
    kl = d.exp() - 1 - d  # (n,)
    return kl if bound is None else kl.clamp(max=bound)


def update(run: Run, batch: Batch, loss: Callable) -> dict[str, float]:
    """One optimizer step per mini-batch -> the means over steps of each loss term per token, and of the gradient norm.

    A mini-batch has about `--mini-batch` rows, and one token denominator over all processes. A step whose gradient is
    not finite is not taken.
    """
    config, processes, optimizer = run.config, run.processes, run.optimizer
    sequences = pack([step.context for step in batch.steps], [step.response for step in batch.steps])
    parts = max(1, round(processes.sum(len(batch.steps)) / config.mini_batch)) if config.mini_batch else 1
    run.policy.train()
    taken, skipped = [], 0
    with run.offload.needed(optimizer, *run.read_in_loss):
        for mini_batch in progress(mini_batches(sequences, parts, config.epochs, run.rng), "update"):
            tokens = processes.sum(sum(size for sequence in mini_batch for _, _, size in sequence.responses))
            if not tokens:  # more mini-batches than sequences, on every process alike
                continue
            read = mini_batch if config.kl or loss is not opid_loss else moved(mini_batch, batch.advantages.total)
            sums: Terms = {}
            for micro in processes.even(micro_batches(read, config.token_budget), run.policy):
                with run.autocast():
                    losses, terms = loss(run, micro, batch)  # (n,)
                (losses.sum() / tokens).backward()
                sums = {name: sums.get(name, 0.0) + term.detach().sum() for name, term in terms.items()}
            norm = processes.clip_gradients(run.trained, config.max_grad_norm)
            if norm.isfinite():  # else one such step would spoil weights and moments for good
                optimizer.step()
                means = {name: (total / tokens).item() for name, total in processes.sum_terms(sums).items()}
                taken.append(means | {"grad_norm": norm.item()})
            else:
                skipped += 1
            optimizer.zero_grad()
    if not taken:
        raise FloatingPointError("every gradient of this iteration was infinite or NaN: try a lower --learning-rate")
    return {name: sum(means[name] / len(taken) for means in taken) for name in taken[0]} | {"update/skipped": skipped}


def mini_batches(sequences: list[Sequence], parts: int, epochs: int, rng: random.Random) -> list[list[Sequence]]:
    """Each epoch's sequences in a new order, dealt out to `parts` mini-batches."""
    dealt = []
    for _ in range(epochs):
        rng.shuffle(sequences)
        dealt += [sequences[part::parts] for part in range(parts)]
    return dealt


# ---- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A method: four functions, and its flags. OPID's stand above; a file of variants/ replaces some (see rlsd.py)."""

    play: Callable  # (run, games) -> trajectories, metrics
    skills: Callable  # (run, trajectories) -> the skills that guide each trajectory, metrics
    advantages: Callable  # (run, batch) -> Advantages
    loss: Callable  # (run, micro-batch, batch) -> losses (n,), terms
    settings: type[Config] = Config


OPID = Variant(play, own_skills, opid_advantages, opid_loss)


def main() -> None:
    config = parse_args()
    with one_line(config) as ending:  # Ctrl-C, and what the user can mend: a folder, a full disk, a server that is gone
        ending.print(settings_come_from(sys.argv[1:]))
        if config.plan:
            return ending.print(describe(config))
        ending.run = start(config)  # policy, reference, optimizer, games, log; from a checkpoint where there is one
        train(ending.run, variant_of(config.algo))


if __name__ == "__main__":
    import train as imported  # not __main__: variants import this file by its name

    imported.main()
