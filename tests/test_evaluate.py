"""The paper's table and its interval."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate as evaluate_module
from config import ACTS, EVALUATED, Config, parse_args, settings_to_save
from data import Step, Trajectory
from envs.alfworld import TASK_TYPES
from envs.search import DATA_SOURCES, GENERATED_SOURCES
from evaluate import environment, eval_splits, evaluate, format_table, games_of, success_by_type, wilson
from lm.encoder import Encoder
from lm.loading import SAVED
from lm.sampler import Sampler
from tests.settings import laptop


def played(task_type, *outcomes):
    return [Trajectory("task", 0, [], outcome, task_type=task_type) for outcome in outcomes]


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half width 1.96 * sqrt(0.016 + 0.009604) / 1.38415
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_table():
    games = played("pick_and_place_simple", True, False) + played("pick_two_obj_and_place", True, True, False)
    assert success_by_type(games, TASK_TYPES) == {"Pick": (1, 2), "Pick2": (2, 3), "All": (3, 5)}
    header, line = format_table({"valid_seen": games}, TASK_TYPES).splitlines()
    assert header.split()[:8] == ["split", "Pick", "Look", "Clean", "Heat", "Cool", "Pick2", "All"]
    assert line.split()[:8] == ["valid_seen", "50.0", "-", "-", "-", "-", "66.7", "60.0"]
    assert line.split()[-1] == "5"


def test_a_tables_words_are_an_environments_and_may_be_any():
    table = format_table({"test": played("t\x1b[2J\ud800\u202e", True)}, {})
    assert table.replace("\n", "").isprintable() and table.encode() and "100.0" in table


def test_table_of_questions_by_data_set():
    games = played("nq", True, False) + played("2wikimultihopqa", True)
    header, line = format_table({"test": games}, DATA_SOURCES).splitlines()
    sets = ["NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle"]
    assert header.split()[1:9] == [*sets, "All"]
    assert line.split()[1:9] == ["50.0", "-", "-", "-", "100.0", "-", "-", "66.7"]
    assert header.index("All") + 3 == line.index("66.7") + 4  # columns line up under wide names
    assert success_by_type(played("one_hop", True), GENERATED_SOURCES) == {"1-hop": (1, 1), "All": (1, 1)}
    mine = played("my_set", False) + played("nq", True)  # a data set that no paper's table knows
    assert success_by_type(mine, DATA_SOURCES) == {"my_set": (0, 1), "nq": (1, 1), "All": (1, 2)}


def test_search_questions_of_a_run(tmp_path):
    config = laptop(env="search", train_games=30, eval_games=5)
    assert [len(games_of(config, split)) for split in ("train", *eval_splits(config))] == [30, 5, 5]
    for split in ("train", "test"):
        rows = "".join(f'{{"question": "q{i}", "golden_answers": ["a"]}}\n' for i in range(8))
        (tmp_path / f"{split}.jsonl").write_text(rows)
    config = laptop(
        env="search",
        model="smollm2",
        env_options={"questions": str(tmp_path)},
        train_games=3,
        eval_games=5,
        max_steps=4,
    )
    assert eval_splits(config) == ("test",)
    assert games_of(config, "train") == [f"search/train/{i}" for i in range(8)]  # of one's own, all
    assert games_of(config, "test") == [f"search/test/{i}" for i in range(5)]
    assert environment(config)().reset(options={"game": "search/test/0"})[1]["task_type"] == tmp_path.name


def test_table_of_another_environment():
    games = played("grocery", True, False) + played("electronics", True)
    header, line = format_table({"valid_seen": games}, {}).splitlines()
    assert header.split()[:4] == ["split", "electronics", "grocery", "All"]
    assert line.split()[:4] == ["valid_seen", "100.0", "50.0", "66.7"]


class OneSplit:
    """An environment that is never played: it has tasks in valid_unseen alone."""

    def tasks(self, split, count=None):
        return [7] if split == "valid_unseen" else []


def test_a_split_without_games_is_left_out_of_the_evaluation(monkeypatch, caplog):
    monkeypatch.setattr("evaluate.environment", lambda config: OneSplit)
    monkeypatch.setattr("evaluate.play", lambda *args, **options: played("pick", True))
    shares = [evaluate(None, None, laptop(), share=(process, 2)) for process in range(2)]
    assert [share.keys() for share in shares] == [{"valid_unseen"}] * 2  # also where a process has nothing to play
    assert "alfworld has no games in valid_seen" in caplog.text


def test_a_table_without_games_has_no_numbers():
    line = format_table({"valid_seen": [], "valid_unseen": played("pick", True)}, {}).splitlines()[1]
    assert line.split() == ["valid_seen", "-", "-", "[0.0,", "100.0]", "0"]


def test_webshop_games():
    config = laptop(env="webshop", eval_games=3)
    assert games_of(config, "valid_seen") == [f"webshop/valid_seen/{i}" for i in range(3)]
    assert len(games_of(config, "train")) == 1000
    assert environment(config)().prompt == "compact"


def test_evaluation_is_repeatable_and_leaves_the_random_state_alone(llama, tokenizer):
    config = laptop(eval_games=3, max_steps=3, max_new_tokens=6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    encoder = Encoder(tokenizer, "chat")
    runs = [evaluate(llama, encoder, config, ["valid_unseen"])["valid_unseen"] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [[s.response for s in t.steps] for t in runs[0]] == [[s.response for s in t.steps] for t in runs[1]]
    assert [t.game for t in runs[0]] == games_of(config, "valid_unseen")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_games_are_played_in_the_runs_precision(precision, llama, tokenizer, monkeypatch):
    config = laptop(eval_games=1, max_steps=1, max_new_tokens=6, mixed_precision=precision)
    seen, original = [], Sampler.__call__
    look = lambda self, *a: (seen.append(torch.is_autocast_enabled("cpu")), original(self, *a))[1]
    monkeypatch.setattr(Sampler, "__call__", look)
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(llama, Encoder(tokenizer, "chat"), config, ["valid_unseen"])
    evaluate(llama, Encoder(tokenizer, "chat"), config, ["valid_unseen"])
    assert seen == [precision == "bf16"] * 2


def test_data_that_are_missing_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("tiny.loading.load_model", None)  # before a model is loaded
    with pytest.raises(SystemExit, match=r"^evaluate\.py: no game\.tw-pddl under"):
        evaluate_module.main(["--env-options", f"data={tmp_path}"])


def test_templates_are_told_the_day_of_the_run(tmp_path, llama, tokenizer, monkeypatch, capsys):
    days = []

    def told(tokenizer, style, date, *rest):
        days.append((style, date))
        return SimpleNamespace(ends=set())

    monkeypatch.setattr("tiny.loading.load_model", lambda *args, **options: (llama, tokenizer))
    monkeypatch.setattr(evaluate_module, "Encoder", told)
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *args: {"valid_seen": played("pick", True)})
    evaluate_module.main(["--model", str(tmp_path), "--env", "alfworld"])
    (tmp_path / SAVED).write_text(json.dumps(settings_to_save(laptop(), "2026-01-02")))
    evaluate_module.main(["--model", str(tmp_path)])
    assert days == [("window", None), ("chat", "2026-01-02")]
    assert "100.0" in capsys.readouterr().out


@pytest.mark.parametrize("budget, sizes", [(2 * 1024, [2, 2, 1]), (131072, [5])])
def test_games_are_played_within_the_budget(budget, sizes, llama, tokenizer, monkeypatch):
    config = laptop(eval_games=5, max_steps=1, max_new_tokens=6, rollout_budget=budget)
    played, original = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *a: (played.append(len(a[0])), original(self, *a))[1])
    evaluate(llama, Encoder(tokenizer, "chat"), config, ["valid_unseen"])
    assert played == sizes


def test_processes_share_the_games_of_a_split(llama, tokenizer):
    config = laptop(eval_games=5, max_steps=2, max_new_tokens=6, tasks=2, rollouts=2)
    encoder, games = Encoder(tokenizer, "chat"), games_of(config, "valid_unseen")
    shares = [
        evaluate(llama, encoder, config, ["valid_unseen"], share=(process, 3))["valid_unseen"] for process in range(3)
    ]
    assert [[t.game for t in share] for share in shares] == [[games[0], games[3]], [games[1], games[4]], [games[2]]]
    alone = evaluate(llama, encoder, config, ["valid_unseen"])["valid_unseen"]
    assert [t.game for t in alone] == games
    # more processes than games: some have nothing to do; and each has a seed of its own
    one = [evaluate(llama, encoder, config, ["valid_unseen"], share=(p, 9))["valid_unseen"] for p in range(9)]
    assert [len(share) for share in one] == [1] * 5 + [0] * 4


def own(folder, config: Config) -> list[str]:
    """Puts beside weights what a run leaves there -> the arguments of their evaluation."""
    (folder / SAVED).write_text(json.dumps(settings_to_save(config, "2026-01-02")))
    return ["--model", str(folder)]


def test_the_settings_of_a_run_are_there_before_the_command_line_is_checked(tmp_path):
    """Options of another environment, and lengths above the defaults, are right for the run that has them."""
    run = Config(env="search", max_new_tokens=2048, context_limit=4096)
    argv = [*own(tmp_path, run), "--env-options", "retriever=generate", "--max-new-tokens", "3000"]
    config = parse_args(argv, saved=("acts", "evaluated"))
    assert (config.env, config.env_options, config.context_limit) == ("search", {"retriever": "generate"}, 4096)
    assert config.max_new_tokens == 3000


def test_a_policy_is_evaluated_by_its_own_settings_and_trained_further_by_those_of_acting(tmp_path):
    run = laptop(
        env="webshop", history=7, max_steps=9, eval_games=11, eval_temperature=0.1, seed=5, rollout_budget=2000
    )
    values, argv = run.to_dict(), own(tmp_path, run)
    again = parse_args(argv, saved=("acts", "evaluated")).to_dict()
    assert {name: again[name] for name in ACTS + EVALUATED} == {name: values[name] for name in ACTS + EVALUATED}
    more = parse_args(argv)
    assert {name: more.to_dict()[name] for name in ACTS} == {name: values[name] for name in ACTS}
    assert (more.eval_games, more.seed, more.eval_temperature) == (200, 0, 0.4)  # the laptop recipe's
    assert more.learning_rate == 3e-4


@pytest.mark.parametrize("argv", [[], ["--model", "smollm2"], ["--model=x/checkpoint-10"]])
def test_a_config_beside_a_model_need_not_be_a_runs(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x/checkpoint-10").mkdir(parents=True)
    before = parse_args(argv, saved=("acts", "evaluated"))
    for place in (Path("config.json"), Path("x/config.json"), Path("x/checkpoint-10/config.json")):
        place.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}))
    assert parse_args(argv, saved=("acts", "evaluated")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged: Expecting value"),
        ("[]", "is damaged: "),
        ('{"base": 3}', "is damaged: base and date must be texts"),
        ('{"acts": []}', "is damaged: base and date must be texts, acts and evaluated tables"),
        ('{"acts": {"depth": 1}}', "is of another version: it has the unknown settings depth"),
    ],
)
def test_what_a_policy_says_of_itself_and_cannot_be_read_is_named(text, words, tmp_path, capsys):
    (tmp_path / SAVED).write_text(text)
    with pytest.raises(SystemExit):
        parse_args(["--model", str(tmp_path)])
    assert SAVED in (told := capsys.readouterr().err) and words in told


@pytest.mark.parametrize("inside", ["checkpoints/000001.pt", "checkpoints", "policy/model.safetensors"])
def test_what_is_no_model_in_a_run_names_its_policy(inside, tmp_path):
    for path in ("checkpoints/000001.pt", "policy/model.safetensors", "start.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(SystemExit, match=rf"^evaluate\.py: .*The policy of that run: {tmp_path}/policy$"):
        evaluate_module.main(["--model", str(tmp_path / inside), "--recipe", "laptop"])


def test_a_policy_that_does_not_fit_its_prompts_is_told(tmp_path, llama, tokenizer, monkeypatch, capsys):
    """Of four context tokens three are unknown; the one response is cut off, its action no action."""
    unknown = tokenizer.unk_token_id
    step = Step((), "", [unknown, unknown, 20, unknown], [20, 20], "", "", False)
    monkeypatch.setattr("tiny.loading.load_model", lambda *args, **options: (llama, tokenizer))
    lost = Trajectory("", 0, [step], False)
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *args: {"valid_seen": [lost]})
    evaluate_module.main(["--recipe", "laptop"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]
    assert [line.split()[1] for line in warnings] == ["100%", "75%", "no"]


def test_a_model_without_a_name_is_named(capsys):
    with pytest.raises(SystemExit):
        evaluate_module.main(["--model"])
    assert "argument --model: expected one argument" in capsys.readouterr().err
