"""A shopper for demonstrations: acts on the instruction and the pages alone, in the compact commands.

It searches with the instruction's words, opens what fits in price and title, compares features and options, goes back
where they don't fit, chooses the options and buys. `flaws` make it a novice.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from envs.webshop.catalogue import DEPARTMENTS
from envs.webshop.compact import shown

FLAWS = {
    "first hit": "opens the first result, whatever its title and price",
    "no compare": "buys what it opens, whatever its features and options",
    "ignores price": "takes no notice of the price limit",
    "forgets option": "chooses all options but the last",
    "no options": "chooses no option",
}
ENTRY = re.compile(r"(\d+) (\D+) price (\d+)(?: to (\d+))?(?: over)?(?= \d+ [a-z]|$)")
TITLE = re.compile(r"(\D+) price (\d+)(?: to (\d+))?(?: over)? (.*?) ?features (.*)")


@dataclass
class Goal:
    """What an instruction asks for."""

    kind: str
    attributes: list[str]
    options: dict[str, str]  # name -> value
    limit: float  # dollars; infinite where none is named

    def fits(self, price: str, highest: str | None) -> bool:
        """Of a price range, the higher end counts: the page doesn't say which price it will be."""
        return float(highest or price) <= self.limit


def read_goal(task: str) -> Goal:
    """A compact task of the generated catalogue, by the catalogue's word lists. Raises ValueError for another one."""
    wanted, _, limit = task.partition(" under ")
    for department in DEPARTMENTS.values():
        for kind in department.kinds:
            if f" {kind} " not in f" {wanted} ":
                continue
            names = wanted.split()
            options = {
                name: names[names.index(name) + 1]
                for name in department.options
                if name in names and names[names.index(name) + 1] in department.options[name]
            }
            attributes = [word for word in names if word in department.attributes]
            return Goal(kind, attributes, options, float(limit or "inf"))
    raise ValueError(f"no kind of product of the generated catalogue in {task!r}")


class Shopper:
    """Plays compact WebShop. `reset` with the task, then `act` with each observation."""

    def __init__(self, flaws: Collection[str] = ()):
        if unknown := set(flaws) - FLAWS.keys():
            raise ValueError(f"unknown flaws {', '.join(sorted(unknown))}; known: {', '.join(FLAWS)}")
        self.flaws = frozenset(flaws)

    def reset(self, task: str) -> None:
        self.goal = read_goal(task)
        self.goal_words = set(self.goal.attributes)
        self.rejected: set[str] = set()  # titles and prices that were opened in vain
        self.opened = ""  # the entry of the results page that is open
        self.left: list[str] = []  # options still to choose

    def act(self, observation: str) -> str:
        """The next compact command."""
        page = shown(observation)
        if page.startswith("results page"):
            return self._pick(page)
        if " features " in page:
            return self._judge(page)
        if page.startswith("chosen"):
            return self._choose()
        return self._query()

    def _query(self) -> str:
        return f"search {' '.join([*self.goal.attributes, self.goal.kind, *self.goal.options.values()])}"

    def _pick(self, page: str) -> str:
        """Open the likeliest product of this page: right kind and price, most of the wanted words in its title."""
        entries = ENTRY.findall(page)
        if "first hit" in self.flaws and entries:
            return "open 1"
        fitting = [
            (-sum(word in title.split() for word in self.goal.attributes), int(number), f"{title} {price}")
            for number, title, price, highest in entries
            if title.endswith(self.goal.kind)
            and not self.goal_words.isdisjoint(title.split())
            and f"{title} {price}" not in self.rejected
            and ("ignores price" in self.flaws or self.goal.fits(price, highest))
        ]
        if not fitting:
            return "next" if entries else "back"
        _, number, self.opened = min(fitting)
        return f"open {number}"

    def _judge(self, page: str) -> str:
        """Buy what has all that is asked for, else go back."""
        shown = TITLE.fullmatch(page)
        assert shown is not None  # a product was opened
        title, _, _, options, features = shown.groups()
        has = {*title.split(), *features.split()}
        good = has.issuperset(self.goal.attributes) and set(options.split()).issuperset(self.goal.options.values())
        if not good and "no compare" not in self.flaws:
            self.rejected.add(self.opened)
            return "back"
        values = list(self.goal.options.values())
        kept = [] if "no options" in self.flaws else values[:-1] if "forgets option" in self.flaws else values
        self.left = [value for value in kept if value in options.split()]
        return self._choose()

    def _choose(self) -> str:
        return f"choose {self.left.pop(0)}" if self.left else "buy"
