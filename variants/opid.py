"""OPID itself: train.py."""

from train import OPID as VARIANT

__all__ = ["VARIANT"]
