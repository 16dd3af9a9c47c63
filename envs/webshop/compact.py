"""WebShop in few words, for a word-level model of a million parameters: pages, tasks and commands.

    search WORDS    search[words], on any page
    open N          click on the N-th product of the results page
    next, previous  turn the results page
    back            from the results to a new search, from a product to the results
    choose VALUE    click on an option
    buy             click[buy now]

A product's page shows its features at once, so the sub-pages have no command. Pages compare themselves with the task,
word by word: `over` marks a price above the limit, and `lacks` ends a product's page. A model of two layers does not
learn to find a missing word in minutes; what to do about it is left to be learnt.
"""

from __future__ import annotations

import math
import re

from envs.webshop.catalogue import PRICES, catalogue_words
from envs.webshop.pages import BACK, BUY, NEXT, PREVIOUS, Session

PAGE_SIZE = 5  # products a results page
FILLER_WORDS = "a an the i me my am is are that and with for of to in need needs want find looking im"
SEARCH = "search <words>"  # how the list of admissible actions shows that any words can be searched for
FILLER = frozenset(FILLER_WORDS.split())
PAGE_WORDS = "page results price features chosen bought nothing happens under to over lacks"
COMMAND_WORDS = "search open next previous back choose buy"
LACKS = " lacks "  # between a product and what the task asks for beyond it
LIMIT = re.compile(r",? and price lower than ([\d.]+) dollars")
NUMBERS = {*range(1, 12), *range(PRICES.start, 145, 5)}  # places, pages, prices, limits

# Every word of generated tasks, pages and commands.
VOCABULARY = sorted({*catalogue_words() - FILLER, *PAGE_WORDS.split(), *COMMAND_WORDS.split(), *map(str, NUMBERS)})


def words(text: str) -> str:
    """Any text in the compact style: lower case, no filler, no punctuation."""
    found = re.findall(r"[^\W_]+(?:\.\d+)?", text.lower())
    return " ".join(word for word in found if word not in FILLER)


def task_words(instruction: str) -> str:
    """'i need a red hat, and price lower than 40.00 dollars' -> 'red hat under 40'."""
    wanted, limit = wanted_words(instruction)
    return wanted + (f" under {limit:g}" if limit < math.inf else "")


def wanted_words(instruction: str) -> tuple[str, float]:
    """-> (what is asked for, in compact words; the price limit in dollars, infinite where none is named)"""
    limit = LIMIT.search(instruction)
    return words(LIMIT.sub("", instruction)), float(limit[1]) if limit else math.inf


def page_words(session: Session) -> str:
    """The open page: results with title and price; a product with price, options, features, and what it lacks. After a
    choice, just what is chosen, and what is still to choose: the product's page is in the history."""
    wanted, limit = wanted_words(session.goal["instruction_text"])
    if session.page == "results":
        products = [
            f"{i} {words(p['Title'])} price {price_words(p['pricing'], limit)}" for i, p in enumerate(session.shown, 1)
        ]
        return " ".join([f"results page {session.number}", *(products or ["nothing"])])
    if session.page != "item":
        return "bought" if session.page == "done" else "search page"
    options = {words(name): [words(value) for value in values] for name, values in session.product["options"].items()}
    if session.options:
        chosen = " ".join(f"{words(name)} {words(value)}" for name, value in session.options.items())
        offered = {word for values in options.values() for value in values for word in value.split()}
        return f"chosen {chosen}{lacks([word for word in wanted.split() if word in offered], chosen)}"
    features = [words(feature) for feature in session.product["BulletPoints"]]
    facts = [words(session.product["Title"]), f"price {price_words(session.product['pricing'], limit)}"]
    page = " ".join(
        [*facts, *(f"{name} {' '.join(values)}" for name, values in options.items()), "features", *features]
    )
    return page + lacks(wanted.split(), page)


def lacks(wanted: list[str], page: str) -> str:
    """' lacks ' and the words asked for that are not on the page."""
    has = set(page.split())
    return LACKS + (" ".join(word for word in wanted if word not in has) or "nothing")


def shown(observation: str) -> str:
    """The page of an observation, without what it lacks."""
    return observation.partition(LACKS)[0]


def price_words(pricing: list[float], limit: float) -> str:
    """'20 to 30 over': of a range the higher end counts, since the page does not say which price it will be."""
    return " to ".join(f"{price:g}" for price in pricing) + (" over" if max(pricing) > limit else "")


def commands(session: Session) -> dict[str, str]:
    """Compact command -> the official action, for all that can be done on the open page but searching."""
    if session.page == "results":
        turns = {"previous": PREVIOUS} if session.number > 1 else {}
        clicks = {"back": BACK, "next": NEXT, **turns}
        clicks |= {f"open {i}": product["asin"] for i, product in enumerate(session.shown, 1)}
    elif session.page == "item":
        values = [value for values in session.product["options"].values() for value in values]
        clicks = {"back": PREVIOUS, "buy": BUY} | {f"choose {words(value)}": value for value in values}
    else:
        clicks = {}
    return {command: f"click[{text.lower()}]" for command, text in clicks.items()}


def admissible(session: Session) -> list[str]:
    return [SEARCH, *commands(session)] if session.page == "search" else list(commands(session))


def is_search(command: str) -> bool:
    return command.startswith("search ") and "<" not in command


def official(command: str, session: Session) -> str:
    """The official action of a compact command; "" where it is none on the open page."""
    if is_search(command):
        return f"search[{command.removeprefix('search ')}]"
    return commands(session).get(command, "")
