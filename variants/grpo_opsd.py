"""GRPO + OPSD: SDAR with its gate held at one half, which has no direction in expectation: a control for the gate. SDAR
release: examples/grpo_opsd_trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from config import OWN
from variants.sdar import VARIANT as SDAR
from variants.sdar import Settings as SdarSettings


@dataclass
class Settings(SdarSettings):
    gate_beta: float = OWN(0.0, "beta: 0 holds the gate at one half", bounds=(0, 0))


VARIANT = replace(SDAR, settings=Settings)
