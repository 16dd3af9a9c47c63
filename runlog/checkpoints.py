"""Checkpoints: everything that the next iteration depends on, complete or absent, never NaN or infinite.

One file (000009.pt), or, of a sharded run, a folder that every process writes its part of (000009.shards, shards.py). A
run goes on from either, sharded or not, in any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import torch

from lm.loading import remove, write_whole
from lm.processes import like, not_finite, parts_of
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


def save(folder: Path, iteration: int, model, optimizer, variant: dict) -> None:
    """Written beside, then renamed; by shards where the model is sharded, then by all processes together. Raises
    FloatingPointError, and writes nothing, where a weight is not finite."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if spoilt := not_finite(trained):
        raise FloatingPointError(f"{spoilt} is not finite after iteration {iteration}: no checkpoint is written")
    state = {"iteration": iteration, "model": trained, "optimizer": optimizer.state_dict(), "variant": variant}
    if parts_of(model):
        shards.save(folder / f"{iteration:06d}.shards", state)
    else:
        write_whole(folder / f"{iteration:06d}.pt", lambda temporary: torch.save(state, temporary))


@torch.no_grad()
def load(path: Path, model, optimizer) -> dict:
    """Into both -> what the variant keeps. Raises ValueError for a checkpoint of another model, or of an older version
    of this code."""
    own = parameters_of(model)
    if path.is_dir():
        state = shards.load(path, own, optimizer)
    else:
        state = torch.load(path, map_location="cpu" if parts_of(model) else model.device, weights_only=True)
    if "variant" not in state:
        raise ValueError(f"{path} is of an older version of this code: go on with that one, or start anew")
    if unexpected := state["model"].keys() - own.keys():
        raise ValueError(f"{path} is of another model: it holds {min(unexpected)}")
    for name, parameter in own.items():
        if name in state["model"]:
            parameter.copy_(like(parameter, state["model"][name]))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, moments in state["optimizer"]["state"].items():
        moments |= {name: like(trained[i], value) for name, value in moments.items()}
    optimizer.load_state_dict(state["optimizer"])
    return state["variant"]


def parameters_of(model) -> dict[str, torch.Tensor]:
    """By name; tied ones have one name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def reading(tokenizer) -> str:
    """The fingerprint of how a tokenizer reads: its tokens and its chat template."""
    text = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(model) -> str:
    """Of all weights: the same for the same numbers on any device."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        rows = parameter.detach().reshape(len(parameter), -1) if parameter.ndim else parameter.detach().reshape(1, 1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(torch.hash_tensor(rows, dim=1).view(torch.int64).cpu().numpy().tobytes())  # xor of a row's bits
    return digest.hexdigest()[:16]
