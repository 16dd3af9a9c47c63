"""Scripted WebShop episodes for the warm start (the Script of tiny/plays.py): who opens the first result and buys it
whatever is missing, or forgets an option, and who would not. Skills name the kind of product that is asked for, no
product, no feature and no value.
"""

from __future__ import annotations

import random

from data import Skills
from envs.webshop import VOCABULARY, WebshopEnv, compact
from envs.webshop.catalogue import DEPARTMENTS
from envs.webshop.compact import SEARCH, shown
from envs.webshop.expert import ENTRY, TITLE, Shopper, read_goal
from tiny.plays import Play, advised_steps, watch

LAYERS = 2
GAMES, PLAYS = 1400, 3
FRESH = 0
FLAWS = {"first hit": 0.45, "forgets option": 0.4}
ALONE_TURNS = 12
MAX_STEPS = 15
HINTED = 0.25
JUDGED, JUDGED_FIRST = 5, 1000
SKILL_WORDS = """
for first then never before search all words open title with fitting price check every feature back one is missing
choose and buy it next now done option
"""


class Adviser(Shopper):
    """A Shopper that copes with commands that it would not have given (plays.Adviser): it goes by the open page."""

    def reset(self, task: str) -> None:
        super().reset(task)
        self.page = self.command = ""
        self.searched = ""  # the last search
        self.entries: dict[int, str] = {}  # the results page: place -> title and price, as `rejected` remembers them
        self.good = False  # whether the product that is open has all that is asked for
        self.there: list[str] = []  # wanted options that it has
        self.advice = ""

    def advise(self, observation: str) -> str:
        if observation != "nothing happens":
            self.page = shown(observation)
            if self.command.startswith("search "):
                self.searched = self.command
        self.advice = self._advice()
        return self.advice

    def _advice(self) -> str:
        if self.page.startswith("results page"):
            self.entries = {int(i): f"{title} {price}" for i, title, price, _ in ENTRY.findall(self.page)}
            turned = self._pick(self.page)
            lost = turned in ("next", "back") and self.searched != self._query()
            return self._query() if lost else turned
        if self._on_product() and not self.page.startswith("chosen"):
            self._look()
        if self._on_product():
            return self._next_choice() if self.good else "back"
        return self._query()

    def _look(self) -> None:
        """Compare the product that is open with what is asked for."""
        title, price, highest, options, features = TITLE.fullmatch(self.page).groups()
        verb, _, place = self.command.partition(" ")
        if verb == "open":
            self.opened = self.entries.get(int(place), "")
        self.there = [value for value in self.goal.options.values() if value in options.split()]
        has = {*title.split(), *features.split()}
        self.good = (
            title.endswith(self.goal.kind)
            and has.issuperset(self.goal.attributes)
            and len(self.there) == len(self.goal.options)
            and self.goal.fits(price, highest)
        )
        if not self.good:
            self.rejected.add(self.opened)

    def _on_product(self) -> bool:
        return self.page.startswith("chosen") or " features " in self.page

    def _next_choice(self) -> str:
        chosen = self.page.split() if self.page.startswith("chosen") else []
        return next((f"choose {value}" for value in self.there if value not in chosen), "buy")

    def hint(self) -> str:
        """The advice in general words: no product, no value, no place on the page."""
        verb, _, value = self.advice.partition(" ")
        phrases = {
            "search": "search all words",
            "open": "open fitting title with fitting price",
            "back": "back one is missing",
        }
        if verb == "choose":
            phrases["choose"] = f"choose {next(name for name, wanted in self.goal.options.items() if wanted == value)}"
        return f"for {self.goal.kind} {phrases.get(verb, verb)}"

    def critical(self) -> bool:
        return not self.advice.startswith("search ")

    def careless(self, flaws: set[str]) -> str:
        """What somebody with `flaws` does instead of what is advised."""
        command = self.advice
        if "first hit" in flaws and self.page.startswith("results page") and self.entries:
            return next((f"open {i}" for i, entry in self.entries.items() if entry not in self.rejected), command)
        if "first hit" in flaws and command == "back" and self._on_product():
            command = self._next_choice()
        if "forgets option" in flaws and command == f"choose {[*self.goal.options.values()][-1]}":
            return "buy"
        return command

    def slip(self, admissible: list[str], rng: random.Random) -> str:
        """What a clumsy player does: anything possible but to buy, or a search for half of what is asked for."""
        possible = [command for command in admissible if command not in ("buy", SEARCH)]
        return rng.choice([*possible, f"search {self.goal.kind}"])


def vocabulary() -> set[str]:
    return {*VOCABULARY, *SKILL_WORDS.split()}


def games(count: int) -> list[str]:
    return WebshopEnv().tasks("train")[:count]


def play(game: str, rng: random.Random, flaws: set[str], *, skill: str = "", **chances: float) -> Play:
    return played(game, rng, flaws, skill=skill, **chances)


def played(
    game: str, rng: random.Random, flaws: set[str], *, prompt: str = "compact", skill: str = "", **chances: float
) -> Play:
    """An episode in compact words, with as many products a page as `prompt` shows."""
    page_size = WebshopEnv(prompt=prompt).page_size
    env = WebshopEnv(prompt="compact", max_steps=MAX_STEPS, page_size=page_size)
    return watch(env, game, Adviser(), rng, flaws, every=FLAWS, skill=skill, **chances)


REASONS = {
    "search": "I search for what the instruction asks for.",
    "open": "This one fits best so far, so I open it.",
    "next": "None of these fits, so I turn the page.",
    "previous": "I look at the page before.",
    "back": "This does not lead on, so I go back.",
    "choose": "The instruction asks for {0}, so I choose it.",
    "buy": "I have what I need, so I buy it.",
}


def official(play: Play, t: int, env) -> str:
    command = play.turns[t][1]
    verb, _, value = command.partition(" ")
    return f"<think>{REASONS[verb].format(value)}</think><action>{compact.official(command, env.session)}</action>"


# ---- skills, as a script would write them ---------------------------------------------------------------------------


def option_names(play: Play) -> str:
    """The names of the options that the task asks for: "color and size"."""
    return " and ".join(read_goal(play.task).options)


def topic(play: Play) -> str:
    """What a skill has to speak of, to be of use."""
    return read_goal(play.task).kind


def workflow(play: Play) -> str:
    """The order of work for this kind of task."""
    return (
        f"for {topic(play)} first search all words then open fitting title with fitting price then check every feature "
        f"back one is missing then choose {option_names(play)} then buy"
    )


def names() -> dict[str, set[str]]:
    kinds = {word for department in DEPARTMENTS.values() for kind in department.kinds for word in kind.split()}
    return {"object": kinds | {name for department in DEPARTMENTS.values() for name in department.options}}


def flaw_of(play: Play) -> str:
    """What went wrong, read off the end: what was bought though something else was called for."""
    _, last, advice = play.turns[-1]
    if last == "buy" and advice.startswith("choose "):
        return "forgets option"
    return "first hit"


def avoidance(play: Play, flaw: str) -> str:
    """What to avoid, and so what to do instead, for one flaw."""
    what = {
        "forgets option": f"never buy before choose {option_names(play)}",
        "first hit": "never buy first one before check every feature and price",
    }
    return f"for {topic(play)} {what[flaw]}"


SUMMARIES = {"forgets option": "option", "first hit": "feature"}


def hindsight(play: Play) -> Skills:
    if play.success:
        return Skills("done", workflow(play), advised_steps(play))
    flaw = flaw_of(play)
    return Skills(SUMMARIES[flaw], avoidance(play, flaw), advised_steps(play))
