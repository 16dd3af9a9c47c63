"""Checkpoints: everything that the next iteration depends on, complete or absent, and never a number that is none."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch

from lm.loading import write_whole


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.pt"))


def newest_readable(checkpoints: list[Path]) -> tuple[Path | None, list[Path]]:
    """Checkpoints, oldest first -> (the newest one that is whole, the newer ones that are not).

    A checkpoint is a zip file with a checksum of each part, so that a truncated or damaged one shows.
    """
    damaged = []
    for path in reversed(checkpoints):
        if _whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def save(path: Path, iteration: int, model, optimizer, ema, method: dict) -> None:
    """Written beside, then renamed. Raises FloatingPointError, and writes nothing, where a weight is not finite."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if spoilt := [name for name, p in trained.items() if not p.isfinite().all()]:
        raise FloatingPointError(f"{spoilt[0]} is not finite after iteration {iteration}: no checkpoint is written")
    state = {
        "iteration": iteration,
        "model": trained,
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
        "method": method,
    }
    write_whole(path, lambda temporary: torch.save(state, temporary))


def load(path: Path, model, optimizer, ema, method) -> None:
    """Into all of them. Raises ValueError for a checkpoint of another model or of an older version of this code."""
    state = torch.load(path, map_location=model.device, weights_only=True)
    if "method" not in state:
        raise ValueError(f"{path} is of an older version of this code: go on with that one, or start anew")
    unexpected = model.load_state_dict(state["model"], strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} is of another model: it holds {unexpected[0]}")
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
    method.restore(state["method"])


def fingerprint(model) -> str:
    """Of all weights: the same for the same numbers on any device."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        rows = parameter.detach().reshape(len(parameter), -1) if parameter.ndim else parameter.detach().reshape(1, 1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(torch.hash_tensor(rows, dim=1).view(torch.int64).cpu().numpy().tobytes())  # xor of a row's bits
    return digest.hexdigest()[:16]
