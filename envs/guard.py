"""What stands between an environment and a rollout: one bad game does not end a run, and a bad environment is named.

`Guard` opens and closes the environments of a rollout, and counts the games that failed. `check_env` says what an
environment of one's own gets wrong.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from data import Prompt, Slot

log = logging.getLogger(__name__)

TIME_LIMIT = 60.0  # seconds for one call of an environment, where it names no `time_limit`
MOST_FAILED = 0.05  # of the episodes; one group may fail whole, since one bad game is met by all of it
LONGEST = 500_000  # characters of an observation: no context holds more, and tokenizers need minutes and gigabytes
LONGEST_PROMPT = 4 * LONGEST
ANSWERS = ("", "look", "<think>hm</think><action>look</action>", "{} \x00 \ud800")  # for `check_env` to be parsed


class ProtocolError(ValueError):
    """An environment does not keep the protocol of envs/__init__.py. The message says where."""


class GameFailure(RuntimeError):
    """Games cannot be played: their environment raised something, or did not answer in time."""


class TimeUp(BaseException):
    """A call took too long. No Exception, or an environment that retries for ever would catch it."""


def close_env(env: Any) -> None:
    """Free what an environment (or an engine) holds. One without `close` holds nothing."""
    close = getattr(env, "close", None)
    if close is not None:
        close()


def try_to_close(env: Any, game: Any) -> None:
    """`close_env`; where it fails, the log says so."""
    try:
        within(getattr(env, "time_limit", TIME_LIMIT), lambda: close_env(env))
    except BaseException as error:
        _pass_ctrl_c(error)
        log.warning("game %s cannot be closed: %s", one_line(game), described(error))


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """The result of `call`. Raises TimeUp where it takes longer than `seconds`.

    Only the main thread of a POSIX system has a limit. Elsewhere there is none. Code in C that never comes back to
    Python is not stopped either. A timer that was set before goes on afterwards.
    """
    main = threading.current_thread() is threading.main_thread()
    if not seconds or not main or not hasattr(signal, "setitimer"):
        return call()

    def stop(*_):
        raise TimeUp(f"no answer in {seconds:g} seconds")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, should it be swallowed
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


class Guard:
    """The environments of one rollout of `episodes` episodes, in groups of `group_size`. Closes them all at its end."""

    def __init__(self, make_env: Callable[[], Any], episodes: int, group_size: int):
        self.make_env, self.episodes = make_env, episodes
        self.most = most_failed(episodes, group_size)
        self.opened: list[Guarded] = []
        self.failures: dict[int, str] = {}  # number of the environment -> its game and what happened

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_) -> None:
        self.close(self.opened)

    def env(self) -> Guarded:
        """A new environment, which its first `reset` makes."""
        self.opened.append(Guarded(self))
        return self.opened[-1]

    def prefetch(self, envs: list[Guarded], responses: list[str]) -> None:
        """What the coming steps of live environments ask for, in one request. Where it fails each asks for itself."""
        first = next((env for env in envs if not env.failed), None)
        if first and (prefetch := getattr(first.env, "prefetch", None)):
            try:
                within(first.limit, lambda: prefetch(responses))
            except BaseException as error:
                _pass_ctrl_c(error)
                log.warning("prefetch failed, so that each step asks for itself: %s", described(error))

    def close(self, envs: Iterable[Guarded]) -> None:
        for env in envs:
            env.close()

    @property
    def metrics(self) -> dict[str, float]:
        return {"rollout/failed": len(self.failures)}

    def note(self, env: Guarded, failure: str, error: BaseException) -> None:
        """Log a failed game. Raises GameFailure where too many have failed."""
        self.failures[id(env)] = failure
        log.warning("an episode is left out: %s", failure)
        if len(self.failures) > self.most:
            named = list(dict.fromkeys(self.failures.values()))
            more = f" and {len(named) - 5} more" if len(named) > 5 else ""
            raise GameFailure(
                f"{len(self.failures)} of {self.episodes} episodes failed, and no more than {self.most} may: "
                f"{'; '.join(named[:5])}{more}"
            ) from error


class Guarded:
    """An environment that raises nothing: what goes wrong is noted, and its episode ends. `failed` says so.

    After a failure its answers are empty.
    """

    def __init__(self, guard: Guard):
        self.env: Any = None  # until the first reset
        self.guard, self.game = guard, None
        self.failed, self.closed, self.steps = False, False, 0
        self.limit = TIME_LIMIT

    def reset(self, *, options: dict) -> tuple[str, dict]:
        self.game, nothing = options.get("game"), ("", {"task": ""})
        if self.env is None:
            self._try("constructor", self._make, None)
        return self._try("reset", lambda: checked_reset(self.env.reset(options=options)), nothing)

    def _make(self) -> None:
        self.env = self.guard.make_env()
        self.limit = getattr(self.env, "time_limit", TIME_LIMIT)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        self.steps += 1
        return self._try("step", lambda: self._ended(checked_step(self.env.step(action))), ("", 0.0, False, True, {}))

    def _ended(self, played: tuple) -> tuple[str, float, bool, bool, dict]:
        """Else a game that never ends would be played for ever."""
        if self.steps >= self.env.max_steps and not (played[2] or played[3]):
            raise ProtocolError(f"the episode goes on after step {self.env.max_steps}: it must end there, truncated")
        return played

    def build_prompt(self, *given) -> Prompt:
        return self._try("build_prompt", lambda: checked_prompt(self.env.build_prompt(*given)), ("",))

    def parse_action(self, *given) -> tuple[str, bool]:
        return self._try("parse_action", lambda: checked_action(self.env.parse_action(*given)), ("", False))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            try_to_close(self.env, self.game)

    def _try(self, method: str, call: Callable[[], Any], otherwise: Any) -> Any:
        if self.failed:
            return otherwise
        try:
            return within(self.limit, call)
        except BaseException as error:
            _pass_ctrl_c(error)
            self.failed = True
            place = f"step {self.steps}" if method == "step" else method
            self.guard.note(self, f"game {one_line(self.game)} ({place}: {described(error)})", error)
            return otherwise


def most_failed(episodes: int, group_size: int) -> int:
    """How many of so many episodes may fail: 5%, or all of one group where that is more."""
    return max(group_size, int(MOST_FAILED * episodes))


def _pass_ctrl_c(error: BaseException) -> None:
    """An environment may raise anything, sys.exit's SystemExit included. Ctrl-C alone is not its own."""
    if isinstance(error, KeyboardInterrupt):
        raise error


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(value: Any, most: int = 300) -> str:
    """A text for logs: one line, and nothing that moves a terminal's cursor."""
    try:
        text = str(value)[: 4 * most]
    except Exception:
        text = f"a {type(value).__name__} that cannot be printed"
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:most]


# ---- what an environment may answer ----------------------------------------------------------------------------------


def checked_reset(result: Any) -> tuple[str, dict]:
    """What `reset` returned, if it keeps the protocol. Raises ProtocolError."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ProtocolError("reset must return (observation, info), info a dict")
    observation, info = result
    _check_text(observation, "the observation of reset")
    if "task" not in info:
        raise ProtocolError("reset's info has no 'task', the goal in words")
    for name in ("task", "task_type", "game"):
        if not isinstance(info.get(name, ""), str):
            raise ProtocolError(f"reset's info[{name!r}] must be a string, not {_kind(info[name])}")
    _check_info(info, "reset")
    return observation, info


def checked_step(result: Any) -> tuple[str, float, bool, bool, dict]:
    """What `step` returned, if it keeps the protocol. Raises ProtocolError."""
    if not isinstance(result, tuple) or len(result) != 5 or not isinstance(result[4], dict):
        raise ProtocolError("step must return (observation, reward, terminated, truncated, info), info a dict")
    observation, reward, terminated, truncated, info = result
    _check_text(observation, "the observation of step")
    if not isinstance(reward, int | float | np.number) or reward != reward:
        raise ProtocolError(f"the reward of step must be a number, not {reward!r}")
    for name, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool | np.bool_):
            raise ProtocolError(f"{name} of step must be True or False, not {_kind(value)}")
    if "won" not in info:
        raise ProtocolError(f"step's info has no 'won', which alone counts as success (its reward was {reward})")
    _check_info(info, "step")
    if terminated and reward >= 1 and not info["won"]:
        raise ProtocolError(f"the episode ends with reward {reward}, but info['won'], which alone counts, is False")
    return observation, reward, bool(terminated), bool(truncated), info


def checked_prompt(prompt: Any) -> Prompt:
    """What `build_prompt` returned, if it keeps the protocol. Raises ProtocolError."""
    if not isinstance(prompt, tuple) or not all(isinstance(piece, str | Slot) for piece in prompt):
        raise ProtocolError("build_prompt must return a tuple of strings and Slots")
    if (size := sum(len(piece) for piece in prompt if isinstance(piece, str))) > LONGEST_PROMPT:
        raise ProtocolError(f"a prompt has {size} characters, more than {LONGEST_PROMPT}")
    return prompt


def checked_action(result: Any) -> tuple[str, bool]:
    """What `parse_action` returned, if it keeps the protocol. Raises ProtocolError."""
    if not isinstance(result, tuple) or list(map(type, result)) != [str, bool]:
        raise ProtocolError(f"parse_action must return (action, whether it is valid): (str, bool), not {result!r:.100}")
    _check_text(result[0], "the action of parse_action")
    return result


def checked_tasks(games: Any) -> list:
    """What `tasks` returned, if it keeps the protocol. Raises ProtocolError."""
    if not isinstance(games, list | tuple):
        raise ProtocolError(f"tasks must return a list, not {_kind(games)}")
    return list(games)


def _check_attributes(env: Any) -> None:
    own, limit = getattr(env, "max_steps", None), getattr(env, "time_limit", TIME_LIMIT)
    if not isinstance(own, int) or own < 1:
        raise ProtocolError(f"max_steps must be a positive number, not {_kind(own)}")
    if limit is not None and (not isinstance(limit, int | float) or not 0 < limit < math.inf):
        raise ProtocolError(f"time_limit must be a positive number of seconds or None, not {_kind(limit)}")
    splits, columns = getattr(env, "held_out", ()), getattr(env, "columns", {})
    if not isinstance(splits, list | tuple) or not all(isinstance(split, str) for split in splits):
        raise ProtocolError(f"held_out must be a tuple of splits, not {_kind(splits)}")
    if not isinstance(columns, dict):
        raise ProtocolError(f"columns must be a dict, task type to column, not {_kind(columns)}")


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ProtocolError(f"{what} must be a string, not {_kind(value)}")
    if len(value) > LONGEST:
        raise ProtocolError(f"{what} has {len(value)} characters, more than {LONGEST}: no context holds it")


def _check_info(info: dict, method: str) -> None:
    if not isinstance(info.get("won", False), bool | np.bool_):
        raise ProtocolError(f"{method}'s info['won'] must be True or False, not {info['won']!r:.50}")
    admissible = info.get("admissible_actions", [])
    if not isinstance(admissible, list) or not all(isinstance(action, str) for action in admissible):
        raise ProtocolError(f"{method}'s info['admissible_actions'] must be a list of strings")


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({value!r:.50})"


# ---- a whole environment ---------------------------------------------------------------------------------------------


def check_env(
    env: Any,
    game: Any = None,
    *,
    max_steps: int | None = None,
    styles: Iterable[str] = ("window", "chat"),
    levels: Iterable[str] = ("episode", "step"),
) -> None:
    """Play an environment's first game twice, and raise ProtocolError for the first thing that is wrong.

    For the tests of an environment of one's own. A run calls it once, before it starts. `game`: another than the first
    of the training split. `max_steps`: a lower limit than `env.max_steps`. `levels`: of the skills that need a slot.
    Raises GameFailure where the environment itself raises, or does not answer in time.
    """
    _check_attributes(env)
    if game is None:
        games = checked_tasks(_call(env, "tasks", None, lambda: env.tasks("train", 1)))
        if not games:
            raise ProtocolError("tasks('train') is empty: there is nothing to train on")
        game = games[0]
    own = env.max_steps
    most = min(own, max_steps or own)
    for listed in (False, True):  # actions that were made up, then such as the environment lists
        result = _call(env, "reset", game, lambda: env.reset(options={"game": game}))
        observation, info = checked_reset(result)
        task, history = info["task"], []
        for number in range(1, most + 1):
            admissible = info.get("admissible_actions", [])
            for style in styles if number < 3 else ():
                given = (style, task, list(history), observation, admissible)
                prompt = checked_prompt(_call(env, "build_prompt", game, lambda given=given: env.build_prompt(*given)))
                _check_slots(prompt, style, history, levels)
            said = ANSWERS[number % len(ANSWERS)]
            parsed = _call(env, "parse_action", game, lambda s=said, a=admissible: env.parse_action(s, a))
            action = checked_action(parsed)[0]
            if listed and admissible:
                action = admissible[number % len(admissible)]
            played = _call(env, "step", game, lambda action=action: env.step(action))
            seen, _, terminated, truncated, info = checked_step(played)
            history, observation = [*history, (observation, action)], seen
            if terminated or truncated:
                break
            if number == most:
                flag = f" (--max-steps {max_steps}; its own max_steps is {own})" if max_steps else ""
                raise ProtocolError(f"an episode goes on after step {most}: it must end there, truncated{flag}")
    template = _call(env, "analysis_prompt", game, env.analysis_prompt)
    if not isinstance(template, str | None):
        raise ProtocolError(f"analysis_prompt must return a string or None, not {_kind(template)}")


def check_first_game(make_env: Callable[[], Any], games: list, max_steps: int, style: str, levels: tuple) -> None:
    """`check_env` before a run, on the first of three games that can be played. Raises ValueError where none can."""
    for number, game in enumerate(games[:3], 1):
        env = make_env()
        try:
            return check_env(env, game, max_steps=max_steps, styles=(style,), levels=levels)
        except GameFailure as error:
            log.warning("%s", error)
            if number == len(games[:3]):
                raise ValueError(f"not one of the first {number} games can be played: {error}") from error
        finally:
            try_to_close(env, game)


def _call(env: Any, method: str, game: Any, call: Callable[[], Any]) -> Any:
    seconds = getattr(env, "time_limit", TIME_LIMIT) if game is not None else None  # `tasks` may make them
    try:
        return within(seconds, call)
    except BaseException as error:
        _pass_ctrl_c(error)
        raise GameFailure(f"{type(env).__name__}.{method} failed, game {one_line(game)}: {described(error)}") from error


def _check_slots(prompt: Prompt, style: str, history: list, levels: Iterable[str]) -> None:
    """The episode slot is in every window prompt, and in the opening message of a chat; the step slot is in all."""
    there = {piece.level for piece in prompt if isinstance(piece, Slot)}
    for level in levels:
        if level not in there and not (level == "episode" and style == "chat" and history):
            when = "a later" if history else "the first"
            raise ProtocolError(f"{when} prompt of style {style!r} has no {level} slot: a skill would have no place")
