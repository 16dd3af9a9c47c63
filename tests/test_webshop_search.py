"""BM25 by hand, Lucene's words, and an index that is built once."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.webshop import search as webshop_search
from envs.webshop.search import Index, build, cached_index, document, tokens

PRODUCT = {"asin": "B1", "Title": "Red Hat", "Description": "Warm.", "BulletPoints": ["soft", "hidden"]}
PRODUCTS = [
    PRODUCT | {"options": {"color": ["red", "blue"], "size": ["small"]}},
    PRODUCT | {"Title": "Green Scarf", "options": {}},
]


def test_document_is_title_description_first_feature_and_options():
    assert document(PRODUCTS[0]) == "red hat warm. soft color: red, blue, and size: small"
    assert document(PRODUCTS[1]) == "green scarf warm. soft "
    assert document(PRODUCTS[1] | {"BulletPoints": []}) == "green scarf warm.  "


def test_words_are_stemmed_and_stop_words_dropped():
    assert tokens("The Men's running shoes, size 3.5 for women") == ["men", "run", "shoe", "size", "3.5", "women"]
    assert tokens("of the") == tokens("!") == []


def test_scores_by_hand():
    engine = build(["red hat", "red red scarf scarf", "green hat hat hat"])

    # Lucene: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), tf / (tf + k1 (1 - b + b length / mean)); the mean is 10 / 3
    def score(found_in, tf, length):
        idf = math.log(1 + (3 - found_in + 0.5) / (found_in + 0.5))
        return idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * length / (10 / 3)))

    expected = [score(2, 1, 2), score(2, 2, 4), 0.0]
    assert engine.get_scores(["red"]).tolist() == pytest.approx(expected, rel=1e-5)
    assert Index(engine).search("red") == [1, 0]
    assert Index(engine).search("red hats") == [0, 2, 1]  # 0.268 + 0.268, 0.355, 0.316
    assert engine.get_scores(["hat"]).tolist() == pytest.approx([score(2, 1, 2), 0.0, score(2, 3, 4)], rel=1e-5)


def test_only_documents_with_a_word_in_common_are_found_equals_in_order():
    index = Index(build(["red hat", "blue hat", "red hat", "scarf"]))
    assert index.search("red") == [0, 2]
    assert index.search("red", most=1) == [0]
    assert index.search("nothing known") == index.search("") == index.search("the of") == []


@settings(max_examples=60)
@given(
    texts=st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=12).filter(
        lambda texts: any(map(tokens, texts))
    ),
    query=st.text("abc ", max_size=8),
    most=st.integers(1, 5),
)
def test_the_best_are_the_start_of_all(texts, query, most):
    index = Index(build(texts))
    found = index.search(query, most=len(texts))
    assert index.search(query, most=most) == found[:most]
    assert set(found) == {i for i, text in enumerate(texts) if set(tokens(query)) & set(tokens(text))}


def test_an_index_is_built_once(tmp_path, monkeypatch):
    assert cached_index(PRODUCTS, tmp_path).search("scarf") == [1]
    (folder,) = tmp_path.iterdir()  # nothing unfinished is left beside it
    monkeypatch.setattr(webshop_search, "build", lambda documents: pytest.fail("built again"))
    assert cached_index(PRODUCTS, tmp_path).search("blue hat") == [0]
    monkeypatch.undo()
    assert cached_index(PRODUCTS[::-1], tmp_path).search("scarf") == [0]
    assert len(list(tmp_path.iterdir())) == 2
    assert folder.is_dir()
