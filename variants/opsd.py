"""OPSD: SDAR's gated term alone, without an outcome."""

from dataclasses import replace

import torch

from variants.sdar import VARIANT as SDAR
from variants.sdar import outcome_only


def no_advantages(run, batch, rng):
    found = outcome_only(run, batch, rng)
    return replace(found, total=torch.zeros_like(found.total))


VARIANT = replace(SDAR, advantages=no_advantages)
