"""RLSD: the skill rescales A_ep, token by token. SDAR release: verl/trainer/ppo/rlsd_utils.py."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from advantage import linear_decay
from baselines.method import LAMBDA, Config, Method
from data import Batch, Level
from router import LEVELS


class Rlsd(Method):
    whole = False
    idle = LAMBDA
    one_teacher = True

    @staticmethod
    def levels(config: Config) -> tuple[Level, ...]:
        return LEVELS  # lambda has no say

    def mix(self, iteration: int) -> float:
        """mu: from `--rlsd-mix` at iteration 0 in a line to 0 at `--rlsd-iterations`."""
        return self.config.rlsd_mix * linear_decay(iteration, self.config.rlsd_iterations)

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        shift = batch.skill_advantages.nan_to_num()  # (B, R)
        mix, clip = self.mix(iteration), self.config.rlsd_clip
        return replace(batch, advantages=rescale(outcome, shift, batch.mask, mix=mix, clip=clip))


def rescale(outcome: Tensor, shift: Tensor, mask: Tensor, *, mix: float, clip: float) -> Tensor:
    """RLSD: A_ep ((1 - mix) + mix clip(exp(sign(A_ep) Delta), 1 - clip, 1 + clip)), 0 off the mask. -> (B, R)

    `outcome` (B,); `shift` (B, R) is what `skill_advantage` returned: 0, hence weight 1, where no skill was scored. The
    skill says which tokens matter most and never which way to go: no sign changes. `mix` 0 is GRPO.
    SDAR release: verl/trainer/ppo/rlsd_utils.py, compute_rlsd_token_advantage.
    """
    sign = outcome.sign()[:, None]  # (B, 1)
    weight = (sign * shift).exp().clamp(1 - clip, 1 + clip)  # (B, R)
    return outcome[:, None] * mask.to(outcome.dtype) * ((1 - mix) + mix * weight)
