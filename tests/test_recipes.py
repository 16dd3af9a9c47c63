"""Each recipe holds the settings that it always had, trains, and fits the card that it says it is for."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import config as config_module
import runlog.start
from config import RECIPES, Config, every_setting, parse_args, read_recipe, variant_of
from memory.counting import bytes_of, shell
from memory.hours import Hours, by_sheet
from memory.plan import GIB, USABLE, Plan, architecture_of
from runlog.metrics import read_lines
from train import train

# The settings of each recipe at commit e24ebb7, where Config() was the laptop's: what most have, and what it has else.
BEFORE = json.loads((Path(__file__).parent / "recipes_before.json").read_text())
MOST = BEFORE.pop("most")

ONE_DAY = sorted(path.stem for path in RECIPES.glob("one-card-*.toml"))  # on one card
CARDS = {
    **dict.fromkeys(ONE_DAY, (1, 24)),
    **dict.fromkeys(("alfworld-qwen3-1.7b", "webshop-qwen3-1.7b", "search-qwen3-1.7b"), (1, 48)),
    **dict.fromkeys(("alfworld-qwen2.5-3b", "webshop-qwen2.5-3b", "search-qwen2.5-3b"), (1, 80)),
    **dict.fromkeys(("alfworld-qwen2.5-7b-lora",), (1, 80)),
    **dict.fromkeys(("alfworld-qwen2.5-7b", "webshop-qwen2.5-7b", "search-qwen2.5-7b"), (4, 80)),
}
WORDS = {1: "one", 4: "four"}


def test_every_recipe_has_its_settings_of_before():
    assert {path.stem for path in RECIPES.glob("*.toml")} == BEFORE.keys() | set(ONE_DAY)


@pytest.mark.parametrize("name", BEFORE)
def test_a_recipe_has_the_settings_that_it_had(name, monkeypatch):
    """Key by key, whatever the defaults are now. `auto` is compared as it stands, not as this machine reads it."""
    monkeypatch.setattr(config_module, "mixed_precision", lambda setting, device: setting)
    expected = Config().to_dict() | MOST | BEFORE[name]  # a setting that came later has its default
    for config in (Config.from_recipe(name), parse_args(["--recipe", name])):
        assert config.to_dict() == expected


def test_every_recipe_for_a_gpu_has_its_card():
    assert {path.stem for path in RECIPES.glob("*qwen*.toml")} == CARDS.keys()


@pytest.mark.parametrize("name", [name for name in CARDS if name not in ONE_DAY or "alfworld" in name])
def test_a_recipe_fits_the_card_that_its_first_line_names(name):
    """Of those for one day ALFWorld's, which need the most: the others have their budgets, and shorter contexts."""
    cards, size = CARDS[name]
    first = (RECIPES / f"{name}.toml").read_text().splitlines()[0]
    assert re.match(f"# For {WORDS[cards]} {size} GB cards?[.:,]", first)
    plan = Plan(config := Config.from_recipe(name), processes=cards)
    assert 0.4 * size * GIB < plan.peak < USABLE * size * GIB
    if name in ONE_DAY:
        assert "and one day on an RTX 4090 by plan." in first
        assert config.max_new_tokens <= 96 and config.context == "chat"
    if name in ONE_DAY and not config.lora_rank:  # of 24 hours; adapters take long to count: lab/logs/hours.txt
        assert 12 < Hours(plan, by_sheet("RTX 4090", config)).run / 3600 < 24


def test_the_configurations_have_the_published_sizes():
    billions = {"Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen2.5-1.5B-Instruct": 1.544, "Qwen/Qwen3-1.7B": 1.72}
    billions |= {"Qwen/Qwen2.5-3B-Instruct": 3.09, "Qwen/Qwen2.5-7B-Instruct": 7.62}
    for name, size in billions.items():
        assert bytes_of(shell(architecture_of(name), "bfloat16", 0)) / 2e9 == pytest.approx(size, abs=0.005)


SMALL = {"model": "small", "tasks": 2, "rollouts": 2, "max_steps": 2, "max_new_tokens": 24, "skill_tokens": 8}
SMALL |= {
    "iterations": 1,
    "eval_every": 0,
    "eval_games": 2,
    "save_every": 1,
    "shard": False,
    "env_options": {},
    "template_options": {},
}
SIZES = {"rollout_budget", "token_budget", "learning_rate", "kl", "mini_batch", "history", "invalid_penalty", "warmup"}
SIZES |= {"context_limit", "skill_context_limit", "max_step_skills", "normalize"}


def unlike_recipes() -> list[str]:
    """One of those that differ in the sizes and weights of things alone."""
    names: dict[str, str] = {}
    for path in sorted(RECIPES.glob("*.toml")):
        if path.stem in ONE_DAY:  # each of them below
            continue
        settings = read_recipe(path.stem, every_setting())
        names.setdefault(
            repr([(k, v) for k, v in sorted(settings.items()) if k not in SMALL.keys() | SIZES]), path.stem
        )
    return sorted(names.values())


@pytest.mark.parametrize("name", ONE_DAY)
def test_a_recipe_for_one_day_trains_an_iteration(name, qwen, qwen3, tokenizer, tmp_path, monkeypatch, own_precision):
    """On a small model of its architecture, in its environment."""
    model = qwen3 if "qwen3" in name else qwen
    assert architecture_of(read_recipe(name, every_setting())["model"]).model_type == model.config.model_type
    config = replace(Config.from_recipe(name), **SMALL, out=str(tmp_path))
    record = an_iteration(config, model, tokenizer, monkeypatch)
    assert record["rollout/steps"] > 1 and record["grad_norm"] > 0


@pytest.mark.parametrize("name", unlike_recipes())
def test_a_recipe_trains_an_iteration(name, llama, tokenizer, tmp_path, monkeypatch, own_precision):
    """With a small model and generated games in place of what a hub and a card have."""
    config = replace(Config.from_recipe(name), **SMALL, out=str(tmp_path))
    record = an_iteration(config, llama, tokenizer, monkeypatch)
    assert record["advantage/skill_abs"] > 0
    assert record["grad_norm"] > 0
    assert (tmp_path / "policy" / "model.safetensors").is_file()


def an_iteration(config: Config, model, tokenizer, monkeypatch) -> dict:
    """The metrics of a run of one, with this model."""
    model = model.to(getattr(torch, config.dtype))
    monkeypatch.setattr(runlog.start, "load_model", lambda *a, **k: (copy.deepcopy(model), tokenizer))
    real, answer = runlog.start.model_writer, '{"episode_summary": "s", "episode_skill": "open every closed place"}'

    def writer(*args, **options):
        write = real(*args, **options)
        return lambda prompts: [answer for _ in write(prompts)]  # a random model's own words are no JSON

    monkeypatch.setattr(runlog.start, "model_writer", writer)
    train(runlog.start.start(config), variant_of(config.algo))
    (record,) = read_lines(Path(config.out) / "metrics.jsonl")
    return record
