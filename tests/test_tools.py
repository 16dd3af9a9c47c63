"""The report and the curve, from a run folder made by hand."""

import json

import pytest

from runlog.curve import plot_curve
from tools.report import write_report


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
