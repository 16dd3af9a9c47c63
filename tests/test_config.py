"""The command line: every flag explained, every mistake named before a model is loaded, and what stands below flags."""

import json
from dataclasses import dataclass, fields, replace

import pytest

import config as config_module
from config import (
    ACTS,
    OWN,
    RECIPES,
    VARIANTS,
    Config,
    flag,
    parse_args,
    read_recipe,
    settings_come_from,
    settings_to_save,
    variant_of,
)
from lm.loading import SAVED
from router import RULES
from tests.settings import laptop
from train import OPID

ALGOS = sorted(path.stem.replace("_", "-") for path in VARIANTS.glob("[a-z]*.py"))
KNOWN = {f.name for f in fields(Config)}


@pytest.fixture
def as_it_stands(monkeypatch):
    """--mixed-precision auto is not made what this machine reads it as."""
    monkeypatch.setattr(config_module, "mixed_precision", lambda setting, device: setting)


def unlike(one: Config, other: Config) -> set[str]:
    """The settings in which two configs differ."""
    one, other = one.to_dict(), other.to_dict()
    return {name for name in one.keys() | other.keys() if one.get(name, ...) != other.get(name, ...)}


# ---- what stands below the flags -------------------------------------------------------------------------------------


def test_without_a_model_it_is_the_laptop_recipe_and_flags_come_above():
    assert parse_args([]) == laptop()
    config = parse_args(["--algo", "grpo", "--learning-rate", "1", "--no-resume", "--dual-clip", "2", "--seed", "3"])
    assert (config.algo, config.learning_rate, config.resume, config.dual_clip, config.seed) == (
        "grpo",
        1.0,
        False,
        2.0,
        3,
    )
    assert parse_args(["--dual-clip", "none"]).dual_clip is None
    for env in ("search", "webshop"):
        assert parse_args(["--env", env]) == Config.from_recipe(f"laptop-{env}")


def test_the_defaults_are_the_papers_alfworld_run(as_it_stands):
    """Key by key the recipe's, but for what is the card's and the data's."""
    paper = Config.from_recipe("alfworld-qwen2.5-3b")
    assert unlike(Config(), paper) == {"mixed_precision", "gradient_checkpointing", "env_options"}
    assert (Config().env_options, Config().gradient_checkpointing) == ({}, False)


@pytest.mark.parametrize("env", ["alfworld", "webshop", "search"])
def test_a_model_of_ones_own_gets_the_papers_run_of_its_environment_on_generated_data(env, as_it_stands):
    config = parse_args(["--model", "X", "--env", env])
    card = {"mixed_precision", "gradient_checkpointing", "fit"}  # what a recipe has for its card, here --fit decides
    assert unlike(config, Config.from_recipe(f"{env}-qwen2.5-3b")) == {"model", "env_options"} | card
    assert (config.model, config.env_options, config.mixed_precision) == ("X", {}, "auto")
    data = {"alfworld": "data=there", "webshop": "data=there", "search": "questions=there"}[env]
    assert parse_args(["--model", "X", "--env", env, "--env-options", data]).env_options == dict([data.split("=")])


@pytest.fixture
def saved(tmp_path):
    """A function of settings: the folder of a policy that a run with them saved."""

    def folder_of(config: Config) -> str:
        (tmp_path / "policy").mkdir()
        (tmp_path / "policy" / SAVED).write_text(json.dumps(settings_to_save(config, "2026-01-02")))
        return str(tmp_path / "policy")

    return folder_of


def test_default_recipe_then_the_saved_policy_then_the_recipe_then_flags(saved, tmp_path):
    policy = saved(laptop(max_steps=9, history=7, context_limit=900, learning_rate=1.0, tasks=3))
    mine = tmp_path / "mine.toml"
    mine.write_text("history = 6\ncontext_limit = 800\nkl = 0.5\n")
    of = lambda config: (config.learning_rate, config.tasks, config.max_steps, config.history, config.context_limit)
    assert of(parse_args(["--model", policy])) == (3e-4, 16, 9, 7, 900)  # it was the laptop's model before
    assert of(parse_args(["--model", policy, "--recipe", str(mine)])) == (3e-4, 16, 9, 6, 800)
    flags = ["--model", policy, "--recipe", str(mine), "--context-limit", "700", "--tasks", "4"]
    assert of(parse_args(flags)) == (3e-4, 4, 9, 6, 700)
    assert parse_args(flags).kl == 0.5
    assert of(parse_args(["--recipe", str(mine)])) == (1e-6, 16, 30, 6, 800)  # no saved policy: Config's own below


def test_a_saved_policy_of_a_larger_model_goes_on_by_the_papers_run(saved):
    was = Config(model="Qwen/Qwen3-0.6B", env="webshop", max_steps=9, learning_rate=1.0, history=1)
    config = parse_args(["--model", saved(was)])
    assert {name: getattr(config, name) for name in ACTS} == {name: getattr(was, name) for name in ACTS}
    assert (config.mini_batch, config.normalize, config.learning_rate) == (64, "mean", 1e-6)


def test_where_settings_come_from_is_one_line(saved):
    assert settings_come_from([]).startswith("no --model: the laptop recipe, recipes/laptop.toml (--model NAME ")
    assert settings_come_from(["--env", "search", "--seed", "1"]).startswith(
        "no --model: the laptop recipe, recipes/laptop-search.toml"
    )
    paper = "settings: the paper's (recipes/webshop-qwen2.5-3b.toml) on generated data"
    assert settings_come_from(["--model", "X", "--env", "webshop"]) == f"{paper}, and flags"
    assert settings_come_from(["--recipe", "webshop-smollm2"]) == "settings: recipe webshop-smollm2, and flags"
    assert settings_come_from(["--model=tiny"]) == "settings: recipes/laptop.toml, and flags"
    assert settings_come_from(["--model=cold:smollm2"]) == "settings: recipes/laptop-smollm2.toml, and flags"
    policy = saved(Config(model="X", env="webshop"))
    assert settings_come_from(["--model", policy]) == f"{paper}, what {policy} says of itself, and flags"
    both = ["--model", policy, "--recipe", "webshop-smollm2"]
    assert settings_come_from(both) == f"{paper}, what {policy} says of itself, recipe webshop-smollm2, and flags"


def test_the_method_in_a_recipe_is_honoured(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "laptop"\nalgo = "sdar"\ngate_beta = 2\n')
    config = parse_args(["--recipe", str(mine)])
    assert (type(config), config.algo, config.gate_beta) == (variant_of("sdar").settings, "sdar", 2.0)
    assert parse_args(["--recipe", str(mine), "--distill-weight", "0.5"]).distill_weight == 0.5


@dataclass
class Settings(Config):
    zeal: float = OWN(0.5, "how much of it", bounds=(0, 1))


MINE, MY_NAME = replace(OPID, settings=Settings), f"{__name__}:MINE"


def test_a_variant_of_a_module_has_its_flags_in_recipes_too(tmp_path, capsys):
    assert variant_of(MY_NAME) is MINE
    config = parse_args(["--algo", MY_NAME, "--zeal", "1"])
    assert (type(config), config.algo, config.zeal) == (Settings, MY_NAME, 1.0)
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--algo", MY_NAME, "--help"])
    assert "--zeal" in capsys.readouterr().out
    above, below = tmp_path / "above.toml", tmp_path / "below.toml"
    below.write_text('base = "laptop"\nzeal = 0.25\n')
    assert parse_args(["--algo", MY_NAME, "--recipe", str(below)]).zeal == 0.25
    assert Config.from_recipe(str(below), algo=MY_NAME).zeal == 0.25
    above.write_text(f'base = "{below}"\nalgo = "{MY_NAME}"\n')
    assert parse_args(["--recipe", str(above)]) == parse_args(["--algo", MY_NAME, "--recipe", str(below)])
    assert settings_come_from(["--algo", MY_NAME, "--recipe", str(below)]) == f"settings: recipe {below}, and flags"
    with pytest.raises(SystemExit):
        parse_args(["--recipe", str(below)])
    assert "unknown settings zeal" in last_line(capsys)


def test_what_another_method_has_is_refused_in_a_recipe_too(tmp_path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "laptop"\nalgo = "sdar"\ngate_beta = 2\n')
    with pytest.raises(SystemExit):
        parse_args(["--recipe", str(mine), "--algo", "opid"])
    assert last_line(capsys) == "train.py: error: --algo opid has no --gate-beta"
    mine.write_text('base = "laptop"\ngate_beta = 2\n')
    with pytest.raises(SystemExit):
        parse_args(["--recipe", str(mine)])
    assert last_line(capsys).endswith("error: --algo opid has no --gate-beta")


def last_line(capsys) -> str:
    """Of what went to stderr: below a usage of one line."""
    usage, line = capsys.readouterr().err.splitlines()
    assert usage == "usage: train.py [--recipe NAME] [flags]"
    return line


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--lamda", "1"], "--lamda 1"),
        (["--iter", "1"], "--iter 1"),  # no guessing of abbreviations
        (["--gate-beta", "1"], "--gate-beta 1"),
        (["--teacher", "smollm2"], "--teacher smollm2"),
        (["--algo", "grpo", "--divergence", "reverse"], "--divergence reverse"),
        (["--algo", "sdar", "--divergence", "jsd"], "--divergence jsd"),
        (["--algo", "gigpo", "--rlsd-mix", "1"], "--rlsd-mix 1"),
    ],
)
def test_a_flag_that_is_nobodys_or_another_methods_is_one_line(argv, shown, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    line, _, hint = last_line(capsys).partition(" (")
    assert line == f"train.py: error: unrecognized arguments: {shown}"
    methods = {"--gate-beta", "--teacher", "--divergence", "--rlsd-mix"}  # own flags of some
    assert (hint == "a flag of another --algo)") == (shown.split()[0] in methods)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--lambda", "0.1"], "did you mean --episode-weight or --step-weight?"),
        (["--learning_rate", "1"], "did you mean --learning-rate"),
        (["--task", "2"], "did you mean --tasks"),
        (["--env", "mine"], "an environment of your own: docs/forking.md"),
        (["--algo", "grpo", "--step-weight", "0.1"], "--algo grpo does nothing with --step-weight"),
        (["--algo", "sdar", "--episode-weight", "0.1"], "--algo sdar does nothing with --episode-weight"),
        (["--algo", "oprd", "--kl", "0.1"], "--algo oprd does nothing with --kl"),
    ],
)
def test_what_was_meant_is_hinted_at(argv, hint, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert hint in last_line(capsys)


@pytest.mark.parametrize("algo", ALGOS)
def test_every_flag_is_explained_and_a_methods_own_to_nobody_else(algo, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--algo", algo, "--help"])
    shown = capsys.readouterr().out.split()
    own = {f.name for f in fields(variant_of(algo).settings)}
    every = {f.name for other in ALGOS for f in fields(variant_of(other).settings)}
    assert own >= KNOWN
    for name in every:
        assert (flag(name) in shown or f"{flag(name)}," in shown) is (name in own), name


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env-options", "engine=slow"], "engine must be"),
        (["--env-options", "engine"], "'engine' is not of the form key=value"),
        (["--algo", "ppo"], "--algo must be one of gigpo, grpo, grpo-opsd, opd, opid, "),
        (["--algo", "../train"], "--algo must be one of"),
        (["--algo", "no.such.module:MINE"], "--algo no.such.module:MINE: No module named 'no'"),
        (["--algo", f"{__name__}:THINE"], f"--algo {__name__}:THINE: module '{__name__}' has no attribute 'THINE'"),
        (["--algo", f"{__name__}:Settings"], f"--algo {__name__}:Settings is no Variant of train.py"),
        (["--algo", ".config:MINE"], "--algo .config:MINE: "),
        (["--algo", MY_NAME, "--zeal", "2"], "--zeal must be between 0 and 1"),
        (["--zeal", "1"], "unrecognized arguments: --zeal"),
        (["--iterations", "0"], "--iterations must be positive"),
        (["--rollout-budget", "0"], "--rollout-budget must be positive"),
        (["--offload", "--shard"], "--offload is for one card"),
        (["--tasks", "two"], "invalid int"),
        (["--context-limit", "64", "--max-new-tokens", "64"], "leaves no room for a prompt"),
        (["--clip", "0.5", "--dual-clip", "1.5"], "--dual-clip must be above 1 + --clip"),
        (["--kl", "-1"], "--kl must not be negative"),
        (["--skill-writer", "openai"], "--openai-model"),
        (
            ["--skill-writer", "ema"],
            "--skill-writer must be one of policy, reference, openai or package.",
        ),
        (["--scorer", "ema"], "invalid choice: 'ema'"),
        (["--routing", "none"], "--algo grpo"),
        (["--max-new-tokens", "2000"], "no room"),
        (["--model", "X", "--max-new-tokens", "12"], "which 12 --max-new-tokens cannot hold: at least 24"),
        (["--prompt", "official", "--max-new-tokens", "64"], "--model tiny knows only the words of --prompt compact"),
        (["--algo", "opd"], "--algo opd needs --teacher"),
        (["--algo", "opd", "--teacher", "x", "--divergence", "forward", "--shard"], "no --shard"),
        (["--algo", "sdar", "--routing", "none"], "guides no step"),
        (["--routing", "step", "--step-weight", "0"], "--routing step guides no step with these weights"),
        (["--routing", "episode", "--episode-weight", "0"], "--routing episode guides no step with these weights"),
        (["--algo", "oprd", "--scorer", "old"], "--algo oprd reads its teacher in each step"),
        (["--algo", "oprd", "--shard"], "no --shard"),
        (["--algo", "oprd", "--oprd-positions", "first-0"], "--oprd-positions must be all, first-K or last-K"),
        (
            ["--algo", "opid-full", "--divergence", "jsd", "--jsd-beta", "1"],
            "--jsd-beta must be between 0.001 and 0.999",
        ),
        (["--algo", "opid-full", "--shard"], "no --shard"),
        (["--algo", "opid-full", "--scorer", "old"], "argument --scorer: invalid choice: 'old'"),
        (["--algo", "rlsd", "--routing", "additive"], "at most one teacher per token"),
        (["--algo", "opid-oracle", "--env", "search"], "none for --env search"),
        (["--algo", "opid-shuffled", "--tasks", "1"], "--tasks must be at least 2"),
        (["--algo", "opid-contrast", "--tasks", "1"], "--tasks must be at least 2"),
        (["--routing", "step", "--max-step-skills", "0"], "guides no step with these weights and --max-step-skills 0"),
        (["--episode-weight", "0", "--max-step-skills", "0"], "these weights and --max-step-skills 0"),
        (["--skill-context-limit", "-5"], "--skill-context-limit must be positive"),
        (["--skill-context-limit", "96"], "--skill-tokens leaves no room for a transcript in --skill-context-limit"),
        (["--skill-tokens", "1024"], "--skill-tokens leaves no room for a transcript in --context-limit"),
        (["--algo", "gigpo", "--gamma", "1.5"], "--gamma must be between 0 and 1"),
        (["--algo", "sdar", "--distill-weight", "-1"], "--distill-weight must be at least 0"),
        (["--algo", "grpo+opsd", "--gate-beta", "1"], "--gate-beta must be between 0 and 0"),
        (["--recipe", "alfword"], "no recipe 'alfword'; known: alfworld-"),
    ],
)
def test_mistakes_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in last_line(capsys)


def test_wrong_types_are_named():
    with pytest.raises(ValueError, match="--tasks must be int"):
        laptop(tasks=2.5)
    with pytest.raises(ValueError, match="--resume must be bool"):
        laptop(resume=1)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    assert isinstance(parse_args(["--recipe", recipe.stem]), Config)


def test_paper_recipe_holds_the_papers_settings():
    config = parse_args(["--recipe", "alfworld-qwen2.5-3b", "--seed", "5"])
    assert (config.tasks, config.rollouts, config.max_steps, config.history) == (16, 8, 30, 5)
    assert (config.episode_weight, config.step_weight, config.max_step_skills) == (0.001, 0.001, 5)
    assert (config.learning_rate, config.clip, config.kl, config.mini_batch) == (1e-6, 0.2, 0.01, 256)
    assert (config.scorer, config.skill_writer, config.routing, config.context) == (
        "old",
        "policy",
        "critical-first",
        "window",
    )
    assert config.context_limit == 2048 + 512
    assert config.seed == 5


def test_a_recipe_holds_what_differs_from_its_base():
    config = parse_args(["--recipe", "webshop-qwen3-1.7b"])
    assert (config.env, config.model) == ("webshop", "Qwen/Qwen3-1.7B")
    assert (config.mini_batch, config.normalize, config.history, config.context_limit) == (64, "mean", 2, 4608)
    assert (config.kl, config.iterations, config.scorer, config.dual_clip) == (0.01, 160, "old", 3.0)
    assert config.env_options == {"data": "$WEBSHOP_DATA", "goals": "synthetic"}  # none of ALFWorld's


def test_options_of_an_environment_are_taken_one_by_one():
    config = parse_args(["--recipe", "webshop-qwen3-1.7b", "--env-options", "data=here", "page_size=5"])
    assert config.env_options == {"data": "here", "goals": "synthetic", "page_size": "5"}
    assert parse_args(["--recipe", "webshop-qwen3-1.7b", "--env", "alfworld"]).env_options == {}


def test_recipes_that_cannot_be_are_named(tmp_path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'base = "{two}"\nseed = 1\n')
    two.write_text(f'base = "{one}"\n')
    with pytest.raises(ValueError, match=f"one another's base: {one} -> {two} -> {one}"):
        read_recipe(str(one), KNOWN)
    two.write_text('base = "nowhere"\n')
    with pytest.raises(ValueError, match="no recipe 'nowhere'"):
        read_recipe(str(one), KNOWN)
    two.write_text("seed = 2\nkl = 1\n")
    assert read_recipe(str(one), KNOWN) == {"seed": 1, "kl": 1.0}


def test_unknown_setting_in_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("lambda = 1\n")
    with pytest.raises(ValueError, match="unknown settings lambda"):
        read_recipe(str(path), KNOWN)


def test_none_in_a_recipe_is_none(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "laptop"\nkl_clip = "none"\nskill_prefill = "none"\n')
    config = parse_args(["--recipe", str(path)])
    assert (config.kl_clip, config.skill_prefill) == (None, "none")  # a text stays one


# ---- what settings mean ----------------------------------------------------------------------------------------------


def test_zero_weights_use_no_skills():
    assert Config().writes_skills
    assert not Config(episode_weight=0.0, step_weight=0.0).writes_skills
    assert not laptop(algo="grpo").writes_skills


@pytest.mark.parametrize("algo", ["opsd", "grpo+opsd", "sdar", "rlsd", "skill-sd"])
def test_lambda_does_not_switch_other_methods_off(algo):
    assert laptop(algo=algo, episode_weight=0.0, step_weight=0.0).levels == ("episode", "step")
    assert laptop(episode_weight=0.0).levels == ("step",)
    assert laptop(algo="grpo").levels == laptop(algo="gigpo").levels == ()
    assert laptop(algo="skill-grpo").levels == ()  # its skills are written to act under, not to re-score
    assert laptop(algo="skill-grpo").writes_skills


def test_loss_weights_of_the_releases():
    weight = lambda algo, **given: laptop(algo=algo, **given).distill_weight
    assert weight("sdar") == weight("opsd") == weight("grpo+opsd") == 0.01
    assert weight("skill-sd") == 0.001
    assert weight("sdar", distill_weight=0.5) == 0.5


def test_starting_weights_are_kept_where_they_score_write_or_pull():
    assert Config(scorer="old").reads("reference")  # --kl
    assert not Config(scorer="old", kl=0.0).reads("reference")
    assert Config(scorer="reference", kl=0.0).reads("reference")
    assert Config(scorer="old", kl=0.0, skill_writer="reference").reads("reference")
    assert not laptop(algo="opid-oracle", scorer="old", kl=0.0, skill_writer="reference").reads("reference")
    assert not laptop(algo="grpo", kl=0.0, scorer="reference", skill_writer="reference").reads("reference")
    assert not laptop(algo="oprd", teacher="tiny", scorer="reference").reads("reference")  # no KL term


@pytest.mark.parametrize("routing", RULES)
def test_a_level_whose_weight_is_0_is_no_level(routing):
    if routing == "none":
        with pytest.raises(ValueError, match="guides no step"):
            laptop(routing=routing)
    else:
        assert laptop(routing=routing).levels == ("episode", "step")
