"""runlog/silence.py: which part of an iteration failed, in words."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data import Advantages, Batch, Step, Trajectory
from lab.experiments.runs import RESULTS
from lab.experiments.stored import read
from lab.experiments.tables import mean_of, splits_of
from lm.obstacles import Mendable
from runlog.metrics import over_processes
from runlog.silence import fall, followed, shares, signs, silences
from runlog.start import Run
from tests.settings import laptop
from tests.test_metrics import Process

FINE = {
    **{"episodes": 8, "rollout/cut_off": 0.1, "rollout/unknown_tokens": 0.0, "rollout/valid_actions": 0.5},
    **{"guided/tokens": 0.8, "advantage/outcome_abs": 0.3, "advantage/skill_abs": 0.1, "skills/parse_rate": 1.0},
}


def test_an_iteration_that_may_have_taught_something_is_quiet():
    assert silences(laptop(), FINE) == {}


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        ({"rollout/cut_off": 0.9}, ["cut off"], "90% of the responses are cut off at --max-new-tokens 12"),
        ({"rollout/unknown_tokens": 0.8}, ["unknown"], "80% of the prompts' tokens are unknown to --model tiny"),
        ({"rollout/valid_actions": 0.0}, ["actions"], "tools/coldstart.py"),
        ({"guided/tokens": 0.0, "skills/parse_rate": 0.0}, ["skills"], "--skill-prefill"),
        ({"guided/tokens": 0.0, "guided/episode_too_long": 32}, ["skills"], "do not fit into --context-limit 1024"),
        ({"guided/tokens": 0.0, "skills/parse_rate": 0.0, "skills/too_long": 8}, ["skills"], "--skill-context-limit"),
        ({"guided/tokens": 0.0}, ["skills"], "name no step that --routing critical-first"),
        ({"advantage/skill_abs": 0.0}, ["shift"], "change no log-prob"),
        (
            {"guided/step": 0.0, "skills/step_keys_dropped": 7},
            ["steps"],
            "(7 name no step), so --step-weight does noth",
        ),
        ({"rollout/context_full": 5}, ["full"], "5 of 8 episodes end because their context is full, at --context-limi"),
        ({"rollout/context_full": 1, "rollout/too_long": 8}, ["full"], "9 of 16 episodes end"),
        ({"advantage/skill_abs": 0.0, "advantage/outcome_abs": 0.0}, ["shift", "advantages"], "every advantage is 0"),
    ],
)
def test_what_failed_is_named_with_the_flag_that_helps(changes, kinds, words):
    found = silences(laptop(), FINE | changes)
    assert list(found) == kinds
    assert any(words in text for text in found.values())


def test_a_writer_elsewhere_is_not_told_of_flags_for_local_ones():
    config = laptop(skill_writer="json:loads")
    refused = FINE | {"guided/tokens": 0.0, "skills/parse_rate": 0.0, "skills/too_long": 8}
    assert silences(config, refused)["skills"].endswith(
        "--skill-writer json:loads gave no answer that could be read as skills (8 refusals)"
    )


def test_grpo_is_not_told_of_skills():
    assert silences(laptop(algo="grpo"), FINE | {"guided/tokens": 0.0, "advantage/skill_abs": 0.0}) == {}


def test_what_writes_no_skills_is_not_told_of_writers():
    found = silences(laptop(algo="sdpo"), FINE | {"guided/tokens": 0.0})
    assert found == {
        "skills": "no step is guided by a skill: --algo sdpo found none. More --rollouts, easier tasks, or a cold start"
    }


def test_shares_by_hand():
    """One step ends with 9, one is cut off; of five context tokens two are unknown (7); two of four are guided."""
    steps = [
        Step((), "", context, response, "", "", True) for context, response in (([7, 1, 2], [3, 9]), ([7, 1], [3, 3]))
    ]
    nan = float("nan")
    batch = Batch([Trajectory("", 0, steps, False)], [None], [[(), ()]], {}, torch.zeros(2, 2), None, {})
    batch.advantages = Advantages(torch.zeros(2, 2), torch.zeros(2), torch.tensor([[0.5, 0.0], [nan, nan]]))
    told = {"rollout/cut_off": 0.5, "rollout/unknown_tokens": 0.4, "rollout/valid_actions": 1.0, "guided/tokens": 0.5}
    assert shares(batch, {9}, 7) == told
    assert shares(batch, {9}, None)["rollout/unknown_tokens"] == 0.0


# ---- a fall ----------------------------------------------------------------------------------------------------------

GOOD = {"skills/parse_rate": 1.0, "train/success": 0.4, "rollout/steps": 8.0}  # of 20 steps 12 are unused
LOST = {"skills/parse_rate": 0.5, "train/success": 0.0, "rollout/steps": 20.0}
FALLEN = [*[GOOD] * 5, *[LOST] * 5]


def after(*iterations: dict) -> dict:
    """What a run keeps of them."""
    kept = {}
    for metrics in iterations:
        kept = followed(kept, signs(laptop(), metrics))
    return kept


def test_best_and_recent_by_hand():
    """Success 0.5, 0, 0.5, 0, 0.5, 0: the mean of the first five is 0.3, that of the last five 0.2."""
    values = [0.5, 0.0, 0.5, 0.0, 0.5, 0.0]
    kept = after(*(GOOD | {"train/success": value} for value in values))
    assert kept["success"] == {"recent": values[1:], "best": pytest.approx(0.3)}
    assert kept["unused"] == {"recent": [0.6] * 5, "best": pytest.approx(0.6)}
    assert after(GOOD, GOOD)["readable"] == {"recent": [1.0, 1.0], "best": 0.0}  # two iterations are no measure


def test_a_fall_is_told_from_what_to_what():
    """Two good iterations and three lost: success 2/5 of its best, not below a quarter. Then four: 1/5."""
    assert fall(laptop(), after(*[GOOD] * 5, *[LOST] * 3)) == {}
    config = laptop(scorer="old", kl=0.01)
    assert fall(config, after(*[GOOD] * 5, *[LOST] * 4))["fall"] == (
        "the run falls. Means of 5 iterations, best and last: readable skills 100% to 60%, steps of an episode 8.0 to "
        "17.6 of 20, success 40% to 8%. In another --out take a smaller --episode-weight and --step-weight or --scorer "
        "reference or a larger --kl than 0.01"
    )


@pytest.mark.parametrize("name", LOST)
def test_success_and_the_end_of_episodes_fall_together(name):
    """Whatever the skills do: a policy may write them well and never answer again."""
    found = fall(laptop(), after(*[GOOD] * 5, *[LOST | {name: GOOD[name]}] * 5))
    assert bool(found) == (name == "skills/parse_rate")


def test_nothing_falls_that_was_never_up_or_comes_back():
    assert fall(laptop(), after(*[LOST] * 9)) == {}
    assert fall(laptop(), after(*[GOOD | {"train/success": 0.0}] * 5, *[LOST] * 5)) == {}
    assert fall(laptop(), after(*[GOOD] * 5, *[LOST] * 5, *[GOOD] * 4)) == {}
    without_skills = {name: value for name, value in LOST.items() if name != "skills/parse_rate"}
    assert signs(laptop(), without_skills) == {} and fall(laptop(), {}) == {}


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"scorer": "reference", "kl": 0.0}, "a smaller --episode-weight and --step-weight or a larger --kl than 0"),
        ({"scorer": "old", "step_weight": 0.0}, "a smaller --episode-weight or --scorer reference or a larger --kl th"),
        ({"algo": "sdar", "scorer": "old"}, "--scorer reference or a larger --kl than"),
        ({"algo": "opid-full"}, "a smaller --episode-weight and --step-weight or a larger --kl than"),
        ({"algo": "skill-grpo", "scorer": "old"}, "a larger --kl than"),  # no skill is scored, and there is no lambda
        ({"algo": "oprd"}, "a lower --learning-rate"),  # its loss has no KL term
    ],
)
def test_only_what_is_possible_is_recommended(changes, helps):
    assert f"In another --out take {helps}" in fall(laptop(**changes), after(*FALLEN))["fallen"]


def test_over_processes_a_fall_is_that_of_all_episodes():
    """Six episodes here that are all lost, two there that are good: a quarter is good."""
    mine, theirs, sizes = signs_of(LOST | {"skills/parse_rate": 0.0}), signs_of(GOOD), {"episodes": 6.0}
    other = Process()
    over_processes(theirs, {"episodes": 2.0}, other)
    got = signs(laptop(), over_processes(mine, sizes, Process(other)))
    assert got == pytest.approx({"readable": 0.25, "success": 0.1, "unused": 0.15})


def signs_of(metrics: dict) -> dict:
    """Those metrics that signs are made of."""
    return {name: metrics[name] for name in LOST}


def test_a_run_that_goes_on_from_a_checkpoint_warns_as_if_it_had_not_stopped(tmp_path):
    """Stopped before its fall shows: two of the five lost iterations are still to come."""
    torch.save(after(*[GOOD] * 5, *[LOST] * 3), tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt")  # plain values, as checkpoints take
    for _ in range(2):
        kept = followed(kept, signs(laptop(), LOST))
    assert kept == after(*FALLEN) and fall(laptop(), kept)


@pytest.mark.parametrize(("iterations", "kind"), [(FALLEN[:-1], "fall"), (FALLEN, "fallen")])
def test_a_fall_is_said_since_when_and_ends_a_strict_run_where_nothing_succeeds(iterations, kind, capsys):
    """One of the last five iterations has success yet, or none."""
    run = object.__new__(Run)  # of which only what warnings need is there
    run.config = laptop(strict=True)
    run.processes = SimpleNamespace(rank=0, print=print)  # ty: ignore[invalid-assignment]
    run.state = {"signs": after(*iterations)}
    for run.iteration in (10, 15):
        found = run.silences(FINE)
    assert run.state["silent"] == {kind: 10}
    told = "--strict, and nothing is learnt: fallen"
    with pytest.raises(Mendable, match=told) if kind == "fallen" else nullcontext():
        run.warn(found)
    assert capsys.readouterr().out.startswith("WARNING (since iteration 10): the run falls. Means of 5 iterations")


def alarms(run: dict) -> list[int]:
    """The iterations of a stored run after which a fall shows."""
    found, kept, metrics = [], {}, run["signal"] | {"train/success": run["train"]}
    config = laptop(max_steps=run["config"]["max_steps"], scorer="old")
    for iteration in range(len(run["train"])):
        line = {name: metrics[name][iteration] for name in LOST}
        kept = followed(kept, signs(config, line))
        found += [iteration] if fall(config, kept) else []
    return found


OWN, PAPERS = "search-controls/opid", "search-replicated/opid-policy"
TOLD = {  # bench and arm -> start and seed -> the first iteration at which a fall shows, but for those after 100
    OWN: {(1, 1): 51, (5, 5): 32, (8, 8): 18, (9, 9): 69},
    f"{OWN}-averaged": {(1, 0): 73, (4, 0): 56, (5, 5): 34, (8, 8): 32},
    f"{OWN}-permuted": {(1, 0): 74, (2, 1): 50, (4, 1): 80, (5, 5): 54, (6, 6): 70, (7, 7): 73, (8, 8): 63, (9, 9): 35},
    f"{OWN}-random-steps": {(9, 9): 27},
    f"{OWN}-skill-only": {
        **{(0, 0): 23, (0, 1): 25, (1, 0): 28, (1, 1): 33},
        **{(3, 1): 25, (5, 5): 32, (7, 7): 54, (9, 9): 71},
    },
    f"{PAPERS}-0.03": {(2, 1): 43, (8, 8): 17, (9, 9): 37},
    f"{PAPERS}-0.1": {
        **{(0, 0): 20, (1, 0): 28, (2, 0): 23, (3, 0): 24, (4, 0): 21},
        **{(5, 5): 19, (6, 6): 29, (7, 7): 21, (8, 8): 15, (9, 9): 23},
    },
    f"{PAPERS}-0.1-centred": {(0, 0): 23, (1, 0): 42, (2, 0): 23, (3, 0): 24, (4, 0): 21},
}


def test_of_all_stored_runs_those_that_fall_are_told_early_and_hardly_another():
    """Those where the policy scores itself at a lambda of 0.1, centred or not, are all told. Of others such as fall,
    held out, to 10% or less; not all that do, and two that do not. Each iteration is looked at."""
    found, lowest, seen = {}, {}, set()
    for path in sorted(RESULTS.glob("*.jsonl")):
        for run in read(path):
            line = run["name"], run.get("start")  # search-controls has some of search-replicated, too
            if {"skills/parse_rate", "rollout/steps"} <= run.get("signal", {}).keys() and line not in seen:
                seen.add(line)
                name = f"{path.stem}/{run['name']}"
                found[name] = alarms(run)
                lowest[name] = min(mean_of(point, splits_of(run)) for point in run["curve"])
    fell = re.compile(r"search-replicated/opid-policy-0\.1(-centred)?-start")
    falls = {name: found.pop(name) for name in list(found) if fell.match(name)}
    assert len(falls) >= 15 and all(15 <= iterations[0] <= 42 for iterations in falls.values())
    told = {name: iterations for name, iterations in found.items() if iterations}
    assert len(found) >= 200  # six more fall, or drop by a quarter or more, in their last iterations
    late = {f"{PAPERS}-0.03-start1-seed0": [118], f"{PAPERS}-0.001-start2-seed0": [119]}
    late |= {f"{OWN}-permuted-start2-seed0": [119], f"{OWN}-permuted-start1-seed1": [119]}
    late |= {f"{OWN}-averaged-start1-seed1": [116, 117, 118, 119], f"{PAPERS}-0.03-start3-seed1": [117, 118, 119]}
    assert {name: iterations for name, iterations in told.items() if iterations[0] > 100} == late
    early = {name: iterations[0] for name, iterations in (told | falls).items() if name not in late}
    assert early == {
        f"{arm}-start{start}-seed{seed}": first for arm, of in TOLD.items() for (start, seed), first in of.items()
    }
    soon_over = {f"{OWN}-start5-seed5", f"{OWN}-averaged-start5-seed5"}  # a dip of rollouts
    assert {name for name in early if lowest[name] > 10} == soon_over
