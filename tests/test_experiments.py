"""The estimates in hand-computed numbers, and a comparison with runs made by hand; one real run from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import compare
from experiments.compare import QUICK, is_there, jobs_of, read_results, run_all, scores, table
from experiments.estimates import bootstrap_interval, interquartile_mean, probability_of_improvement

SUCCESS = {"grpo": 0.4, "opid": 0.6}


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([[0.0], [1], [3], [100]])) == 2
    assert interquartile_mean(np.array([[0.0, 1], [3, 100]])) == 2  # over runs and splits alike
    assert interquartile_mean(np.array([[1.0], [2], [6]])) == 3  # a quarter of 3 is less than one


def test_probability_of_improvement_by_hand():
    ours, theirs = np.array([[1.0, 0], [3, 0]]), np.array([[2.0, 0], [0, 0]])
    # first split: 1 > 0, 3 > 2, 3 > 0 of four pairs; second: all ties
    assert probability_of_improvement(ours, theirs) == pytest.approx((0.75 + 0.5) / 2)
    assert probability_of_improvement(theirs, ours) == pytest.approx((0.25 + 0.5) / 2)


def test_bootstrap_intervals():
    same = np.full((5, 2), 0.3)
    assert bootstrap_interval(interquartile_mean, same) == pytest.approx((0.3, 0.3))
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=(5, 1)), rng.normal(size=(200, 1))
    width = lambda scores: np.diff(bootstrap_interval(interquartile_mean, scores, samples=300))[0]
    assert width(few) > 2 * width(many) > 0
    assert bootstrap_interval(probability_of_improvement, same + 1, same, samples=20) == (1, 1)


def test_bootstrap_keeps_the_splits_of_a_run_together():
    """Two splits that always add up to 1: drawn apart, their mean would vary."""
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert bootstrap_interval(lambda s: s.mean(), scores, samples=50) == pytest.approx((0.5, 0.5))


@pytest.fixture
def jobs(tmp_path):
    (tmp_path / "results").mkdir()
    return jobs_of(["grpo", "opid"], 2, QUICK.split(), tmp_path / "start", tmp_path / "results", tmp_path / "runs")


def pretend(job):
    """What a run leaves that `store` reads."""
    folder = Path(job.config.out)
    folder.mkdir(parents=True)
    success = {"valid_seen": SUCCESS[job.algo] + 0.1 * job.seed, "valid_unseen": SUCCESS[job.algo]}
    lines = [
        {"iteration": -1, "success": {"valid_seen": 0.1, "valid_unseen": 0.1}},
        {"iteration": 1, "success": success},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = [{"train/success": 0.5, "episodes": 4, "seconds/rollout": 1.5, "seconds/update": 0.5}] * 2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def test_seeds_come_in_order_and_meet_the_same_settings(jobs):
    assert [job.name for job in jobs] == ["grpo-seed0", "opid-seed0", "grpo-seed1", "opid-seed1"]
    a, b = (compare.settings(job.config) for job in jobs[:2])
    assert {k for k in a if a[k] != b[k]} == {"algo"}


def test_results_are_stored_once_and_tabulated(jobs):
    made = []
    run_all(jobs[:3], launch=lambda job: (made.append(job.name), pretend(job)))
    run_all(jobs, launch=lambda job: (made.append(job.name), pretend(job)))
    assert sorted(made) == ["grpo-seed0", "grpo-seed1", "opid-seed0", "opid-seed1"]
    found = read_results(jobs)
    stored = found["opid"][1]
    assert (stored["seconds"], stored["episodes"], stored["train"]) == (4.0, 8, [0.5, 0.5])
    assert [point["iteration"] for point in stored["curve"]] == [0, 2]
    assert scores(found["grpo"]).tolist() == [[0.4, 0.4], [0.5, 0.4]]
    rows = table(found, "grpo").splitlines()
    assert rows[2].startswith("| grpo | 2 | 40.0 |")  # 0.4, 0.4 of 0.4 0.4 0.4 0.5
    assert rows[3].startswith("| opid | 2 | 60.0 |")
    assert "| 1.00 | [1.00, 1.00] | 4 |" in rows[3]


def test_a_failed_run_is_made_again_and_the_others_are_kept(jobs):
    def launch(job):
        if job.algo == "opid":
            raise RuntimeError("opid-seed0 failed: out of memory")
        pretend(job)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_all(jobs[:2], launch=launch)
    assert [is_there(job) for job in jobs[:2]] == [True, False]


def test_a_result_of_other_settings_is_not_mistaken_for_this_run(jobs, tmp_path):
    run_all(jobs[:1], launch=pretend)
    flags = [*QUICK.split(), "--kl", "0.5"]
    other = jobs_of(["grpo"], 1, flags, tmp_path / "start", tmp_path / "results", tmp_path / "runs")
    with pytest.raises(ValueError, match="other settings of kl"):
        is_there(other[0])


def test_quick_comparison_from_end_to_end(tmp_path):
    argv = ["--quick", "--methods", "grpo", "--seeds", "1"]
    text = compare.main([*argv, "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")])
    assert text.splitlines()[-1].startswith("| grpo | 1 |")
    result = json.loads((tmp_path / "results/grpo-seed0.json").read_text())
    assert [point["iteration"] for point in result["curve"]] == [0, 1, 2]
    assert result["episodes"] == 8
    assert (tmp_path / "results/comparison.png").stat().st_size > 1000
