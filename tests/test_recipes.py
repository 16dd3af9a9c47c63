"""Each recipe fits the card that it says it is for, planned from its model's published configuration."""

import re

import pytest

from config import RECIPES, Config, read_recipe
from runlog.counting import bytes_of, shell
from runlog.plan import GIB, USABLE, Plan, architecture_of

CARDS = {
    **dict.fromkeys(("alfworld-qwen3-1.7b-lora",), (1, 24)),
    **dict.fromkeys(("alfworld-qwen3-1.7b", "webshop-qwen3-1.7b", "search-qwen3-1.7b"), (1, 48)),
    **dict.fromkeys(("alfworld-qwen2.5-3b", "webshop-qwen2.5-3b", "search-qwen2.5-3b"), (1, 80)),
    **dict.fromkeys(("alfworld-qwen2.5-7b-lora",), (1, 80)),
    **dict.fromkeys(("alfworld-qwen2.5-7b", "webshop-qwen2.5-7b", "search-qwen2.5-7b"), (4, 80)),
}
WORDS = {1: "one", 4: "four"}


def test_every_recipe_for_a_gpu_has_its_card():
    assert {path.stem for path in RECIPES.glob("*qwen*.toml")} == CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_card_that_its_first_line_names(name):
    cards, size = CARDS[name]
    first = (RECIPES / f"{name}.toml").read_text().splitlines()[0]
    assert re.match(f"# For {WORDS[cards]} {size} GB cards?[.:,]", first)
    plan = Plan(Config(**read_recipe(name)), processes=cards)
    assert 0.4 * size * GIB < plan.peak < USABLE * size * GIB


def test_the_configurations_have_the_published_sizes():
    billions = {"Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen2.5-3B-Instruct": 3.09, "Qwen/Qwen2.5-7B-Instruct": 7.62}
    for name, size in billions.items():
        assert bytes_of(shell(architecture_of(name), "bfloat16", 0)) / 2e9 == pytest.approx(size, abs=0.005)
