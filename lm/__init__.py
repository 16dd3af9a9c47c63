"""What turns messages into tokens and tokens into numbers.

encoder.py        messages to token ids, through the chat template
sampler.py        `generate`, with the cache kept over turns (cache.py)
scoring.py        log p of given responses: packing, branches, the forward pass
obstacles.py      what an architecture allows without changing its numbers
writers.py        who writes the skills; answers.py: what is read from their answers
loading.py        loading, saving, frozen copies; adapters.py: LoRA; precision.py: bfloat16 or not
processes.py      many processes and host memory; watch.py: no process goes on without the others
distributions.py  whole next-token distributions, for variants that need them

`import lm` takes no time, and comes first in every command: from there on Ctrl-C is one line, while PyTorch loads, too.
"""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def last_words(kind: type[BaseException], error: BaseException, trace) -> None:
    """As sys.excepthook: Ctrl-C is one line, a reader that has gone (`| head`) none, all else keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words


@contextmanager
def one_line(program: str) -> Generator[None]:
    """Around what a command does with what its user named: where that fails, it ends in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        sys.exit(f"{program}: {error}")
