"""Where weights lie, and what several processes do together. In a single process on one device all of it does nothing.

`Processes` is what train.py knows of this. Gradients are summed in few large buckets. With --shard (FSDP2) every
process holds a part of each weight, gradient and moment. What has no gradient (rollout, skill writing, scoring,
evaluation) runs on weights that are `gathered` once for all of it, so that processes with unequal work don't wait for
one another at every token. Only the update gathers layer by layer, forward and backward; there every process makes as
many passes as the one that has most (`even`). With --offload what a phase does not need rests in host memory.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lm.obstacles import unwrapped
from lm.scoring import Sequence, has_linear_head

BUCKET = 2**25  # bytes of gradients summed in one call: one a tensor waits for the network hundreds of times
EMPTY = Sequence([0, 0], [])  # two tokens of which none is scored: its loss is a sum of nothing

_hollow: WeakKeyDictionary = WeakKeyDictionary()  # sharded model -> the same modules unsharded, without weights


class Processes:
    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def print(self, text: str) -> None:
        """By the main process alone."""
        self.accelerator.print(text)

    def share(self, items: list) -> list:
        """This process's part of them."""
        return items[self.rank :: self.count]

    def sum(self, value: float) -> float:
        return self.accelerator.reduce(torch.tensor(value, dtype=torch.float32, device=self.device), "sum").item()

    def largest(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([value], device=self.device)).max().item()

    def sum_terms(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each term over all processes, of which some may have none."""
        if self.count == 1:
            return sums
        names = sorted({name for others in gather_object([list(sums)]) for name in others})
        zero = torch.zeros((), device=self.device)
        totals = self.accelerator.reduce(torch.stack([sums.get(name, zero) for name in names]), "sum")
        return dict(zip(names, totals, strict=True))

    def even(self, batches: list[list[Sequence]], model) -> list[list[Sequence]]:
        """As many micro-batches in each process, where the model is sharded."""
        return even(batches, model)

    def clip_gradients(self, parameters: list, most: float) -> Tensor:
        """Sum the gradients over all processes and scale them down to the L2 norm `most` -> the norm before."""
        sum_gradients(parameters)
        return clip_gradients(parameters, most)


# ---- gradients -------------------------------------------------------------------------------------------------------


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Over all processes; a parameter without a gradient counts as zero. Those of a sharded model are summed already:
    their backward pass does it."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1 or is_sharded(parameters):
        return
    for bucket in buckets(parameters, BUCKET):
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
        for parameter in bucket:  # before the sum, which needs room itself
            parameter.grad = None
        distributed.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def buckets(parameters: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """In order, each of one dtype and of at most `size` bytes (a larger parameter goes alone)."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and (bucket[0].dtype != parameter.dtype or sum(map(_bytes, bucket)) + _bytes(parameter) > size):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def clip_gradients(parameters: list[torch.nn.Parameter], most: float) -> Tensor:
    """Scale all gradients down to the L2 norm `most` -> the norm before, over all shards: the same in every process."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---- sharding --------------------------------------------------------------------------------------------------------


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is held in parts just now."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def shard(models: Iterable, device: torch.device) -> None:
    """Share the weights of each out over all processes, layer by layer, then the rest, in place.

    They may be on the CPU: only this process's part goes to `device`. Models that share their weights (AdapterOff) are
    sharded once. Called under the run's autocast. Raises ValueError in a single process.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        raise ValueError("--shard splits weights over processes, and there is but one: accelerate launch train.py ...")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for model in models:
        root = unwrapped(model)
        if isinstance(root, FSDPModule):
            continue
        _hollow[root] = hollow(model)
        layers = [module for module in root.modules() if type(module).__name__ in (root._no_split_modules or ())]
        for part in [*reversed(layers), root]:  # inner ones first
            fully_shard(part, mesh=mesh)
        for part in parts_of(root):
            # The loss of every process is divided by the tokens of all: gradients are summed, not averaged. Plain sums,
            # as a factor of any other kind is NCCL's alone.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        root.set_reduce_scatter_unused_params(True)  # a parameter may have a gradient in some processes only
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):  # some weights may be in 16 bits
            root(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # FSDP sets itself up in its first pass
        root.reshard()
        if any(parameter.requires_grad for parameter in root.parameters()):
            with gathered(model):  # tried now, by all processes together: in the update one may ask alone
                has_linear_head(model)


def parts_of(model) -> list[FSDPModule]:
    """The modules that are gathered one at a time; empty where nothing is sharded."""
    root = unwrapped(model)
    return [part for part in root.modules() if isinstance(part, FSDPModule)] if isinstance(root, FSDPModule) else []


@contextmanager
def gathered(model) -> Generator[None]:
    """All weights of a sharded model whole in each process inside, for work without gradient. All processes enter
    together, and inside no one waits. It changes nothing where the model is not sharded, or gathered already."""
    parts = parts_of(model)
    if not parts or not is_sharded(model.parameters()):
        yield
        return
    root, *layers = parts
    root.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
        root.reset_iter_state()  # in parts again; and the order of the passes, perhaps a million, is forgotten


def even(batches: list[list[Sequence]], model) -> list[list[Sequence]]:
    """As many micro-batches in every process as in the one with most, where the model is sharded: what is missing are
    passes over nothing."""
    if not parts_of(model):
        return batches
    most = torch.tensor(len(batches), device=model.device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return batches + [[EMPTY]] * (int(most) - len(batches))


# ---- whole again -----------------------------------------------------------------------------------------------------


def hollow(model):
    """A copy of the modules with parameters that have a shape and no numbers."""
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


@torch.no_grad()
def whole(model):
    """A model whose weights are not sharded: itself, or, in the main process, a copy on the CPU. All processes call it,
    and the others get None."""
    if not parts_of(model):
        return model
    main, weights = distributed.get_rank() == 0, {}
    for name, parameter in model.named_parameters():  # one at a time, so that the device never holds them all
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weights |= {name: full.cpu()} if main else {}
    if not main:
        return None
    copied = _hollow[unwrapped(model)]
    copied.load_state_dict(weights, strict=False, assign=True)  # a tied weight has one name here, and two there
    unwrapped(copied).tie_weights()
    return copied


def local(tensor: Tensor) -> Tensor:
    """This process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def not_finite(weights: dict[str, Tensor]) -> str | None:
    """The first of these weights that is infinite or no number somewhere, in this process's part of it."""
    return next((name for name, weight in weights.items() if not local(weight).isfinite().all()), None)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor that every process has whole, shared out as `parameter` is; as it is where it is no number for each of
    the parameter's, or shared out already."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---- host memory -----------------------------------------------------------------------------------------------------


class Offload:
    """Keeps models and optimizers in host memory and brings them to the device where they are `needed`.

    Raises ValueError where the device is a CPU: there is no other memory then.
    """

    def __init__(self, device: torch.device, wanted: bool):
        if wanted and device.type == "cpu":
            raise ValueError("--offload moves what is not needed from a GPU to host memory: here there is no GPU")
        self.device, self.home = device, torch.device("cpu") if wanted else device

    def rest(self, *things) -> None:
        """To host memory, until they are needed."""
        for thing in things:
            _move(thing, self.home)

    @contextmanager
    def needed(self, *things) -> Generator[None]:
        """On the device for as long as the block runs."""
        for thing in things:
            _move(thing, self.device)
        try:
            yield
        finally:
            self.rest(*things)


def _move(thing: torch.nn.Module | torch.optim.Optimizer, device: torch.device) -> None:
    if isinstance(thing, torch.nn.Module):
        thing.to(device)
        return
    for moments in thing.state.values():
        for name, value in moments.items():
            if value.ndim:  # AdamW counts its steps on the CPU
                moments[name] = value.to(device)


def give_back() -> None:
    """What was freed goes back: to the system, on Linux without a GPU, or to the GPU's other processes.

    glibc keeps what is freed in its heap, in pieces between what lives on, and new tensors of other sizes go on top:
    SmolLM2-135M held 8.4 GiB after two iterations, of which 2.1 were in use, and the next phase added to that. Giving
    it back takes 0.2 s and the next phase begins with what is in use. On a GPU torch keeps it, too: a cold start that
    fits in 7 GiB on a CPU held 110 of an H200's 140, and the runs beside it found none left.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and (trim := _malloc_trim()):
        trim(0)


@functools.cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
