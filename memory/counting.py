"""How much memory a computation holds, counted on tensors without data: the model's own code runs, nothing is computed.

It takes a second or two, and no device. What counts is what PyTorch's tensors hold, which on a GPU is what
`torch.cuda.max_memory_allocated` says of the same code; what a kernel needs inside itself does not.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lm.loading import add_lora


class Count(TorchDispatchMode):
    """While it is entered: `held`, bytes of the tensors that are alive, and `peaks`, the most of it in each stage, up
    to a `mark` and from there on. Tensors that were there before (`known`) count as nothing. `kept` and `cache` are for
    the work to set: what it leaves behind, and keys and values."""

    def __init__(self, known):
        super().__init__()
        self.held, self.peaks, self.kept, self.cache = 0, [0], 0, 0
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
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


def shell(architecture, dtype: str, lora_rank: int) -> nn.Module:
    """The model with all its sizes and none of its data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, dtype))
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

    def peak_of(self, work: Callable[[nn.Module, Count], None]) -> tuple[float, float, float]:
        """Bytes beyond the weights that `work` holds: (at its peak, what it `kept`, its `cache`).

        In each stage of it memory grows with every layer by the same, so that two numbers of layers say it of any.
        """
        stages = [self._stages(work, architecture) for architecture in self.counted]
        if len(stages) == 2:
            stages = [[two + self.more * (three - two) for two, three in zip(*stages, strict=True)]]
        *peaks, kept, cache = stages[0]
        return max(peaks), kept, cache

    def _stages(self, work, architecture) -> list[float]:
        model = shell(architecture, *self.options)
        with _without_data(model), Count([*model.parameters(), *model.buffers()]) as count:
            work(model, count)
            return [*count.peaks, count.kept, count.cache]


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
