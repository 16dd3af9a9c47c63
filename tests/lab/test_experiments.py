"""The estimates in hand-computed numbers, and a comparison with runs made by hand; one real run from end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lab.experiments import compare
from lab.experiments.compare import QUICK, is_there, jobs_of, read_arms, read_results, run_all
from lab.experiments.estimates import bootstrap_interval, interquartile_mean, probability_of_improvement
from lab.experiments.stored import OLD, add, differing, find, read
from lab.experiments.tables import (
    area,
    by_episodes,
    by_type,
    efficiency,
    episodes_to_reach,
    leads,
    read_shares,
    scores,
    share_of_points,
    table,
)

ROOT = Path(__file__).parent.parent.parent
PLAIN = {"grpo": "--algo grpo", "opid": "--algo opid"}
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
    return jobs_of(PLAIN, range(2), QUICK.split(), [tmp_path / "start"], tmp_path / "bench.jsonl", tmp_path / "runs")


TABLE = """split          Pick   Pick2     All     95% interval  games
valid_seen     55.0       -    55.0     [10.5, 80.8]      4
valid_unseen   25.0    50.0    30.0     [10.0, 80.0]      4"""


def pretend(job):
    """What a run leaves that `store` reads."""
    folder = Path(job.config.out)
    folder.mkdir(parents=True)
    success = {"valid_seen": SUCCESS[job.arm] + 0.1 * (job.seed % 100), "valid_unseen": SUCCESS[job.arm]}
    lines = [
        {"iteration": -1, "success": {"valid_seen": 0.1, "valid_unseen": 0.1}, "table": TABLE},
        {"iteration": 1, "success": success, "table": TABLE.replace("55.0", f"{50 + 2 * job.seed}.0")},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = [{"train/success": 0.5, "episodes": 4, "seconds/rollout": 1.5, "seconds/update": 0.5}] * 2
    metrics = [m | {"tokens/sampled": count} for m, count in zip(metrics, (10, 20), strict=True)]
    metrics = [m | {"advantage/skill_abs": 0.123456} for m in metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for name in ("000000.pt", "000001.pt"):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / name).touch()


def test_seeds_come_in_order_and_meet_the_same_settings(jobs):
    assert [job.name for job in jobs] == ["grpo-seed0", "opid-seed0", "grpo-seed1", "opid-seed1"]
    a, b = (compare.settings(job.config) for job in jobs[:2])
    assert {k for k in a if a[k] != b[k]} == {"algo", "episode_weight", "step_weight"}  # GRPO is lambda = 0


def test_results_are_stored_once_and_tabulated(jobs):
    made = []
    run_all(jobs[:3], launch=lambda job: (made.append(job.name), pretend(job)))
    run_all(jobs, launch=lambda job: (made.append(job.name), pretend(job)))
    assert sorted(made) == ["grpo-seed0", "grpo-seed1", "opid-seed0", "opid-seed1"]
    assert [path.name for job in jobs for path in Path(job.config.out, "checkpoints").iterdir()] == ["000001.pt"] * 4
    found = read_results(jobs)
    stored = found["opid"][1]
    assert (stored["seconds"], stored["episodes"], stored["train"]) == (4.0, 8, [0.5, 0.5])
    assert [point["iteration"] for point in stored["curve"]] == [0, 2]
    assert scores(found["grpo"]).tolist() == [[0.4, 0.4], [0.5, 0.4]]
    assert (stored["training"], stored["curve"][0]["sampled"], stored["curve"][1]["sampled"]) == (0, 0, 30)
    assert stored["signal"] == {"advantage/skill_abs": [0.1235, 0.1235]}
    assert (stored["phases"], stored["tokens"]) == ({"rollout": 3.0, "update": 1.0}, {"sampled": 30})
    rows = table(found, "grpo").splitlines()
    assert [cell.strip() for cell in rows[0].split("|")][3:6] == ["valid_seen, IQM, %", "95%", "valid_unseen, IQM, %"]
    assert rows[2].startswith("| grpo | 2 | 45.0 | [40.0, 50.0] | 40.0 | [40.0, 40.0] |")
    # over both: of 40 40 40 50 the middle two; where seed 1 is drawn twice, of 40 40 50 50
    assert "| 40.0 | [40.0, 45.0] |" in rows[2]
    # over training: each split's mean with 0.1, so 0.25 and 0.25 of seed 0, 0.3 and 0.25 of seed 1
    assert area(found["grpo"]).ravel().tolist() == pytest.approx([0.25, 0.25, 0.3, 0.25])
    assert "| 25.0 | [25.0, 27.5] |" in rows[2]
    assert rows[3].startswith("| opid | 2 | 65.0 |")
    assert "| 1.00 | [1.00, 1.00] | 4 |" in rows[3]
    rows = by_type(found).splitlines()  # means of seeds 0 and 1, seen / unseen
    assert rows[0] == "| success by type, valid_seen / valid_unseen, % | Pick | Pick2 |"
    seen = {"before training": 55, "grpo": 51, "opid": 51}
    late = [run | {"curve": run["curve"][1:]} for run in found["grpo"]]  # --eval-every 0: one evaluation, at the end
    assert [row.split("|")[1].strip() for row in by_type({"grpo": late}).splitlines()[2:]] == ["grpo"]
    assert rows[2:] == [f"| {name} | {share} / 25 | nan / 50 |" for name, share in seen.items()]
    del found["opid"][0]["tables"]  # of an older version: left out
    assert [row.split("|")[1].strip() for row in by_type(found).splitlines()[2:]] == ["before training", "grpo"]


def curve(*successes):
    """A run of 10 episodes an iteration, evaluated every second one."""
    points = [{"iteration": 2 * i, "valid_seen": s, "valid_unseen": s - 0.2} for i, s in enumerate(successes)]
    return {"curve": points, "train": [0.0] * 4, "episodes": 40}


def test_episodes_to_reach_by_hand():
    run = curve(0.2, 0.6, 0.9)  # means of the splits: 0.1, 0.5, 0.8
    assert [episodes_to_reach(run, goal) for goal in (0.05, 0.5, 0.7, 0.8, 0.9)] == [0, 20, 40, 40, np.inf]
    assert episodes_to_reach(curve(0.2, 0.9, 0.3), 0.7) == 20  # the first time counts


def test_runs_that_never_reach_a_goal_count_as_such():
    quick, slow, never = curve(0.2, 0.9, 0.9), curve(0.2, 0.3, 0.9), curve(0.2, 0.3, 0.3)
    rows = efficiency({"a": [quick, quick, slow, never], "b": [never] * 5}, "b").splitlines()
    assert rows[0].startswith("| episodes to reach, IQM [95%] | 50% | 60% | 70% | 80% | episodes to b's final level")
    assert rows[2].startswith("| a | 30 [20, never], 1 of 4 never |")  # the middle two of 20 20 40 inf
    assert rows[3] == "| b |" + " 5 of 5 never |" * 4 + " - | - |"


def test_share_of_the_baselines_episodes_by_hand():
    slow = np.array([[0.1, 0.2, 0.3, 0.5, 0.5], [0.1, 0.2, 0.3, 0.3, 0.5]])  # means: 0.1 0.2 0.3 0.4 0.5
    quick = np.array([[0.1, 0.4, 0.6, 0.6, 0.6]])  # 0.5 at the second point, where slow takes four
    assert share_of_points(quick, slow) == 0.5
    assert share_of_points(slow, slow) == 1.0
    assert share_of_points(slow, quick) == np.inf
    assert share_of_points(slow, np.array([[0.1, 0.0]])) == 1  # they lost by training: both are there from the start
    assert share_of_points(np.array([[0.0, 0.3]]), np.array([[0.3, 0.2]])) == np.inf
    ends = np.array([[0.1, 0.4, 0.2, 0.2, 0.2, 0.2, 0.6, 0.4]])  # the last quarter's mean is 0.5, of the last alone 0.4
    assert share_of_points(np.array([[0.1, 0.4, 0.5]]), ends) == 2 / 6


def test_the_share_is_in_the_table_with_its_interval():
    slow, quick, never = curve(0.2, 0.4, 0.6, 0.9), curve(0.2, 0.9, 0.9, 0.9), curve(0.2, 0.2, 0.2, 0.2)
    found = {"grpo": [slow] * 5, "opid": [quick] * 5, "opsd": [never] * 5}
    rows = efficiency(found, "grpo").splitlines()
    assert [row.split("|")[-3:-1] for row in rows[2:]] == [
        [" - ", " - "],
        [" 33 ", " [33, 33] "],
        [" never ", " [never, never] "],
    ]


def test_leads_are_counted_seed_by_seed():
    def run(seed, seen, unseen):
        before = {"iteration": 0, "valid_seen": 0.1, "valid_unseen": 0.3}
        after = {"iteration": 2, "valid_seen": seen, "valid_unseen": unseen}
        return {"config": {"seed": seed}, "curve": [before, after]}

    found = {
        "opid": [run(0, 0.5, 0.5), run(2, 0.8, 0.7)],
        "opid-shuffled": [run(0, 0.4, 0.4), run(1, 0.9, 0.9), run(2, 0.6, 0.6)],  # seed 1 has no counterpart
        "other": [run(5, 0.1, 0.1)],
    }
    at_the_end, over_training = (part.splitlines() for part in leads(found, "grpo").split("\n\n"))
    assert at_the_end[0] == "| points ahead at the end, seed by seed | of opid-shuffled | 95% |"
    assert at_the_end[2] == "| opid | 10.0 | [10.0, 15.0] |"  # differences 10 10 (seed 0), 20 10 (seed 2)
    assert at_the_end[3:] == ["| opid-shuffled | - | - |", "| other | - | - |"]
    assert over_training[0] == "| points ahead over training, seed by seed | of opid-shuffled | 95% |"
    assert over_training[2] == "| opid | 5.0 | [5.0, 7.5] |"  # they began alike
    assert leads(found, "opid").splitlines()[0].startswith("| points ahead at the end, seed by seed | of opid | 95% |")


def test_success_by_episodes_is_the_mean_of_the_splits():
    found = {"grpo": [curve(0.2, 0.4, 0.6)], "opid": [curve(0.2, 0.5, 0.9), curve(0.2, 0.6, 0.7)]}
    assert by_episodes(found).splitlines() == [
        "| success after episodes, IQM, % | 0 | 20 | 40 |",
        "|---|---|---|---|",
        "| grpo | 10.0 | 30.0 | 50.0 |",
        "| opid | 10.0 | 45.0 | 70.0 |",
    ]


def test_arms_are_runs_of_their_own(jobs, tmp_path):
    arms = PLAIN | read_arms()
    folders = [tmp_path / "start"], tmp_path / "bench.jsonl", tmp_path / "runs"
    made = jobs_of(arms, [0], [*QUICK.split(), "--step-weight", "0.2", "--skill-writer", "reference"], *folders)
    assert len({json.dumps(compare.settings(job.config)) for job in made}) == len(arms)
    a = {job.arm: job.config for job in made}
    assert a["opid"].step_weight == a["opid-episode-alone"].step_weight == 0.2
    assert a["opid-lambda-0.3"].step_weight == 0.3  # the arm's own flags come last
    assert a["opid"].skill_writer == "reference" and a["opid-scorer-old-writer-policy"].skill_writer == "policy"


@pytest.mark.parametrize(
    "wrong, error",
    [
        (["--arms", "opid-k9"], "--arms: there is no 'opid-k9', but opid-lambda-0.3, "),
        (["--methods", "opod"], "--methods: --algo must be one of "),
        ([], "name what is compared: --methods, --arms or both"),
        (["--results", "folder"], "folder is no file NAME.jsonl"),
        (["--trainings", "0"], "--trainings is 0, must be 1 or more"),
        (["--final-games", "-1"], "--final-games is -1, must be 0 or more"),
        (["--first-seed", "-1"], "--first-seed is -1, must be 0 or more"),
        (["--seeds", "2", "--seed", "1"], "--seed differs from run to run"),
        (["--model", "smollm2", "--methods", "opid"], "--quick takes an untrained model"),
        (["--algo=opid"], "--algo differs from run to run"),
        (["--methods", "grpo", "--baseline", "opid"], "--baseline opid is none of the methods and arms: grpo"),
    ],
)
def test_mistakes_on_the_command_line_are_named(wrong, error, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--quick", *wrong])
    assert error in capsys.readouterr().err


STOPPED = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from lab.experiments.children import Children

children = Children()
with children.stopped_by_signals(), ThreadPoolExecutor(2) as pool:
    for _ in range(6):
        pool.submit(children.run, ["sh", "-c", f"echo $$ >> {sys.argv[1]}; exec sleep 60"])
"""


def test_runs_start_from_the_named_model_and_no_other(tmp_path, monkeypatch, llama, tokenizer):
    asked = []
    monkeypatch.setattr(compare, "load_model", lambda name, **k: asked.append(name) or (llama, tokenizer))
    for _ in range(2):
        (start,) = compare.prepare(tmp_path, False, QUICK.split(), "some/model")
    assert asked == ["some/model"]  # once
    assert (start / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds runs from some/model for alfworld, not from tiny"):
        compare.prepare(tmp_path, False, QUICK.split())
    with pytest.raises(ValueError, match="not from some/model for search"):
        compare.prepare(tmp_path, False, [*QUICK.split(), "--env", "search"], "some/model")
    with pytest.raises(ValueError, match="not from some/model for alfworld, untrained"):
        compare.prepare(tmp_path, True, QUICK.split(), "some/model")


def test_each_training_of_the_starting_model_has_runs_of_its_own(tmp_path, monkeypatch, llama, tokenizer):
    asked = []
    monkeypatch.setattr(compare, "load_model", lambda name, training, **k: asked.append(training) or (llama, tokenizer))
    starts = compare.prepare(tmp_path, False, QUICK.split(), "tiny", trainings=2)
    assert (asked, [start.name for start in starts]) == ([0, 1], ["start0", "start1"])
    (starts[1] / "model.safetensors").write_bytes(b"others")
    made = jobs_of(
        {"a": "--algo grpo", "b": "--algo opid"}, [3, 4], QUICK.split(), starts, tmp_path / "bench.jsonl", tmp_path
    )
    assert [job.name for job in made[:5]] == [
        *("a-start0-seed3", "b-start0-seed3", "a-start1-seed3", "b-start1-seed3"),
        "a-start0-seed4",
    ]
    assert [job.training for job in made[:4]] == [0, 0, 1, 1]
    assert made[0].start == made[1].start != made[2].start == made[3].start
    assert [Path(job.config.model).name for job in made[1:3]] == ["start0", "start1"]
    assert {compare.arm_of(job.name) for job in made} == {"a", "b"}


def test_the_cost_of_training_by_hand():
    line = {
        "tokens/sampled": 10,
        "tokens/skills": 4,
        "tokens/scored": 99,
        "seconds/rollout": 1.5,
        "seconds/skills": 0.5,
    }
    evaluated = line | {"seconds/evaluate": 50.0}
    assert compare.cost([line, evaluated]) == {"sampled": 20, "skills": 8, "seconds": 4.0, "writing": 1.0}
    assert compare.cost([]) == {"sampled": 0, "skills": 0, "seconds": 0, "writing": 0}


def test_what_evaluate_printed_by_hand():
    printed = f"loading\n{TABLE}\nWARNING: 60% of the responses are cut off"
    assert read_shares(printed) == {"games": 4, "valid_seen": 0.55, "valid_unseen": 0.3}


def test_data_from_outside_goes_to_a_model_that_knows_its_words(tmp_path, monkeypatch, llama, tokenizer):
    """And its splits are those that are there."""
    monkeypatch.setattr(compare, "load_model", lambda name, **k: (llama, tokenizer))
    asked = []
    monkeypatch.setattr(compare, "games_of", lambda config, split: asked.append(split))
    monkeypatch.setattr(compare, "eval_splits", lambda config: ("test",))
    outside = ["--env", "search", "--env-options", f"questions={tmp_path}"]
    compare.prepare(tmp_path / "runs", False, [*QUICK.split(), *outside], "some/model")
    assert asked == ["train", "test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "other"}, "opid-seed1 and grpo-seed0 are from other starting weights"),
        ({"iterations": 9}, "opid-seed1 and grpo-seed0 have other settings of iterations"),
        ({"learning_rate": 1e-5}, "opid-seed1 and opid-seed0 have other settings of learning_rate"),
    ],
)
def test_what_must_not_be_compared_is_not_put_into_one_table(changes, message, jobs, tmp_path):
    run_all(jobs, launch=pretend)
    found = read_results(jobs)
    compare.check_alike(found)
    run = found["opid"][1]
    run["start"] = changes.pop("start", run["start"])
    run["config"] |= changes
    with pytest.raises(ValueError, match=message):
        compare.report(found, "grpo", tmp_path / "bench.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_children_and_starts_no_more(tmp_path, number):
    started = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", STOPPED, str(started)], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not started.exists() or len(started.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    assert f"stopped by {number.name}. The same command goes on" in parent.communicate(timeout=30)[1].decode()
    assert parent.returncode == 128 + number
    pids = started.read_text().split()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize("at_once", [1, 2])
def test_as_many_runs_at_a_time_as_told(jobs, at_once):
    running, most = [], []
    all_started = threading.Barrier(at_once)  # times out where fewer run

    def launch(job):
        running.append(job.name)
        most.append(len(running))
        all_started.wait(30)
        pretend(job)
        running.remove(job.name)

    run_all(jobs, launch, at_once)
    assert max(most) == at_once


def test_a_failed_run_is_made_again_and_the_others_are_kept(jobs):
    def launch(job):
        if job.arm == "opid":
            raise RuntimeError("opid-seed0 failed: out of memory")
        pretend(job)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_all(jobs[:2], launch=launch)
    assert [is_there(job) for job in jobs[:2]] == [True, False]


def test_a_report_takes_all_seeds_that_are_there(jobs, tmp_path):
    run_all([jobs[0], jobs[2], jobs[3]], launch=pretend)  # both seeds of grpo, seed 1 of opid
    argv = ["--report", "--results", str(tmp_path / "bench.jsonl"), "--runs", str(tmp_path / "nowhere")]
    text = compare.main([*argv, "--methods", "opid", "grpo", "sdar"])
    assert [line[: line.index("|", 9)] for line in text.splitlines()[2:4]] == ["| opid | 1 ", "| grpo | 2 "]
    assert not (tmp_path / "nowhere").exists()
    assert compare.main(argv) == text  # the same arms, in the order of the table that is there
    with pytest.raises(ValueError, match="no result of these arms"):
        compare.main([*argv, "--methods", "sdar"])


@pytest.mark.parametrize("bench", ["smollm2-search-sparse", "tuning-search"])
def test_stored_tables_are_those_of_the_stored_runs(bench, tmp_path):
    """Old flags among them: --shift-base other, --centred, --divergence."""
    for suffix in (".jsonl", ".md"):
        shutil.copy(compare.RESULTS / f"{bench}{suffix}", tmp_path)
    compare.main(["--report", "--results", str(tmp_path / f"{bench}.jsonl")])
    assert (tmp_path / f"{bench}.md").read_text() == (compare.RESULTS / f"{bench}.md").read_text()


def test_every_stored_line_has_a_name_of_its_own_and_old_settings_are_whole():
    for path in compare.RESULTS.glob("*.jsonl"):
        results = read(path)
        assert len({result["name"] for result in results}) == len(results) > 0
        for result in results:
            assert "config" not in result or result["config"].keys() >= OLD["defaults"].keys()


def test_old_flags_are_the_variants_of_today():
    old = {"algo": "opid", "shift_base": "other"}
    assert differing(old, {"algo": "opid-contrast"}) == []
    assert differing(old, {"algo": "opid"}) == ["algo"]
    assert differing({"algo": "opid", "shift_base": "scorer"}, {"algo": "opid-shift"}) == []
    full = {"algo": "opid-full", "divergence": "reverse"}
    assert differing({"algo": "opid", "divergence": "reverse"}, full) == []
    assert differing({"algo": "opid", "divergence": "forward"}, full) == ["divergence"]
    assert differing({"algo": "opid", "centred": True}, {"algo": "opid"}) == ["centred"]  # nothing is that now
    assert differing({"algo": "grpo"}, {"algo": "grpo", "episode_weight": 0.0, "step_weight": 0.0}) == []
    assert differing({"algo": "opid"}, {"algo": "opid", "sample_every": 1}) == []


def test_a_file_keeps_the_order_of_its_lines_and_what_differs_from_the_old_defaults(tmp_path):
    file = tmp_path / "folder" / "bench.jsonl"
    for name, seed in (("a", 0), ("b", 1), ("a", 2)):
        add(file, {"name": name, "config": OLD["defaults"] | {"seed": seed}})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"name": "a", "config": {"seed": 2}},
        {"name": "b", "config": {"seed": 1}},
    ]
    assert find(file, "b")["config"]["lr_halving"] == 20 and find(file, "c") is None
    assert [path.name for path in file.parent.iterdir()] == ["bench.jsonl"]  # nothing half-written


ADDING = """
import sys
from pathlib import Path
from lab.experiments.stored import add

for number in range(20):
    add(Path(sys.argv[1]), {"name": f"{sys.argv[2]}-{number}"})
"""


def test_processes_and_threads_that_write_at_once_lose_nothing(tmp_path):
    file = tmp_path / "bench.jsonl"
    other = subprocess.Popen([sys.executable, "-c", ADDING, str(file), "there"], cwd=ROOT)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(file, {"name": f"here-{number}"}), range(20)))
    assert other.wait(120) == 0
    assert {result["name"] for result in read(file)} == {f"{who}-{n}" for who in ("there", "here") for n in range(20)}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "bench.jsonl"
    add(file, {"name": "a"})
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        add(file, {"name": "b"})
    assert file.read_bytes() == before


def test_tuning_takes_seeds_that_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "launch", lambda job, *_: pretend(job))
    folders = ["--results", str(tmp_path / "bench.jsonl"), "--runs", str(tmp_path / "runs")]
    compare.main(["--quick", "--seeds", "2", "--first-seed", "100", "--methods", "grpo", *folders])
    assert sorted(result["name"] for result in read(tmp_path / "bench.jsonl")) == ["grpo-seed100", "grpo-seed101"]


def test_a_failed_run_leaves_the_table_of_the_others(tmp_path, monkeypatch):
    def launch(job, *_):
        if job.arm == "opid":
            raise RuntimeError("opid-seed0 failed: the loss is nan")
        pretend(job)

    monkeypatch.setattr(compare, "launch", launch)
    folders = ["--results", str(tmp_path / "bench.jsonl"), "--runs", str(tmp_path / "runs")]
    with pytest.raises(RuntimeError, match="the loss is nan"):
        compare.main(["--quick", "--seeds", "1", "--methods", "grpo", "opid", *folders])
    assert "| grpo | 1 |" in (tmp_path / "bench.md").read_text()


def test_bootstrap_leaves_out_what_is_not_defined():
    scores = np.array([[np.nan], [0.2], [0.4]])
    low, high = bootstrap_interval(lambda s: s.mean(), scores, samples=200)
    assert 0.2 - 1e-9 <= low <= high <= 0.4 + 1e-9
    assert np.isnan(bootstrap_interval(lambda s: np.nan, scores, samples=20)).all()


def test_a_result_of_other_settings_is_not_mistaken_for_this_run(jobs, tmp_path):
    run_all(jobs[:1], launch=pretend)
    flags = [*QUICK.split(), "--kl", "0.5"]
    other = jobs_of(
        {"grpo": "--algo grpo"}, [0], flags, [tmp_path / "start"], tmp_path / "bench.jsonl", tmp_path / "runs"
    )
    with pytest.raises(ValueError, match="other settings of kl"):
        is_there(other[0])


def test_a_result_of_before_a_flag_was_made_with_its_default(jobs):
    run_all(jobs[:1], launch=pretend)
    result = find(jobs[0].results, jobs[0].name)
    result["config"] = {k: v for k, v in result["config"].items() if k != "kl_clip"}  # the file: without it either way
    add(jobs[0].results, result)
    assert "kl_clip" not in jobs[0].results.read_text() and is_there(jobs[0])
    jobs[0].config.kl_clip = 10.0
    with pytest.raises(ValueError, match="other settings of kl_clip"):
        is_there(jobs[0])


def test_a_result_from_other_starting_weights_is_not_mistaken_for_this_run(jobs, tmp_path):
    run_all(jobs[:1], launch=pretend)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_bytes(b"others")
    folders = [tmp_path / "start"], tmp_path / "bench.jsonl", tmp_path / "runs"
    with pytest.raises(ValueError, match="other starting weights"):
        is_there(jobs_of(PLAIN, [0], QUICK.split(), *folders)[0])


def test_quick_comparison_from_end_to_end(tmp_path):
    file = tmp_path / "bench.jsonl"
    argv = ["--quick", "--methods", "grpo", "--arms", "opid-episode-alone", "--seeds", "1", "--final-games", "3"]
    text = compare.main([*argv, "--results", str(file), "--runs", str(tmp_path / "runs")])
    assert [line.split(" | ")[0] for line in text.splitlines()][2:4] == ["| grpo", "| opid-episode-alone"]
    assert text == (tmp_path / "bench.md").read_text().strip()
    arm = find(file, "opid-episode-alone-seed0")
    assert arm["config"]["routing"] == "episode"
    assert len(arm["signal"]["skills/parse_rate"]) == 2
    assert (tmp_path / "runs/opid-episode-alone-seed0/policy/config.json").exists()
    result = find(file, "grpo-seed0")
    assert [point["iteration"] for point in result["curve"]] == [0, 1, 2]
    assert result["episodes"] == 8
    assert result["final"]["games"] == 3 and result["final"].keys() == {"games", "valid_seen", "valid_unseen"}
    assert (tmp_path / "bench.png").stat().st_size > 1000
