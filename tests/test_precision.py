"""bfloat16 only where the device multiplies in it."""

import pytest
import torch

import lm.precision
from config import Config
from lm.precision import mixed_precision, multiplies_bfloat16
from tiny.coldstart import ColdStart


@pytest.mark.parametrize("has, chosen", [(True, "bf16"), (False, "no")])
def test_auto_is_what_the_device_multiplies_in(has, chosen, monkeypatch):
    monkeypatch.setattr(lm.precision, "multiplies_bfloat16", lambda device: has)
    assert mixed_precision("auto") == ColdStart().mixed_precision == chosen
    assert Config(mixed_precision="auto").mixed_precision == chosen
    assert Config(mixed_precision="bf16").mixed_precision == ColdStart(mixed_precision="bf16").mixed_precision == "bf16"


def test_a_processor_without_oneDNN_multiplies_in_float32(monkeypatch):
    assert multiplies_bfloat16("cpu") in (True, False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert multiplies_bfloat16("cpu") is False
