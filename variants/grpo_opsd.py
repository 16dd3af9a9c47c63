"""GRPO + OPSD: SDAR with its gate held at one half, which has no direction in expectation: a control for the gate."""

from dataclasses import dataclass, replace

from config import OWN
from variants.sdar import VARIANT as SDAR
from variants.sdar import Settings as SdarSettings


@dataclass
class Settings(SdarSettings):
    gate_beta: float = OWN(0.0, "beta: 0 holds the gate at one half")


VARIANT = replace(SDAR, settings=Settings)
