"""Nothing is lost, nothing mixed up: folders that are taken, runs that are stopped or fail, data that changed."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

import evaluate as evaluate_module
import runlog.start as start_module
import train as train_module
from envs import digest, fingerprints
from envs.alfworld import AlfworldEnv
from envs.search import SearchEnv
from envs.search.questions import load_questions
from envs.webshop import WebshopEnv
from lm.loading import load_pretrained, save_policy, taken
from lm.obstacles import Mendable
from runlog import RunLog, checkpoints
from runlog.ending import Ending, command, one_line, without_terminal
from runlog.start import notes, start
from tests.settings import laptop
from tests.test_train import SMALL, config, lines, same, train, weights
from tiny import warmstart
from tiny.coldstart import ColdStart, cold_start

ROOT = Path(__file__).parent.parent


# ---- a folder is taken -----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_in_a_line(random_tiny, tmp_path, monkeypatch, capsys):
    train(c := config(tmp_path, "run", iterations=1))
    before = Path(c.out, "config.json").read_bytes()
    with FileLock(tmp_path / "run/.lock"), pytest.raises(ValueError, match="run is in use by another run") as refused:
        start(replace(c, resume=True, iterations=2))  # as another process would
    assert "wait for it, stop it, or take another --out" in str(refused.value) and "\n" not in str(refused.value)
    assert Path(c.out, "config.json").read_bytes() == before
    train(replace(c, resume=True, iterations=2))


def test_two_runs_at_once_in_a_new_folder_leave_one(random_tiny, tmp_path):
    first = start(c := config(tmp_path, "run", iterations=1))
    script = f"from lm.loading import taken; from pathlib import Path; taken(Path({c.out!r}), 'run')"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode and "in use by another run" in other.stderr
    train(c, first)
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0  # given back at the end


def test_a_lock_goes_with_a_killed_process(tmp_path):
    script = f"from lm.loading import taken; from pathlib import Path; lock = taken(Path({str(tmp_path)!r}), 'run')"
    script += "; print('taken', flush=True); import time; time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match="in use by another run"):
        taken(tmp_path, "run")
    other.kill()
    other.wait()
    assert taken(tmp_path, "run").is_locked


def test_two_cold_starts_of_one_folder_leave_one(tmp_path, llama, tokenizer):
    save_policy(llama, tokenizer, tmp_path / "model")
    settings = ColdStart(model=str(tmp_path / "model"), games=1)
    (tmp_path / "cold").mkdir()
    with FileLock(tmp_path / "cold/.lock"), pytest.raises(ValueError, match="cold is in use by another cold start"):
        cold_start(settings, tmp_path / "cold")
    assert "seconds" in cold_start(settings, tmp_path / "cold")


def test_weights_that_two_runs_need_are_made_once(tmp_path, monkeypatch, llama, tokenizer):
    """The other process makes them while this one waits for its lock."""

    class Waited(FileLock):
        def __enter__(self):
            Path(self.lock_file.removesuffix(".lock")).write_text("made by the other")
            return super().__enter__()

    monkeypatch.setattr(warmstart, "FileLock", Waited)
    monkeypatch.setattr(warmstart, "made_of", lambda file: {"key": "old"})
    monkeypatch.setattr(warmstart, "make", lambda *args: pytest.fail("made twice"))
    monkeypatch.setattr(warmstart, "load_file", lambda file: {})
    warmstart.warm_started("alfworld", tmp_path)


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(self):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(FileLock, "acquire", none)
    taken(tmp_path, "run")
    assert "cannot be locked (no flock): start no second run in it" in caplog.text


# ---- stopped ---------------------------------------------------------------------------------------------------------


def main(out: Path, *more: str, monkeypatch) -> None:
    """train.py in this process, as `random_tiny` has it. Checkpoints are rare."""
    flags = f"{SMALL} --eval-every 0 --save-every 100 --invalid-penalty 1 --iterations 4 --scorer old --mini-batch 4"
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split(), "--out", str(out), *more])
    train_module.main()


def sends(number: int, at: int, name: str, monkeypatch, module=train_module):
    """The `at`-th call of a function sends this process a signal."""
    original, calls = getattr(module, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("number", "name", "at", "last", "code"),
    [
        (signal.SIGINT, "rescore", 3, 1, 130),  # before the update of iteration 2: the weights are those of 1
        (signal.SIGTERM, "micro_batches", 10, 2, 143),  # after its first gradient step: it comes to its end
        (signal.SIGINT, "rescore", 1, None, 130),  # before anything has moved
    ],
)
def test_a_stopped_run_is_saved_and_goes_on_exactly(
    number, name, at, last, code, random_tiny, tmp_path, monkeypatch, capsys
):
    main(tmp_path / "whole", monkeypatch=monkeypatch)
    with monkeypatch.context() as patch:
        sends(number, at, name, patch)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(tmp_path / "stopped", monkeypatch=monkeypatch)
    assert ended.value.code == code
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: stopped by")]
    kept = [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()]
    assert kept == ([] if last is None else [f"{last:06d}.pt"])
    assert f"Last checkpoint: {f'{tmp_path}/stopped/checkpoints/{kept[0]}' if kept else 'none'}. Go on with: " in told
    assert told.endswith(f"--out {tmp_path}/stopped --resume")
    main(tmp_path / "stopped", "--resume", monkeypatch=monkeypatch)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "whole", file) == lines(tmp_path / "stopped", file)


def test_a_variants_own_state_is_that_of_the_last_finished_iteration(random_tiny, tmp_path, monkeypatch):
    """skill-grpo keeps skills while it plays: those of the iteration that is stopped are not in the checkpoint."""
    flags = ("--algo", "skill-grpo")
    main(tmp_path / "whole", *flags, "--save-every", "1", "--keep-checkpoints", "9", monkeypatch=monkeypatch)
    sends(signal.SIGINT, 3, "rescore", monkeypatch)
    with pytest.raises(SystemExit):
        main(tmp_path / "stopped", *flags, monkeypatch=monkeypatch)
    states = [torch.load(tmp_path / run / "checkpoints/000001.pt") for run in ("whole", "stopped")]
    assert states[0]["variant"] == states[1]["variant"] and states[0]["variant"]


STOPPED = """
import os, signal, sys, time
import runlog.start, train
from config import parse_args
from tiny.warmstart import tiny_model, tiny_tokenizer

def slow(*args):
    print("updating", flush=True)
    time.sleep(60)

tokenizer = tiny_tokenizer()
runlog.start.load_model = lambda *a, **k: (tiny_model(len(tokenizer), seed=0, width=24), tokenizer)
runlog.start.Run.finish = slow
train.main()
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    flags = [*SMALL.split(), "--algo", "grpo", "--eval-every", "0", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", STOPPED, *flags]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line == "updating\n" for line in run.stdout)
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)  # a launcher's, after Ctrl-C: no second one
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=20)
    assert run.returncode == 130 and "Traceback" not in told
    assert "this iteration comes to its end first" in told and "ended at once" in told


# ---- failed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Mendable("no usable answer from http://x: gone"), "no usable answer from http://x: gone"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: lower --token-budget or --rollout-budget"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower --token-budget"),
        (FloatingPointError("every gradient was NaN: try a lower --learning-rate"), "every gradient was NaN"),
        (OSError(28, "the disk is full"), "[Errno 28] the disk is full"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_user_can_mend_ends_in_a_line_with_the_last_state_saved(
    error, words, random_tiny, tmp_path, monkeypatch
):
    fails(error, 3, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(tmp_path / "run", monkeypatch=monkeypatch)
    told, saved = ended.value.code, tmp_path / "run/checkpoints/000001.pt"
    assert told.startswith(f"train.py: {words}") and "\n" not in told
    assert f". Last checkpoint: {saved}. Go on with: python train.py" in told and told.endswith("--resume")
    assert saved.is_file()


def fails(error: Exception, at: int, monkeypatch) -> None:
    original, calls = train_module.rescore, []

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(*args)

    monkeypatch.setattr(train_module, "rescore", call)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(error, random_tiny, tmp_path, monkeypatch):
    fails(error, 2, monkeypatch)
    with pytest.raises(type(error), match="a bug") as ended:
        main(tmp_path / "run", monkeypatch=monkeypatch)
    (note,) = ended.value.__notes__  # under the traceback
    assert note.startswith(f"Last checkpoint: {tmp_path}/run/checkpoints/000000.pt. Go on with: python train.py")


def test_after_the_first_gradient_step_of_an_iteration_nothing_of_it_is_saved(random_tiny, tmp_path, monkeypatch):
    original, calls = train_module.micro_batches, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 6:  # four gradient steps an iteration
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args)

    monkeypatch.setattr(train_module, "micro_batches", fail)
    with pytest.raises(SystemExit, match="Last checkpoint: none"):
        main(tmp_path / "run", monkeypatch=monkeypatch)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_no_first_prompt_that_fits_is_a_line(random_tiny, tmp_path, monkeypatch):
    original = AlfworldEnv.build_prompt
    monkeypatch.setattr(AlfworldEnv, "build_prompt", lambda *a: (*original(*a), " look" * 5000))
    with pytest.raises(SystemExit, match=r"^train\.py: not one first prompt fits: raise --context-limit .*--resume$"):
        main(tmp_path / "run", monkeypatch=monkeypatch)


def test_strict_saves_the_iteration_first(random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(start_module, "silences", lambda *args: {"steps": "no end", "actions": "none is valid"})
    told = (
        rf"train\.py: --strict, and nothing is learnt: actions\. Last checkpoint: {tmp_path}/run/checkpoints/000000\.pt"
    )
    with pytest.raises(SystemExit, match=rf"^{told}\. Go on with: .*--strict --resume$"):
        main(tmp_path / "run", "--strict", monkeypatch=monkeypatch)
    assert torch.load(tmp_path / "run/checkpoints/000000.pt")["variant"]["silent"] == {"steps": 0, "actions": 0}


def test_a_reader_that_has_gone_costs_nothing(random_tiny, tmp_path, monkeypatch):
    """`| head`, or a terminal that was closed: the line of an iteration is an error, and the iteration is kept."""
    monkeypatch.setattr(RunLog, "show", lambda *args: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(SystemExit, match=r"Broken pipe\. Last checkpoint: .*000000\.pt\. Go on with"):
        main(tmp_path / "run", monkeypatch=monkeypatch)


def test_a_signal_waits_while_a_run_that_failed_is_saved(random_tiny, tmp_path, monkeypatch, capfd):
    fails(OSError(5, "gone"), 3, monkeypatch)
    sends(signal.SIGTERM, 1, "save", monkeypatch, checkpoints)
    with pytest.raises(SystemExit, match=r"gone\. Last checkpoint: .*000001\.pt"):
        main(tmp_path / "run", monkeypatch=monkeypatch)
    assert "the run is being saved; Ctrl-C ends at once" in capfd.readouterr().err


def test_a_closed_terminal_ends_a_run_unless_nohup_says_otherwise():
    with pytest.raises(SystemExit) as ended, one_line(laptop(out="nowhere")):
        os.kill(os.getpid(), signal.SIGHUP)
    assert ended.value.code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with one_line(laptop(out="nowhere")):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_words_to_a_terminal_that_has_closed_are_no_error():
    master, terminal = os.openpty()
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(terminal, b"words")
    without_terminal(terminal)
    assert os.write(terminal, b"words") == 5
    os.close(terminal)


@pytest.mark.parametrize(("name", "text"), [("start.json", "{"), ("config.json", "[]"), ("config.json", "")])
def test_a_damaged_file_of_a_run_is_named(name, text, random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=1))
    Path(c.out, name).write_text(text)
    with pytest.raises(ValueError, match=rf"run/{name} is damaged: ") as refused:
        start(replace(c, resume=True, iterations=2))
    assert "\n" not in str(refused.value)


def test_a_damaged_line_costs_only_itself(random_tiny, tmp_path):
    train(c := config(tmp_path, "run", iterations=2))
    file = Path(c.out, "metrics.jsonl")
    file.write_text('{"iteration": 0, "x\n[1]\n' + file.read_text())
    train(replace(c, resume=True, iterations=3))
    assert [record["iteration"] for record in lines(c.out)] == [0, 1, 2]


def test_fewer_iterations_than_were_made_are_told(random_tiny, tmp_path, capsys):
    train(c := config(tmp_path, "run", iterations=2))
    train(replace(c, resume=True, iterations=1))
    assert "2 iterations are made already, and --iterations is 1: nothing more is trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": 1000, "lr_halving": 0}, "the learning rate reaches 16.0% of its peak: --warmup 1000 is too long"),
        ({"lr_halving": 8}, "the learning rate ends at 1e-06 of its peak"),
    ],
)
def test_a_learning_rate_that_teaches_nothing_is_told(changes, words, llama):
    assert any(words in note for note in notes(laptop(iterations=160, **changes), llama))
    assert not any("learning rate" in note for note in notes(laptop(iterations=160), llama))


def test_only_the_first_process_says_where_settings_come_from(monkeypatch, capsys):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        Ending(laptop()).print(f"settings of {rank}")
    assert capsys.readouterr().out == "settings of 0\n"


IMPORTING = ["train.py", "evaluate.py", "tools/coldstart.py", "tools/skill_quality.py", "tools/walkthrough.py"]
IMPORTING += ["tools/play.py", "lab/experiments/skill_effect.py", "lab/experiments/compare.py"]


@pytest.mark.parametrize("command", IMPORTING)
def test_ctrl_c_while_pytorch_loads_is_a_line(command, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    told = subprocess.run([sys.executable, command], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert told.stderr.decode() == f"{Path(command).name}: stopped by Ctrl-C\n"
    assert told.returncode == -signal.SIGINT


def test_a_pipe_without_a_reader_is_no_traceback():
    script = "import lm\nwhile True: print('x')"
    said = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said.stdout.readline()
    said.stdout.close()
    assert said.stderr.read() == b"" and said.wait()


def test_the_command_that_goes_on_is_quoted_and_has_resume_once(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", "--out", "my runs/a"])
    assert command() == "python train.py --out 'my runs/a' --resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command() == "the same command and --resume"


# ---- what a run goes on with -----------------------------------------------------------------------------------------


def write(path: Path, answers: list[str], stamp: int | None = None) -> None:
    rows = [{"question": f"q{i}?", "golden_answers": [answer]} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stamp is not None:
        os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("right", ["right", "wrong, and longer"])
def test_a_corrected_answer_is_read_whatever_the_clock_says(right, tmp_path):
    """`datasets` takes a file with the time of change of before for the file of before."""
    path, stamp = tmp_path / "test.jsonl", 1_700_000_000_000_000_000
    for answer in ("wrong", right):
        write(path, [answer], stamp)
        load_questions.cache_clear()
        assert load_questions(str(tmp_path), "test")[0].golden_answers == (answer,)


def test_data_are_known_by_their_content(tmp_path):
    """Questions, a corpus, an address, WebShop's files, game files: what changed has another fingerprint."""
    write(tmp_path / "train.jsonl", ["a"])
    write(tmp_path / "test.jsonl", ["a"])
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "contents": "Lima"}\n')
    search = SearchEnv(questions=str(tmp_path), retriever=str(tmp_path / "corpus.jsonl"))
    games = {"train": ["search/train/0"]}
    before = fingerprints(search, games)
    assert set(before) == {"questions of train", "questions of test", "retriever", "games of train"}
    write(tmp_path / "test.jsonl", ["b"])
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "contents": "Rome"}\n')
    after = fingerprints(search, games)
    assert {name for name in before if before[name] != after[name]} == {"questions of test", "retriever"}
    served = SearchEnv(questions=str(tmp_path), retriever="http://127.0.0.1:8000")
    assert fingerprints(served, {})["retriever"] == "http://127.0.0.1:8000"
    assert WebshopEnv().sources() == {}
    folder = tmp_path / "pick-Mug" / "trial"
    folder.mkdir(parents=True)
    (folder / "game.tw-pddl").write_text("{}")
    game = {"train": [str(folder / "game.tw-pddl"), object()]}  # an environment of one's own may have any tasks
    before = fingerprints(object(), game)
    assert before == fingerprints(object(), {"train": [game["train"][0], object()]})
    (folder / "game.tw-pddl").write_text("[]")
    assert fingerprints(object(), game) != before


def test_webshops_files_are_among_its_sources(tmp_path, monkeypatch):
    env = WebshopEnv()
    env.generated, env.data = False, "cache/webshop"
    assert set(env.sources()) == {"WebShop's products", "WebShop's attributes", "WebShop's instructions"}
    env.goals = "synthetic"
    assert "WebShop's instructions" not in env.sources()


def test_of_a_large_file_pieces_are_read(tmp_path, monkeypatch):
    path = tmp_path / "corpus"
    with open(path, "wb") as file:
        file.truncate(2**31)  # no room is taken
    before = digest(path)
    with open(path, "r+b") as file:
        file.seek(2**31 - 10)
        file.write(b"changed")
    assert digest(path) != before


def test_other_data_are_not_gone_on_with(random_tiny, tmp_path, monkeypatch):
    train(c := config(tmp_path, "run", iterations=1))
    original = start_module.games_of
    monkeypatch.setattr(start_module, "games_of", lambda *a: original(*a)[::-1])
    with pytest.raises(ValueError, match=r"run started with other data \(games of train\): cannot resume it"):
        start(replace(c, iterations=2, resume=True))
    monkeypatch.setattr(start_module, "games_of", original)
    told = json.loads(Path(c.out, "start.json").read_text())
    told["data"]["retriever"] = "http://elsewhere"
    Path(c.out, "start.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"other data \(retriever\)"):
        start(replace(c, iterations=2, resume=True))
    del told["data"]  # a run from before data had a fingerprint
    Path(c.out, "start.json").write_text(json.dumps(told))
    assert start(replace(c, iterations=2, resume=True)).log.first_iteration == 1


def test_without_a_checkpoint_a_run_starts_anew_from_what_is_there(random_tiny, tmp_path, monkeypatch):
    """Nothing was trained on the data of before. Another model's metrics stay where they are."""
    train(c := config(tmp_path, "run", iterations=1))
    Path(c.out, "checkpoints/000000.pt").unlink()
    with pytest.raises(ValueError, match="other settings of --model"):
        start(replace(c, resume=True, model="smollm2"))
    original = start_module.games_of
    monkeypatch.setattr(start_module, "games_of", lambda *a: original(*a)[::-1])
    before = json.loads(Path(c.out, "start.json").read_text())["data"]
    assert start(replace(c, resume=True)).log.first_iteration == 0
    assert json.loads(Path(c.out, "start.json").read_text())["data"] != before


def test_a_model_that_moved_is_the_same_model(random_tiny, tmp_path, monkeypatch, llama, tokenizer):
    train(c := config(tmp_path, "run", iterations=1))
    moved = replace(c, iterations=2, resume=True, model="smollm2")
    assert start(moved).log.first_iteration == 1  # the same weights by another name
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), other))
    with pytest.raises(ValueError, match=r"other data \(tokenizer\)"):
        start(moved)


def test_a_resumed_run_is_tracked_as_one(random_tiny, tmp_path, monkeypatch):
    told, begun = [], []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, init_kwargs: begun.append(init_kwargs))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: told.append((step, sorted(values))))
    train(c := config(tmp_path, "run", iterations=2, eval_every=1))
    assert told[0] == (0, ["eval/valid_seen/success", "eval/valid_unseen/success"])
    assert [step for step, _ in told] == [0, 1, 2]
    train(replace(c, iterations=3, resume=True))
    assert [step for step, _ in told] == [0, 1, 2, 3]
    first, again = begun
    assert first["wandb"] == again["wandb"] and len(first["wandb"]["id"]) == 8 and first["wandb"]["resume"] == "allow"
    assert (first["tensorboard"], again["tensorboard"]) == ({"purge_step": 0}, {"purge_step": 3})


def test_the_same_settings_and_seed_make_the_same_files(random_tiny, tmp_path):
    """Byte for byte, but for seconds and memory."""
    for name in ("one", "other"):
        train(config(tmp_path, name, iterations=2, sample_every=1))
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "other/samples.jsonl").read_bytes()
    texts = [[json.dumps(line) for line in lines(tmp_path / name)] for name in ("one", "other")]
    assert texts[0] == texts[1]


# ---- a run's folder is its policy ------------------------------------------------------------------------------------


def test_a_runs_folder_stands_for_its_policy(random_tiny, tmp_path, monkeypatch, capsys):
    train(config(tmp_path, "run", iterations=1, max_steps=3))
    run = str(tmp_path / "run")
    model, _ = load_pretrained(run)
    assert same(dict(model.named_parameters()), weights(run))
    assert train_module.parse_args(["--model", run]).max_steps == 3  # what the policy says of itself
    evaluate_module.main(["--model", run, "--eval-games", "1"])
    assert "valid_unseen" in capsys.readouterr().out


def test_a_run_without_a_policy_says_so(random_tiny, tmp_path, capsys):
    start(config(tmp_path, "run"))
    for main in (evaluate_module.main, train_module.parse_args):
        with pytest.raises(SystemExit):
            main(["--model", str(tmp_path / "run")])
        assert "run is the folder of a run that has not ended: no policy is in it yet" in capsys.readouterr().err
