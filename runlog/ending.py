"""How a run ends before its last iteration: it is saved, and one line says why and names the command that goes on.

A signal (Ctrl-C, SIGTERM, SIGHUP of a terminal that closes) ends it where its weights are those of the last finished
iteration. Until the first gradient step of an iteration they are, so the run ends there at once. After that step the
iteration comes to its end first, its evaluation included. Several processes wait for nobody: there the last state is
kept only where the weights have not moved.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from config import Config
from envs import GameFailure
from lm.obstacles import Mendable
from runlog.checkpoints import saved

if TYPE_CHECKING:
    from runlog.start import Run

SIGNALS = {signal.SIGINT: "stopped by Ctrl-C", signal.SIGTERM: "stopped by SIGTERM"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS[signal.SIGHUP] = "stopped by SIGHUP"
NO_MEMORY = ("can't allocate memory", "out of memory")  # PyTorch's allocator on CPUs, CUDA's libraries


@dataclass
class Ending:
    """What a run that ends early leaves, and says."""

    config: Config
    run: Run | None = field(default=None, repr=False)  # once it has started; signal.signal prints its handlers
    signal: int = 0  # the first that came
    over: bool = False  # whether the run has ended, and is being saved

    def print(self, text: str) -> None:
        """By the first process alone."""
        if first():
            print(text)

    def stop(self, number: int, frame) -> None:
        """Handles a signal. A launcher may send SIGTERM after Ctrl-C, so that this one does not count as a second."""
        if self.signal:
            if number in (self.signal, signal.SIGINT):
                told(b"train.py: ended at once. What comes after the last checkpoint is lost\n")
                os._exit(128 + number)
            return
        self.signal = number
        for stream in (1, 2):
            without_terminal(stream)
        self.end_table()
        if self.over:
            told(b"train.py: the run is being saved; Ctrl-C ends at once\n")
            return
        if self.run and self.run.ahead and self.run.processes.count == 1:
            self.run.interrupted = True
            told(b"train.py: this iteration comes to its end first; Ctrl-C ends at once\n")
            return
        raise KeyboardInterrupt

    def end_table(self) -> None:
        """Before what is printed by other means than sys.stdout and sys.stderr."""
        if self.run:
            self.run.log.end_table()

    def words(self, error: BaseException) -> str | None:
        """What ended the run, where the user can mend it. None: a bug."""
        others_went = self.signal and self.run and self.run.processes.count > 1  # by the same signal
        if isinstance(error, KeyboardInterrupt) or others_went:
            return SIGNALS[signal.Signals(self.signal or signal.SIGINT)]
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
        ):
            return f"out of memory: lower --token-budget or --rollout-budget ({text[:150]})"
        if isinstance(error, OSError | FloatingPointError | Mendable | GameFailure):
            return text
        return text if self.run is None and isinstance(error, ValueError | ImportError) else None

    def keep(self) -> Path | None:
        """Saves the last finished iteration, where the weights are still its own -> the newest checkpoint."""
        run, folder = self.run, Path(self.config.out)
        newest = max((int(path.stem) for path in saved(folder)), default=-1)
        if run and not run.ahead and run.finished > newest and not self.config.shard:  # shards take all processes
            try:
                run.log.save(run.finished, run.policy, run.optimizer, run.kept)
            except (OSError, RuntimeError, FloatingPointError) as error:  # a full disk may be why the run ends
                print(f"train.py: iteration {run.finished} could not be saved: {error}", file=sys.stderr)
        return next(reversed(saved(folder)), None)


@contextmanager
def one_line(config: Config) -> Generator[Ending]:
    """Around a run: signals, and what the user can mend, end it in one line. Other errors keep their traceback."""
    ending = Ending(config)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    handlers = {number: signal.signal(number, ending.stop if first() else signal.SIG_DFL) for number in heard}
    try:
        try:
            yield ending
        finally:
            ending.end_table()
    except (Exception, KeyboardInterrupt) as error:
        words, ending.over = ending.words(error), True
        if words is None:
            if ending.run:
                error.add_note(f"Last checkpoint: {ending.keep() or 'none'}. Go on with: {command()}")
            raise
        stopped = ending.signal or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        if ending.run or stopped:
            words += f". Last checkpoint: {ending.keep() or 'none'}. Go on with: {command()}"
        if not stopped:
            raise SystemExit(f"train.py: {words}") from error
        print(f"train.py: {words}", file=sys.stderr)
        raise SystemExit(128 + stopped) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def first() -> bool:
    """Whether this is the first process, before accelerate knows of any."""
    return os.environ.get("RANK", "0") == "0"


def told(words: bytes) -> None:
    with suppress(OSError):  # there may be nobody left to tell
        os.write(2, words)


def without_terminal(stream: int) -> None:
    """What is written to a terminal that has closed goes nowhere, where it would raise an error."""
    try:
        os.write(stream, b"")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def command() -> str:
    """What goes on with this run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return "the same command and --resume"
    return f"python {shlex.join(argument for argument in sys.argv if argument != '--resume')} --resume"
