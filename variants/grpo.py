"""GRPO: OPID whose lambdas are 0, so that no skill is written and nothing is re-scored under one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from config import Config
from train import OPID


@dataclass
class Settings(Config):
    def __post_init__(self):
        self.episode_weight = self.step_weight = 0.0
        super().__post_init__()


VARIANT = replace(OPID, settings=Settings)
