"""Whatever comes in from outside (game files, catalogues, answers of a server, responses) is read or refused by name.

100 inputs a test; by `python -m pytest -n 2 tests/test_fuzz_environments.py --hypothesis-profile=fuzz` 100,000 in all.
"""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs import ENVIRONMENTS, make_env
from envs.alfworld import files
from envs.alfworld.engine import FastEngine, GameFileError, load_game
from envs.alfworld.env import list_games
from envs.alfworld.pddl import SIGNATURES
from envs.search.env import read_action
from envs.search.questions import Question, _question
from envs.search.retrievers import CorpusError, HttpRetriever, Passage, RetrieverError, read_corpus
from envs.search.server import read_request
from envs.search.text import compact_results, official_results, shown_passages
from envs.webshop import WebshopEnv, load_shop
from envs.webshop.data import FILES
from envs.webshop.search import Index, build, document
from lm.encoder import Encoder
from tests.test_webshop_data import record, wish

# Fifteen tests search here: each does a third of the profile's examples, where these are many.
many = settings(
    max_examples=max(100, settings.default.max_examples // 3),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Any text at all, as JSON can hold it: lone halves of surrogate pairs included.
halves = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2)
letters = st.text(max_size=12) | st.text(st.characters(), max_size=4) | halves
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=6,
)
deep = st.sampled_from(["[" * 100_000, '{"a":' * 100_000])


def changed(original: dict, keys=None):
    """`original` with some of its values replaced by any others, or gone."""
    keys = st.sampled_from(sorted(keys or original))
    replaced = st.dictionaries(keys, values, max_size=2)
    return st.builds(
        lambda new, gone: {key: value for key, value in {**original, **new}.items() if key not in gone},
        replaced,
        st.sets(keys, max_size=1),
    )


# ---- responses ----

TAGS = ["think", "action", "search", "answer"]
pieces = st.sampled_from(
    [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    + ["<ACTION>", "search ", "answer ", " ", "\n", "look", "看", "[", "]", "İ", "click[", "buy", "doc 1"]
)
responses = st.lists(pieces | letters, max_size=12).map("".join)
plain = letters.filter(lambda text: not re.search(r"[<>\u4e00-\u9fff]", text))


@pytest.mark.parametrize("prompt", ["official", "compact"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_any_response_is_parsed(name, prompt):
    env = make_env(name, prompt=prompt)

    @many
    @given(responses, st.lists(plain, max_size=3))
    def check(response, admissible):
        action, valid = env.parse_action(response, admissible)
        assert isinstance(action, str) and isinstance(valid, bool)
        if prompt == "official" and valid:
            tags = ("<search>", "<answer>") if name == "search" else ("<action>", "<think>")
            assert any(tag in response.lower() for tag in tags)
        if name == "search":
            assert not valid or read_action(action) is not None
            read_action(response)

    check()


@many
@given(plain, plain)
def test_a_well_formed_response_is_read_as_it_is_meant(thought, text):
    response = f"<think>{thought}</think><action>{text}</action>"
    for name in ("alfworld", "webshop"):
        assert make_env(name).parse_action(response, []) == (text.lower().strip(), True)
    for tag in ("search", "answer"):
        action, valid = make_env("search").parse_action(f"<think>{thought}</think><{tag}>{text}</{tag}>", [])
        assert valid and read_action(action) == (tag, text.strip())


def test_any_observation_is_encoded(tokenizer):
    """Texts from JSON may hold half a surrogate pair, which tokenizers refuse."""
    encoder = Encoder(tokenizer, "chat")

    @many
    @given(letters)
    def check(text):
        assert encoder.context([f"room {text}"], []) and encoder.context(["room", f"{text} bed"], [[5, 4]])

    check()


# ---- game files ----

THINGS = ["?a", "?b", "agent1", "appletype", "fridgetype", "nowhere", "loc_bar_0"]
atoms = st.tuples(st.sampled_from([*SIGNATURES, "=", "knows"]), st.lists(st.sampled_from(THINGS), max_size=3)).map(
    lambda atom: f"({atom[0]} {' '.join(atom[1])})"
)
variables = st.sampled_from(["?a - object", "?a - receptacle", "?b - agent", "?a", "", "- ?a"])
goals = st.recursive(
    atoms | st.sampled_from(["", "()", "and", "(and)", "(not)", "(exists (?a - object))"]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or", "not", "imply"]), st.lists(inner, max_size=3)).map(
            lambda parts: f"({parts[0]} {' '.join(parts[1])})"
        ),
        st.tuples(st.sampled_from(["exists", "forall"]), variables, inner).map("({0[0]} ({0[1]}) {0[2]})".format),
    ),
    max_leaves=5,
)


def mutated(draw, text: str) -> str:
    """A few tokens of a text gone, twice, changed places or replaced."""
    tokens = re.findall(r"\s+|\w+|[^\w\s]", text)
    for _ in range(draw(st.integers(1, 3))):
        i, j = (draw(st.integers(0, len(tokens) - 1)) for _ in range(2))
        change = draw(st.sampled_from(["drop", "double", "swap", "copy", "new"]))
        if change == "swap":
            tokens[i], tokens[j] = tokens[j], tokens[i]
        else:
            tokens[i] = {"drop": "", "double": tokens[i] * 2, "copy": tokens[j]}.get(change) or draw(pieces | letters)
    return "".join(tokens)


@st.composite
def game_files(draw, original: dict) -> bytes:
    kind = draw(st.sampled_from(["keys", "bytes", "cut", "problem", "goal", "grammar", "wording", "deep"]))
    game = dict(original)
    if kind == "bytes":
        return draw(st.binary(max_size=30) | values.map(lambda value: json.dumps(value).encode()))
    if kind == "deep":
        return draw(deep).encode()
    if kind == "keys":
        game = draw(changed(game))
    if kind == "goal":
        problem = game["pddl_problem"]
        game["pddl_problem"] = problem[: problem.rindex("(:goal")] + f"(:goal {draw(goals)}))"
    if kind in ("problem", "grammar"):
        key = {"problem": "pddl_problem", "grammar": "grammar"}[kind]
        start = draw(st.integers(0, len(game[key]) - 1))
        game[key] = game[key][:start] + mutated(draw, game[key][start : start + 300] or " ") + game[key][start + 300 :]
    if kind == "wording":  # the few texts that are read from the file
        old = draw(
            st.sampled_from(["move {o} to {r}", "You move the {o.name} to the {r.name}.", "You arrive at {r.name}"])
        )
        assert old in game["grammar"]
        game["grammar"] = game["grammar"].replace(old, old + draw(st.sampled_from(list("{}[]|;")) | letters))
    text = json.dumps(game).encode()
    return text[: draw(st.integers(0, len(text)))] if kind == "cut" else text


def test_any_game_file_is_played_or_refused(games, tmp_path):
    path = tmp_path / "valid_seen" / "game.tw-pddl"
    path.parent.mkdir()

    @many
    @given(st.data(), st.sampled_from(range(len(games))))
    def check(data, number):
        path.write_bytes(data.draw(game_files(json.loads(Path(games[number]).read_text()))))
        files._load_game.cache_clear()  # within one tick of the clock the file seems the same
        try:
            engine = FastEngine(load_game(path))
        except GameFileError as error:
            assert str(path) in str(error)
            return
        assert engine.reset()
        for _ in range(6):
            commands = engine.admissible_commands()
            assert engine.won in (True, False)
            assert engine.step(data.draw(st.sampled_from(commands) | letters))

    check()


def test_any_game_file_is_listed_or_left_out(games, tmp_path):
    path = tmp_path / "valid_seen" / "task" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    original = json.loads(Path(games[0]).read_text())

    @many
    @given(game_files(original))
    def check(content):
        path.write_bytes(content)
        try:
            official = json.loads(content)
            kept = isinstance(official, dict) and bool(official.get("solvable"))
        except (ValueError, RecursionError):
            kept = False
        try:
            assert list_games(tmp_path, "valid_seen") == [str(path)]
        except FileNotFoundError as error:
            assert not kept and "left out 1" in str(error)
        else:
            assert kept

    check()


# ---- WebShop ----

NAMES = [
    "B1",
    "b1",
    "B2",
    "",
    "nan",
    "Features",
    "Buy Now",
    "Next >",
    "< Prev",
    "Back to Sea",
    "a]b",
    "search",
    "İ",
    "B\n3",
]
optional = {"Size": [{"value": "small"}, {"value": "Buy Now"}, {"value": ""}], "İ": [{"value": "< prev"}], "": None}
products = st.lists(
    st.builds(
        lambda product, asin: product | {"asin": asin},
        changed(record(customization_options=optional)) | st.just(record()) | st.just(record(name="of", query="")),
        st.sampled_from(NAMES) | values,
    )
    | values,
    max_size=4,
)
wishes = st.lists(changed(wish()) | st.just(wish()) | values, max_size=2) | values
instructions = st.dictionaries(st.sampled_from(NAMES), st.just([wish()]) | wishes, max_size=4) | values
synthetic = {"attributes": ["warm"], "instruction": "a jacket", "instruction_attributes": ["warm"]}
attributes = (
    st.dictionaries(st.sampled_from(NAMES), st.just(synthetic) | changed(synthetic) | values, max_size=4) | values
)


@many
@given(products, attributes, instructions, st.sampled_from(["human", "synthetic"]), st.data())
def test_any_catalogue_is_a_shop_or_refused(tmp_path, products, attributes, instructions, goals, data):
    for kind, content in (("products", products), ("attributes", attributes), ("instructions", instructions)):
        (tmp_path / FILES[kind][0]).write_text(json.dumps(content))
    try:
        shop = load_shop(tmp_path, goals)
    except ValueError as error:
        assert str(tmp_path) in str(error)
        return
    index = Index(build(map(document, shop.products.values())))
    with mock.patch("envs.webshop.env.open_shop", lambda *_: (shop, index, list(shop.products))):
        for prompt in ("official", "compact"):
            go_shopping(WebshopEnv(prompt=prompt, page_size=2), data)


def go_shopping(env: WebshopEnv, data) -> None:
    """A walk over the pages, which stays possible, and ends with a score from 0 to 1."""
    tasks = [task for split in ("valid_unseen", "valid_seen") for task in env.tasks(split)]
    if not tasks:
        return
    observation, info = env.reset(options={"game": data.draw(st.sampled_from(tasks))})
    for _ in range(12):
        env.build_prompt(
            "window", info.get("task", "task"), [(observation, "x")], observation, info["admissible_actions"]
        )
        searches = st.sampled_from(["search[jacket]", "search[<r>]", "search jacket", "search of"])
        action = data.draw(st.sampled_from(info["admissible_actions"]) | searches | responses)
        observation, reward, terminated, _, info = env.step(action)
        session = env.session
        assert isinstance(observation, str)
        assert session.number >= 1
        assert session.page in ("search", "results") or session.asin in env.shop.products
        assert terminated or set(session.options) <= (set(session.product["options"]) if session.asin else set())
        if terminated:
            assert 0 <= info["score"] <= 1 and reward == float(info["score"] == 1)
            return


def test_a_catalogue_nested_too_deep_is_refused(tmp_path):
    for kind in FILES:
        (tmp_path / FILES[kind][0]).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        load_shop(tmp_path)


# ---- search ----

item = changed({"document": {"contents": "c"}, "score": 1.5}) | changed({"document": {"text": "c"}}) | values
answers = st.one_of(
    st.lists(st.lists(item, max_size=4) | values, max_size=3).map(lambda rows: {"result": rows}),
    st.lists(st.just([{"document": {"contents": "c"}}] * 4), min_size=2, max_size=2).map(lambda rows: {"result": rows}),
    values.map(lambda value: {"result": value}),
    values,
)
bodies = answers.map(lambda answer: json.dumps(answer).encode()) | st.binary(max_size=20) | deep.map(str.encode)


@many
@given(bodies)
def test_any_answer_of_a_server_is_passages_or_an_error(body):
    retriever = HttpRetriever("http://localhost:1")
    with mock.patch.object(retriever, "_post", lambda _: body):
        try:
            found = retriever.search(["q", "r"], 3)
        except RetrieverError as error:
            assert "http://localhost:1" in str(error)
            return
    assert len(found) == 2 and all(len(passages) <= 3 for passages in found)
    for passages in found:
        assert all(isinstance(p, Passage) and isinstance(p.contents, str) for p in passages)
        contents = [p.contents for p in passages]
        assert isinstance(compact_results(contents), str)
        shown_passages(official_results(contents))


@many
@given(
    st.binary(max_size=30)
    | deep.map(str.encode)
    | changed({"queries": ["q"], "topk": 3}).map(json.dumps).map(str.encode)
)
def test_any_request_is_read_or_refused(body):
    try:
        queries, k, _ = read_request(body)
    except ValueError:
        return
    assert all(isinstance(query, str) for query in queries) and k >= 1


@many
@given(
    st.lists(
        st.binary(max_size=20) | changed({"contents": "c"}).map(json.dumps).map(str.encode) | deep.map(str.encode),
        max_size=3,
    )
)
def test_any_corpus_is_read_or_refused(tmp_path, lines):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        assert all(isinstance(contents, str) for _, contents in read_corpus(path))
    except CorpusError as error:
        assert f"{path}, line " in str(error)


@many
@given(changed({"question": "q", "golden_answers": ["a"], "data_source": "nq", "reward_model": {"ground_truth": {}}}))
def test_any_row_is_a_question_or_refused(row):
    try:
        question = _question(row, "row 7", "mine")
    except ValueError as error:
        assert "row 7" in str(error)
        return
    assert isinstance(question, Question) and question.golden_answers and isinstance(question.source, str)
