"""Which model plays, by its name: the tiny one, a cold-started one, or what lm/loading.py loads."""

from __future__ import annotations

import torch

import lm.loading
from lm.obstacles import fuse_norms
from tiny.coldstart import PREFIX, cold_started
from tiny.plays import TINY, script
from tiny.warmstart import tiny_model, tiny_tokenizer, warm_started


def load_model(name: str, *, env: str = "alfworld", dtype: str = "float32", training: int = 0):
    """-> (model, tokenizer). `tiny`: the laptop model, warm-started for `env`; `tiny-2` has two layers in any, as the
    benches' have (lab/README.md).
    `cold:NAME`: what lm/loading.py knows by NAME, after its cold start for `env`. Both are trained where they are not
    there yet, then kept; `training` is the seed of that. Any other model has none."""
    if name in TINY:
        model, tokenizer = warm_started(env, seed=training, layers=TINY[name])
        model.name_or_path = name
        return lm.loading.rounded(fuse_norms(model), getattr(torch, dtype)), tokenizer
    own = cold_started(name, env, training) if name.startswith(PREFIX) else name
    return lm.loading.load_pretrained(own, dtype=dtype)


def load_config(name: str, env: str = "alfworld"):
    """The architecture of what `load_model` would load, without its weights."""
    if name in TINY:
        return tiny_model(len(tiny_tokenizer(env)), seed=0, layers=TINY[name] or script(env).LAYERS).config
    return lm.loading.load_architecture(name.removeprefix(PREFIX))
