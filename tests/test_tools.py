"""The report and the curve, from a run folder made by hand; every script's --help."""

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
from runlog.report import colour, write_report
from skills import write_skills
from tools import plot_run, report, skill_quality, walkthrough
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
    step = {
        "observation": "on <desk 1> see pen 1",
        "route": [{"level": "step", "text": "take pen & go"}],
        "tokens": ["take", "pen", "1"],
        "old_logprobs": [-0.5, -1.0, -0.1],
        "skill_advantages": [0.4, -0.2, None],
        "advantages": [1.04, 0.98, 1.0],
    }
    skills = {"summary": "", "episode": "in order", "steps": {}}
    sample = {"iteration": 3, "task": "put pen", "success": True, "skills": skills, "steps": [step]}
    lost = sample | {"success": False, "skills": None}
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in (sample, lost)))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "train/success": 0.5}) + "\n")
    held_out = {"iteration": 0, "success": {"valid_seen": 0.25}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(held_out) + "\n")
    return tmp_path


def test_praise_is_green_blame_is_red_and_the_stronger_the_deeper():
    assert colour(0.5, 1.0) == "rgba(46, 160, 67, 0.44)"  # 0.08 + 0.72 / 2
    assert colour(-2.0, 1.0) == "rgba(218, 54, 51, 0.80)"
    assert colour(None, 1.0) == "#eee"


def test_report_shows_praise_blame_and_what_was_not_scored(run):
    page = write_report(run).read_text()
    assert "A_skill +0.400" in page
    assert "A_skill -0.200" in page
    assert "A_skill not scored" in page
    assert "&lt;desk 1&gt;" in page  # text is text, never markup
    assert "take pen &amp; go" in page
    assert "no skills (none used, or none could be parsed)" in page
    green, red = "rgba(46, 160, 67", "rgba(218, 54, 51"
    assert page.count(green) == page.count(red) == 2


def test_curve(run):
    assert plot_curve(run).stat().st_size > 1000


def test_what_is_no_number_or_no_text_is_shown_all_the_same(run):
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    sample["steps"][0] |= {"old_logprobs": [None, -1.0, -0.1], "tokens": ["a \ud83d", "pen", "1"]}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert "log pi_old not a number | A_skill +0.400" in page
    assert "a ?" in page


def test_a_curve_of_several_runs_and_of_one_without_evaluations(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert plot_curve(run, other) == run / "curve.png"


@pytest.mark.parametrize(
    ("main", "missing", "written"),
    [(report.main, "samples.jsonl", "report.html"), (plot_run.main, "metrics.jsonl", "curve.png")],
)
def test_the_command_lines(main, missing, written, run, monkeypatch, capsys):
    def call(folder):
        monkeypatch.setattr(sys, "argv", ["script.py", str(folder)])
        main()

    call(run)
    assert capsys.readouterr().out == f"{run / written}\n"
    (run / missing).write_text((run / missing).read_text() + '{"iteration": 3, "tra')  # a run that is alive
    call(run)
    (run / missing).write_text("{half a line\n")
    with pytest.raises(SystemExit, match=rf"\.py: .*line 1 of {run / missing} is damaged: Expecting property name"):
        call(run)
    (run / missing).write_text("[1]\n")
    with pytest.raises(SystemExit, match=r"is no file of a run: it holds \[1\]"):
        call(run)
    (run / missing).unlink()
    with pytest.raises(SystemExit, match=rf"\.py: no {missing} in {run}: not the folder of a run"):
        call(run)
    with pytest.raises(SystemExit, match=rf"\.py: no {missing} in nowhere"):
        call("nowhere")


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
