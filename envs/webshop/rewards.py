"""WebShop's reward: how well a purchase meets the goal, from 0 to 1.

Source: princeton-nlp/WebShop, web_agent_site/engine/goal.py (get_reward and what it calls) and engine/normalize.py
(normalize_color). The official package compares texts with thefuzz's token_set_ratio, which rounds to whole percents;
rapidfuzz computes the same number, and the same rounding is done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.util import find_spec

from rapidfuzz import fuzz, utils

# The order matters: the first of these that occurs in an option is what the option counts as ("light blue" is blue).
COLOR_WORDS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel
champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim
eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki
lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard
natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver
skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow
"""
COLORS = COLOR_WORDS.split()

LATIN_1 = dict.fromkeys(range(128, 256))  # the characters that thefuzz drops before it compares

NOUN_TAGS = ("NOUN", "PROPN")
# Without spaCy: what is left of a product title when these are gone is names of things, brands and materials.
OTHER_WORDS = """
a an the and or nor but for of in on at to from with without by as into over under up out off per via plus this that
these those it its your our his her their my you we they is are be was were has have can will not no all any each
every more most very so than then new best great good big small large medium long short high low wide slim thin
thick soft hard light heavy dark deep fresh clean easy quick fast slow hot cold warm cool dry wet free full half
multiple premium perfect ideal natural organic portable adjustable durable waterproof breathable comfortable
stretchy reusable washable removable wireless rechargeable lightweight casual classic modern vintage elegant cute
black white red blue green yellow pink purple gray grey brown
"""
NOT_NOUNS = frozenset(OTHER_WORDS.split())

Nouns = Callable[[str], list[str]]  # a text -> its nouns, lower case


def reward(product: dict, goal: dict, price: float, options: dict[str, str], nouns: Nouns) -> float:
    """The official score of buying `product` (a processed record) at `price` dollars with the chosen `options`.

    (matched attributes + matched options + price within the limit) / (attributes + options + 1), times the type score.
    `goal["goal_options"]` is a list of values or a mapping from name to value; `nouns` lists a title's nouns. As in the
    official engine, TypeError where the price is None or the goal has no positive limit, ZeroDivisionError where the
    goal has no attributes: its loader lets no such goal through.
    """
    limit, attributes, wanted = goal["price_upper"], goal["attributes"], goal["goal_options"]
    if price is None or not limit > 0:
        raise TypeError(f"a reward needs a price and a positive price_upper, not {price!r} and {limit!r}")
    if not attributes:
        raise ZeroDivisionError("a goal without attributes has no reward")
    matched = attribute_matches(product, attributes) + option_matches(options.values(), wanted) + (price <= limit)
    return matched / (len(attributes) + len(wanted) + 1) * type_score(product, goal, nouns)


def type_score(product: dict, goal: dict, nouns: Nouns) -> float:
    """1.0 for a product of the goal's kind, 0.5 for another, 0.1 or 0.0 where the titles share (almost) no noun."""
    categories = [{part.strip() for part in record["product_category"].split("›")} for record in (product, goal)]
    desired = nouns(goal["name"])
    shared = len(set(nouns(product["name"])) & set(desired))
    title = shared / len(desired) if desired else 0.2
    if title == 0.0:
        return 0.0
    if title < 0.1:
        return 0.1
    same_kind = product["query"] == goal["query"] or len(categories[0] & categories[1]) >= 2 or title > 0.2
    return 1.0 if same_kind else 0.5


def attribute_matches(product: dict, attributes: list[str]) -> int:
    """How many of the goal's attributes the product has, among its own or word for word in its texts."""
    texts = (product["Title"].lower(), " ".join(product["BulletPoints"]).lower(), product["Description"].lower())
    return sum(
        any(alike(own, attribute) for own in product["Attributes"]) or any(attribute in text for text in texts)
        for attribute in attributes
    )


def option_matches(chosen: Iterable[str], wanted: list[str] | dict[str, str]) -> int:
    """How many of the wanted options are among the chosen ones, colours by their plain name.

    Of a mapping the official code compares (name, value) pairs, in which a colour is found where it is an element.
    """
    pairs = wanted.items() if isinstance(wanted, dict) else wanted
    bought = [plain_color(option) for option in chosen]
    return sum(any(alike(option, plain_color(want)) for option in bought) for want in pairs)


def plain_color(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first known colour in an option, else the option itself."""
    return next((color for color in COLORS if color in option), option)


def alike(first: str | tuple[str, str], second: str | tuple[str, str]) -> bool:
    """Whether thefuzz's token_set_ratio, a whole number of percents, is above 85."""
    texts = (str(text).translate(LATIN_1) for text in (first, second))
    return round(fuzz.token_set_ratio(*texts, processor=utils.default_process)) > 85


@lru_cache(maxsize=1)
def tagger():
    """spaCy's small English model, or None where it is not installed (spaCy alone, slow to import, does not help)."""
    if find_spec("en_core_web_sm") is None:
        return None
    import spacy

    return spacy.load("en_core_web_sm")


@lru_cache(maxsize=16384)
def nouns(text: str) -> list[str]:
    """The nouns and names of a product title, lower case, in order (do not change the list: it is cached).

    By spaCy's en_core_web_sm where that is installed, as officially. Without it: every word that has a letter, less
    the function words and the adjectives of NOT_NOUNS. Titles are mostly nouns, so the two mostly agree on the ratio
    of shared nouns, which has to pass 0.2 and 0.1.
    """
    if (parse := tagger()) is not None:
        return [token.text.lower() for token in parse(text) if token.pos_ in NOUN_TAGS]
    words = re.findall(r"[^\W_]+", text.lower())
    return [word for word in words if any(map(str.isalpha, word)) and word not in NOT_NOUNS]
