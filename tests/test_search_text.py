"""Normalisation and exact match by hand and by property; passages in both styles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.search import exact_match
from envs.search.text import compact_results, normalize, official_results, passage_words, shown_passages, words


@pytest.mark.parametrize(
    ("prediction", "golden", "same"),
    [
        ("The Beatles!", ["Beatles"], True),
        ("  new   york ", ["Paris", "New York"], True),
        ("U.S.", ["us"], True),  # punctuation goes, it does not part words
        ("Guinea-Bissau", ["Guinea Bissau"], False),
        ("an apple a day", ["apple day"], True),
        ("theatre", ["atre"], False),  # an article is a word, not the beginning of one
        ("Paris, France", ["Paris"], False),
        ("Paris", "Paris", True),  # one string is one answer, not five letters
        ("P", "Paris", False),
        ("42", [42], True),
        ("", ["the"], False),  # SQuAD's script leaves nothing of either, so that saying nothing would win
        ("the  the", ["The The"], True),
        ("the", ["The The"], False),
        ("!!!", ["!!!"], True),
        ("", ["!!!"], False),
        ("", [""], False),
        ("anything", [], False),
        ("Lima", np.array(["Cusco", "Lima"]), True),
        ("Lima", np.array(["Cusco"], dtype=object), False),
        ("Lima", np.array("lima"), True),
    ],
)
def test_exact_match_by_hand(prediction, golden, same):
    assert exact_match(prediction, golden) is same


TEXT = st.text(max_size=40)
WORD = st.text(alphabet="bcdefgh0123456789", min_size=1, max_size=6)


@given(TEXT, st.lists(TEXT, max_size=4))
def test_a_golden_answer_matches_and_normalising_twice_changes_nothing(text, others):
    assert exact_match(text, [*others, text]) is bool(text.split())
    assert normalize(normalize(text)) == normalize(text)


@given(st.lists(WORD, min_size=1, max_size=5), st.sampled_from(["the ", "A ", "an "]), st.sampled_from(".,!?\"'"))
def test_case_articles_punctuation_and_spaces_do_not_matter(parts, article, mark):
    written = article + f"  {mark}".join(parts).upper() + mark
    assert exact_match(written, [" ".join(parts)])
    assert not exact_match(f"{written} x", [" ".join(parts)])


def test_compact_words():
    assert words("What is the capital of Côte d'Ivoire?") == "what is capital of côte d ivoire"
    assert passage_words('"Paris"\nParis is a city.') == "paris is city"
    assert passage_words('"Paris"\nThe city of Paris.') == "paris city of paris"
    assert passage_words("no title here") == "no title here"
    assert passage_words('"Par"\nParis.') == "par paris"  # the title's words, not its letters


def test_results_are_shown_as_the_authors_show_them():
    passages = ['"Lima"\nA city. ', '"Peru"\nA "country".']
    assert official_results(passages) == (
        '<information>{"result": "Doc 1: \\"Lima\\"\\nA city.\\nDoc 2: \\"Peru\\"\\nA \\"country\\".\\n"}</information>'
    )
    assert official_results([]) == '<information>{"result": "No search results found."}</information>'
    assert compact_results(passages) == "doc 1 lima city doc 2 peru country"
    assert compact_results([]) == "no results"


@given(st.lists(st.lists(WORD, min_size=1, max_size=4), max_size=4))
def test_what_was_shown_can_be_read_back(texts):
    passages = [f'"{text[0]}"\n{" ".join(text)}' for text in texts]
    read = [words(" ".join(text)) for text in texts]
    assert shown_passages(official_results(passages)) == read
    assert shown_passages(compact_results(passages)) == read
