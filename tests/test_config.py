"""The command line: every flag explained, every mistake named before a model is loaded."""

from dataclasses import fields

import pytest

from baselines import METHODS
from config import RECIPES, Config, flag, parse_args, read_recipe

IDLE = "does not use A_skill as OPID does:"


def test_defaults_and_overrides():
    assert parse_args([]) == Config()
    config = parse_args(["--algo", "grpo", "--learning-rate", "1", "--no-resume", "--skill-clip", "2", "--seed", "3"])
    assert (config.algo, config.learning_rate, config.resume, config.skill_clip, config.seed) == (
        "grpo",
        1.0,
        False,
        2.0,
        3,
    )
    assert parse_args(["--skill-clip", "none"]).skill_clip is None


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    for f in fields(Config):
        assert flag(f.name) in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env-options", "engine=slow"], "engine must be"),
        (["--env-options", "engine"], "'engine' is not of the form key=value"),
        (["--lamda", "1"], "unrecognized arguments: --lamda"),
        (["--iter", "1"], "unrecognized"),  # no guessing of abbreviations
        (["--algo", "ppo"], "invalid choice"),
        (["--iterations", "0"], "--iterations must be positive"),
        (["--rollout-budget", "0"], "--rollout-budget must be positive"),
        (["--offload", "--shard"], "--offload is for one card"),
        (["--ema-decay", "1.5"], "--ema-decay must be between 0 and 1"),
        (["--tasks", "two"], "invalid int"),
        (["--context-limit", "64", "--max-new-tokens", "64"], "leaves no room for a prompt"),
        (["--clip", "0.5", "--dual-clip", "1.5"], "--dual-clip must be above 1 + --clip"),
        (["--kl", "-1"], "--kl must not be negative"),
        (["--skill-writer", "openai"], "--openai-model"),
        (["--routing", "none"], "--algo grpo"),
        (["--max-new-tokens", "2000"], "no room"),
        (["--algo", "opd"], "--algo opd needs --teacher"),
        (["--teacher", "smollm2"], "--teacher is for opd"),
        (["--algo", "sdar", "--routing", "none"], "guides no step"),
        (["--routing", "step", "--step-weight", "0"], "--routing step guides no step with these weights"),
        (["--routing", "episode", "--episode-weight", "0"], "--routing episode guides no step with these weights"),
        (["--algo", "sdar", "--centred"], f"--algo sdar {IDLE} --centred would do nothing"),
        (["--algo", "oprd", "--shift-base", "scorer"], f"--algo oprd {IDLE} --shift-base would do nothing"),
        (["--algo", "oprd", "--scorer", "old"], "--algo oprd reads its teacher in each step"),
        (["--algo", "rlsd", "--skill-clip", "1"], f"--algo rlsd {IDLE} --skill-clip would do nothing"),
        (
            ["--algo", "skill-sd", "--skill-iterations", "5"],
            f"--algo skill-sd {IDLE} --skill-iterations would do nothing",
        ),
        (["--divergence", "jsd", "--jsd-beta", "1"], "--jsd-beta 0 and 1 measure nothing"),
        (["--skill-clip", "-1"], "--skill-clip must be positive"),
        (["--algo", "rlsd", "--routing", "additive"], "one teacher per token"),
        (["--algo", "opid-oracle", "--env", "search"], "none for --env search"),
        (["--algo", "opid-shuffled", "--tasks", "1"], "--tasks must be at least 2"),
        (["--shift-base", "other", "--tasks", "1"], "--tasks must be at least 2"),
        (["--algo", "grpo", "--divergence", "reverse"], "--divergence is for opid and opd"),
        (["--algo", "sdar", "--divergence", "jsd"], "--divergence is for opid and opd"),
        (["--divergence", "reverse", "--centred"], "are for samples"),
        (["--divergence", "reverse", "--shift-base", "scorer"], "are for samples"),
        (["--divergence", "reverse", "--skill-clip", "1"], "are for samples"),
        (["--divergence", "forward", "--shard"], "no --shard"),
        (["--divergence", "forward", "--top-k", "4", "--top-k-rest", "hold"], "hold is for --divergence reverse"),
        (["--top-k", "4"], "--top-k is for"),
        (["--algo", "opid-shuffled", "--shift-base", "other"], "--algo opid-shuffled has no own ones"),
        (["--algo", "opid-placebo", "--shift-base", "other"], "--algo opid-placebo has no own ones"),
        (["--routing", "step", "--max-step-skills", "0"], "guides no step with these weights and --max-step-skills 0"),
        (["--episode-weight", "0", "--max-step-skills", "0"], "these weights and --max-step-skills 0"),
        (["--skill-context-limit", "-5"], "--skill-context-limit must be positive"),
        (["--skill-context-limit", "96"], "--skill-tokens leaves no room for a transcript in --skill-context-limit"),
        (["--skill-tokens", "1024"], "--skill-tokens leaves no room for a transcript in --context-limit"),
        (["--algo", "opd", "--teacher", "x", "--centred"], f"--algo opd {IDLE} --centred would do nothing"),
        (["--algo", "opd", "--teacher", "x", "--shift-base", "scorer"], "--shift-base would do nothing"),
        (["--algo", "oprd", "--teacher", "x", "--skill-iterations", "3"], "--skill-iterations would do nothing"),
        (["--algo", "oprd", "--teacher", "x", "--skill-clip", "3"], "--skill-clip would do nothing"),
        (["--algo", "gigpo", "--gamma", "1.5"], "--gamma must be between 0 and 1"),
        (["--algo", "sdar", "--distill-weight", "-1"], "--distill-weight must not be negative"),
        (["--recipe", "alfword"], "no recipe 'alfword'; known: alfworld-"),
    ],
)
def test_mistakes_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in capsys.readouterr().err


def test_wrong_types_are_named():
    with pytest.raises(ValueError, match="--tasks must be int"):
        Config(tasks=2.5)
    with pytest.raises(ValueError, match="--resume must be bool"):
        Config(resume=1)


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
        read_recipe(str(one))
    two.write_text('base = "nowhere"\n')
    with pytest.raises(ValueError, match="no recipe 'nowhere'"):
        read_recipe(str(one))
    two.write_text("seed = 2\nkl = 1\n")
    assert read_recipe(str(one)) == {"seed": 1, "kl": 1.0}


def test_unknown_setting_in_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("lambda = 1\n")
    with pytest.raises(ValueError, match="unknown settings lambda"):
        read_recipe(str(path))


def test_zero_weights_use_no_skills():
    assert Config().writes_skills
    assert not Config(episode_weight=0.0, step_weight=0.0).writes_skills
    assert not Config(algo="grpo").writes_skills


@pytest.mark.parametrize("algo", ["opsd", "grpo+opsd", "sdar", "rlsd", "skill-sd"])
def test_lambda_does_not_switch_other_methods_off(algo):
    assert Config(algo=algo, episode_weight=0.0, step_weight=0.0).levels == ("episode", "step")
    assert Config(episode_weight=0.0).levels == ("step",)
    assert Config(algo="grpo").levels == Config(algo="gigpo").levels == ()
    assert Config(algo="skill-grpo").levels == ()  # its skills are written to act under, not to re-score
    assert Config(algo="skill-grpo").writes_skills


def test_loss_weights_of_the_releases():
    weight = lambda algo, **given: METHODS[algo](Config(algo=algo, **given)).loss_weight
    assert weight("sdar") == weight("opsd") == weight("grpo+opsd") == 0.01
    assert weight("skill-sd") == 0.001
    assert weight("sdar", distill_weight=0.5) == 0.5


def test_weights_that_follow_slowly_are_kept_where_they_score_or_write():
    assert not Config().reads("ema")
    assert Config(scorer="ema").reads("ema")
    assert Config(skill_writer="ema").reads("ema")
    assert not Config(algo="opid-oracle", skill_writer="ema").reads("ema")
    assert not Config(algo="grpo", scorer="ema", skill_writer="ema").reads("ema")


def test_starting_weights_are_kept_where_they_score_write_or_pull():
    assert Config(scorer="old").reads("reference")  # --kl
    assert not Config(scorer="old", kl=0.0).reads("reference")
    assert Config(scorer="reference", kl=0.0).reads("reference")
    assert Config(scorer="old", kl=0.0, skill_writer="reference").reads("reference")
    assert not Config(algo="grpo", kl=0.0, scorer="reference", skill_writer="reference").reads("reference")
    assert not Config(algo="oprd", teacher="tiny", scorer="reference").reads("reference")  # no KL term


def test_prompt_follows_the_model():
    assert Config().prompt == "compact"
    assert Config(model="smollm2").prompt == "official"
