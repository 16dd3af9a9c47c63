"""Makes a WebShop catalogue without a download: `generate_catalogue(folder)` writes files in the official format.

Every word is from the lists below, so that a word-level model can speak it. A title shows one of a product's three
attributes, and search reads no other; the rest is on the product's own pages only. Products of a kind differ in
attributes, price and options, so what a goal asks for rules out most of what a search finds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from envs.webshop.data import read_pricing

BRAND_WORDS = """
acorn bluff cedar delta ember fable grove harbor isle juniper kestrel lotus maple nimbus onyx pebble quartz ridge sable
tundra umber vista willow zephyr
"""
BRANDS = BRAND_WORDS.split()
PACKS, SIZES = ("single", "double", "triple"), ("small", "medium", "large")
COLORS = ("black", "white", "red", "blue", "green", "yellow", "pink", "purple")
PRICES = range(10, 100, 5)  # whole dollars


@dataclass(frozen=True)
class Department:
    """One of the official categories: its kinds of product, what they can be like, and the two options to choose."""

    path: str  # product_category above the kind
    kinds: tuple[str, ...]
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]


def listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


DEPARTMENTS = {
    "fashion": Department(
        "clothing › outfits",
        listed("hiking jacket, rain coat, wool sweater, denim skirt, leather belt, cotton shirt, knit scarf, sun hat"),
        listed("waterproof, lightweight, breathable, stretchy, padded, striped"),
        {"color": COLORS, "size": SIZES},
    ),
    "electronics": Department(
        "electronics › devices",
        listed("desk lamp, phone case, car charger, gaming mouse, kitchen radio, smart watch, camera bag, wall clock"),
        listed("wireless, rechargeable, portable, dimmable, foldable, shockproof"),
        {"color": COLORS, "pack": PACKS},
    ),
    "garden": Department(
        "home › furnishings",
        listed("coffee table, office chair, book shelf, floor rug, window curtain, bath towel, patio bench, toy box"),
        listed("handmade, stackable, recycled, sturdy, woven, adjustable"),
        {"color": COLORS, "style": ("modern", "rustic", "vintage")},
    ),
    "beauty": Department(
        "beauty › care",
        listed("face cream, hair brush, lip balm, body lotion, nail polish, beard oil, eye mask, hand soap"),
        listed("vegan, gentle, hydrating, soothing, herbal, unscented"),
        {"scent": ("rose", "lemon", "mint", "vanilla", "coconut", "lavender"), "pack": PACKS},
    ),
    "grocery": Department(
        "food › pantry",
        listed("black tea, trail mix, fruit jam, rice cracker, oat cookie, peanut butter, pasta sauce, corn soup"),
        listed("organic, crunchy, salted, roasted, spicy, smoked"),
        {"flavor": ("apple", "cherry", "honey", "ginger", "garlic", "pepper"), "pack": PACKS},
    ),
}
KINDS = tuple((category, kind) for category, department in DEPARTMENTS.items() for kind in department.kinds)
WORDINGS = (
    "i need a {first} and {second} {kind} with {options}",
    "find me a {first} {kind} that is {second}, with {options}",
    "i am looking for a {kind}, {first} and {second}, with {options}",
)
ONE_OPTION = 0.3  # share of goals that name the first option only
MOST_ABOVE = 20  # dollars: a price limit is mostly at least so far above the price of the product that is asked for
TRIES = 6  # wishes for each of a product's two pairs of attributes, at most
PLAIN_LEFT_OUT = 0.9  # share of wishes left out since the first product that looks right is right
RIVALS = 4  # an episode of 15 steps (and a context of 400 words) has room for opening so many and buying the last
RANGES, NO_PRICE = 0.06, 0.03  # shares of products with a price range, and without a price (which officially costs 100)


def catalogue_words() -> set[str]:
    """Every word of generated products and instructions; numbers are left out."""
    texts = [*BRANDS, *WORDINGS]
    for category, department in DEPARTMENTS.items():
        texts += [category, department.path, *department.kinds, *department.attributes]
        texts += [text for name, values in department.options.items() for text in (name, *values)]
    fields = {"{first}", "{second}", "{kind}", "{options}"}
    return {word for text in texts for word in text.replace(",", " ").split() if word.isalpha() and word not in fields}


def sample_product(index: int, seed: int) -> tuple[dict, list[str]]:
    """Product number `index`, as a record of items_shuffle.json, and its attributes. Kinds take turns."""
    rng = Random(f"product {seed} {index}")
    category, kind = KINDS[index % len(KINDS)]
    department = DEPARTMENTS[category]
    attributes = rng.sample(department.attributes, 3)
    brand = BRANDS[(index // len(KINDS) + rng.randrange(2) * 7) % len(BRANDS)]
    price, chance = rng.choice(PRICES), rng.random()
    pricing = f"${price}.00"
    if chance < RANGES:
        pricing += f"${price + 10}.00"
    elif chance < RANGES + NO_PRICE:
        pricing = ""
    options = {
        name: [{"value": value, "image": None} for value in rng.sample(values, len(values) * 2 // 3 if i else 3)]
        for i, (name, values) in enumerate(department.options.items())
    }
    record = {
        "asin": f"B{index:09d}",
        "name": f"{brand} {attributes[0]} {kind}",
        "category": category,
        "query": kind,
        "product_category": f"{department.path} › {kind}",
        "pricing": pricing,
        "small_description": attributes,
        "full_description": f"{kind} by {brand}",
        "customization_options": options,
        "images": [None],
    }
    return record, attributes


def held_out(kind: str, pair: frozenset[str], attributes: tuple[str, ...]) -> bool:
    """Whether a kind with this pair of attributes is left to valid_unseen: 3 of each kind's 15 pairs."""
    pairs = [frozenset(each) for each in combinations(attributes, 2)]
    turn = [name for _, name in KINDS].index(kind)
    return (pairs.index(pair) + turn) % 5 == 0


def sample_wishes(record: dict, attributes: list[str], shelf: list[dict], seed: int, taken: set) -> Iterator[dict]:
    """Instructions that this product fulfils, as in items_human_ins.json: its title's attribute and one of the others.

    `split` says where each belongs: valid_unseen has pairs of its own; valid_seen and train never share what is asked
    for, whichever products fulfil it (`taken` remembers). `shelf` holds all products of the kind: nobody asks for what
    more than RIVALS of them look like, and few for what only right ones look like.
    """
    rng = Random(f"wishes {seed} {record['asin']}")
    kind, known = record["query"], DEPARTMENTS[record["category"]].attributes
    for other in attributes[1:] * TRIES:
        pair = (attributes[0], other)
        first, second = rng.sample(pair, 2)
        names = list(record["customization_options"])[: 1 if rng.random() < ONE_OPTION else 2]
        chosen = {name: rng.choice(record["customization_options"][name])["value"] for name in names}
        wording, seen_split = rng.choice(WORDINGS), "valid_seen" if rng.random() < 0.2 else "train"
        wish = (kind, frozenset(pair), tuple(chosen.values()))
        rivals = lookalikes(shelf, pair, {names[0]: chosen[names[0]]})
        impostors = [r for r in lookalikes(shelf, pair, chosen) if not fulfils(r, pair, dollars(record) + MOST_ABOVE)]
        plain = not impostors or impostors[0]["asin"] > record["asin"]  # equals are found in the catalogue's order
        if wish in taken or len(rivals) > RIVALS or (plain and rng.random() < PLAIN_LEFT_OUT):
            continue
        taken.add(wish)
        options = " and ".join(f"{name} {value}" for name, value in chosen.items())
        yield {
            "asin": record["asin"],
            "instruction": wording.format(first=first, second=second, kind=kind, options=options),
            "instruction_attributes": [first, second],
            "instruction_options": list(chosen.values()),
            "split": "valid_unseen" if held_out(kind, frozenset(pair), known) else seen_split,
        }


def fulfils(record: dict, pair: tuple[str, str], most: float) -> bool:
    return set(pair) <= set(record["small_description"]) and dollars(record) <= most


def dollars(record: dict) -> float:
    """What a product costs at least."""
    return read_pricing(record["pricing"])[0][0]


def lookalikes(shelf: list[dict], pair: tuple[str, str], chosen: dict[str, str]) -> list[dict]:
    """The products that look right to a search: a wanted attribute in the title, and the options."""
    return [
        record
        for record in shelf
        if not set(pair).isdisjoint(record["name"].split())
        and all({"value": chosen[name], "image": None} in record["customization_options"][name] for name in chosen)
    ]


def generate_catalogue(folder: str | Path, count: int = 1000, seed: int = 0) -> Path:
    """Write `count` products, their attributes and instructions under `folder`, in the official format -> `folder`.

    Product i depends on (seed, i) alone, and a file that is there with the same content is left alone. Nobody asks for
    a product with a price range: its page doesn't say what it costs.
    """
    products = [sample_product(index, seed) for index in range(count)]
    records = [record for record, _ in products]
    own = {record["asin"]: {"attributes": attributes} for record, attributes in products}
    wishes, taken = {}, set()
    for index, (record, attributes) in enumerate(products):
        if record["pricing"].count("$") == 1:
            shelf = records[index % len(KINDS) :: len(KINDS)]
            wishes[record["asin"]] = list(sample_wishes(record, attributes, shelf, seed, taken))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"items_shuffle.json": records, "items_ins_v2.json": own, "items_human_ins.json": wishes}
    for name, content in files.items():
        write_if_new(folder / name, json.dumps(content, ensure_ascii=False))
    return folder


def write_if_new(path: Path, text: str) -> None:
    """In one go, so that another process which starts at the same time never reads half a file."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
