"""A run that is killed many times, and the same run left alone: what test_processes.py compares. A script, since a
process that has imported everything once can be forked in no time.

python tests/killed.py FOLDER 25 1 --iterations 20         # 25 kills: FOLDER/whole, FOLDER/killed, FOLDER/kills.json
python tests/killed.py FOLDER 10 2 --shard                 # in two processes; further flags go to the run
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import runlog.start
from config import parse_args, variant_of
from envs.alfworld import AlfworldEnv
from tiny.warmstart import tiny_model, tiny_tokenizer
from train import train

EVERY = 5  # of the kills is in the middle of writing a checkpoint
FLAGS = "--algo grpo --tasks 2 --rollouts 2 --max-steps 2 --max-new-tokens 4 --train-games 4 --eval-games 1 "
FLAGS += "--eval-every 0 --save-every 1 --mini-batch 4 --learning-rate 1e-3 --invalid-penalty 1 --sample-every 1 "
FLAGS += "--resume"


def processes(count: int, out: Path, more: list[str], cut_off: bool = False) -> list[int]:
    """Starts the run in `count` processes -> their ids. `cut_off`: each kills itself while it writes a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            if count > 1:
                os.environ |= {
                    name: str(value) for name, value in (places | {"RANK": rank, "LOCAL_RANK": rank}).items()
                }
            try:
                if cut_off:
                    cut_writing()
                with open(out.parent / f"{out.name}.log{rank}", "a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                config = parse_args([*FLAGS.split(), "--out", str(out), *more])
                train(runlog.start.start(config), variant_of(config.algo))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return children


def cut_writing() -> None:
    """The next file that PyTorch writes ends in the middle, and so does the process."""

    def cut(state, path, *more, **options):
        write(state, path, *more, **options)
        if isinstance(path, Path):  # not a buffer, of which a file by shards is made
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    write, torch.save = torch.save, cut


def ended(children: list[int], seconds: float) -> bool:
    """Waits so long, then kills them all -> whether they had all ended well before."""
    left, well, until = list(children), True, time.monotonic() + seconds
    while left and well and time.monotonic() < until:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                well = well and status == 0
        time.sleep(0.001)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return well and not left


def main(folder: Path, kills: int, count: int, more: list[str]) -> None:
    torch.set_num_threads(1)
    AlfworldEnv.parse_action = lambda self, text, admissible: (text, len(text) % 2 == 0)
    tokenizer = tiny_tokenizer()
    runlog.start.load_model = lambda *a, **k: (tiny_model(len(tokenizer), seed=0, width=24), tokenizer)
    started = time.time()
    assert ended(processes(count, folder / "whole", more), 300), (folder / "whole.log0").read_text()[-2000:]
    first, *_, last = ((folder / "whole" / name).stat().st_mtime for name in ("start.json", "samples.jsonl"))
    iterations = len((folder / "whole/samples.jsonl").read_text().splitlines())
    start, each = first - started, (last - first) / iterations  # seconds
    draw, found = random.Random(0), []
    for kill in range(kills):
        cut_off = kill % EVERY == EVERY - 1
        after = 60 if cut_off else draw.uniform(0, start + 4 * each)
        over = ended(processes(count, folder / "killed", more, cut_off), after)
        left = [path.name for path in (folder / "killed/checkpoints").glob("*.tmp")]
        found.append({"over": over, "cut_off": cut_off, "left": left})
    assert ended(processes(count, folder / "killed", more), 300), (folder / "killed.log0").read_text()[-2000:]
    (folder / "kills.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
