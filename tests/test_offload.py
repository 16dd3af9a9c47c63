"""lm/processes.py: what a phase does not need is in host memory. Here "the device" is the CPU, and "meta" the host:
what has been moved there shows, and what stayed shows, too."""

from contextlib import contextmanager

import pytest
import torch

from lm.processes import Offload


class Poisoned(Offload):
    """What rests is made no number until it is needed again."""

    def __init__(self, *how):
        super().__init__(*how)
        self.aside: dict[int, torch.Tensor] = {}

    def _tensors(self, things):
        for thing in things:
            moments = [m[name] for m in getattr(thing, "state", {}).values() for name in ("exp_avg", "exp_avg_sq")]
            yield from moments if isinstance(thing, torch.optim.Optimizer) else thing.parameters()

    def rest(self, *things):
        for tensor in self._tensors(things):
            self.aside[id(tensor)] = tensor.detach().clone()
            tensor.detach().fill_(float("nan"))

    @contextmanager
    def needed(self, *things):
        for tensor in self._tensors(things):
            tensor.detach().copy_(self.aside.pop(id(tensor)))
        yield
        self.rest(*things)


def offload(home: str) -> Offload:
    moved = Offload(torch.device("cpu"), wanted=False)
    moved.home = torch.device(home)
    return moved


def stepped(model) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_models_and_moments_are_at_home_but_where_they_are_needed():
    model = torch.nn.Linear(3, 2)
    optimizer = stepped(model)
    frozen = torch.nn.Linear(3, 2)
    before = next(moments["exp_avg"].clone() for moments in optimizer.state.values())
    moved = offload("meta")
    with moved.needed(optimizer, frozen):
        assert next(m["exp_avg"] for m in optimizer.state.values()).equal(before)
        assert frozen.weight.device.type == "cpu"
    assert {m[name].device.type for m in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")} == {"meta"}
    assert {m["step"].device.type for m in optimizer.state.values()} == {"cpu"}
    assert frozen.weight.device.type == "meta"
    assert model.weight.device.type == "cpu"  # the trained weights themselves stay


def test_they_are_brought_back_home_after_an_error():
    frozen = torch.nn.Linear(3, 2)
    with pytest.raises(KeyError), offload("meta").needed(frozen):
        raise KeyError
    assert frozen.weight.device.type == "meta"


def test_a_step_after_a_rest_is_the_same_step():
    steps = []
    for rested in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = stepped(model)
        if rested:
            offload("cpu").rest(optimizer)
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        steps.append(model.weight.detach().clone())
    assert torch.equal(*steps)


def test_without_a_gpu_it_is_refused_and_off_it_moves_nothing():
    with pytest.raises(ValueError, match="no GPU"):
        Offload(torch.device("cpu"), wanted=True)
    assert Offload(torch.device("cuda"), wanted=True).home.type == "cpu"
    assert Offload(torch.device("cuda"), wanted=False).home.type == "cuda"
