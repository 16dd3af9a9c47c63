"""The environment protocol and the registry. A new environment is one file: copy the protocol, add a line below."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import typing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from envs.guard import GameFailure, Guard, Guarded, ProtocolError, check_env, close_env

if TYPE_CHECKING:
    from data import Prompt


__all__ = ["GameFailure", "Guard", "Guarded", "ProtocolError", "TextEnv"]
__all__ += ["check_env", "close_env", "make_env", "read_options"]


class TextEnv(Protocol):
    """Gymnasium's conventions on text, plus the two things an environment knows best: its prompt and its parser.

    Its constructor's keywords are its options. `max_steps`, `prompt` and `history` are flags of train.py, given to the
    constructors that take them; the others come from `--env-options key=value ...` (see `read_options`).

    Optional attributes, with what holds where an environment has none:
    - `held_out`: the splits that evaluation plays (valid_seen, valid_unseen)
    - `columns`: task type -> its column in the table, in order (the types' own names)
    - `generated`: False where the data come from outside, so that training takes all there are (True)
    - `sources() -> dict[str, str]`: the files and addresses that the data come from, by what they hold, but for games
      that are files themselves. A resumed run refuses others (none)
    - `new_words`, of the class: options that, changed, bring words which the tiny model does not know (none)
    - `time_limit`: seconds that one call of a method may take, None for any (60; see guard.within). `tasks` may take
      as long as it likes. A call that takes longer, or raises something, ends that episode. It is left out of training,
      counted and logged
    - `close() -> None`: free what the environment holds. Called when an episode ends, however it ends. It may be called
      twice, and a `reset` may follow it (nothing to free)
    - `prefetch(responses: list[str]) -> None`, called on one live environment of a rollout before each turn's steps,
      with the texts of all live episodes' responses in order. An environment whose steps ask something slow (a search
      server) can ask for all of them in one request there, and find the answers in its steps. Where it fails or takes
      longer than `time_limit`, the log says so, and the steps ask
    """

    max_steps: int

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start an episode -> (observation, info). `info["task"]` is the goal in words, `info["task_type"]` its kind,
        `info["game"]` where it came from, `info["admissible_actions"]` the actions possible now (where known)."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """-> (observation, reward, terminated, truncated, info). `info["won"]` says whether the task is solved."""

    def tasks(self, split: str, count: int | None = None) -> list[Any]:
        """What `reset(options={"game": ...})` accepts for `split` (train, valid_seen, valid_unseen, ...), in order: the
        first `count`, or all there are."""

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


def on_this_machine(url: str) -> bool:
    """Whether a server is on this machine, so that no proxy is asked for it."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.endswith(".localhost") or host.startswith("127.")


_REGISTRY = {
    "alfworld": ("envs.alfworld", "AlfworldEnv"),
    "search": ("envs.search", "SearchEnv"),
    "textarena": ("envs.textarena", "TextArenaEnv"),
    "webshop": ("envs.webshop", "WebshopEnv"),
}


ENVIRONMENTS = tuple(_REGISTRY)
COMMON = ("max_steps", "prompt", "history")  # constructor keywords that have a flag of their own


def env_class(name: str) -> type:
    """Raises ValueError for an unknown environment, listing the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(sorted(_REGISTRY))}")
    module, cls = _REGISTRY[name]
    return getattr(import_module(module), cls)


def make_env(name: str, **options) -> TextEnv:
    """An environment by its name. Of COMMON it gets what its constructor takes. Raises ValueError for an unknown name
    or option, listing the known ones."""
    cls = env_class(name)
    known = inspect.signature(cls).parameters
    options = {key: value for key, value in options.items() if key in known or key not in COMMON}
    if unknown := options.keys() - known:
        raise ValueError(f"--env {name} has no option {unknown.pop()!r}; it has: {', '.join(known) or 'none'}")
    return cls(**options)


def read_options(name: str, texts: dict[str, str]) -> dict[str, Any]:
    """The text of `--env-options` -> keywords of the constructor, by its annotations: int, float, bool, a Literal or
    str, each possibly None. Raises ValueError for an unknown option or a value that cannot be read."""
    cls = env_class(name)
    hints = typing.get_type_hints(cls.__init__)
    known = {key: kinds for key in inspect.signature(cls).parameters if (kinds := _kinds(hints.get(key, str)))}
    options = {}
    for key, text in texts.items():
        if key not in known or key in COMMON:
            names = [option for option in known if option not in COMMON]
            raise ValueError(f"--env {name} has no option {key!r}; --env-options knows: {', '.join(names) or 'none'}")
        options[key] = _read(key, text, known[key])
    return options


def fingerprints(env: TextEnv, games: dict[str, list]) -> dict[str, str]:
    """What each split's games and each of the environment's sources hold. Files count by their content, not their
    place; of games the folders next to them count, too, since their names may say the kind of task."""

    def of(game) -> list:
        if isinstance(game, str | Path) and os.path.isfile(game):
            return [*Path(game).parts[-3:], digest(game)]
        return [game]

    sources = getattr(env, "sources", dict)()
    found = {name: digest(place) if os.path.isfile(place) else place for name, place in sources.items()}
    for split, names in games.items():
        text = json.dumps([of(name) for name in names], default=lambda game: type(game).__name__)
        found[f"games of {split}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def digest(path: str | Path) -> str:
    """The fingerprint of a file's content. Of more than a gigabyte: of its size and a thousand pieces of it."""
    with open(path, "rb") as file:
        size, pieces, piece = os.fstat(file.fileno()).st_size, 1000, 2**16
        if size <= 2**30:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        found = hashlib.sha256(str(size).encode())
        for i in range(pieces):
            file.seek((size - piece) * i // (pieces - 1))
            found.update(file.read(piece))
        return found.hexdigest()[:16]


def new_words(name: str, texts: dict[str, str]) -> list[str]:
    """The options among `texts` whose values bring words that the tiny model does not know."""
    cls = env_class(name)
    known = inspect.signature(cls).parameters
    return [key for key in getattr(cls, "new_words", ()) if key in texts and texts[key] != known[key].default]


def _kinds(hint) -> list:
    """The kinds of value that a text can be read as, for an annotation; none: it takes what no text can say."""
    if typing.get_origin(hint) is typing.Literal:
        return [hint]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return [kind for kind in kinds if kind in (int, float, bool, str) or typing.get_origin(kind) is typing.Literal]


def _read(key: str, text: str, kinds: list):
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            if text in typing.get_args(kind):
                return text
        elif kind is bool:
            if text in ("true", "false"):
                return text == "true"
        else:
            try:
                return kind(text)
            except ValueError:
                continue
    choices = [str(typing.get_args(kind)) if typing.get_args(kind) else kind.__name__ for kind in kinds]
    raise ValueError(f"--env-options {key} must be {' or '.join(choices)}, not {text!r}")
