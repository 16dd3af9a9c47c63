"""SDPO (arXiv 2601.20802): the policy learns from itself under a solution of the same task, one that its group found.

    L = rho JSD(pi_theta(. | h), pi_teacher(. | h^)),   rho = min(pi_theta / pi_old, c) without gradient

The loss has no A_ep and no KL term: the outcome only says which rollout is a solution. h^ is h with the actions of the
first other success of the group, where OPID's episode skill stands. A rollout without such a peer teaches nothing. A
success is no teacher of itself. The token that ends a turn counts in an episode's last turn alone: before it the
teacher reads the solution on to the next action, and would teach not to stop.

Release (lasgroup/SDPO, 0e6d510): core_algos.py, compute_self_distillation_loss, in place of the policy's loss
(dp_actor.py, update_policy); ray_trainer.py, _get_solution; defaults of config/actor/actor.yaml (alpha 0.5, is_clip 2,
dont_reprompt_on_self_success, EMA 0.05). There alpha is `jsd_beta`, with 0 for forward and 1 for reverse. Its teacher
is an average of past policies in the reference's place, as here; its top 100 words and tail are the whole
vocabulary here. TRL's trainer (trl/experimental/sdpo) takes sampled tokens and the reverse KL by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import OWN
from data import Batch, Level, Skills, Trajectory
from lm.distributions import DIVERGENCES, states_and_logprobs
from lm.scoring import Sequence
from runlog.start import Run
from train import MAX_LOG_RATIO, OPID, Terms, grpo_loss
from variants import opid_full
from variants.opid_full import distance_to_scorer
from variants.opsd import no_outcome


@dataclass
class Settings(opid_full.Settings):
    divergence: str = OWN("jsd", "Jensen-Shannon, KL(pi_theta || pi), or KL(pi || pi_theta)", DIVERGENCES)
    teacher_rate: float = OWN(
        0.05,
        "the teacher moves so far towards the policy before each iteration. 0: the frozen start; 1: the policy itself",
        bounds=(0, 1),
    )
    is_clip: float | None = OWN(2.0, "c: the most that a token's pi_theta / pi_old counts; none: the ratio is left out")

    def __post_init__(self):
        self.episode_weight = self.step_weight = self.kl = 0.0
        if self.teacher_rate:
            self.frozen_dtype = "float32"  # bfloat16 would round small moves away
        super().__post_init__()
        if self.is_clip is not None and self.is_clip <= 0:
            raise ValueError(f"--is-clip must be positive, not {self.is_clip}")
        if self.lora_rank and self.teacher_rate:
            raise ValueError(f"--algo {self.algo} with --lora-rank has no teacher that moves: --teacher-rate 0")

    @property
    def least_rollouts(self) -> int:
        return 2

    @property
    def kept_models(self) -> int:
        return 1 if self.teacher_rate else 0

    @property
    def levels(self) -> tuple[Level, ...]:
        return ("episode",)

    @property
    def writes_skills(self) -> bool:
        return False


# ---- the teacher, and what it is shown -------------------------------------------------------------------------------


def peer_skills(run: Run[Settings], trajectories: list[Trajectory]) -> tuple[list[Skills | None], dict[str, float]]:
    if run.config.teacher_rate:
        move_teacher(run)  # before anything is scored under it
    peers = [peer_of(trajectories, at) for at in range(len(trajectories))]
    return [Skills("", transcript(peer), {}) if peer else None for peer in peers], {}


def peer_of(trajectories: list[Trajectory], at: int) -> Trajectory | None:
    """The first other success in the group of trajectory `at` that has actions to show; None where there is none."""
    group, others = trajectories[at].group, trajectories[:at] + trajectories[at + 1 :]
    return next((other for other in others if other.success and other.group == group and transcript(other)), None)


def transcript(trajectory: Trajectory) -> str:
    """What it did, in words that the tiny model knows, too. Thoughts and observations are left out, and actions that
    are not valid: not in the prompt's form, though some of them may have been carried out."""
    actions = [step.action for step in trajectory.steps if step.valid]
    return f"first {' then '.join(actions)}" if actions else ""


@torch.no_grad()
def move_teacher(run: Run[Settings]) -> None:
    """theta_teacher += rate (theta - theta_teacher), in the scorer's place. `run.state` keeps it for --resume."""
    teacher = run.models[run.config.scorer]
    with run.reading(teacher):
        own = list(teacher.parameters())
        before = run.state.get("teacher", own)  # of a checkpoint, where the run goes on from one
        for theirs, old, policy in zip(own, before, run.policy.parameters(), strict=True):
            theirs.copy_(old).lerp_(policy, run.config.teacher_rate)
        run.state["teacher"] = [weights.to("cpu", copy=True) for weights in own]


# ---- the loss --------------------------------------------------------------------------------------------------------


def sdpo_loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    config = run.config
    states, new, at = states_and_logprobs(run.policy, micro, config.temperature)  # (n, H), (n,)
    losses, terms = grpo_loss(new, at, batch, config)  # 0, like A and beta
    exact = distance_to_scorer(run, batch, "episode", states, at)  # (n,) 0 without a peer
    exact = exact.masked_fill(turn_ends(batch)[at].to(exact.device), 0.0)
    if config.is_clip is not None:
        exact = exact * clipped_ratio(new, batch.old_logprobs[at].to(new.device), config.is_clip)
    return losses + exact, terms | {"loss/distill": exact}


def turn_ends(batch: Batch) -> Tensor:
    """The last token of each turn, but of an episode's last turn. -> (B, R) bool"""
    more = [step is not trajectory.steps[-1] for trajectory in batch.trajectories for step in trajectory.steps]
    columns, last = torch.arange(batch.mask.shape[1]), batch.mask.sum(dim=1) - 1  # (R,), (B,)
    return (columns == last[:, None]) & torch.tensor(more, dtype=torch.bool)[:, None]


def clipped_ratio(new: Tensor, old: Tensor, most: float) -> Tensor:
    """min(pi_theta / pi_old, most), without gradient. (n,), (n,) -> (n,)"""
    return (new - old).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=most)


VARIANT = replace(OPID, skills=peer_skills, advantages=no_outcome, loss=sdpo_loss, settings=Settings)
