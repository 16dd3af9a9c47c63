"""Checkpoints: everything that the next iteration depends on, complete or absent, and never a number that is none.

One file (000009.pt), or, of a sharded run, a folder that every process writes its part of (000009.shards, shards.py). A
run goes on from either, sharded or not, in any number of processes.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import torch

from lm.loading import remove, write_whole
from lm.parallel import like, not_finite, parts_of
from runlog import shards


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    names = re.compile(r"\d+\.(pt|shards)")
    return sorted(path for path in (folder / "checkpoints").glob("*") if names.fullmatch(path.name))


def set_aside(path: Path) -> None:
    """A damaged checkpoint under a name that is no checkpoint's."""
    aside = path.with_name(path.name + ".damaged")
    remove(aside)
    path.rename(aside)


def newest_readable(checkpoints: list[Path]) -> tuple[Path | None, list[Path]]:
    """Checkpoints, oldest first -> (the newest one that is whole, the newer ones that are not).

    A checkpoint has a checksum of each part, so that a truncated or damaged one shows: the file is a zip file.
    """
    damaged = []
    for path in reversed(checkpoints):
        if shards.intact(path) if path.is_dir() else _intact(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _intact(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def save(folder: Path, iteration: int, model, optimizer, ema, method: dict) -> None:
    """Written beside, then renamed; by shards where the model is sharded, then by all processes together. Raises
    FloatingPointError, and writes nothing, where a weight is not finite."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if spoilt := not_finite(trained):
        raise FloatingPointError(f"{spoilt} is not finite after iteration {iteration}: no checkpoint is written")
    state = {"iteration": iteration, "model": trained, "optimizer": optimizer.state_dict(), "method": method}
    if parts_of(model):
        shards.save(folder / f"{iteration:06d}.shards", state | {"ema": None if ema is None else parameters_of(ema)})
    else:
        state |= {"ema": None if ema is None else ema.state_dict()}
        write_whole(folder / f"{iteration:06d}.pt", lambda temporary: torch.save(state, temporary))


@torch.no_grad()
def load(path: Path, model, optimizer, ema) -> dict:
    """Into all of them. Raises ValueError for a checkpoint of another model or of an older version of this code."""
    own, slow = parameters_of(model), {} if ema is None else parameters_of(ema)
    if path.is_dir():
        state = shards.load(path, own, optimizer, slow)
    else:
        state = torch.load(path, map_location="cpu" if parts_of(model) else model.device, weights_only=True)
    if "method" not in state:
        raise ValueError(f"{path} is of an older version of this code: go on with that one, or start anew")
    if unexpected := state["model"].keys() - own.keys():
        raise ValueError(f"{path} is of another model: it holds {min(unexpected)}")
    for weights, saved_ones in ((own, state["model"]), (slow, state["ema"] or {})):
        for name, parameter in weights.items():
            if name in saved_ones:
                parameter.copy_(like(parameter, saved_ones[name]))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, moments in state["optimizer"]["state"].items():
        moments |= {name: like(trained[i], value) for name, value in moments.items()}
    optimizer.load_state_dict(state["optimizer"])
    return state["method"]


def parameters_of(model) -> dict[str, torch.Tensor]:
    """By name; tied ones have one name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fingerprint(model) -> str:
    """Of all weights: the same for the same numbers on any device."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        rows = parameter.detach().reshape(len(parameter), -1) if parameter.ndim else parameter.detach().reshape(1, 1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(torch.hash_tensor(rows, dim=1).view(torch.int64).cpu().numpy().tobytes())  # xor of a row's bits
    return digest.hexdigest()[:16]
