"""envs/guard.py: environments are closed, one bad game does not end a run, and a bad environment is named."""

import mmap
import os
import signal
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest

from data import Slot
from envs import ENVIRONMENTS, ProtocolError, check_env, close_env, make_env
from envs.alfworld import AlfworldEnv
from envs.alfworld.engine import FastEngine, TextWorldEngine, load_game
from envs.guard import LONGEST, GameFailure, check_first_game, within
from evaluate import evaluate
from lm.encoder import Encoder
from runlog.start import Run
from tests import playing
from tests.settings import laptop

SLOTS = (Slot("episode", "hint {text}"), Slot("step", "look {text}"))


class Plain:
    """An environment that does nothing wrong. Tests break one method at a time."""

    max_steps = 3

    def __init__(self):
        self.steps, self.closed = None, 0

    def tasks(self, split, count=None):
        return [f"g{i}" for i in range(40)][:count]

    def reset(self, *, seed=None, options=None):
        self.game, self.steps = options["game"], 0
        return "see bed 1", {"task": "look", "task_type": "t", "game": self.game, "admissible_actions": ["look"]}

    def step(self, action):
        self.steps += 1
        return "see bed 2", 0.0, False, self.steps >= self.max_steps, {"won": False, "admissible_actions": ["look"]}

    def build_prompt(self, style, task, history, observation, admissible):
        return (*SLOTS, observation)

    def parse_action(self, response, admissible):
        return response.strip(), True

    def analysis_prompt(self):
        return None

    def close(self):
        self.closed += 1


def broken(method, how, games=("g1",)):
    """Plain, but `how(env, result)` takes the place of a method's result, in these games."""

    class Broken(Plain):
        pass

    def replaced(self, *args, **options):
        if method == "reset":
            self.game = options["options"]["game"]
        result = getattr(Plain, method)(self, *args, **options)
        return how(self, result) if self.game in games else result

    setattr(Broken, method, replaced)
    return Broken


def fail(env, result):
    raise KeyError("no\x1b[2J such\nroom")


def play(llama, tokenizer, make, games, group_size=2, **options):
    options = {"max_new_tokens": 4, "context_limit": 256} | options
    return playing.play(llama, Encoder(tokenizer, "chat"), make, games, group_size, **options)


def made(cls):
    """-> a maker, and the environments that it made."""
    envs = []

    def make():
        envs.append(cls())
        return envs[-1]

    return make, envs


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_every_episode_is_closed_once_however_it_ends(llama, tokenizer):
    make, envs = made(Plain)
    play(llama, tokenizer, make, ["g0", "g1"])
    assert [env.closed for env in envs] == [1] * 4 and all(env.steps == 3 for env in envs)
    make, envs = made(Plain)
    _, metrics = play(llama, tokenizer, make, ["g0", "g1"], context_limit=8)
    assert metrics["rollout/too_long"] == 4 and [env.closed for env in envs] == [1] * 4

    class Interrupted(Plain):
        def step(self, action):
            raise KeyboardInterrupt

    make, envs = made(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        play(llama, tokenizer, make, ["g0", "g1"])
    assert [env.closed for env in envs] == [1] * 4


def test_episodes_that_have_ended_are_closed_before_the_next_ones_begin(llama, tokenizer):
    alive = []

    class Counted(Plain):
        def reset(self, **options):
            alive.append(sum(env.closed == 0 for env in envs))
            return super().reset(**options)

    make, envs = made(Counted)
    play(llama, tokenizer, make, ["g0", "g1", "g2"], rollout_budget=2 * 256)
    assert alive == [1, 2] * 3


def test_an_environment_without_close_holds_nothing(llama, tokenizer):
    class Bare(Plain):
        close = None

    close_env(object())
    assert len(play(llama, tokenizer, Bare, ["g0"])[0]) == 2


def test_a_close_that_fails_is_logged_and_no_more(llama, tokenizer, caplog):
    class Bad(Plain):
        def close(self):
            raise OSError("busy")

    assert len(play(llama, tokenizer, Bad, ["g0"])[0]) == 2
    assert "game g0 cannot be closed: OSError: busy" in caplog.text


def planners() -> tuple[int, int]:
    """Maps of this process, and those of deleted copies of the official engine's planner."""
    with open("/proc/self/maps") as file:
        maps = file.read().splitlines()
    return len(maps), sum("libdownward" in line and "deleted" in line for line in maps)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_the_official_engine_gives_its_planner_back(games):
    pytest.importorskip("alfworld")
    env = AlfworldEnv(engine="textworld", max_steps=2)
    seen, held = [], []
    for number in range(6):  # replaced by another game's
        env.reset(options={"game": games[number % 3]})
        assert env.step("look")[0]
        seen.append(planners())
        held.append(mmap.mmap(-1, 3_000_000 * (number + 1)))  # or what is loaded next would lie where another lay
    env.close()
    env.close()
    env.reset(options={"game": games[0]})  # may follow
    seen.append(planners())
    assert {deleted for _, deleted in seen} == {seen[0][1]}, seen
    assert seen[-1][0] <= seen[0][0] + 20, seen  # those above, and the allocator's own
    env.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_a_rollout_on_the_official_engine_needs_as_many_planners_as_are_alive(llama, tokenizer, games):
    pytest.importorskip("alfworld")
    make, seen = lambda: AlfworldEnv(engine="textworld", prompt="compact", max_steps=2), []
    for _ in range(2):
        before = planners()[1]
        play(llama, tokenizer, make, games[:2], 2, rollout_budget=2 * 256)
        seen.append(planners()[1] - before)
    assert seen[0] <= 2 * 5 and seen[1] == 0  # two episodes at a time, of four; a planner has five maps


def test_closing_one_official_engine_leaves_another_as_it_is(games):
    pytest.importorskip("alfworld")
    fast, kept, closed = FastEngine(load_game(games[0])), *(TextWorldEngine(load_game(g)) for g in games[:2])
    assert fast.reset() == kept.reset() and closed.reset()
    for number in range(4):
        command = fast.admissible_commands()[number]
        assert fast.step(command) == kept.step(command)
        assert fast.admissible_commands() == kept.admissible_commands()
        closed.close()
    kept.close()


# ---- games that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reset", "step", "build_prompt", "parse_action"])
def test_a_game_that_raises_is_left_out_counted_and_logged(method, llama, tokenizer, caplog):
    make, envs = made(broken(method, fail))
    played, metrics = play(llama, tokenizer, make, ["g0", "g1", "g2"])
    assert [(t.game, t.group) for t in played] == [("g0", 0)] * 2 + [("g2", 2)] * 2
    assert all(len(t.steps) == 3 for t in played)
    assert metrics["rollout/failed"] == 2 and metrics["episodes"] == 4 and metrics["rollout/too_long"] == 0
    assert [env.closed for env in envs] == [1] * 6
    lines = [record.getMessage() for record in caplog.records if record.name == "envs.guard"]
    place = "step 1" if method == "step" else method
    assert lines == [f"an episode is left out: game g1 ({place}: KeyError: 'no\\x1b[2J such\\nroom')"] * 2


def test_one_episode_of_a_group_may_fail(llama, tokenizer):
    make, envs = made(broken("step", lambda env, result: fail(env, result) if env is envs[1] else result, ("g0",)))
    played, metrics = play(llama, tokenizer, make, ["g0", "g1"], 3)
    assert [t.group for t in played] == [0, 0, 1, 1, 1] and metrics["rollout/failed"] == 1


def test_without_a_failure_nothing_changes(llama, tokenizer):
    """And what others sample in the same turn as a failing one is still a function of the seed."""
    import torch

    runs = []
    for cls in (Plain, Plain, broken("step", fail), broken("step", fail)):
        torch.manual_seed(0)
        runs.append([[s.response for s in t.steps] for t in play(llama, tokenizer, cls, ["g0", "g1"])[0]])
    assert runs[0] == runs[1] and runs[2] == runs[3] and len(runs[2]) == 2


def test_more_than_a_few_failures_end_the_rollout_in_one_line(llama, tokenizer):
    games = [f"g{i}" for i in range(40)]
    few = tuple(games[:2])
    _, metrics = play(llama, tokenizer, broken("step", fail, few), games, 1)
    assert metrics["rollout/failed"] == 2  # 5%
    make, envs = made(broken("step", fail, tuple(games[:3])))
    with pytest.raises(RuntimeError, match=r"3 of 40 episodes failed.*no more than 2.*g0 \(step 1.*g1.*g2") as raised:
        play(llama, tokenizer, make, games, 1)
    assert "\n" not in str(raised.value) and all(env.closed == 1 for env in envs)
    with pytest.raises(RuntimeError, match="3 of 8 episodes failed"):  # more than a group
        play(llama, tokenizer, broken("reset", fail, ("g0", "g1")), games[:4], 2)


def test_an_evaluation_of_games_that_all_fail_is_no_zero(llama, tokenizer, games, monkeypatch):
    config = laptop(eval_games=1)
    monkeypatch.setattr(AlfworldEnv, "step", fail)
    with pytest.raises(RuntimeError, match=r"no game of valid_seen could be played: 1 failed"):
        evaluate(llama, Encoder(tokenizer, "chat"), config, ["valid_seen"])


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("fatal"), GeneratorExit(), RecursionError()], ids=repr)
def test_an_environment_may_raise_anything(error, llama, tokenizer, caplog):
    """A game engine that calls sys.exit does not end the run, let alone in silence."""

    def leave(env, result):
        raise error

    played, metrics = play(llama, tokenizer, broken("step", leave), ["g0", "g1"], 1)
    assert [t.game for t in played] == ["g0"] and metrics["rollout/failed"] == 1
    assert f"game g1 (step 1: {type(error).__name__}" in caplog.text
    check_first_game(broken("close", leave), ["g1"], 3, "chat", ())
    with pytest.raises(ValueError, match="not one of the first 1 games can be played"):
        check_first_game(broken("reset", leave), ["g1"], 3, "chat", ())


def test_an_error_without_words_is_one_too(llama, tokenizer, caplog):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def leave(env, result):
        raise Mute

    assert play(llama, tokenizer, broken("step", leave), ["g0", "g1"], 1)[1]["rollout/failed"] == 1
    assert "Mute: a Mute that cannot be printed" in caplog.text


def test_a_constructor_that_fails_costs_its_episode(llama, tokenizer, caplog):
    class Full(Plain):
        made = 0

        def __init__(self):
            Full.made += 1
            if Full.made == 2:
                raise OSError("too many open files")
            super().__init__()

    played, metrics = play(llama, tokenizer, Full, ["g0", "g1"])
    assert [t.group for t in played] == [0, 1, 1] and metrics["rollout/failed"] == 1
    assert "game g0 (constructor: OSError: too many open files)" in caplog.text


def test_a_game_that_never_ends_is_one_that_fails(llama, tokenizer, caplog):
    endless = broken("step", lambda env, result: (*result[:2], False, False, result[4]))
    played, metrics = play(llama, tokenizer, endless, ["g0", "g1"], 1)
    assert [t.game for t in played] == ["g0"] and metrics["rollout/failed"] == 1
    assert "game g1 (step 3: ProtocolError: the episode goes on after step 3" in caplog.text


@pytest.mark.parametrize("method", ["build_prompt", "parse_action"])
def test_every_method_has_a_limit(method, llama, tokenizer, caplog):
    slow = broken(method, lambda env, result: time.sleep(30))
    slow.time_limit = 0.2
    assert play(llama, tokenizer, slow, ["g0", "g1"], 1)[1]["rollout/failed"] == 1
    assert f"game g1 ({method}: TimeUp" in caplog.text


@pytest.mark.parametrize("how", [lambda: time.sleep(30), lambda: fail(None, None)], ids=["hangs", "raises"])
def test_a_prefetch_that_fails_leaves_the_steps_to_ask(how, llama, tokenizer, caplog):
    class Asking(Plain):
        time_limit = 0.2

        def prefetch(self, responses):
            how()

    played, metrics = play(llama, tokenizer, Asking, ["g0"], 2)
    assert [len(t.steps) for t in played] == [3, 3] and metrics["rollout/failed"] == 0
    assert caplog.text.count("prefetch failed, so that each step asks for itself: ") == 3  # turns


def test_a_run_of_small_rollouts_counts_failures_together():
    """A fifth of 16 episodes is less than one group of 4. Of 32 it is more, and 5% of those is less than a group."""

    def run_of(*failed):
        run = SimpleNamespace(tried=0, failed=0, config=SimpleNamespace(rollouts=4))
        for each in failed:
            Run.count_failures(run, {"rollout/failed": each, "episodes": 15 - each, "rollout/too_long": 1})
        return run

    assert run_of(4, 0, 0).tried == 48 and run_of(*[1, 0] * 50).failed == 50  # 3 in a hundred
    with pytest.raises(GameFailure, match=r"^6 of 32 episodes failed .* no more than 4 may"):
        run_of(3, 3)
    with pytest.raises(GameFailure, match=r"^5 of 80 episodes failed"):
        run_of(*[1] * 5)


class Hanging(Plain):
    time_limit = 0.2

    def step(self, action):
        while self.game == "g1":
            try:
                time.sleep(30)
            except Exception:  # as environments do that ask a server again and again
                continue
        return super().step(action)


def test_a_step_that_hangs_is_a_game_that_fails(llama, tokenizer, caplog):
    began = time.monotonic()
    played, metrics = play(llama, tokenizer, Hanging, ["g0", "g1"], 1)
    assert [t.game for t in played] == ["g0"] and metrics["rollout/failed"] == 1
    assert "game g1 (step 1: TimeUp: no answer in 0.2 seconds)" in caplog.text
    assert time.monotonic() - began < 25


def test_a_limit_leaves_alarms_as_they_were_and_is_none_on_other_threads():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert within(5, lambda: time.sleep(0.1) or "done") == "done"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.25
        time.sleep(0.4)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    results = []
    thread = threading.Thread(target=lambda: results.append(within(0.05, lambda: time.sleep(0.2) or "late")))
    thread.start()
    thread.join()
    assert results == ["late"]


# ---- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["official", "compact"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_keeps_the_protocol(name, prompt):
    env = make_env(name, prompt=prompt, max_steps=4)
    check_env(env)
    close_env(env)


def answer(**changes):
    """Changes to what reset or step returns: of `observation`, or of the info."""

    def change(env, result):
        info = {key: value for key, value in (result[-1] | changes).items() if value is not ...}
        observation = info.pop("observation", result[0])
        return (observation, *result[1:-1], info)

    return change


WRONG = {
    "no observation at reset": ("reset", answer(observation=None), "observation of reset must be a string, not None"),
    "no observation": ("step", answer(observation=None), "observation of step must be a string, not None"),
    "1 MB of it": ("step", answer(observation="x" * 10**6), f"1000000 characters, more than {LONGEST}"),
    "not won": ("step", answer(won=...), r"no 'won', which alone counts as success"),
    "reward, not won": ("step", lambda e, r: (r[0], 1.0, True, False, r[4]), r"reward 1\.0, but info\['won'\]"),
    "reward that is none": ("step", lambda e, r: (r[0], float("nan"), *r[2:]), "reward of step must be a number"),
    "won in words": ("step", answer(won="no"), r"info\['won'\] must be True or False, not 'no'"),
    "won is NaN": ("step", answer(won=float("nan")), r"info\['won'\] must be True or False, not nan"),
    "old gym": ("step", lambda env, result: result[:4], "step must return"),
    "reset without info": ("reset", lambda env, result: result[0], "reset must return"),
    "done is a word": ("step", lambda e, r: (r[0], r[1], "no", *r[3:]), "terminated of step must be True or False"),
    "no end": ("step", lambda e, r: (*r[:2], False, False, r[4]), "goes on after step 3"),
    "no task": ("reset", answer(task=...), "no 'task'"),
    "task": ("reset", answer(task=7), r"info\['task'\] must be a string, not int"),
    "task type": ("reset", answer(task_type=7), r"info\['task_type'\] must be a string, not int"),
    "game": ("reset", answer(game=7), r"info\['game'\] must be a string, not int"),
    "actions": ("reset", answer(admissible_actions="look"), "must be a list of strings"),
    "action": ("step", answer(admissible_actions=[1]), "must be a list of strings"),
    "prompt": ("build_prompt", lambda env, prompt: "look", "tuple of strings and Slots"),
    "no slot": ("build_prompt", lambda env, prompt: prompt[2:], "has no episode slot: a skill would have no place"),
    "no step slot": ("build_prompt", lambda env, prompt: prompt[:1], "has no step slot"),
    "parsed": ("parse_action", lambda env, parsed: parsed[0], "parse_action must return"),
    "5 MB of an action": ("parse_action", lambda e, r: ("x" * 5_000_000, True), "action of parse_action has 5000000"),
    "valid": ("parse_action", lambda env, parsed: (parsed[0], None), "parse_action must return"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_an_environment_is_named(name):
    method, how, message = WRONG[name]
    with pytest.raises(ProtocolError, match=message):
        check_env(broken(method, how, ("g0",))())


@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("no end", "no slot", "no step slot")])
def test_an_answer_that_breaks_the_protocol_is_a_game_that_fails(name, llama, tokenizer, caplog):
    method, how, _ = WRONG[name]
    played, metrics = play(llama, tokenizer, broken(method, how), ["g0", "g1"], 1)
    assert [t.game for t in played] == ["g0"] and metrics["rollout/failed"] == 1
    assert "ProtocolError" in caplog.text


def test_other_things_that_are_wrong_with_an_environment():
    check_env(Plain())
    for value in (None, 0, "3"):
        env = Plain()
        env.max_steps = value
        with pytest.raises(ProtocolError, match="max_steps must be a positive number"):
            check_env(env)
    env = Plain()
    env.tasks = lambda split, count=None: []
    with pytest.raises(ProtocolError, match=r"tasks\('train'\) is empty"):
        check_env(env)
    for name, value, message in (
        ("time_limit", "60", "time_limit must be a positive number of seconds or None"),
        ("time_limit", -1, "time_limit must be a positive"),
        ("held_out", "valid_seen", "held_out must be a tuple of splits"),
        ("columns", None, "columns must be a dict"),
        ("tasks", lambda split, count=None: (f"g{i}" for i in range(3)), "tasks must return a list, not generator"),
    ):
        env = Plain()
        setattr(env, name, value)
        with pytest.raises(ProtocolError, match=message):
            check_env(env)
    env = Plain()
    env.analysis_prompt = lambda: fail(env, None)
    with pytest.raises(GameFailure, match=r"Plain\.analysis_prompt failed"):
        check_env(env)
    env = Plain()
    env.analysis_prompt = lambda: 3
    with pytest.raises(ProtocolError, match="analysis_prompt must return"):
        check_env(env)
    with pytest.raises(GameFailure, match=r"Broken\.step failed, game g0: KeyError"):
        check_env(broken("step", fail, ("g0",))())
    check_env(broken("build_prompt", lambda env, prompt: prompt[2:], ("g0",))(), levels=())  # GRPO writes no skills


def test_a_run_checks_its_environment_once_at_its_start(caplog):
    games, levels = ["g0", "g1", "g2", "g3"], ("episode", "step")
    make, envs = made(Plain)
    check_first_game(make, games, 3, "chat", levels)
    assert [env.closed for env in envs] == [1]
    with pytest.raises(ProtocolError, match=r"goes on after step 2.*--max-steps 2; its own max_steps is 3"):
        check_first_game(Plain, games, 2, "chat", levels)
    make, envs = made(broken("reset", fail, ("g0", "g1")))  # one bad game is not the environment
    check_first_game(make, games, 3, "chat", levels)
    assert [env.closed for env in envs] == [1] * 3 and caplog.text.count("Broken.reset failed") == 2
    with pytest.raises(ValueError, match=r"not one of the first 3 games can be played: .*game g2: KeyError"):
        check_first_game(broken("reset", fail, tuple(games)), games, 3, "chat", levels)


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_observations_of_a_megabyte_cost_their_game_alone(llama, tokenizer):
    """They are refused before a tokenizer sees them."""
    for text in ("x" * 10**6, "bed 1 " * 200_000, "\x00\x1b[2J" * 250_000):
        began = time.monotonic()
        tracemalloc.start()
        played, metrics = play(llama, tokenizer, broken("step", answer(observation=text)), ["g0", "g1"], 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert metrics["rollout/failed"] == 1 and [t.game for t in played] == ["g0"]
        assert peak < 200e6 and time.monotonic() - began < 60


def test_an_observation_that_is_just_allowed_ends_its_episode_soon(llama, tokenizer):
    began = time.monotonic()
    text = ("bed 1 " * LONGEST)[:LONGEST]
    played, metrics = play(llama, tokenizer, broken("step", answer(observation=text)), ["g0", "g1"], 1)
    assert metrics["rollout/context_full"] == 1 and [len(t.steps) for t in played] == [3, 1]
    assert time.monotonic() - began < 60


def test_control_characters_are_text_like_any_other(llama, tokenizer, caplog):
    strange = "".join(map(chr, range(32))) + "\x7f\x85\u2028\u202e\ud800\ufffe"
    cls = broken("step", answer(observation=f"bed {strange} 1"), ("g0",))
    played, _ = play(llama, tokenizer, cls, ["g0"], 2)
    assert [len(t.steps) for t in played] == [3, 3] and strange in played[0].steps[1].observation
    play(llama, tokenizer, broken("step", fail, (strange,)), ["g0", strange], 1)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "envs.guard"]
    assert line.isprintable()
