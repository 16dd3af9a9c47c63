"""GRPO: OPID whose lambdas are 0, so that no skill is written and nothing is re-scored under one."""

from dataclasses import dataclass, replace

from config import OWN, Config
from train import OPID


@dataclass
class Settings(Config):
    episode_weight: float = OWN(0.0, "lambda_ep: 0")
    step_weight: float = OWN(0.0, "lambda_step: 0")


VARIANT = replace(OPID, settings=Settings)
