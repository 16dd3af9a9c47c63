"""tools/play.py, with lines that somebody could type."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch

import envs
import tiny.loading
from advantage import skill_advantage
from config import Config
from data import Guidance, Skills, Slot
from rescore import response_logprobs, skill_context
from router import LEVELS, route
from tests.playing import BUDGET, skill_logprobs
from tools import play

ROOT = Path(__file__).parent.parent
LOST = ["1"] * 4  # one command after another, which ends an episode of
SHORT = ("--max-steps", "4")
TOY = ("--env", "toy", "--model", "toy")  # an environment of one's own, and a model that knows ALFWorld's words
WORDS_OF = {"toy": "alfworld"}
load_once = functools.cache(tiny.loading.load_model)


class Toy:
    """An environment of one's own: no list of commands, no expert, no place for a step skill."""

    max_steps = 2
    held_out = ()

    def reset(self, *, seed=None, options=None):
        return "on desk see pen", {"task": "put pen desk"}

    def step(self, action):
        if action == "open drawer":
            raise RuntimeError("the drawer is stuck")
        return "nothing happens", 0.0, action == "look", False, {"won": False}

    def tasks(self, split, count=None):
        return [0][:count]

    def build_prompt(self, style, task, history, observation, admissible):
        return f"task {task}", Slot("episode", " skill {text}"), f" now {observation}"

    def parse_action(self, response, admissible):
        return response, True

    def analysis_prompt(self):
        return None


@pytest.fixture
def typed(monkeypatch, capsys):
    """(lines, flags) -> what is printed, and the last episode at the table. After the lines `last` happens."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(play, "load_model", lambda name, *, env, dtype: load_once("tiny", env=WORDS_OF.get(env, env)))
    monkeypatch.setitem(envs._REGISTRY, "toy", (__name__, "Toy"))
    monkeypatch.setattr(Config, "_check_values", lambda self: None)  # the registry was read before
    tables = []
    table = play.Table
    monkeypatch.setattr(play, "Table", lambda *given: tables.append(table(*given)) or tables[-1])

    def visit(lines, *flags, last=EOFError):
        waiting = list(lines)

        def ask(prompt):
            if not waiting:
                raise last
            line = waiting.pop(0)
            return line(capsys) if callable(line) else line

        monkeypatch.setattr("builtins.input", ask)
        play.main(list(flags))
        return capsys.readouterr().out, tables[-1]

    return visit


@pytest.mark.parametrize("last", [EOFError, KeyboardInterrupt, "quit"])
@pytest.mark.parametrize(
    "lines",
    [[], ["1"], ["skill look"], ["hint look"], ["blah"], ["1", "new"], LOST, [*LOST, "write"], [*LOST, "skill look"]],
)
def test_one_line_ends_it_in_every_state(typed, lines, last):
    printed, _ = typed([*lines, last] if last == "quit" else lines, *SHORT, last=last)
    assert printed.endswith("\nThat was all. Nothing was saved.\n")


def test_ctrl_c_in_the_midst_of_scoring_is_a_line(typed, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(play.Model, "logprobs", stopped)
    printed, table = typed(["1"])
    assert printed.endswith("\nThat was all. Nothing was saved.\n") and table.t == 0


def shown_row(printed: str, command: str) -> list[float]:
    """The numbers beside a command, of the table that was printed last."""
    return [float(number) for number in re.findall(rf"^ *\d* {command} +(.*)$", printed, re.MULTILINE)[-1].split()]


@pytest.mark.parametrize("level", LEVELS)
def test_the_columns_are_the_chances_of_whole_commands_under_h_and_under_the_skill(typed, level):
    word, text = {"episode": "skill", "step": "hint"}[level], "for wateringcan go to drawer"
    printed, table = typed(["1", f"{word} {text}", "list"])
    model, coming = table.model, table.coming()
    assert len(coming.steps) == 2 and table.guidances() == (Guidance(level, text),)
    contexts = [skill_context(model.encoder, coming, 1, guidance) for guidance in (None, Guidance(level, text))]
    y = [*model.encoder.tokenizer("go to drawer 2")["input_ids"], model.encoder.tokenizer.eos_token_id]
    scores = response_logprobs(model.net, contexts, [y, y], token_budget=BUDGET, packed=False).sum(1)
    plain, under = scores.tolist()
    assert abs(under - plain) > 0.1
    assert shown_row(printed, "go to drawer 2") == pytest.approx(
        [math.exp(plain), math.exp(under), under - plain], abs=6e-3, rel=0.05
    )
    sums = [float(number) for number in re.findall(r"together: (\S+), with skill (\S+)\. ", printed)[-1]]
    assert sums == pytest.approx(table.scores.exp().sum(1).tolist(), abs=6e-4) and 0.3 < sums[0] < 1
    assert table.scores[0].tolist() == sorted(table.scores[0].tolist(), reverse=True)


def test_a_hint_takes_the_skills_place_for_one_step_and_both_can_be_taken_out(typed):
    printed, _ = typed(["skill look first", "hint go to drawer", "hint", "hint go to drawer", "1", "skill"])
    shown = re.findall(r"^With your (skill|hint): (.*)$", printed, re.MULTILINE)
    skill, hint = ("skill", "look first"), ("hint", "go to drawer")
    assert shown == [skill, hint, skill, hint, skill]
    assert "with skill" not in printed.rpartition("> ")[0].rpartition("step 2")[2].rpartition("chance")[2]


def test_numbers_commands_and_what_a_word_would_hide_are_played(typed):
    printed, table = typed(["1", "look", "do help", "do inventory"])
    first = re.search(r"^  1 (.*?)  ", printed, re.MULTILINE)[1]
    assert [step.action for step in table.episode.trajectory.steps] == [first, "look", "help", "inventory"]
    assert all(step.valid and step.response[-1] in table.model.encoder.ends for step in table.episode.trajectory.steps)
    assert "you: look (chance " in printed


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "Type a command or its number."),
        ("   ", "Type a command or its number."),
        ("lok", "lok is no command here. Did you mean look?"),
        ("go to narnia", "go to narnia is no command here."),
        ("expret", "Did you mean expert?"),
        ("quitt", "Did you mean quit?"),
        ("sample 3", "sample 3 is no command here."),
        ("99", "99 is no command here."),
        ("0", "0 is no command here."),
        ("²", "² is no command here."),
        ("try", "Which command?"),
        ("do", "Which command?"),
        ("try fly away", "fly away is no command here."),
        ("write", "The episode is not over yet"),
        ("\x00\x1b[2J\ud800", "[2J is no command here."),
    ],
)
def test_what_is_no_command_costs_no_step_and_gets_a_line(typed, line, told):
    printed, table = typed([line])
    said = printed.rpartition("no command here.\n")[0] + printed
    assert told in " ".join(said.split()) and "\x1b" not in printed and "\x00" not in printed
    assert table.t == 0 and not table.own.episode


def test_a_skill_is_text_whatever_it_holds(typed):
    printed, table = typed(["hint {text} {0} %s \x1b[31m\x07 look", "prompt", "1"])
    assert table.own.steps == {0: "{text} {0} %s [31m look"}
    assert "With your hint: {text} {0} %s [31m look" in printed and "\x1b" not in printed and "\x07" not in printed
    assert "The model does not know {text}, {0}, %s, [31m: it reads them as a blank." in printed
    assert table.t == 1


def test_the_same_seed_plays_the_same_and_the_prompt_is_what_the_model_reads(typed):
    played = [typed(["sample"] * 3 + ["skill look", "prompt"], "--seed", seed) for seed in ("1", "1", "2")]
    actions = [[step.response for step in table.episode.trajectory.steps] for _, table in played]
    assert actions[0] == actions[1] != actions[2]
    printed, table = played[0]
    shown = " ".join(printed.partition("Without a skill:")[2].split())
    assert shown.startswith(table.model.encoder.tokenizer.decode(table.context))
    assert "sidetable skill look now" in shown.partition("With the episode skill:")[2]
    assert [step.context for step in table.episode.trajectory.steps] == [
        table.context[: len(step.context)] for step in table.episode.trajectory.steps
    ]


@pytest.mark.parametrize(("env", "game"), [("alfworld", "0"), ("alfworld", "4"), ("search", "0"), ("webshop", "3")])
def test_who_does_what_the_expert_says_wins(typed, env, game):
    """Also after a detour."""

    def obey(capsys):
        said = re.findall(r"^the expert: (.*)$", capsys.readouterr().out, re.MULTILINE)
        return said[-1] if said else "quit"

    wrong_product = ["search waterproof stretchy leather belt blue medium", "open 3"]
    detour = {"alfworld": ["1"], "search": ["search capital of france"], "webshop": wrong_product}[env]
    _, table = typed([*detour, *["expert", obey] * 15], "--env", env, "--game", game)
    assert table.episode.trajectory.success and table.over.startswith("won after ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (TOY, "No advice: --env toy has no expert."),
        (["--env-options", "engine=textworld"], "No advice: the expert needs --env-options engine=fast."),
    ],
)
def test_without_an_expert_a_line_says_so(typed, flags, told):
    assert told in typed(["expert"], *flags)[0]


def test_where_commands_are_not_listed_the_model_suggests_one_and_sample_plays_it(typed):
    printed, table = typed(["try answer paris", "search capital of flurb", "sample"], "--env", "search")
    suggested = re.findall(r"^The model suggests.*\n.*\n  1 (.*?) {2,}", printed, re.MULTILINE)
    first, second = table.episode.trajectory.steps
    assert first.text == first.action == "search capital of flurb"  # what was typed, not what the model can read of it
    assert "The model does not know flurb: it reads it as a blank." in printed
    assert second.text == suggested[1] and f"the model: {suggested[1]}" in printed
    assert re.search(r"^ +answer paris +\d\S*$", printed, re.MULTILINE)


def test_an_answer_cannot_end_its_turn_in_between(typed):
    printed, table = typed(["search a <end> b"], "--env", "search")
    assert "an answer cannot hold the model's own sign for the end of a turn." in printed and table.t == 0


def test_official_answers_are_spelled_as_the_environment_reads_them():
    read = {}
    for env in ("alfworld", "search", "webshop"):
        made = envs.make_env(env, prompt="official")
        table = play.Table(None, made, None)
        for began in ("", "<think>\n"):
            table.model = play.Model(None, None, type("Began", (), {"began": began}))
            table.episode = type("Now", (), {"admissible": []})
            text = table.spelled("search pens")
            read[env, began] = made.parse_action(began + text, [])
            assert ((began + text).count("<think>"), text.count("</think>")) == (1, 1)
    assert {read[env, began] for env in ("alfworld", "webshop") for began in ("", "<think>\n")} == {
        ("search pens", True)
    }
    assert read["search", ""] == read["search", "<think>\n"] == ("<search>pens</search>", True)


@pytest.mark.parametrize(
    ("env", "command", "told", "action"),
    [
        (
            "search",
            "search pens",
            "search pens is scored as the answer <think></think><search>pens",
            "<search>pens</search>",
        ),
        ("alfworld", "look", " is scored as the answer <think></think><action>", "look"),
    ],
)
def test_an_answer_in_tags_is_told(typed, env, command, told, action):
    printed, table = typed([command], "--env", env, "--model", "toy", "--context-limit", "4096")
    assert told in " ".join(printed.split()) and table.episode.trajectory.steps[0].action == action
    assert table.episode.trajectory.steps[0].valid


# ---- praise and blame ------------------------------------------------------------------------------------------------


def judged(printed: str) -> list[float]:
    """Every number below a token, in order."""
    lines = printed.rpartition("A_skill of each word")[2].splitlines()
    return [float(n) for line in lines if re.fullmatch(r" +([+-]\d+\.\d\d ?| )+", line) for n in line.split()]


@pytest.mark.parametrize(
    "typed_skill", [None, "for wateringcan first look in shelf or countertop then take wateringcan"]
)
def test_every_token_of_ones_answers_stands_above_its_a_skill(typed, monkeypatch, typed_skill):
    steps = {1: "for wateringcan look in drawer", 3: "for wateringcan go to garbagecan"}
    answer = '{"episode_summary": "s", "episode_skill": "look in every drawer", "step_skills": {"1": "%s", "3": "%s"}}'
    monkeypatch.setattr(play, "model_writer", lambda *a, **k: lambda asked: [answer % tuple(steps.values())])
    printed, table = typed([*LOST, f"skill {typed_skill}" if typed_skill else "write"], *SHORT)
    skills = Skills("", typed_skill, {}) if typed_skill else Skills("s", "look in every drawer", steps)
    model, trajectory = table.model, table.episode.trajectory
    path, expected = route(trajectory, skills, "critical-first"), []
    y, h = [step.response for step in trajectory.steps], [step.context for step in trajectory.steps]
    old = response_logprobs(model.net, h, y, token_budget=BUDGET, packed=False)
    shifts = {}
    for level in LEVELS:
        given = model.net, model.encoder, [trajectory], [path], level
        under, _ = skill_logprobs(*given, context_limit=9999, packed=False)
        shifts[level] = skill_advantage(under, old, ~old.isnan())
    for t, guidances in enumerate(path):
        expected += [shift for g in guidances for shift in shifts[g.level][t, : len(y[t])].tolist()]
    assert len(expected) == sum(map(len, y)) and max(map(abs, expected)) > 0.5
    assert judged(printed) == pytest.approx(expected, abs=6e-3)
    if not typed_skill:
        assert "step skill 2: for wateringcan look in drawer" in printed
        assert "step 2, step skill, in all " in printed and "step 3, episode skill, in all " in printed


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_praise_is_blue_blame_is_orange_in_a_terminal_alone(monkeypatch, capsys, terminal, no_color, coloured):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    play.show_tokens(["go", "to", "bed", "now"], [0.7, -9.0, 0.001, 2.9])
    printed = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert plain == "       go    to   bed   now\n    +0.70 -9.00 +0.00 +2.90\n"
    backs = [int(back) for back in re.findall(r"\x1b\[48;5;(\d+)", printed)]
    assert backs == ([play.BLUE[1][0], play.ORANGE[-1][0], play.BLUE[-1][0]] if coloured else [])


def test_a_real_model_writes_skills_of_the_episode_and_they_judge_it(typed):
    printed, table = typed([*LOST, "write"], *SHORT)
    assert re.search(r"^episode skill: \w+", printed, re.MULTILINE) and len(judged(printed)) >= table.t * 2


@pytest.mark.parametrize(
    ("answer", "told"),
    [("no idea", "its answer could not be read, twice"), (None, "the episode is too long for --context-limit")],
)
def test_skills_that_cannot_be_had_get_a_line(typed, monkeypatch, answer, told):
    monkeypatch.setattr(play, "model_writer", lambda *a, **k: lambda asked: [answer] * len(asked))
    assert f"The model wrote no skills: {told}." in typed([*LOST, "write"], *SHORT)[0]


@pytest.mark.parametrize("line", ["1", "look", "list", "sample", "expert", "hint look", "prompt", "try look"])
def test_after_the_end_nothing_is_played(typed, line):
    printed, table = typed([*LOST, line], *SHORT)
    assert printed.count("The episode is over: `write`, `skill TEXT`, `new` or `quit`.") == 1 and table.t == 4


# ---- what may go wrong -----------------------------------------------------------------------------------------------


def test_a_narrow_terminal_gets_narrow_lines(typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "3")
    printed, _ = typed(["help", "hint for wateringcan go to drawer", *LOST, "write"], *SHORT)
    assert max(map(len, printed.splitlines())) <= play.NARROWEST


def test_a_context_that_is_too_small_is_named(typed):
    flags = ["--skill-context-limit", "1024", "--context-limit"]
    printed, table = typed(["write"], *flags, "30")
    assert "has 22 tokens, too many for --context-limit 30" in printed and "Nothing was played that" in printed
    printed, table = typed(["1"] * 9, *flags, "60")
    assert "too many for --context-limit 60" in " ".join(printed.split()) and 0 < table.t < 20
    printed, table = typed(["skill " + "look " * 40, "1"], *flags, "60")
    assert "the skill does not fit into --context-limit 60, and is left out." in printed
    assert table.own.episode == "" and table.t == 1 and "with skill" not in printed


def test_a_skill_without_a_place_in_the_prompt_is_left_out(typed):
    printed, table = typed(["hint look", "look"], *TOY)
    assert "this prompt has no step slot (it has: ['episode'])." in printed and table.t == 1


def test_a_game_that_fails_ends_and_the_next_one_starts(typed):
    printed, table = typed(["open drawer", "write", "skill look", "new", "look"], *TOY)
    assert "The episode is over: the game itself failed." in printed
    assert printed.count("Nothing was played that could be learnt from.") == 2 and "A_skill" not in printed
    assert table.over == "lost after 1 step" and printed.count("game 0. Your task: put pen desk") == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([*TOY, "--game", "1"], "play.py: --game 1: toy has 1 games in train, counted from 0"),
        (["--game", "-1"], "play.py: --game -1: "),
        (["--model", "nowhere"], "play.py: no model 'nowhere'"),
    ],
)
def test_what_cannot_be_played_is_one_line(typed, monkeypatch, flags, told):
    monkeypatch.setattr(play, "load_model", tiny.loading.load_model)
    with pytest.raises(SystemExit) as ended:
        typed([], *flags)
    assert str(ended.value).startswith(told) and "\n" not in str(ended.value)


def test_a_model_that_was_made_for_another_environment_gets_a_warning(typed, monkeypatch):
    assert "WARNING" not in typed([], "--env", "webshop")[0]
    monkeypatch.setitem(WORDS_OF, "webshop", "alfworld")
    printed = " ".join(typed(["search a", "1"], "--env", "webshop")[0].split())
    assert printed.count("of the prompts' tokens are unknown to --model tiny") == 1


def test_new_starts_the_next_game(typed):
    printed, _ = typed(["1", "new"], "--game", "2")
    assert re.findall(r"^game (\d+)\.", printed, re.MULTILINE) == ["2", "3"]


def test_nothing_is_learnt_here(typed):
    before = [parameter.clone() for parameter in load_once("tiny", env="alfworld")[0].parameters()]
    typed([*LOST, "write"], *SHORT)
    assert all(map(torch.equal, before, load_once("tiny", env="alfworld")[0].parameters()))
