"""Host memory for what a phase does not need: frozen models and the optimizer's moments (--offload)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    def needed(self, *things) -> Iterator[None]:
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
