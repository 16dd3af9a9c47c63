"""How much memory a computation holds, counted on tensors without data: the model's own code runs, nothing is computed.

It takes a second or two, and no device. What counts is what PyTorch's tensors hold, which on a GPU is what
`torch.cuda.max_memory_allocated` says of the same code; what a kernel needs inside itself does not.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lm.loading import add_lora


class Count(TorchDispatchMode):
    """While it is entered: `held`, bytes of the tensors that are alive, and `peaks`, the most of it in each stage, up
    to a `mark` and from there on. Tensors that were there before (`known`) count as nothing. `kept` is for the work to
    set: what it leaves behind."""

    def __init__(self, known):
        super().__init__()
        self.held, self.peaks, self.kept = 0, [0], 0
        self._sizes: dict[int, int] = {}  # storage -> its bytes
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
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


Work = Callable[[nn.Module, Count], None]


def shell(architecture, dtype: str, lora_rank: int) -> nn.Module:
    """The model with all its sizes and none of its data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, dtype))
        return add_lora(model, lora_rank) if lora_rank else model


def peak_of(work: Work, architecture, dtype: str, lora_rank: int) -> tuple[float, float]:
    """Bytes beyond the weights that `work` holds: (at its peak, left behind).

    Where all layers are alike it is counted with two and with three of them, and each stage extended to all: in a stage
    memory grows with every layer by the same.
    """
    text = architecture.get_text_config(decoder=True)
    depth, shorter = text.num_hidden_layers, [_shortened(architecture, layers) for layers in (2, 3)]
    sizes = [bytes_of(shell(each, dtype, lora_rank)) for each in (*shorter, architecture)]
    if depth <= 3 or sizes[2] != sizes[0] + (depth - 2) * (sizes[1] - sizes[0]):
        stages = _stages(work, architecture, dtype, lora_rank)
        return max(stages[:-1]), stages[-1]
    two, three = (_stages(work, each, dtype, lora_rank) for each in shorter)
    stages = [a + (depth - 2) * (b - a) for a, b in zip(two, three, strict=True)]
    return max(stages[:-1]), stages[-1]


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


def _stages(work: Work, architecture, dtype: str, lora_rank: int) -> list[float]:
    """The peak of each stage, and what is left behind."""
    model = shell(architecture, dtype, lora_rank)
    with _without_data(model), Count([*model.parameters(), *model.buffers()]) as count:
        work(model, count)
        return [*count.peaks, count.kept]


@contextlib.contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """Inside, new tensors have a shape, a type and a device, and no data. So have the model's: it comes from the meta
    device, on which autocast does nothing."""
    with FakeTensorMode():
        made: dict[int, torch.Tensor] = {}  # what is tied stays tied
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                    held[name] = None if tensor is None else made[id(tensor)]
        yield
