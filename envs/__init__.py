"""The environment protocol and the registry. A new environment is one file: copy the protocol, add a line below."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from data import Prompt


class TextEnv(Protocol):
    """Gymnasium's conventions on text, plus the two things an environment knows best: its prompt and its parser.

    Optional: `prefetch(responses: list[str]) -> None`, called on one live environment of a rollout before each turn's
    steps, with the texts of all live episodes' responses in order. An environment whose steps ask something slow (a
    search server) can ask for all of them in one request there, and find the answers in its steps.
    """

    max_steps: int

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start an episode -> (observation, info). `info["task"]` is the goal in words, `info["task_type"]` its kind,
        `info["game"]` where it came from, `info["admissible_actions"]` the actions possible now (where known)."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """-> (observation, reward, terminated, truncated, info). `info["won"]` says whether the task is solved."""

    def tasks(self, split: str) -> list[Any]:
        """What `reset(options={"game": ...})` accepts for `split` (train, valid_seen, valid_unseen, ...), in order."""

    def build_prompt(
        self, style: str, task: str, history: list[tuple[str, str]], observation: str, admissible: list[str]
    ) -> Prompt:
        """The user message for the coming turn, with its skill slots open.

        `style` is "window" (a whole prompt of its own, with the last few of `history` in it) or "chat" (an opening
        message when `history` is empty, else just the new observation). `history` holds every earlier (observation,
        action). The episode slot sits right after the task description, in "chat" only in the opening message; the
        step slot sits right before the turn that it guides.
        """

    def parse_action(self, response: str, admissible: list[str]) -> tuple[str, bool]:
        """A response's text -> (the action to send, whether it is a valid one)."""

    def analysis_prompt(self) -> str | None:
        """A template for writing skills in this environment's own words, or None for the general one of skills.py."""


_REGISTRY = {
    "alfworld": ("envs.alfworld", "AlfworldEnv"),
    "search": ("envs.search", "SearchEnv"),
    "webshop": ("envs.webshop", "WebshopEnv"),
}


ENVIRONMENTS = tuple(_REGISTRY)


def make_env(name: str, **options) -> TextEnv:
    """An environment by its name. Raises ValueError for an unknown name or option, listing the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    module, cls = _REGISTRY[name]
    return getattr(import_module(module), cls)(**options)
