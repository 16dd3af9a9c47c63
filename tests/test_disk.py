"""Room on the disk: what is planned is what is written, and a disk that is full costs nothing but the wait."""

import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from config import Config, parse_args, variant_of
from lm.loading import add_lora, rounded, save_policy, write_whole
from memory.disk import describe, most, room
from runlog.start import start as start_run
from tiny.warmstart import tiny_model, tiny_tokenizer
from train import train

ROOT = Path(__file__).parent.parent
FLAGS = "--recipe laptop --algo grpo --tasks 2 --rollouts 2 --max-steps 2 --max-new-tokens 4 --train-games 4 "
FLAGS += "--eval-games 2 --eval-every 0 --save-every 1"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder of random weights."""
    folder = tmp_path_factory.mktemp("start")
    save_policy(tiny_model(len(tiny_tokenizer()), seed=0, width=48), tiny_tokenizer(), folder)
    return folder


# ---- what a run writes ----


def test_the_most_by_hand():
    model = torch.nn.Linear(5, 20)  # 120 numbers, 480 bytes
    each = 3 * 480  # with two moments
    assert most(Config(), model) == 3 * each  # the new one before the oldest of two goes
    assert most(Config(keep_checkpoints=1), model) == 2 * each
    assert most(Config(iterations=10), model) == each + 480  # one checkpoint, and the policy
    assert most(Config(iterations=11), model) == 2 * each + 480
    lora = add_lora(tiny_model(len(tiny_tokenizer()), seed=0, width=48), 4)
    adapters = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in lora.parameters())
    assert most(Config(lora_rank=4, iterations=10), lora) == 4 * (3 * adapters + whole)
    half = add_lora(tiny_model(len(tiny_tokenizer()), seed=0, width=48).to(torch.bfloat16), 4)
    assert most(Config(lora_rank=4, iterations=10), half) == 4 * (3 * adapters + whole)  # merged in float32


@pytest.mark.parametrize(
    "changes", ["", "--algo opid", "--algo sdpo", "--lora-rank 4", "--lora-rank 4 --dtype bfloat16"], ids=str
)
def test_what_is_planned_is_what_is_written(changes, start, tmp_path, monkeypatch):
    monkeypatch.setattr("runlog.start.model_writer", lambda *a, **k: lambda prompts: ["no idea"] * len(prompts))
    flags = [*FLAGS.split(), "--iterations", "1", "--out", str(tmp_path), "--model", str(start)]
    config = parse_args([*flags, *changes.split()])
    train(start_run(config), variant_of(config.algo))
    written = [*(tmp_path / "checkpoints").iterdir(), *(tmp_path / "policy").rglob("*.safetensors")]
    model = tiny_model(len(tiny_tokenizer()), seed=0, width=48)
    model = rounded(model, getattr(torch, config.dtype))
    planned = most(config, add_lora(model, 4) if config.lora_rank else model)
    assert planned == pytest.approx(sum(path.stat().st_size for path in written), rel=0.1)


def test_room_is_what_is_free_and_what_goes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(1000, 300, 700))
    assert room(tmp_path / "not" / "yet") == 700
    (tmp_path / "checkpoints" / "000001.shards").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000000.pt").write_bytes(bytes(10))
    (tmp_path / "checkpoints" / "000001.shards" / "rest.pt").write_bytes(bytes(5))
    assert room(tmp_path) == 715
    monkeypatch.chdir(tmp_path)
    assert room(Path("runs/new")) == 700
    assert asked == [tmp_path, tmp_path, tmp_path]


def test_a_warning_says_what_helps(tmp_path, monkeypatch):
    model = torch.nn.Linear(1023, 2**18, device="meta")  # 1 GiB: a checkpoint of 3

    def with_room(gib: float, **changes) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, gib * 2**30))
        return describe(Config(out=str(tmp_path), **changes), model)

    assert with_room(9.1) == "disk: at most 9.0 GiB of checkpoints and policy, 9.1 GiB there"
    warning = f"WARNING: the disk of {tmp_path} may run full: free some of it, or take another --out"
    assert with_room(8.9).endswith(f"{warning}, or keep fewer, with --keep-checkpoints 1 (6.0 GiB)")
    assert with_room(5.9).endswith(warning)
    assert with_room(5.9, keep_checkpoints=1).endswith(warning)


# ---- a disk that is full ----


@pytest.mark.parametrize(
    "error, free",
    [
        (RuntimeError("unexpected pos 64 vs 8"), 100),  # what torch.save says
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2**30),  # gives back what it took
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2**30),
        (CheckpointException("write", {}), 100),  # no Exception, says PyTorch
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_said_plainly_and_nothing_stays(error, free, kind, tmp_path, monkeypatch):
    path = tmp_path / "policy"
    path.write_text("before")

    def write(temporary: Path) -> None:
        if kind == "folder":
            temporary.mkdir()
        (temporary / "part" if kind == "folder" else temporary).write_text("half")
        raise error

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    with pytest.raises(OSError, match="the disk is full") as raised:
        write_whole(path, write)
    assert raised.value.errno == errno.ENOSPC and raised.value.__cause__ is error
    assert [file.name for file in tmp_path.iterdir()] == ["policy"] and path.read_text() == "before"


def test_another_error_is_passed_on_and_nothing_stays(tmp_path):
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        write_whole(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


APART = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]  # with mounts of its own


def may_mount() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*APART, "mount -t tmpfs tmpfs /mnt"]).returncode


@pytest.mark.skipif(not may_mount(), reason="this system lets nobody mount a disk of one's own")
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on(start, tmp_path):
    """A checkpoint takes 0.9 MB: there is room for the first, then for the others, too."""
    run = f"{sys.executable} train.py {FLAGS} --iterations 3 --model {start} --out {tmp_path}/run 2>&1"
    look = f"echo left: $(ls {tmp_path}/run/checkpoints)"
    script = f"mount -t tmpfs -o size=1600k tmpfs {tmp_path}; {run}; echo code $?; {look}; "
    script += f"mount -o remount,size=16m {tmp_path}; {run} --resume; echo code $?; {look}"
    done = subprocess.run([*APART, script], cwd=ROOT, capture_output=True, text=True)
    first, second = done.stdout.split("code 1\n")
    assert "WARNING: the disk of" in first and "Traceback" not in first
    told = first.rstrip().splitlines()[-1]
    assert told.startswith("train.py: [Errno 28] the disk is full: ")
    run = f"{tmp_path}/run"
    assert f"'{run}/checkpoints'. Last checkpoint: {run}/checkpoints/000000.pt. Go on with: python train.py" in told
    assert told.endswith(f"--out {run} --resume")
    assert second.startswith("left: 000000.pt\n")
    assert second.endswith("code 0\nleft: 000001.pt 000002.pt\n")
