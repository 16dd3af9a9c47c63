"""What a computation holds and does, counted on tensors without data: the model's own code runs, nothing is computed.

It takes a second or two, and no device. What counts as held is what PyTorch's tensors hold, which on a GPU is what
`torch.cuda.max_memory_allocated` says of the same code; what a kernel needs inside itself does not. What it does is
counted an operation at a time (`Work`): hours.py makes seconds of it.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from lm.loading import add_lora
from lm.obstacles import fuse_norms


@dataclass(frozen=True)
class Work:
    """`launches`: operations that PyTorch dispatches, each a kernel or a view. `weights`: bytes of the matrices that
    rows are multiplied with, keys and values among them. `moved`: all other bytes that are read and written.
    `products`, `attention`: multiplications and additions of matrix products, and of attention."""

    launches: float = 0.0
    weights: float = 0.0
    moved: float = 0.0
    products: float = 0.0
    attention: float = 0.0

    def __iter__(self) -> Iterator[float]:
        return iter(vars(self).values())

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * mine for mine in self))


class Count(TorchDispatchMode):
    """While it is entered: `held`, bytes of the tensors that are alive, `peaks`, the most of it in each stage, up to a
    `mark` and from there on, and the `work` done. Tensors that were there before (`known`) count as nothing held.
    `kept` and `cache` are for the work to set: what it leaves behind, and keys and values."""

    def __init__(self, known):
        super().__init__()
        self.held, self.peaks, self.kept, self.cache, self.work = 0, [0], 0, 0, Work()
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.work += work_of(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._add(storage, storage.nbytes())
        return out

    def mark(self, *_) -> None:
        """A new stage begins. (As a hook it is told what it does not need.)"""
        self.peaks.append(self.held)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._sizes:  # a view of what is counted already
            return
        self._sizes[key] = size
        self.held += size
        self.peaks[-1] = max(self.peaks[-1], self.held)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu": (0, 2)}  # where its query is, and how many products it is
ATTENTION["_scaled_dot_product_flash_attention_for_cpu_backward"] = (1, 5)
LOOKED_UP = ("embedding", "index", "index_select", "gather")  # read of their first argument what they return
# which arguments rows are multiplied with: weights, or keys and values
MATRICES = {"mm": slice(1, 2), "bmm": slice(1, 2), "addmm": slice(2, 3)}
MATRICES["_scaled_dot_product_flash_attention_for_cpu"] = slice(1, 3)
NO_NUMBERS = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh")


def work_of(function, args, kwargs, out) -> Work:
    """Of one operation. A view moves nothing, nor does memory that is not filled."""
    kernel = function.overloadpacket
    name = kernel.__name__
    if function.namespace != "aten":  # what tensors without data ask themselves
        return Work()
    if function.is_view or name in NO_NUMBERS:
        return Work(1)
    products = attention = 0.0
    if name in ATTENTION:
        at, count = ATTENTION[name]
        query, key = args[at], args[at + 1]  # (B, heads, L, size) each
        attention = 2 * count * query.numel() * key.shape[2]
    elif kernel in flop_registry:
        products = flop_registry[kernel](*args, **kwargs, out_val=out)
    given = [*args[1:], out] if name in LOOKED_UP else list(args)
    weights = sum(map(bytes_in, args[MATRICES[name]])) if name in MATRICES else 0
    return Work(1, weights, sum(map(bytes_in, tree_leaves([given, kwargs, out]))) - weights, products, attention)


def bytes_in(value) -> int:
    """Of a tensor's numbers, those that it shows many times (`expand`) once; 0 of anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def shell(architecture, dtype: str, lora_rank: int) -> nn.Module:
    """The model with all its sizes and none of its data."""
    with torch.device("meta"):
        model = fuse_norms(AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, dtype)))
        return add_lora(model, lora_rank) if lora_rank else model


class Shells:
    """A model to count on. Where all its layers are alike, two short ones: of two layers, and of three."""

    def __init__(self, architecture, dtype: str, lora_rank: int):
        self.options, depth = (dtype, lora_rank), architecture.get_text_config(decoder=True).num_hidden_layers
        self.more, self.counted = depth - 2, [architecture]  # layers more than two
        if depth > 3:
            short = [_shortened(architecture, layers) for layers in (2, 3)]
            two, three, whole = (bytes_of(shell(each, *self.options)) for each in (*short, architecture))
            if whole == two + self.more * (three - two):
                self.counted = short

    def count(self, work: Callable[[nn.Module, Count], None]) -> tuple[float, float, float, Work]:
        """Bytes beyond the weights that `work` holds: (at its peak, what it `kept`, its `cache`), and what it does.

        In each stage of it all of these grow with every layer by the same, so that two numbers of layers say it of any.
        """
        stages = [self._stages(work, architecture) for architecture in self.counted]
        if len(stages) == 2:
            stages = [[two + self.more * (three - two) for two, three in zip(*stages, strict=True)]]
        size = len([*Work()])
        *peaks, kept, cache = stages[0][:-size]
        return max(peaks), kept, cache, Work(*stages[0][-size:])

    def _stages(self, work, architecture) -> list[float]:
        model = shell(architecture, *self.options)
        with _without_data(model), Count([*model.parameters(), *model.buffers()]) as count:
            work(model, count)
            return [*count.peaks, count.kept, count.cache, *count.work]


def bytes_of(model: nn.Module, *, trained: bool = False) -> int:
    """Of all its weights, or of those that are trained."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def _shortened(architecture, layers: int):
    architecture = copy.deepcopy(architecture)
    text = architecture.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return architecture


@contextlib.contextmanager
def _without_data(model: nn.Module) -> Generator[None]:
    """Inside, new tensors have a shape, a type and a device, and no data. So have the model's: it comes from the meta
    device, on which autocast does nothing."""
    with FakeTensorMode():
        made: dict[int, torch.Tensor] = {}  # what is tied stays tied
        for module in model.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for held in tables:
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                    held[name] = None if tensor is None else made[id(tensor)]
        yield
