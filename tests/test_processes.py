"""Two processes for real: they share the tasks, write each file once, and train as one process does."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm.loading import remove
from lm.processes import shard
from runlog import checkpoints
from tests.sharded import CHECKS

ROOT = Path(__file__).parent.parent
TASKS, ROLLOUTS, ITERATIONS = 3, 2, 3
FLAGS = f"--tasks {TASKS} --rollouts {ROLLOUTS} --iterations {ITERATIONS} --max-steps 4 --max-new-tokens 6 "
FLAGS += "--train-games 6 --eval-games 5 --eval-every 0 --invalid-penalty 1 --scorer old --sample-every 1 --clip 0.01 "
FLAGS += "--lr-halving 0 --episode-weight 1 --step-weight 1"

# A response depends on what is in the context and on which rollout of its task it belongs to, not on a process's random
# numbers, so that one process and two play the same episodes. SGD in place of AdamW, whose first step is the gradient's
# sign: what differs in the ninth digit of a gradient of nearly 0 would differ in the first digit there.
SCRIPT = """
import evaluate, hashlib, json, os, random, sys, torch
from runlog import start as starting
from config import parse_args, variant_of
from envs.alfworld import AlfworldEnv
from tiny.warmstart import tiny_model, tiny_tokenizer
from dataclasses import replace
from train import train

def drawn(*seed):
    return random.Random(hashlib.sha256(repr(seed).encode()).hexdigest())

class Scripted(starting.Sampler):
    rollouts = ROLLOUTS

    def __call__(self, keys, contexts):
        self.recorded = self.recorded or {}  # nothing is sampled from the model
        for key in keys:
            self.recorded.setdefault(key, []).append([])
        draws = [drawn(key % self.rollouts, context) for key, context in zip(keys, contexts, strict=True)]
        return [[draw.randrange(9, 200) for _ in range(draw.randint(1, 6))] for draw in draws]

class HeldOut(Scripted):
    rollouts = 1

def writer(prompts):
    skill = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'
    return [skill if drawn(prompt.split()).random() < 0.6 else "no idea" for prompt in prompts]

def written(event, args):
    if event == "open" and isinstance(args[0], str | os.PathLike) and (args[2] & (os.O_WRONLY | os.O_RDWR)):
        files.append(os.path.abspath(args[0]))
    if event == "os.rename":
        files.append(os.path.abspath(args[1]))

def build(self, *more):
    return (*built(self, *more), " look" * 2000) if self.engine.game.path in unfit else built(self, *more)

def note_played(run, games):
    if run.iteration == 2:  # the task of the second process, the only one it has, does not fit
        drawn = random.Random(f"{config.seed} 2").sample(run.games, run.config.tasks)
        assert all(game in drawn for game in games)
        unfit.append(drawn[1])
    trajectories, metrics = opid.play(run, games)
    played.append(sorted({trajectory.game for trajectory in trajectories}))
    return trajectories, metrics

def step(self, action):
    observation, reward, terminated, truncated, info = moved(self, action)
    return observation, reward, terminated, truncated, info | {"won": drawn(action).random() < 0.5}

files, played, unfit = [], [], []
torch.set_num_threads(1)
tokenizer, moved, built = tiny_tokenizer(), AlfworldEnv.step, AlfworldEnv.build_prompt
AlfworldEnv.build_prompt = build
AlfworldEnv.parse_action = lambda self, text, admissible: (text, len(text) % 2 == 0)
AlfworldEnv.step = step
starting.load_model = lambda *a, **k: (tiny_model(len(tokenizer), seed=0, width=48), tokenizer)
starting.model_writer = lambda *a, **k: writer
starting.Sampler, evaluate.Sampler = Scripted, HeldOut
starting.logprob_gap, starting.check_gap = lambda *a: (0.1 + 0.2 * int(os.environ["RANK"]), 0.0), lambda *a: None
torch.optim.AdamW = lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr=lr)
config = parse_args(sys.argv[1:])
run, opid = starting.start(config), variant_of("opid")
sys.addaudithook(written)
share, finish = run.processes, starting.RunLog.finish

def keep(log, model, tokenizer):
    shards = dict(model.named_parameters())
    weights = {name: p.full_tensor() if config.shard else p for name, p in shards.items()}
    torch.save({name: p.detach().clone() for name, p in weights.items()}, f"{config.out}.weights{share.rank}")
    finish(log, model, tokenizer)

starting.RunLog.finish = keep
train(run, replace(opid, play=note_played))
inside = [file for file in files if file.startswith(os.path.abspath(config.out) + os.sep)]
told = {"processes": share.count, "files": inside, "played": played}
with open(f"{config.out}.told{share.rank}", "w") as file:
    json.dump(told, file)
""".replace("ROLLOUTS", str(ROLLOUTS))


TORCHRUN = ["-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(count: int, script: str, *argv: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in `count` processes on CPUs that PyTorch connects, and waits. Fails where one of them fails."""
    options = ["--nproc_per_node", str(count), "--master_port", str(free_port())]
    done = run_python([*TORCHRUN, *options], script, *argv)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def alone(script: str, *argv: str) -> None:
    """Runs a script of this folder, which forks processes of its own."""
    done = run_python([], str(ROOT / "tests" / script), *argv)
    assert done.returncode == 0, done.stderr[-4000:]


def run_python(options: list[str], *argv: str) -> subprocess.CompletedProcess:
    surroundings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command, how = [sys.executable, *options, *argv], {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=ROOT, env=os.environ | surroundings, **how)


def trained(folder: Path, count: int, *more: str) -> Path:
    """The run folder of a run in `count` processes. Beside it lies what each of them told and its weights."""
    script, out = folder / "run.py", out_of(folder, count, *more)
    script.write_text(SCRIPT)
    launch(count, str(script), *FLAGS.split(), "--out", str(out), *more)
    return out


def out_of(folder: Path, count: int, *more: str) -> Path:
    return folder / f"processes{count}{'-sharded' * ('--shard' in more)}"


def told(out: Path, process: int) -> dict:
    return json.loads(Path(f"{out}.told{process}").read_text())


def weights(out: Path, process: int) -> dict[str, torch.Tensor]:
    return torch.load(f"{out}.weights{process}")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(made_once):
    """The same run in one process, in two, which play two of its three tasks and one, and in two that share the weights
    as well. One update an iteration."""
    flags = ("--mini-batch", "0", "--learning-rate", "1")
    ways = [(1,), (2,), (2, "--shard")]
    folder = made_once("processes", lambda folder: [trained(folder, *way, *flags) for way in ways])
    return [out_of(folder, *way) for way in ways]


def test_two_processes_share_the_tasks_without_overlap(runs):
    one, two, _ = runs
    assert told(one, 0)["processes"] == 1
    for process in (0, 1):
        assert told(two, process)["processes"] == 2
    shares = []
    for all_played, first, second in zip(*(told(*at)["played"] for at in ((one, 0), (two, 0), (two, 1))), strict=True):
        shares.append((len(first), len(second)))
        assert sorted(first + second) == all_played
        assert len(set(all_played)) == sum(shares[-1])
    assert shares == [(2, 1), (2, 1), (2, 0)]


def test_each_file_is_written_by_one_process_and_once(runs):
    one, two, sharded = runs
    assert told(two, 1)["files"] == []
    names = {Path(file).name for file in told(two, 0)["files"]}
    assert names == {Path(file).name for file in told(one, 0)["files"]}
    assert {"metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "000002.pt", "policy"} <= names
    assert [Path(file).name for file in told(sharded, 1)["files"]] == ["__1_0.distcp"]
    assert names - {"000002.pt", "000002.pt.tmp"} < {Path(file).name for file in told(sharded, 0)["files"]}
    for out in (two, sharded):
        assert [record["iteration"] for record in lines(out, "metrics.jsonl")] == [0, 1, 2]
        assert [record["iteration"] for record in lines(out, "evaluations.jsonl")] == [2]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_make_the_update_of_one(runs, sharded):
    """Of the same trajectories, of which one process has twice as many as the other, or all: mean over all tokens."""
    one, two = runs[0], runs[1 + sharded]
    expected, first, second = weights(one, 0), weights(two, 0), weights(two, 1)
    start = lines(one, "metrics.jsonl")
    assert min(record["grad_norm"] for record in start) > 0.1
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - value).abs().max() < 1e-5, name


@pytest.mark.parametrize("sharded", [False, True])
def test_metrics_of_two_processes_are_those_of_one(runs, sharded):
    """Every mean is over all episodes, steps, tokens, ...; processes of unequal shares do not count alike."""
    for one, two in zip(*(lines(out, "metrics.jsonl") for out in (runs[0], runs[1 + sharded])), strict=True):
        assert one.keys() == two.keys()
        assert one["episodes"] == TASKS * ROLLOUTS - one["rollout/too_long"]
        assert one["rollout/too_long"] == (ROLLOUTS if one["iteration"] == 2 else 0)
        assert 0 < one["skills/parse_rate"] < 1 and 0 < one["train/success"] < 1
        for name in one.keys() - {"memory/peak_mib", "advantage/noise_floor", "rollout/logprob_gap"}:
            if not name.startswith("seconds/"):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert lines(runs[1], "metrics.jsonl")[0]["rollout/logprob_gap"] == pytest.approx(0.3)  # the larger of 0.1 and 0.3


def test_two_processes_share_the_evaluation(runs):
    (one,), (two,), (sharded,) = (lines(out, "evaluations.jsonl") for out in runs)
    assert one["table"] == two["table"] == sharded["table"] and one["success"] == two["success"] == sharded["success"]
    assert [line.split()[-1] for line in two["table"].splitlines()] == ["games", "5", "5"]


def test_a_process_without_a_share_of_a_mini_batch_keeps_in_step(tmp_path):
    """Mini-batches of one step: as many as there are steps, and a process has fewer sequences than that."""
    out = trained(tmp_path, 2, "--mini-batch", "1", "--learning-rate", "0.1")
    for record in lines(out, "metrics.jsonl"):
        assert record["grad_norm"] > 0
    for name, value in weights(out, 0).items():
        assert torch.equal(value, weights(out, 1)[name]), name


# ---- sharding, part by part (sharded.py) -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(made_once):
    """(the folder that the checks wrote to, what went wrong in each process by check)"""
    folder = made_once("sharded", lambda folder: alone("sharded.py", str(folder)))
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_sharding(checked, check):
    assert "".join(checked[1][check]) == ""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_final_policy_of_a_sharded_model_loads_plainly(checked, kind):
    got, expected = (AutoModelForCausalLM.from_pretrained(checked[0] / name) for name in (kind, f"{kind}-plain"))
    assert same(got.state_dict(), expected.state_dict())
    assert (checked[0] / kind / "config.json").read_text() == (checked[0] / f"{kind}-plain/config.json").read_text()


@pytest.mark.parametrize("damage", ["__1_0.distcp", "rest.pt", ".metadata", "index.json", "cut off"])
def test_damaged_shards_fall_back_to_the_checkpoint_before(checked, damage, tmp_path):
    shutil.copytree(checked[0] / "by3", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/000009.shards"
    (tmp_path / "checkpoints/000007.shards").rename(newest)
    saved = checkpoints.saved(tmp_path)
    assert [path.name for path in saved] == ["000008.pt", "000009.shards"]
    assert checkpoints.newest_readable(saved) == (newest, [])
    if damage == "cut off":
        (newest / "__2_0.distcp").write_bytes((newest / "__2_0.distcp").read_bytes()[:-100])
    elif damage == "__1_0.distcp":  # one bit
        content = bytearray((newest / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / damage).write_bytes(content)
    else:
        (newest / damage).unlink()
    assert checkpoints.newest_readable(saved) == (newest.with_name("000008.pt"), [newest])
    remove(newest)
    assert checkpoints.saved(tmp_path) == saved[:1]


# ---- processes that die ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kills, processes, flags", [(12, 1, "--iterations 12"), (6, 2, "--iterations 6 --shard")], ids=["one", "sharded"]
)
def test_a_run_that_is_killed_again_and_again_goes_on_bit_for_bit(tmp_path, kills, processes, flags):
    """At random moments, in the middle of writing a checkpoint included."""
    alone("killed.py", str(tmp_path), str(kills), str(processes), *flags.split())
    found = json.loads((tmp_path / "kills.json").read_text())
    assert len(found) == kills and not any(kill["over"] for kill in found)
    assert all(kill["left"] for kill in found if kill["cut_off"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lines(whole, "samples.jsonl") == lines(killed, "samples.jsonl")
    told = [
        [{k: v for k, v in r.items() if not k.startswith(("seconds/", "memory/"))} for r in lines(out, "metrics.jsonl")]
        for out in (whole, killed)
    ]
    assert told[0] == told[1]
    policies = [load_file(out / "policy/model.safetensors") for out in (whole, killed)]
    assert same(*policies)


DYING = (
    SCRIPT.partition("config = parse_args")[0]
    + """
import time

def play(run, games):
    if os.environ["RANK"] == "1":
        time.sleep(1)
        DEATH
    BUSY

config = parse_args(sys.argv[1:])
train(starting.start(config), replace(variant_of("opid"), play=play))
"""
)


def dying(folder: Path, death: str, busy: str) -> list[str]:
    """A script and its arguments: process 1 dies in its first rollout, and the others do something meanwhile."""
    script = folder / "run.py"
    script.write_text(DYING.replace("DEATH", death).replace("BUSY", busy))
    return [str(script), *FLAGS.split(), "--out", str(folder / "run")]


def test_a_process_that_dies_ends_those_of_its_machine(tmp_path):
    """One that waits for it would wait for half an hour."""
    script = dying(tmp_path, "raise ValueError('it went wrong')", "run.processes.accelerator.wait_for_everyone()")
    started = time.monotonic()
    failed = launch(2, *script, check=False)
    assert failed.returncode != 0 and time.monotonic() - started < 90
    assert "ValueError: it went wrong" in failed.stderr


def test_a_process_that_dies_ends_those_of_other_machines(tmp_path):
    """Two launches on one machine, which know of each other by address alone; the other one is busy, and waits for
    nobody."""
    script, port = dying(tmp_path, "os.kill(os.getpid(), 9)", "time.sleep(250)"), str(free_port())
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        options = [["--nnodes", "2", "--node_rank", str(node), "--master_port", port] for node in (0, 1)]
        failed = list(pool.map(lambda how: run_python([*TORCHRUN, "--nproc_per_node", "1", *how], *script), options))
    assert all(done.returncode != 0 for done in failed) and time.monotonic() - started < 150
    assert "process 0 ends, as process 1 has ended" in failed[0].stderr
    assert "Signal 9" in failed[1].stderr


def test_one_process_has_nothing_to_share_the_weights_with():
    with pytest.raises(ValueError, match="--shard splits weights over processes"):
        shard([], torch.device("cpu"))
