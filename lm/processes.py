"""One object for everything that several processes do together. In a single process each of it does nothing."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lm.packing import Sequence
from lm.parallel import clip_gradients, even, sum_gradients

Terms = dict[str, Tensor]


class Processes:
    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.count, self.main = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.is_main_process,
        )

    def share(self, items: list) -> list:
        """This process's part of them."""
        return items[self.rank :: self.count]

    def sum(self, value: float) -> float:
        return self.accelerator.reduce(torch.tensor(value, dtype=torch.float32, device=self.device), "sum").item()

    def largest(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([value], device=self.device)).max().item()

    def sum_terms(self, sums: Terms) -> Terms:
        """Each term over all processes, of which some may have none."""
        if self.count == 1:
            return sums
        names = sorted({name for others in gather_object([list(sums)]) for name in others})
        zero = torch.zeros((), device=self.device)
        totals = self.accelerator.reduce(torch.stack([sums.get(name, zero) for name in names]), "sum")
        return dict(zip(names, totals, strict=True))

    def even(self, batches: list[list[Sequence]], model) -> list[list[Sequence]]:
        """As many micro-batches in each process, where the model is sharded: see lm/parallel.py."""
        return even(batches, model)

    def clip_gradients(self, parameters: list, most: float) -> Tensor:
        """Sum the gradients over all processes and scale them down to the L2 norm `most` -> the norm before."""
        sum_gradients(parameters)
        return clip_gradients(parameters, most)
