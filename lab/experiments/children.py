"""Child processes that end with their parent: a comparison that is stopped leaves no training behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Children:
    """Commands under way, each waited for by a thread. Once stopped, nothing new is started."""

    def __init__(self):
        # Reentrant, since a second signal may come while the first one is handled.
        self._lock, self._running, self._stopped = threading.RLock(), set(), False

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """As `subprocess.run`, output captured as text. Raises RuntimeError after `stop`."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("stopped")
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
            self._running.add(child)
        output, errors = child.communicate()
        with self._lock:
            self._running.remove(child)
        return subprocess.CompletedProcess(command, child.returncode, output, errors)

    def stop(self) -> None:
        """Returns when all have ended: those that take no notice for 10 seconds are killed."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()
            for child in self._running:
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP end the children, then this process, with the exit status that a shell expects."""

        def stop(number, frame):
            self.stop()
            words = f"stopped by {signal.Signals(number).name}. The same command goes on, from its runs' checkpoints"
            print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
            raise SystemExit(128 + number)

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
