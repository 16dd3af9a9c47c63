"""Room on the disk: what a run writes, and whether that is there before it has played for hours."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from torch import nn

from config import Config
from memory.counting import bytes_of


def most(config: Config, model: nn.Module) -> float:
    """Bytes of checkpoints and final policy when they are most: a new checkpoint is whole before the oldest goes.
    What is logged is not counted."""
    checkpoint = 3 * bytes_of(model, trained=True)  # the weights and AdamW's two moments
    checkpoint += config.kept_models * bytes_of(model)
    count = -(-config.iterations // config.save_every)
    kept = min(count, config.keep_checkpoints)
    policy = bytes_of(model)
    if config.lora_rank:  # merged, and the adapters: all in float32 whatever --dtype says
        policy = sum(4 * weight.numel() for weight in model.parameters())
    return max(min(count, kept + 1) * checkpoint, kept * checkpoint + policy)


def room(folder: Path) -> float:
    """Bytes for the run in `folder`, which need not be there yet: what is free, and what its checkpoints take now."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    return shutil.disk_usage(there).free + held


def describe(config: Config, model: nn.Module) -> str:
    """One line, and a warning where the disk would run full."""
    size, free = most(config, model), room(Path(config.out))
    line = f"disk: at most {_shown(size)} of checkpoints and policy, {_shown(free)} there"
    if size <= free:
        return line
    fewer = most(replace(config, keep_checkpoints=1), model)
    keep = f", or keep fewer, with --keep-checkpoints 1 ({_shown(fewer)})" if fewer <= free else ""
    return f"{line}\nWARNING: the disk of {config.out} may run full: free some of it, or take another --out{keep}"


def _shown(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
