"""The curve, from a run folder made by hand; every script's --help."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tiny.loading
from data import Advantages, Batch, Guidance, Step, Trajectory
from runlog.curve import plot_curve
from skills import write_skills
from tools import plot_run, skill_quality, walkthrough
from variants.opid_oracle import scripted_skills

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "lab/experiments", "lab/benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "train/success": 0.5}) + "\n")
    held_out = {"iteration": 0, "success": {"valid_seen": 0.25}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(held_out) + "\n")
    return tmp_path


def test_curve(run):
    assert plot_curve(run).stat().st_size > 1000


def test_a_curve_of_several_runs_and_of_one_without_evaluations(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert plot_curve(run, other) == run / "curve.png"


def test_the_command_line_of_the_curve(run, monkeypatch, capsys):
    def call(folder):
        monkeypatch.setattr(sys, "argv", ["plot_run.py", str(folder)])
        plot_run.main()

    call(run)
    assert capsys.readouterr().out == f"{run / 'curve.png'}\n"
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 3, "tra')  # a run that is alive
    call(run)
    metrics.write_text("{half a line\n")
    with pytest.raises(SystemExit, match=rf"plot_run\.py: line 1 of {metrics} is damaged: Expecting property name"):
        call(run)
    metrics.write_text("[1]\n")
    with pytest.raises(SystemExit, match=r"is no file of a run: it holds \[1\]"):
        call(run)
    metrics.unlink()
    for folder in (run, "nowhere"):
        with pytest.raises(SystemExit, match=rf"plot_run\.py: no metrics.jsonl in {folder}: not the folder of a run"):
            call(folder)


def test_skill_quality_plays_writes_and_checks(llama, tokenizer, monkeypatch, capsys):
    llama.generation_config.eos_token_id = list(range(4, len(tokenizer), 5))  # a random model must end its responses
    monkeypatch.setattr(skill_quality, "load_model", lambda name: (llama, tokenizer))
    monkeypatch.setattr(sys, "argv", ["skill_quality.py", "--games", "2"])
    skill_quality.main()  # as it is: what a random model writes is no skill
    assert "parsed at first 0%, after a retry 0%" in capsys.readouterr().out

    def written(trajectories, write, **options):
        metrics = {"skills/first_parse_rate": 0.5, "skills/parse_rate": 1.0}
        skills = [scripted_skills(trajectory, options["max_step_skills"]) for trajectory in trajectories]
        skills[0].episode, skills[0].steps = "always look first", {0: "fly"}
        return skills, metrics

    monkeypatch.setattr(skill_quality, "write_skills", written)
    skill_quality.main()
    shown = capsys.readouterr().out
    assert "parsed at first 50%, after a retry 100%" in shown
    assert "failure: 2 episode skills, 50% right" in shown
    assert "1 step skills, 0% right" in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help_of_its_own_before_anything_is_loaded(script, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("--help loads a model")

    monkeypatch.setattr(tiny.loading, "load_model", load)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {Path(script).name} [-h]")
    described = runpy.run_path(str(ROOT / script))["__doc__"].split()
    assert " ".join(described) in " ".join(shown.split())


@pytest.mark.parametrize("script", ["tools/report.py", "tools/plot_run.py", "tools/extract_alfworld_data.py"])
def test_small_tools_answer_without_waiting_for_pytorch(script):
    """From another folder, too."""
    watch = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watch += "except SystemExit: print('torch' in sys.modules)"
    command = [sys.executable, "-c", watch, str(ROOT / script), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("\nFalse\n")


def test_the_walkthrough_records_what_a_writer_is_asked_and_answers():
    """First of each rollout, then of those that are asked again."""
    exchanges, batches = [], [['{"episode_skill": "look first"}', "no idea"], ['{"episode_skill": "open it"}']]
    write = walkthrough.recorded(lambda prompts: batches.pop(0), exchanges)
    played = [Trajectory("put a pen on the desk", 0, [], False) for _ in range(2)]
    skills, _ = write_skills(played, write, max_step_skills=0, template=None)
    assert [own.episode for own in skills] == ["look first", "open it"]
    assert [answer for _, answer in exchanges] == [
        '{"episode_skill": "look first"}',
        "no idea",
        '{"episode_skill": "open it"}',
    ]
    assert exchanges[2][0].startswith(exchanges[1][0]) and "no idea" in exchanges[2][0]


def test_the_walkthrough_shows_a_step_of_a_task_that_was_won_and_lost():
    """Rather one with a step skill, and of these the one that its skill moved most."""
    step = Step((), "", [1], [2], "", "", True)
    outcomes = [(0, False), (0, False), (1, True), (1, False)]  # (task, won)
    trajectories = [Trajectory("", group, [step, step], success) for group, success in outcomes]
    episode, own = (Guidance("episode", "in order"),), (Guidance("step", "open it"),)
    routes = [[own, own], [own, own], [episode, own], [own, ()]]
    skill = torch.tensor([[9.0], [9], [9], [9], [5], [-2], [1], [float("nan")]])  # (B, 1)
    advantages = Advantages(torch.zeros(8, 1), torch.zeros(8), skill)
    batch = Batch(trajectories, [None] * 4, routes, {}, torch.zeros(8, 1), None, {})
    batch.advantages = advantages
    assert walkthrough.pick(batch) == (2, 1)
    trajectories.append(Trajectory("", 1, [], False))  # what comes last has no say
    batch.routes = [*routes, []]
    assert walkthrough.pick(batch) == (2, 1)
    with pytest.raises(ValueError, match="no step is guided"):
        batch.routes = [[(), ()]] * 4 + [[]]
        walkthrough.pick(batch)
