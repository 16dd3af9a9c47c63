"""A checkpoint that every process writes its own part of, in PyTorch's distributed format, so that any number of
processes can read it, sharded or not.

    000009.shards/    __0_0.distcp, __1_0.distcp, ...   the shards of each process
                      .metadata                         which shard is where
                      rest.pt                           what is no tensor
                      index.json                        a checksum of each of these files
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_tensors
from torch.distributed.checkpoint import save as save_tensors
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lm.loading import remove, whole_or_nothing

PIECE = 2**24  # bytes of a file that are read at a time


def save(path: Path, state: dict) -> None:
    """Written beside, then renamed. All processes call it, and the folder has to be one that they share."""
    temporary, rank = path.with_name(path.name + ".tmp"), distributed.get_rank()
    if rank == 0:
        remove(temporary)
        temporary.mkdir()
    distributed.barrier()
    with whole_or_nothing(temporary, clear=rank == 0):
        _write(temporary, rank, state)
    if rank == 0:
        remove(path)  # a damaged one
        temporary.rename(path)
    distributed.barrier()


def _write(folder: Path, rank: int, state: dict) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for i, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    save_tensors(tensors, storage_writer=FileSystemWriter(folder))
    own = list(folder.glob(f"__{rank}_*"))
    if rank == 0:
        rest = {"iteration": state["iteration"], "variant": state["variant"]}
        torch.save(rest | {"groups": state["optimizer"]["param_groups"]}, folder / "rest.pt")
        own += [folder / "rest.pt", folder / ".metadata"]
    sums: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(sums, {file.name: checksum(file) for file in own})
    if rank == 0:
        (folder / "index.json").write_text(json.dumps({name: crc for each in sums for name, crc in each.items()}))


def intact(path: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        sums = json.loads((path / "index.json").read_text())
        return all(checksum(path / name) == crc for name, crc in sums.items())
    except (OSError, ValueError):
        return False


def load(path: Path, own: dict[str, Tensor], optimizer) -> dict:
    """What `save` was given: weights read into `own` themselves, moments into new tensors that are shared out as
    the optimizer's parameters are."""
    reader = FileSystemReader(path)
    written = reader.read_metadata().state_dict_metadata
    kept = {name: about for name, about in written.items() if isinstance(about, TensorStorageMetadata)}
    trained = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    tensors = {f"model.{name}": tensor for name, tensor in own.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, about in kept.items():
        if name.startswith("optimizer."):
            _, i, moment = name.split(".")
            like = trained[int(i)]
            same = about.size == like.shape
            empty = torch.empty_like(like) if same else torch.empty(about.size, dtype=about.properties.dtype)
            tensors[name] = state.setdefault(int(i), {})[moment] = empty
    load_tensors({name: tensor for name, tensor in tensors.items() if name in kept}, storage_reader=reader)
    rest = torch.load(path / "rest.pt", weights_only=True)
    weights = {name.removeprefix("model."): tensors.get(name) for name in kept if name.startswith("model.")}
    optimizer_state = {"state": state, "param_groups": rest.pop("groups")}
    return rest | {"model": weights, "optimizer": optimizer_state}


def checksum(path: Path) -> int:
    """CRC-32. Raises OSError where there is no such file."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
