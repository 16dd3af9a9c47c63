"""The larger model that an on-policy distilled student learns from."""

from __future__ import annotations

from tiny.loading import load_model


def load_teacher(name: str, tokenizer, *, dtype: str):
    """A frozen model. Raises ValueError where its tokenizer is not the student's: it has to score the student's token
    ids."""
    teacher, own = load_model(name, dtype=dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {name} has another tokenizer than --model: it cannot score the model's tokens")
    return teacher.requires_grad_(False).eval()
