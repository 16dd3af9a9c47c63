"""The official reward: every branch by hand, and what holds for any purchase."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.webshop import reward
from envs.webshop import rewards as webshop_reward
from envs.webshop.rewards import alike, attribute_matches, nouns, option_matches, plain_color, type_score

PRODUCT = {
    "name": "acorn hiking jacket",
    "Title": "Acorn Hiking Jacket",
    "query": "jackets",
    "product_category": "clothing › men › jackets",
    "Attributes": ["water proof"],
    "BulletPoints": ["Has deep pockets", "Machine washable"],
    "Description": "Made for LONG walks",
}
GOAL = {
    "name": "bluff hiking jacket",
    "query": "jackets",
    "product_category": "clothing › men › jackets",
    "attributes": ["water proof", "machine washable"],
    "goal_options": ["red", "large"],
    "price_upper": 40.0,
}


def words(text):
    return text.split()


def kind(title, wanted, **changes):
    return type_score(PRODUCT | {"name": title} | changes, GOAL | {"name": wanted}, words)


def test_full_score_and_each_missing_part():
    chosen = {"color": "red", "size": "large"}
    assert reward(PRODUCT, GOAL, 40.0, chosen, words) == 1.0  # at the limit is within it
    assert reward(PRODUCT, GOAL, 40.01, chosen, words) == 4 / 5
    assert reward(PRODUCT, GOAL, 40.0, {"size": "large"}, words) == 4 / 5
    assert reward(PRODUCT, GOAL, 99.0, {}, words) == 2 / 5
    assert reward(PRODUCT | {"Attributes": []}, GOAL, 1.0, chosen, words) == 4 / 5
    assert reward(PRODUCT, GOAL | {"goal_options": []}, 1.0, {}, words) == 1.0


@pytest.mark.parametrize(
    ("title", "wanted", "changes", "score"),
    [
        ("a b", "a b", {"query": "hats", "product_category": "x"}, 1.0),  # all of the title's nouns
        ("a", "a b c d e", {"query": "hats", "product_category": "x"}, 0.5),  # 0.2 is not above 0.2
        ("a", "a b c d", {"query": "hats", "product_category": "x"}, 1.0),
        ("a", "a b c d e", {"query": "hats", "product_category": "jackets › men"}, 1.0),  # two categories, any order
        ("a", "a b c d e", {"query": "hats", "product_category": "men › men"}, 0.5),  # one, named twice
        ("a", "a b c d e", {}, 1.0),  # the same query
        ("a", "a b c d e f g h i j", {}, 1.0),  # 0.1 is not below 0.1
        ("a", "a b c d e f g h i j k", {}, 0.1),  # even though the query is the same
        ("a", "b", {}, 0.0),
        ("a", "", {}, 1.0),  # no noun wanted: 0.2
        ("a", "", {"query": "hats", "product_category": "x"}, 0.5),
    ],
)
def test_type_score(title, wanted, changes, score):
    assert kind(title, wanted, **changes) == score


def test_attributes_match_by_likeness_or_word_for_word_in_the_texts():
    assert attribute_matches(PRODUCT, ["water proofs"]) == 1  # 2 * 11 / 23 = 95.7%
    assert attribute_matches(PRODUCT, ["proof of water"]) == 1  # a superset of its words
    assert attribute_matches(PRODUCT, ["hiking jack"]) == 1  # in the title
    assert attribute_matches(PRODUCT, ["pockets machine"]) == 1  # features are joined by spaces
    assert attribute_matches(PRODUCT, ["long walk"]) == 1  # in the description, whose case does not count
    assert attribute_matches(PRODUCT, ["Long walk"]) == 0  # but the goal's does
    assert attribute_matches(PRODUCT, ["wool", "cotton"]) == 0


def test_options_match_by_plain_color():
    assert plain_color("light blue") == "blue"  # the list is in alphabetical order
    assert plain_color("a1-army") == "a1-army"
    assert option_matches(["dark navy blue", "large"], ["blue", "x-large"]) == 2  # a subset of the words is enough
    assert option_matches(["red"], ["green"]) == 0
    assert option_matches([], ["green"]) == 0
    assert option_matches(["red"], []) == 0


def test_options_as_a_mapping_are_compared_as_pairs():
    # ("size", "xl") counts as the words "size xl", of which "xl" is a subset; "grey" is itself in ("color", "grey").
    assert option_matches(["grey", "xl"], {"color": "grey", "size": "xl"}) == 2
    assert option_matches(["light grey"], {"color": "light grey"}) == 1  # "light grey" in "('color', 'light grey')"
    assert option_matches(["red"], {"color": "grey"}) == 0


def test_likeness_is_rounded_to_whole_percents():
    # 18 characters of 21 each are shared: 2 * 18 / 42 = 85.7%, 86 rounded. 17 of 20: 85.0%, not above 85.
    assert alike("a" * 18 + "bbb", "a" * 18 + "ccc")
    assert not alike("a" * 17 + "bbb", "a" * 17 + "ccc")
    # 2 * 115 / 271 = 84.9%; 2 * 79 / 185 = 85.4%, above 85 but 85 rounded.
    assert not alike("a" * 79 + "b" * 13, "a" * 79 + "c" * 14)
    assert alike("café", "caf")  # characters of Latin-1 are dropped
    assert not alike("", "")


def test_what_the_official_engine_cannot_score_raises():
    with pytest.raises(TypeError, match="price"):
        reward(PRODUCT, GOAL, None, {}, words)
    with pytest.raises(TypeError, match="price_upper"):
        reward(PRODUCT, GOAL | {"price_upper": 0}, 1.0, {}, words)
    with pytest.raises(ZeroDivisionError, match="attributes"):
        reward(PRODUCT, GOAL | {"attributes": []}, 1.0, {}, words)


def test_nouns_without_spacy(monkeypatch):
    monkeypatch.setattr(webshop_reward, "tagger", lambda: None)
    assert nouns.__wrapped__("Acorn Waterproof Hiking Jacket for Men, 2 Pack (XL)") == [
        *("acorn", "hiking", "jacket", "men", "pack", "xl")
    ]
    assert nouns.__wrapped__("") == []


def test_nouns_with_spacy(monkeypatch):
    tags = {"Acorn": "PROPN", "Hiking": "VERB", "Jackets": "NOUN", "for": "ADP", "men": "NOUN"}
    parse = lambda text: [SimpleNamespace(text=word, pos_=tags[word]) for word in text.split()]
    monkeypatch.setattr(webshop_reward, "tagger", lambda: parse)
    assert nouns.__wrapped__("Acorn Hiking Jackets for men") == ["acorn", "jackets", "men"]


TEXT = st.text("ab redlightblue", max_size=12)


@settings(max_examples=200)
@given(
    own=st.lists(TEXT, max_size=3),
    attributes=st.lists(TEXT, min_size=1, max_size=3),
    wanted=st.one_of(st.lists(TEXT, max_size=3), st.dictionaries(TEXT, TEXT, max_size=3)),
    chosen=st.dictionaries(TEXT, TEXT, max_size=3),
    price=st.floats(0, 200),
    title=TEXT,
)
def test_bounds_and_monotony(own, attributes, wanted, chosen, price, title):
    product = PRODUCT | {"Attributes": own, "name": title}
    goal = GOAL | {"attributes": attributes, "goal_options": wanted}
    score = reward(product, goal, price, chosen, words)
    assert 0 <= score <= 1
    assert reward(product, goal, 0.0, chosen, words) >= score  # cheaper is never worse
    assert reward(product | {"Attributes": own + attributes}, goal, price, chosen, words) >= score
    assert reward(product, goal, price, {}, words) <= score  # more options never hurt
    if isinstance(wanted, list) and all(map(str.strip, wanted)) and all(map(str.strip, attributes)):
        chosen_all = {str(i): value for i, value in enumerate(wanted)}
        bought = PRODUCT | {"Attributes": attributes, "name": GOAL["name"]}
        assert reward(bought, goal, 40.0, chosen_all, words) == 1.0
