"""A process that dies ends the others, wherever they run and whatever they do.

PyTorch's launcher ends the processes of its own machine. One on another machine would find out when it next waits for
the dead one, which in a long rollout takes many minutes. So each process has a thread that waits for a farewell: it
comes when the run is over, and where the connection breaks instead, the process ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Thread

import torch
from torch import distributed

GRACE = 20.0  # seconds: the launcher of the dead one's own machine goes first, and says which process it was
FOREVER = timedelta(days=365)


def watch() -> Callable[[], None]:
    """Starts to watch the other processes -> the farewell, to be called at the end by all of them; it returns when all
    have. Rank 0 watches everyone, and everyone watches rank 0."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return lambda: None
    rank, count = distributed.get_rank(), distributed.get_world_size()
    group, others = distributed.new_group(backend="gloo", timeout=FOREVER), range(1, count) if rank == 0 else [0]

    def wait(other: int) -> None:
        try:
            distributed.recv(torch.zeros(1), other, group)
        except RuntimeError:  # the connection is closed
            time.sleep(GRACE)
            print(f"process {rank} ends, as process {other} has ended before the run was over", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # the main thread may be anywhere

    threads = [Thread(target=wait, args=(other,), daemon=True) for other in others]
    for thread in threads:
        thread.start()

    def farewell() -> None:
        for other in others:
            distributed.send(torch.zeros(1), other, group)
        for thread in threads:
            thread.join()

    return farewell
