"""WebShop's files as they are -> products and goals, as the official engine processes them.

Source: princeton-nlp/WebShop, web_agent_site/engine/engine.py (load_products, generate_product_prices) and goal.py
(get_human_goals, get_synthetic_goals). Three files: items_shuffle*.json (products), items_ins_v2*.json (their
attributes and synthetic instructions) and items_human_ins.json (what people asked for).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

log = logging.getLogger(__name__)

SPLITS = ("train", "valid_seen", "valid_unseen")
OFFICIAL_SPLITS = {"valid_unseen": slice(0, 500), "valid_seen": slice(500, 1500), "train": slice(1500, None)}
ALIASES = {"test": "valid_unseen", "eval": "valid_seen"}  # the official names

FILES = {  # what it holds -> names, the full data first
    "products": ("items_shuffle.json", "items_shuffle_1000.json"),
    "attributes": ("items_ins_v2.json", "items_ins_v2_1000.json"),
    "instructions": ("items_human_ins.json",),
}
WHERE = (
    "get the official files with setup.sh of https://github.com/princeton-nlp/WebShop (its data folder), or leave the "
    "data at 'generate' for a generated catalogue"
)
TEXTS = ("asin", "name", "category", "query", "product_category", "full_description")
GOAL_FIELDS = ("asin", "category", "query", "name", "product_category")  # of the product that a goal is about
SHUFFLE_SEED = 233  # the official one: it decides which goal is in which split
LIMITS = [10.0 * i for i in range(1, 100)]  # price limits that a goal can name, dollars
NO_LIMIT = 1_000_000


@dataclass
class Shop:
    """All that one process's environments share; nothing in it changes after loading."""

    products: dict[str, dict]  # asin -> the processed record
    prices: dict[str, float]  # asin -> what it costs at purchase, dollars
    goals: dict[str, list[dict]]  # split -> goals, in order
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> records left out


def load_shop(folder: str | Path, goals: str = "human") -> Shop:
    """Products and goals from a folder that holds the three files, official or generated.

    `goals`: "human", what people asked for, or "synthetic", an instruction for every choice of options. Prices of
    ranges and price limits are drawn with the seed of the official shuffle (unseeded officially). Records that cannot
    be used are left out, counted in `skipped` and logged. Raises FileNotFoundError or ValueError, naming the file and
    what to do.
    """
    folder = Path(os.path.expandvars(folder)).expanduser()
    if goals not in GOALS:
        raise ValueError(f"unknown WebShop goals {goals!r}; known: {', '.join(GOALS)}")
    records, attributes = (read_json(find(folder, kind), kind) for kind in ("products", "attributes"))
    wishes = attributes if goals == "synthetic" else read_json(find(folder, "instructions"), "instructions")
    skipped: Counter[str] = Counter()
    products: dict[str, dict] = {}
    for record in records:
        if reason := unusable(record, products):
            skipped[reason] += 1
            continue
        try:
            products[record["asin"]] = process(record, attributes.get(record["asin"]))
        except (ValueError, TypeError, AttributeError, LookupError):
            skipped["malformed product"] += 1
    rng = Random(SHUFFLE_SEED)
    prices = {asin: draw_price(product, rng) for asin, product in products.items()}
    found = GOALS[goals](products, prices, wishes, rng, skipped)
    if not products or not found:
        raise ValueError(f"{folder}: {len(products)} usable products, {len(found)} {goals} goals (left out: {skipped})")
    if skipped:
        log.warning("%s: left out %s", folder, dict(skipped))
    Random(SHUFFLE_SEED).shuffle(found)
    shop = Shop(products, prices, split(found), skipped)
    if not all(shop.goals.values()):
        log.warning("%s: %s", folder, sizes(shop))
    return shop


def sizes(shop: Shop) -> str:
    """How many goals each split has, and what to do where one has none."""
    counts = ", ".join(f"{len(goals)} in {name}" for name, goals in shop.goals.items())
    return (
        f"of its {sum(map(len, shop.goals.values()))} goals {counts} (officially the first 500 are valid_unseen, the "
        "next 1000 valid_seen, the rest train). The files of 1000 products hold few human goals: take "
        "--env-options goals=synthetic, or the full files"
    )


def find(folder: Path, kind: str) -> Path:
    for name in FILES[kind]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {' or '.join(FILES[kind])} (WebShop's {kind}) in {folder}: {WHERE}")


def read_json(path: Path, kind: str) -> Any:
    """A list of products, a dict of anything else. Raises ValueError for other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again: {WHERE}") from error
    expected = list if kind == "products" else dict
    if not isinstance(content, expected):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not WebShop's {expected.__name__} of {kind}: {WHERE}"
        )
    return content


def unusable(record: object, products: dict[str, dict]) -> str:
    """Why a raw product is left out, as the official loader does or since it would fail on it; "" where it isn't."""
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in TEXTS):
        return "malformed product"
    if record["asin"] == "nan" or len(record["asin"]) > 10:
        return "bad asin"
    return "repeated asin" if record["asin"] in products else ""


def process(record: dict, attributes: dict | None) -> dict:
    """A raw product -> what pages, search and reward read. Raises an error of some kind for malformed fields."""
    features = record.get("small_description")
    features = features if isinstance(features, list) else [features]
    if not all(isinstance(feature, str) for feature in features):
        raise TypeError("small_description holds something other than text")
    pricing, tag = read_pricing(record.get("pricing"))
    own = (attributes or {}).get("attributes", ["DUMMY_ATTR"])
    return {
        "asin": record["asin"],
        "Title": record["name"],
        "name": record["name"],
        "Description": record["full_description"],
        "BulletPoints": features,
        "category": record["category"],
        "query": record["query"].lower().strip(),
        "product_category": record["product_category"],
        "pricing": pricing,
        "Price": tag,
        "options": read_options(record.get("customization_options")),
        "Attributes": [str(attribute) for attribute in own],
        "Rating": "N.A.",  # the official text environment loads no reviews either
    }


def read_pricing(pricing: str | None) -> tuple[list[float], str]:
    """'$10.99$24.99' -> ([10.99, 24.99], '$10.99 to $24.99'); nothing -> $100.0. Raises ValueError without a '$'."""
    if not pricing:
        return [100.0], "$100.0"
    prices = [float(re.sub(r"[^\d.]", "", price)) for price in pricing.split("$")[1:]][:2]
    if not prices:
        raise ValueError(f"no price in {pricing!r}")
    return prices, " to ".join(f"${price}" for price in prices)


def read_options(customization: dict | Literal[""] | None) -> dict[str, list[str]]:
    """Option name -> its values, lower case."""
    return {
        name.lower(): [value["value"].strip().replace("/", " | ").lower() for value in values]
        for name, values in (customization or {}).items()
        if values is not None
    }


def draw_price(product: dict, rng: Random) -> float:
    """The price that counts at purchase: somewhere in the range where the page shows one."""
    pricing = product["pricing"]
    return pricing[0] if len(pricing) == 1 else rng.uniform(*pricing)


def human_goals(products: dict, prices: dict, instructions: dict, rng: Random, skipped: Counter[str]) -> list[dict]:
    """What people asked for, in the catalogue's order, each with a price limit above its product's price."""
    goals = []
    for asin, product in products.items():
        wishes = instructions.get(asin, [])
        for wish in wishes if isinstance(wishes, list) else [wishes]:
            if not is_wish(wish):
                skipped["malformed instruction"] += 1
                continue
            if not wish["instruction_attributes"]:
                skipped["instruction without attributes"] += 1
                continue
            limit, text = draw_limit(prices[asin], rng)
            about = {
                "instruction_text": wish["instruction"].strip(".") + text,
                "attributes": wish["instruction_attributes"],
                "goal_options": wish["instruction_options"],
                "price_upper": limit,
                "split": wish.get("split"),  # only generated instructions name one
            }
            goals.append({key: product[key] for key in GOAL_FIELDS} | about)
    return goals


def synthetic_goals(products: dict, prices: dict, attributes: dict, rng: Random, skipped: Counter[str]) -> list[dict]:
    """For each product with an instruction, one goal for every choice of its options; they share a price limit."""
    goals = []
    for asin, product in products.items():
        wish = attributes.get(asin) or {}
        if wish.get("instruction") is None:
            continue
        if not is_wish(wish | {"instruction_options": []}) or not wish["instruction_attributes"]:
            skipped["malformed instruction"] += 1
            continue
        limit, text = draw_limit(prices[asin], rng)
        names = sorted(product["options"])
        for values in itertools.product(*(product["options"][name] for name in names)):
            chosen = dict(zip(names, values))
            options = ", and ".join(f"{name}: {value}" for name, value in chosen.items())
            about = {
                "instruction_text": wish["instruction"] + (f" with {options}" if options else "") + text,
                "attributes": wish["instruction_attributes"],
                "goal_options": chosen,
                "price_upper": limit,
                "split": None,
            }
            goals.append({key: product[key] for key in GOAL_FIELDS} | about)
    return goals


def is_wish(wish: object) -> bool:
    """Whether an instruction has a text, a list of attributes, and options: a list of values, or a mapping to them."""
    if not isinstance(wish, dict) or not isinstance(wish.get("instruction"), str):
        return False
    attributes, options = wish.get("instruction_attributes"), wish.get("instruction_options")
    values = list(options.values()) if isinstance(options, dict) else options
    return all(isinstance(part, list) and all(isinstance(text, str) for text in part) for part in (attributes, values))


def draw_limit(price: float, rng: Random) -> tuple[float, str]:
    """A price limit among the next four round ones above `price`, and how the instruction says it."""
    above = [limit for limit in LIMITS if limit > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def split(goals: list[dict]) -> dict[str, list[dict]]:
    """Generated goals name their split. Official ones: test 0-499, eval 500-1499, the rest for training."""
    if any(goal["split"] for goal in goals):
        return {name: [goal for goal in goals if goal["split"] == name] for name in SPLITS}
    return {name: goals[OFFICIAL_SPLITS[name]] for name in SPLITS}


GOALS = {"human": human_goals, "synthetic": synthetic_goals}
