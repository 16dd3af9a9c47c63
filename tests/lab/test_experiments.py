"""The estimates in hand-computed numbers, and a comparison with runs made by hand; one real run from end to end."""

import dataclasses
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
from scipy.stats import ttest_rel

from lab.experiments import compare
from lab.experiments import runs as stored_runs
from lab.experiments.compare import QUICK, check_folder, is_there, jobs_of, read_arms, run_all, stored
from lab.experiments.estimates import bootstrap_interval, estimate, holm
from lab.experiments.runs import arm_of
from lab.experiments.stored import OLD, add, differing, find, read
from lab.experiments.tables import (
    EPISODES,
    SECONDS,
    TOKENS,
    at_equal,
    by_episodes,
    by_run,
    by_type,
    by_unit,
    costs,
    differences,
    draw,
    ends,
    ends_of,
    leads,
    mean_until,
    p_value,
    read_shares,
    runs_of,
    show,
    splits_of,
    success_at,
    units_of,
)

ROOT = Path(__file__).parent.parent.parent
PLAIN = {"grpo": "--algo grpo", "opid": "--algo opid"}
SUCCESS = {"grpo": 0.4, "opid": 0.6}


def test_paired_t_test_by_hand():
    ours, theirs = np.array([11.0, 22, 33, 46]), np.array([10.0, 20, 30, 40])
    e = estimate(ours - theirs)  # 1 2 3 6: mean 3, standard error sqrt(14 / 3) / 2 = 1.0801, t = 2.7775
    assert e.mean == 3
    assert (e.low, e.high) == pytest.approx((3 - 3.18245 * 1.0801, 3 + 3.18245 * 1.0801), abs=1e-3)
    x = 2.7775 / np.sqrt(3)  # three degrees of freedom have a closed form
    assert e.p == pytest.approx(1 - 2 / np.pi * (x / (1 + x**2) + np.arctan(x)), abs=1e-5)
    assert e.p == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_under_four_units_or_without_spread_there_is_the_mean_alone():
    for values in ([1.0, 2, 6], [3.0] * 5, [0.1 + 0.2, 0.3, 0.3, 0.3]):
        e = estimate(np.array(values))
        assert e.mean == pytest.approx(np.mean(values)) and np.isnan([e.low, e.high, e.p]).all()
    assert estimate(np.array([1.0, 2, 6, 3])).p < 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # x 3, x 1 but no less than before, x 2
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([0.03, float("nan"), 0.02]) == pytest.approx([0.04, float("nan"), 0.04], nan_ok=True)  # of two
    assert holm([]).tolist() == []


def test_bootstrap_intervals():
    assert bootstrap_interval(np.mean, np.full(5, 0.3)) == pytest.approx((0.3, 0.3))
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=5), rng.normal(size=200)
    width = lambda values: np.diff(bootstrap_interval(np.mean, values, samples=300))[0]
    assert width(few) > 2 * width(many) > 0
    apart = lambda ours, theirs: float(ours.mean() - theirs.mean())  # two strata, each drawn by itself
    low, high = bootstrap_interval(apart, many + 10, many, samples=100)
    assert 9 < low < 10 < high < 11


def test_bootstrap_keeps_the_splits_of_a_run_together():
    """Two splits that always add up to 1: drawn apart, their mean would vary."""
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert bootstrap_interval(lambda s: s.mean(), scores, samples=50) == pytest.approx((0.5, 0.5))


@pytest.fixture
def jobs(tmp_path):
    return jobs_of(PLAIN, range(2), QUICK.split(), {0: tmp_path / "start"}, tmp_path / "bench.jsonl", tmp_path / "runs")


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
    found = stored(jobs[0].results, PLAIN)
    line = next(run for run in found["opid"] if run["config"]["seed"] == 1)
    assert (line["seconds"], line["episodes"], line["train"]) == (4.0, 8, [0.5, 0.5])
    assert [point["iteration"] for point in line["curve"]] == [0, 2]
    assert (line["training"], line["curve"][0]["sampled"], line["curve"][1]["sampled"]) == (0, 0, 30)
    assert line["signal"] == {"advantage/skill_abs": [0.1235, 0.1235]}
    assert (line["phases"], line["tokens"]) == ({"rollout": 3.0, "update": 1.0}, {"sampled": 30})
    runs = runs_of(found)
    assert [run.end for run in runs["grpo"]] == pytest.approx([40, 45])  # seed 0: 40 40, seed 1: 50 40
    assert [row.split(" | ")[:6] for row in ends(runs, "grpo").splitlines()[2:4]] == [
        ["| grpo", "2", "42.5 [-]", "-", "-", "-"],
        ["| opid", "2", "62.5 [-]", "20.0 [-]", "-", "-"],
    ]
    rows = by_type(runs).splitlines()  # means of seeds 0 and 1, seen / unseen
    assert rows[0] == "| success by type, valid_seen / valid_unseen, % | Pick | Pick2 |"
    seen = {"before training": 55, "grpo": 51, "opid": 51}
    assert rows[2:] == [f"| {name} | {share} / 25 | - / 50 |" for name, share in seen.items()]
    late = [run | {"curve": run["curve"][1:]} for run in found["grpo"]]  # --eval-every 0: one evaluation, at the end
    rows = by_type(runs_of({"grpo": late})).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["grpo"]
    del found["opid"][0]["tables"]  # of an older version: left out
    rows = by_type(runs_of(found)).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["before training", "grpo"]


def made(seed, *successes, training=0, cost=None, algo="opid", **more):
    """A result in shares: ten episodes an iteration, evaluated every second one. `cost`: what the policy and the writer
    sample between two evaluations, the seconds, and those of the writer."""
    curve = [{"iteration": 2 * i, "seen": s + 0.1, "unseen": s - 0.1} for i, s in enumerate(successes)]
    if cost:
        names = ("sampled", "skills", "seconds", "writing")
        curve = [p | {name: i * each for name, each in zip(names, cost, strict=True)} for i, p in enumerate(curve)]
    config, iterations = {"seed": seed, "algo": algo}, 2 * len(curve) - 2
    result = {"config": config, "curve": curve, "train": [0.0] * iterations, "episodes": 10 * iterations}
    return result | ({"training": training} if training else {}) | more


def run_of(*args, **how):
    return runs_of({"arm": [made(*args, **how)]})["arm"][0]


def test_what_a_run_costs_is_no_split():
    result = made(0, 0.2, 0.4, cost=(100, 50, 8, 3))
    result["curve"][-1]["seen+skill"] = 0.9
    assert splits_of(result) == ["seen", "unseen"]
    assert run_of(0, 0.2, 0.4, cost=(100, 50, 8, 3)).success.tolist() == pytest.approx([20, 40])


def test_a_placebo_pays_for_no_writer():
    spent = {algo: run_of(0, 0.2, 0.4, cost=(100, 50, 8, 3), algo=algo).cost for algo in ("opid", "opid-placebo")}
    assert {kind: at.tolist() for kind, at in spent["opid"].items()} == {
        EPISODES: [0, 20],
        TOKENS: [0, 150],
        SECONDS: [0, 8],
    }
    assert spent["opid-placebo"][TOKENS].tolist() == [0, 100]
    assert spent["opid-placebo"][SECONDS].tolist() == [0, 5]


def test_success_at_equal_cost_by_hand():
    run = run_of(0, 0.1, 0.3, 0.7, cost=(60, 40, 8, 3))  # 100 tokens between evaluations
    assert [success_at(run, TOKENS, spent) for spent in (0, 100, 150)] == pytest.approx([10, 30, 50])
    assert [success_at(run, TOKENS, spent) for spent in (200, 999)] == pytest.approx([70, 70])  # it stays there
    late = dataclasses.replace(run, cost={TOKENS: run.cost[TOKENS][1:]}, success=run.success[1:])
    assert np.isnan(success_at(late, TOKENS, 50)) and success_at(late, TOKENS, 150) == pytest.approx(50)


def test_a_lead_is_of_one_set_of_games():
    """GRPO that plays on is GRPO until then: no lead, though the final games are harder. Where an arm has ended, too,
    the final games count."""
    final = {"games": {"seen": 500, "unseen": 500}, "seen": 0.2, "unseen": 0.2}
    short = made(0, 0.1, 0.3, cost=(100, 0, 8, 0), algo="grpo", final=final)
    longer = made(0, 0.1, 0.3, 0.7, cost=(100, 0, 8, 0), algo="grpo", final=final | {"seen": 0.9, "unseen": 0.9})
    equal = made(0, 0.1, 0.4, cost=(100, 0, 8, 0), final=final | {"seen": 0.3, "unseen": 0.3})
    runs = runs_of({"grpo": [short], "grpo-longer": [longer], "opid": [equal]})
    for kind in (EPISODES, TOKENS, SECONDS):
        ahead = differences(runs, "grpo", at_equal(kind))
        assert ahead["grpo-longer"] == pytest.approx([0]) and ahead["opid"] == pytest.approx([10])


def test_mean_over_training_at_equal_cost_by_hand():
    run = run_of(0, 0.1, 0.3, 0.7, cost=(100, 0, 8, 0))
    assert mean_until(run, TOKENS, 150) == pytest.approx((20 * 100 + 40 * 50) / 150)
    assert mean_until(run, TOKENS, 400) == pytest.approx((20 * 100 + 50 * 100 + 70 * 200) / 400)  # stays at its end
    late = dataclasses.replace(run, cost={TOKENS: run.cost[TOKENS] + 1})
    assert np.isnan(mean_until(late, TOKENS, 150))


def test_seeds_of_one_training_are_averaged_first():
    results = [made(0, 0.1, 0.2), made(1, 0.1, 0.4), made(0, 0.1, 0.9, training=1)]
    runs = runs_of({"grpo": results})
    assert ends_of(runs["grpo"]) == pytest.approx([30, 90])
    assert by_unit(runs["grpo"], [[1, 2], [3, 4], [5, 6]]).tolist() == [[2, 3], [5, 6]]
    rows = ends(runs, "grpo").splitlines()
    assert rows[0].startswith("| arm | trainings x seeds | end, % |")
    assert rows[2].startswith("| grpo | 2 x 1-2 | 60.0 [-] |")  # not 50, the mean of the runs
    assert "The unit is the training of the starting model" in rows[4]
    one = runs_of({"grpo": results[:2]})  # with one training alone the unit is the seed
    assert ends_of(one["grpo"]) == pytest.approx([20, 40])
    assert units_of(one, "grpo") == "2" and ends(one, "grpo").startswith("| arm | seeds |")


def test_arms_are_compared_pair_by_pair():
    """Of the same training and seed; what has no counterpart does not count."""
    grpo = [made(seed, 0, 0.1 * seed, training=k) for k, seed in ((0, 1), (0, 2), (1, 1), (1, 3))]
    opid = [made(seed, 0, 0.1 * seed + 0.1 * k, training=k) for k, seed in ((0, 1), (1, 1), (0, 2), (2, 1))]
    runs = runs_of({"opid": opid, "grpo": grpo, "sdar": [made(5, 0, 0.3, training=3)]})
    ahead = differences(runs, "grpo", lambda ours, theirs: ours.end - theirs.end)
    assert list(ahead) == ["opid"] and ahead["opid"] == pytest.approx([0, 10])
    assert differences(runs, "nobody", lambda ours, theirs: 1.0) == {}


def bench():
    """GRPO spends 200 tokens and 20 s; OPID 400 and 30; the placebo 200 and 20, its writer not counted; SDAR 100."""
    seeds, up = range(4), (0.00, 0.01, 0.02, 0.05)
    return {
        "grpo": [made(s, 0.1, 0.2, 0.3 + up[s], cost=(100, 0, 10, 0), algo="grpo") for s in seeds],
        "opid": [made(s, 0.1, 0.4 + 2 * up[s], 0.9, cost=(100, 100, 15, 5)) for s in seeds],
        "opid-placebo": [made(s, 0.1, 0.2, 0.4 + up[s], cost=(100, 70, 15, 5), algo="opid-placebo") for s in seeds],
        "sdar": [made(s, 0.1, 0.2, 0.3, cost=(50, 0, 10, 0), algo="sdar") for s in seeds],
    }


def test_ends_by_hand():
    """In points, 0 1 2 5 have mean 2 and interval +- 3.18245 * 1.0801 = 3.44. Alike in all seeds: no interval."""
    head, _, *rows = (line[2:-2].split(" | ") for line in ends(runs_of(bench()), "grpo").splitlines())
    assert head == [
        *["arm", "seeds", "end, %"],
        *["ahead of grpo at equal episodes", "p (Holm)", "bootstrap"],
        *["ahead of grpo at equal sampled tokens", "p (Holm)"],
        *["ahead of grpo at equal training seconds", "p (Holm)"],
        *["over training, at equal sampled tokens", "p (Holm)"],
    ]
    grpo, opid, placebo, sdar = (row[2:] for row in rows[:4])
    assert grpo == ["32.0 [28.6, 35.4]", *["-"] * 9]
    assert opid[:4] == ["90.0 [-]", "58.0 [54.6, 61.4]", "<0.001 (<0.001)", "[56.0, 59.5]"]
    # after 200 of 400 tokens 40 42 44 50, ahead by 10 11 12 15: t = 12 / 1.0801 = 11.1
    assert opid[4:6] == ["12.0 [8.6, 15.4]", "0.002 (0.003)"]
    # after 20 of 30 seconds a third of the way from there to 90: ahead by 26.7 and a third of 0 1 2 5
    assert opid[6] == "27.3 [26.2, 28.5]"
    # until 200 tokens OPID's mean is 25 and 0 1 2 5, GRPO's 20 and a quarter of that
    assert opid[8] == "6.5 [3.9, 9.1]"
    assert placebo == ["42.0 [38.6, 45.4]", "10.0 [-]", "-", "[10.0, 10.0]", *["10.0 [-]", "-"] * 2, "2.5 [-]", "-"]
    assert sdar[1] == "-2.0 [-5.4, 1.4]"
    assert sdar[4] == "-2.0 [-5.4, 1.4] (4 of 4 cheaper)"  # its end, when it had spent 100 of GRPO's 200 tokens
    assert sdar[8] == "4.5 [3.6, 5.4] (4 of 4 cheaper)"  # 20 until 100 tokens, 30 from there: 25


def test_what_was_not_evaluated_before_the_baseline_ended_is_not_told():
    late = bench()
    for run in late["opid"]:
        run["curve"] = run["curve"][-1:]  # --eval-every 0: after its 400 tokens, where GRPO had 200
    row = ends(runs_of(late), "grpo").splitlines()[3].removesuffix(" |").split(" | ")
    assert row[3] == "58.0 [54.6, 61.4]" and row[6:] == ["-"] * 6


def test_numbers_are_rounded_alike():
    """Whatever the order of a sum; zero has no sign."""
    assert show(46.55 - 1e-13) == show(46.55 + 1e-13)
    assert [show(-0.01), show(float("nan")), show(-2.04)] == ["0.0", "-", "-2.0"]
    assert [p_value(p) for p in (0.00099, 0.0014, float("nan"))] == ["<0.001", "0.001", "-"]


def test_what_a_run_uses_by_hand():
    assert costs(runs_of(bench()), "grpo").splitlines() == [
        "| a run uses (times grpo's) | episodes | sampled tokens | training seconds |",
        "|---|---|---|---|",
        "| grpo | 40 (1.00) | 200 (1.00) | 20 (1.00) |",
        "| opid | 40 (1.00) | 400 (2.00) | 30 (1.50) |",
        "| opid-placebo | 40 (1.00) | 200 (1.00) | 20 (1.00) |",
        "| sdar | 40 (1.00) | 100 (0.50) | 20 (1.00) |",
    ]


def test_one_older_run_among_them_leaves_out_what_it_does_not_tell():
    found = bench()
    found["grpo"][0] = made(0, 0.1, 0.2, 0.3, algo="grpo")
    assert costs(runs_of(found), "grpo") == ""
    text = ends(runs_of(found), "grpo")
    assert text.splitlines()[0].endswith("| ahead of grpo at equal episodes | p (Holm) | bootstrap |")
    assert not any(word in text for word in ("tokens", "seconds", "cost"))


def test_ends_are_of_the_final_games_where_all_runs_have_them():
    final = {"games": {"seen": 300, "unseen": 500}, "seen": 0.6, "unseen": 0.4}
    found = {"grpo": [made(0, 0.1, 0.2, final=final)], "opid": [made(0, 0.1, 0.3, final=final)]}
    head, _, row, *rest = ends(runs_of(found), "grpo").splitlines()
    assert head.startswith("| arm | seeds | end of 300 + 500 games, % |") and row.startswith("| grpo | 1 | 50.0 [-] |")
    assert "last evaluation" not in "".join(rest)
    fewer = final | {"games": {"seen": 300, "unseen": 400}}  # of the second split alone
    for other in (found["opid"][0] | {"final": fewer}, made(0, 0.1, 0.3)):
        head, _, row, *rest = ends(runs_of(found | {"opid": [other]}), "grpo").splitlines()
        assert head.startswith("| arm | seeds | end, % |") and row.startswith("| grpo | 1 | 20.0 [-] |")
        assert "Ends are of the last evaluation: not all runs played the same games after it." in rest


def test_leads_over_the_controls_by_hand():
    rows = leads(runs_of(bench()), "grpo").splitlines()
    assert rows[0] == "| ahead at the end | of opid-placebo | p (Holm) |"  # the baseline is in the first table
    assert rows[2:4] == ["| grpo | -10.0 [-] | - |", "| opid | 48.0 [44.6, 51.4] | <0.001 (<0.001) |"]
    assert rows[4] == "| opid-placebo | - | - |"
    # 10 11 12 15 points behind: t = 12 / 1.0801 = 11.1, of two tests the larger p
    assert rows[5] == "| sdar | -12.0 [-15.4, -8.6] | 0.002 (0.002) |"
    assert leads(runs_of(bench()), "sdar").startswith("| ahead at the end | of grpo | p (Holm) | of opid-placebo |")
    assert leads(runs_of({"sdar": bench()["sdar"]}), "grpo") == ""


def test_an_arm_that_plays_longer_is_a_control_by_its_end(jobs, tmp_path):
    """Its evaluations are others, so that it has no row by episodes; no other arm may differ so."""
    runs = runs_of({"grpo": [made(0, 0.1, 0.2)], "grpo-longer": [made(0, 0.1, 0.2, 0.3)], "opid": [made(0, 0.1, 0.5)]})
    assert [row.split(" | ")[0] for row in by_episodes(runs).splitlines()[2:]] == ["| grpo", "| opid"]
    assert leads(runs, "grpo").splitlines()[0] == "| ahead at the end | of grpo-longer | p (Holm) |"
    assert leads(runs, "grpo").splitlines()[4] == "| opid | 20.0 [-] | - |"
    run_all(jobs, launch=pretend)
    found = stored(jobs[0].results, PLAIN)
    longer = [run | {"config": run["config"] | {"iterations": 9}} for run in found.pop("opid")]
    compare.check_alike(found | {"grpo-longer": longer})
    with pytest.raises(ValueError, match="other settings of iterations"):
        compare.check_alike(found | {"opid": longer})


def test_success_by_episodes_tells_each_of_few_units():
    found = {"grpo": [made(0, 0.2, 0.4)], "opid": [made(0, 0.2, 0.5), made(1, 0.2, 0.6)]}
    found["sdar"] = [made(seed, 0.1, 0.2) for seed in range(4)]
    assert by_episodes(runs_of(found)).splitlines() == [
        "| success after episodes, % | 0 | 20 |",
        "|---|---|---|",
        "| grpo | 20.0 | 40.0 |",
        "| opid | 20.0, 20.0 | 50.0, 60.0 |",
        "| sdar | 10.0 | 20.0 |",
    ]


def test_every_run_is_told_where_trainings_are_the_units():
    opid = [made(seed, 0, 0.1 * seed + 0.2 * k, training=k) for k, seed in ((0, 2), (0, 1), (1, 1), (1, 2))]
    found = {"grpo": [made(1, 0, 0.3, training=1), made(1, 0, 0.4, training=2)], "opid": opid}
    assert by_run(runs_of(found)).splitlines() == [
        "| end of each run, % | start 0 | start 1 | start 2 |",
        "|---|---|---|---|",
        "| grpo | - | 30.0 | 40.0 |",
        "| opid | 10.0 / 20.0 | 30.0 / 40.0 | - |",
    ]
    assert by_run(runs_of(bench())) == ""


def test_every_run_is_told_in_the_type_that_was_hardest():
    """Means of 35 and 20% before; Heat is not in both splits. In the end Pick is the harder one."""
    before = "split  Pick Pick2 Heat All\nseen 30.0 20.0 - 25.0\nunseen 40.0 20.0 0.0 25.0"
    after = "split  Pick Pick2 Heat All\nseen 10.0 {} - 25.0\nunseen 0.0 {} 0.0 25.0"
    runs = [made(0, 0, 0.5, training=k, tables=[before, after.format(60 + k, 40)]) for k in range(2)]
    assert by_run(runs_of({"opid": runs})).splitlines()[4:] == [
        "| Pick2 of each run, % | start 0 | start 1 |",
        "|---|---|---|",
        "| opid | 50.0 | 50.5 |",
    ]


def test_a_figure_has_a_panel_for_each_kind_of_cost(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    draw(runs_of(bench()), tmp_path / "bench.png")
    draw(runs_of({"grpo": [made(0, 0.2, 0.4)]}), tmp_path / "older.png")
    panels, older = (figure.axes for figure in figures)
    assert [axis.get_xlabel() for axis in panels] == ["episodes", "sampled tokens", "training seconds"]
    assert [axis.get_legend() is not None for axis in panels] == [False, False, True]
    assert [axis.get_xlabel() for axis in older] == ["episodes"]
    first = panels[1].get_lines()[0]  # who ends highest
    assert first.get_label() == "opid (4)"
    assert first.get_xydata().tolist() == [[0, 10], [200, pytest.approx(44)], [400, pytest.approx(90)]]
    (band,) = (b.get_paths()[0].vertices for b in panels[1].collections[:1])
    assert band[band[:, 0] == 200][:, 1].max() == pytest.approx(44 + 2 * 3.4374, abs=1e-3)  # 2 x 0 1 2 5 over 40


def test_arms_are_runs_of_their_own(jobs, tmp_path):
    arms = PLAIN | read_arms()
    folders = {0: tmp_path / "start"}, tmp_path / "bench.jsonl", tmp_path / "runs"
    made = jobs_of(arms, [0], [*QUICK.split(), "--step-weight", "0.2", "--skill-writer", "reference"], *folders)
    assert len({json.dumps(compare.settings(job.config)) for job in made}) == len(arms)
    a = {job.arm: job.config for job in made}
    assert a["opid"].step_weight == a["opid-clipped"].step_weight == 0.2
    assert a["opid-lambda-0.3"].step_weight == 0.3  # the arm's own flags come last
    assert a["opid"].skill_writer == "reference" and a["opid-policy-0.1"].skill_writer == "policy"
    assert (a["grpo"].iterations, a["grpo"].eval_every) == (2, 1)
    assert (a["grpo-longer"].iterations, a["grpo-longer"].eval_every) == (10, 5)


def test_each_arm_has_stored_runs():
    """An arm without any has nothing that supports it."""
    named = {arm_of(line["name"]) for file in compare.RESULTS.glob("*.jsonl") for line in read(file) if "curve" in line}
    assert read_arms().keys() <= named


@pytest.mark.parametrize(
    "wrong, error",
    [
        (["--arms", "opid-k9"], "--arms: there is no 'opid-k9', but opid-lambda-0.3, "),
        (["--methods", "opod"], "--methods: --algo must be one of "),
        ([], "name what is compared: --methods, --arms or both"),
        (["--results", "folder"], "folder is no file NAME.jsonl"),
        (["--trainings", "0"], "--trainings is 0, must be 1 or more"),
        (["--first-training", "-1"], "--first-training is -1, must be 0 or more"),
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
        (start,) = compare.prepare(tmp_path, False, QUICK.split(), "some/model").values()
    assert asked == ["some/model"]  # once
    assert (start / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds runs from some/model for alfworld, not from tiny"):
        compare.prepare(tmp_path, False, QUICK.split())
    with pytest.raises(ValueError, match="not from some/model for search"):
        compare.prepare(tmp_path, False, [*QUICK.split(), "--env", "search"], "some/model")
    with pytest.raises(ValueError, match="not from some/model for alfworld, untrained"):
        compare.prepare(tmp_path, True, QUICK.split(), "some/model")


def test_folders_of_ones_own_are_named_by_training(tmp_path, monkeypatch, llama, tokenizer, capsys):
    asked = []
    monkeypatch.setattr(compare, "load_model", lambda name, **k: asked.append(name) or (llama, tokenizer))
    compare.prepare(tmp_path, False, QUICK.split(), "own-seed{}", trainings=[0, 1])
    assert asked == ["own-seed0", "own-seed1"]
    for several in ("--trainings", "2"), ("--first-training", "1"):
        with pytest.raises(SystemExit):
            compare.main(["--methods", "opid", *several, "--model", "own"])
        assert "there is one training of own: write {} for its number" in capsys.readouterr().err


def test_each_training_of_the_starting_model_has_runs_of_its_own(tmp_path, monkeypatch, llama, tokenizer):
    asked = []
    monkeypatch.setattr(compare, "load_model", lambda name, training, **k: asked.append(training) or (llama, tokenizer))
    starts = compare.prepare(tmp_path, False, QUICK.split(), "tiny", trainings=[0, 1])
    assert (asked, [start.name for start in starts.values()]) == ([0, 1], ["start0", "start1"])
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


def test_starting_models_may_be_added_to_those_of_before(tmp_path, monkeypatch, llama, tokenizer):
    asked = []
    monkeypatch.setattr(compare, "load_model", lambda name, training, **k: asked.append(training) or (llama, tokenizer))
    starts = compare.prepare(tmp_path, False, QUICK.split(), "tiny", trainings=[7])
    (made,) = jobs_of({"a": "--algo grpo"}, [9], QUICK.split(), starts, tmp_path / "bench.jsonl", tmp_path)
    assert (asked, made.name, made.training) == ([7], "a-start7-seed9", 7)


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
    games = {"valid_seen": 4, "valid_unseen": 4}
    assert read_shares(printed) == {"games": games, "valid_seen": 0.55, "valid_unseen": 0.3}


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
        ({"training": 1}, "opid-seed1 and grpo-seed0 are from the same starting weights"),
        ({"iterations": 9}, "opid-seed1 and grpo-seed0 have other settings of iterations"),
        ({"learning_rate": 1e-5}, "opid-seed1 and opid-seed0 have other settings of learning_rate"),
    ],
)
def test_what_must_not_be_compared_is_not_put_into_one_table(changes, message, jobs, tmp_path):
    run_all(jobs, launch=pretend)
    found = stored(jobs[0].results, PLAIN)
    compare.check_alike(found)
    run = found["opid"][1]
    run |= {name: changes.pop(name) for name in ("start", "training") if name in changes}
    run["config"] |= changes
    with pytest.raises(ValueError, match=message):
        compare.report(found, "grpo", tmp_path / "bench.jsonl")


def test_each_training_of_the_starting_model_has_its_own_weights(jobs):
    run_all(jobs, launch=pretend)
    found = stored(jobs[0].results, PLAIN)
    for runs in found.values():  # seed 1 of both arms is of another training
        runs[1] |= {"training": 1, "start": "second"}
    compare.check_alike(found)
    found["opid"][1]["start"] = "third"
    with pytest.raises(ValueError, match="opid-seed1 and grpo-seed1 are from other starting weights"):
        compare.check_alike(found)


def test_new_results_are_no_change_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_runs, "ROOT", tmp_path)
    assert stored_runs.commit() == "unknown"
    code, results = tmp_path / "code.py", tmp_path / "lab/results/bench.jsonl"
    results.parent.mkdir(parents=True)
    for file in (code, results):
        file.write_text("one")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "c"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    version = stored_runs.commit()
    results.write_text("two")
    assert stored_runs.commit() == version != "unknown" and "dirty" not in version
    code.write_text("two")
    assert stored_runs.commit() == f"{version}-dirty"


def test_a_name_tells_the_arm():
    names = ["opid-k0-seed3", "opid-k0-start1-seed3", "start"]
    assert [arm_of(name) for name in names] == ["opid-k0", "opid-k0", "start"]


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
    with pytest.raises(SystemExit, match="no result of these arms"):
        compare.main([*argv, "--methods", "sdar"])
    shutil.copy(compare.RESULTS / "skill-effect.jsonl", tmp_path)  # of another experiment
    with pytest.raises(SystemExit, match="no result of these arms"):
        compare.main(["--report", "--results", str(tmp_path / "skill-effect.jsonl")])
    assert compare.main([*argv, "--methods", "grpo", "opid", "--baseline", "opid"]).startswith("| arm | seeds |")
    assert "| ahead of opid at equal episodes |" in compare.main(argv)  # the baseline of the table, too
    (tmp_path / "bench.md").write_text("| something else |\n")
    with pytest.raises(SystemExit, match="is no table of today"):
        compare.main(argv)


def test_runs_of_several_trainings_are_all_reported(tmp_path):
    file = tmp_path / "bench.jsonl"
    for training, name in enumerate(("opid-seed0", "opid-start1-seed0")):
        result = made(0, 0.2, 0.4 + 0.2 * training, training=training)
        add(file, result | {"name": name, "start": str(training), "config": OLD["defaults"] | result["config"]})
    assert compare.main(["--report", "--results", str(file)]).splitlines()[2].startswith("| opid | 2 x 1 | 50.0 [-] |")


COMPARISONS = [path.stem for path in compare.RESULTS.glob("*.jsonl") if any("curve" in line for line in read(path))]


@pytest.mark.parametrize("bench", COMPARISONS)
def test_stored_tables_are_those_of_the_stored_runs(bench, tmp_path, monkeypatch):
    """Byte for byte. Where this fails: compare.py --report. Old flags are among them: --shift-base, --centred."""
    monkeypatch.setattr(compare, "draw", lambda runs, path: None)
    for suffix in (".jsonl", ".md"):
        shutil.copy(compare.RESULTS / f"{bench}{suffix}", tmp_path)
    compare.main(["--report", "--results", str(tmp_path / f"{bench}.jsonl")])
    assert (tmp_path / f"{bench}.md").read_bytes() == (compare.RESULTS / f"{bench}.md").read_bytes()


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


def test_a_later_comparison_leaves_other_arms_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "launch", lambda job, *_: pretend(job))
    folders = ["--results", str(tmp_path / "bench.jsonl"), "--runs", str(tmp_path / "runs")]
    for method in ("grpo", "opid"):
        text = compare.main(["--quick", "--seeds", "1", "--methods", method, *folders])
    assert [row.split(" | ")[0] for row in text.splitlines()[2:4]] == ["| grpo", "| opid"]


def test_a_run_of_other_settings_in_the_folder_is_not_taken_over(jobs, tmp_path):
    """--resume would go on with another learning rate, and store it under this one."""
    begun = Path(jobs[0].config.out)
    begun.mkdir(parents=True)
    begun.joinpath("config.json").write_text(json.dumps(jobs[0].config.to_dict()))
    check_folder(jobs[0])
    jobs[0].config.learning_rate *= 2
    with pytest.raises(ValueError, match="grpo-seed0 holds a run with other settings of learning_rate"):
        run_all(jobs[:1], launch=pretend)


def test_a_run_that_is_not_whole_is_not_stored(jobs):
    def launch(job):
        pretend(job)
        job.config.iterations += 1

    with pytest.raises(RuntimeError, match="grpo-seed0 has 2 iterations of 3"):
        run_all(jobs[:1], launch=launch)
    assert not jobs[0].results.exists()


def test_a_run_counts_once(jobs):
    """grpo-seed0 and grpo-start0-seed0 are one run by their weights and their seed."""
    run_all(jobs, launch=pretend)
    found = stored(jobs[0].results, PLAIN)
    again = found["grpo"][0] | {"name": "grpo-start0-seed0"}
    with pytest.raises(ValueError, match="has the starting weights and the seed of another run of grpo"):
        compare.check_alike(found | {"grpo": [*found["grpo"], again]})


def test_bootstrap_leaves_out_what_is_not_defined():
    scores = np.array([[np.nan], [0.2], [0.4]])
    low, high = bootstrap_interval(lambda s: s.mean(), scores, samples=200)
    assert 0.2 - 1e-9 <= low <= high <= 0.4 + 1e-9
    assert np.isnan(bootstrap_interval(lambda s: np.nan, scores, samples=20)).all()


def test_a_result_of_other_settings_is_not_mistaken_for_this_run(jobs, tmp_path):
    run_all(jobs[:1], launch=pretend)
    flags = [*QUICK.split(), "--kl", "0.5"]
    other = jobs_of(
        {"grpo": "--algo grpo"}, [0], flags, {0: tmp_path / "start"}, tmp_path / "bench.jsonl", tmp_path / "runs"
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
    folders = {0: tmp_path / "start"}, tmp_path / "bench.jsonl", tmp_path / "runs"
    with pytest.raises(ValueError, match="other starting weights"):
        is_there(jobs_of(PLAIN, [0], QUICK.split(), *folders)[0])


def test_quick_comparison_from_end_to_end(tmp_path):
    file = tmp_path / "bench.jsonl"
    argv = ["--quick", "--methods", "grpo", "--arms", "opid-lambda-0.3", "--seeds", "1", "--final-games", "3"]
    text = compare.main([*argv, "--results", str(file), "--runs", str(tmp_path / "runs")])
    assert [line.split(" | ")[0] for line in text.splitlines()][2:4] == ["| grpo", "| opid-lambda-0.3"]
    assert text == (tmp_path / "bench.md").read_text().strip()
    arm = find(file, "opid-lambda-0.3-seed0")
    assert arm["config"]["episode_weight"] == 0.3
    assert len(arm["signal"]["skills/parse_rate"]) == 2
    assert (tmp_path / "runs/opid-lambda-0.3-seed0/policy/config.json").exists()
    result = find(file, "grpo-seed0")
    assert [point["iteration"] for point in result["curve"]] == [0, 1, 2]
    assert result["episodes"] == 8
    assert result["final"]["games"] == {"valid_seen": 3, "valid_unseen": 3}
    assert result["final"].keys() == {"games", "valid_seen", "valid_unseen"}
    assert (tmp_path / "bench.png").stat().st_size > 1000
