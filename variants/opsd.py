"""OPSD: SDAR's gated term alone, without an outcome."""

from __future__ import annotations

from dataclasses import replace

import torch

from data import Advantages, Batch
from runlog.start import Run
from variants.sdar import VARIANT as SDAR
from variants.sdar import outcome_only


def no_outcome(run: Run, batch: Batch) -> Advantages:
    found = outcome_only(run, batch)
    return replace(found, total=torch.zeros_like(found.total))


VARIANT = replace(SDAR, advantages=no_outcome)
