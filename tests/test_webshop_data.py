"""Official files as they are: fields, skips, price limits, splits, errors."""

import json
from random import Random

import pytest

from envs.webshop.data import NO_LIMIT, SPLITS, draw_limit, load_shop, process, read_options, read_pricing, split


def record(asin="B1", **changes):
    return {
        "asin": asin,
        "name": "Acorn Jacket",
        "category": "fashion",
        "query": " Men Jackets ",
        "product_category": "Clothing › Men › Jackets",
        "pricing": "$10.99",
        "small_description": ["warm", "light"],
        "full_description": "A jacket.",
        "customization_options": {
            "Color": [{"value": " Red/Blue ", "image": "x.jpg"}, {"value": "GREEN"}],
            "Size": None,
        },
        "images": ["x.jpg"],
    } | changes


def wish(**changes):
    return {"instruction": "a jacket.", "instruction_attributes": ["warm"], "instruction_options": ["red"]} | changes


@pytest.fixture
def write(tmp_path):
    def write(products, attributes=None, wishes=None):
        names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
        for name, content in zip(names, (products, attributes or {}, wishes or {"B1": [wish()]})):
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return write


def test_a_record_becomes_what_the_official_engine_makes_of_it():
    product = process(record(), {"attributes": ["warm"], "instruction": None})
    assert product["Title"] == product["name"] == "Acorn Jacket"
    assert product["query"] == "men jackets"
    assert product["options"] == {"color": ["red | blue", "green"]}
    assert (product["pricing"], product["Price"], product["Attributes"]) == ([10.99], "$10.99", ["warm"])
    assert product["BulletPoints"] == ["warm", "light"]
    assert process(record(small_description="warm"), None)["BulletPoints"] == ["warm"]
    assert process(record(), None)["Attributes"] == process(record(), {})["Attributes"] == ["DUMMY_ATTR"]


@pytest.mark.parametrize(
    ("pricing", "read"),
    [
        ("$10.99", ([10.99], "$10.99")),
        ("$10.99$24.99", ([10.99, 24.99], "$10.99 to $24.99")),
        ("$1,024.50 - $2,000.00$3", ([1024.5, 2000.0], "$1024.5 to $2000.0")),
        ("", ([100.0], "$100.0")),
        (None, ([100.0], "$100.0")),
    ],
)
def test_pricing(pricing, read):
    assert read_pricing(pricing) == read


def test_options_may_be_missing():
    assert read_options("") == read_options(None) == read_options({"size": None}) == {}


def test_unusable_records_are_left_out_and_counted(write):
    products = [
        record("B1"),
        record("B1", name="again"),
        record("nan"),
        record("B0123456789"),
        record("B2", full_description=None),
        record("B3", pricing="free"),
        record("B4", customization_options={"color": [{"image": "x"}]}),
        record("B5", small_description=[None]),
        "not a record",
        {k: v for k, v in record("B6").items() if k != "query"},
    ]
    wishes = {"B1": [wish(), wish(instruction_attributes=[]), wish(instruction_options=7), "?"], "gone": [wish()]}
    shop = load_shop(write(products, wishes=wishes))
    assert list(shop.products) == ["B1"]
    assert shop.products["B1"]["Title"] == "Acorn Jacket"
    assert shop.skipped == {
        "repeated asin": 1,
        "bad asin": 2,
        "malformed product": 6,
        "instruction without attributes": 1,
        "malformed instruction": 2,
    }
    assert sum(map(len, shop.goals.values())) == 1


def test_a_goal(write):
    wishes = {"B1": [wish(instruction_options={"color": "red"})]}
    goal = load_shop(write([record()], {"B1": {"attributes": ["warm"]}}, wishes)).goals["valid_unseen"][0]
    assert goal["price_upper"] in (30.0, 40.0, 50.0)  # the higher of two of 20, 30, 40, 50
    assert goal["instruction_text"] == f"a jacket, and price lower than {goal['price_upper']:.2f} dollars"
    assert (goal["attributes"], goal["goal_options"]) == (["warm"], {"color": "red"})
    assert (goal["query"], goal["name"], goal["category"]) == ("men jackets", "Acorn Jacket", "fashion")


def test_synthetic_goals_are_all_choices_of_options(write):
    options = {"Size": [{"value": "S"}], "Color": [{"value": "Red"}, {"value": "Blue"}]}
    products = [record("B1", customization_options=options), record("B2", customization_options=""), record("B3")]
    wishes = {"attributes": ["warm"], "instruction": "Find me a jacket", "instruction_attributes": ["warm"]}
    attributes = {"B1": wishes, "B2": wishes, "B3": {"attributes": ["warm"], "instruction": None}}
    goals = load_shop(write(products, attributes), "synthetic").goals["valid_unseen"]
    texts = sorted(goal["instruction_text"].partition(", and price")[0] for goal in goals)
    red, blue = ("Find me a jacket with color: red, and size: s", "Find me a jacket with color: blue, and size: s")
    assert texts == sorted(["Find me a jacket", red, blue])
    assert [goal["goal_options"] for goal in goals if goal["instruction_text"].startswith(red)] == [
        {"color": "red", "size": "s"}
    ]
    assert len({goal["price_upper"] for goal in goals if goal["asin"] == "B1"}) == 1
    with pytest.raises(ValueError, match="human, synthetic"):
        load_shop(write(products), "made up")
    with pytest.raises(ValueError, match="0 synthetic goals"):
        load_shop(write(products), "synthetic")


def test_price_limits():
    limits = {draw_limit(10.0, Random(seed))[0] for seed in range(50)}
    assert limits == {30.0, 40.0, 50.0}  # 10 is not above 10
    assert draw_limit(975.0, Random(0)) == (990.0, ", and price lower than 990.00 dollars")
    assert draw_limit(985.0, Random(0)) == (NO_LIMIT, "")


def test_official_split_of_2000_goals(write):
    goals = [{"split": None, "number": i} for i in range(2000)]
    parts = split(goals)
    assert [goal["number"] for goal in parts["valid_unseen"]] == list(range(500))
    assert [goal["number"] for goal in parts["valid_seen"]] == list(range(500, 1500))
    assert [goal["number"] for goal in parts["train"]] == list(range(1500, 2000))
    asins = [f"B{i}" for i in range(600)]
    wishes = {asin: [wish(instruction=asin)] for asin in asins}
    shop = load_shop(write([record(asin, pricing="$990") for asin in asins], wishes=wishes))  # no limits to say
    order = [goal["instruction_text"] for name in ("valid_unseen", "valid_seen") for goal in shop.goals[name]]
    Random(233).shuffle(asins)
    assert order == asins


def test_prices_of_ranges_are_within_them_and_the_same_each_time(write):
    folder = write([record("B1", pricing="$10$20"), record("B2", pricing="")])
    prices = load_shop(folder).prices
    assert 10 <= prices["B1"] <= 20
    assert prices["B2"] == 100.0
    assert load_shop(folder).prices == prices


def test_errors_name_the_file_and_the_way_out(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"items_shuffle\.json.*princeton-nlp/WebShop.*generate"):
        load_shop(tmp_path)
    folder = write([record()])
    (folder / "items_human_ins.json").unlink()
    with pytest.raises(FileNotFoundError, match="items_human_ins"):
        load_shop(folder)
    (write([record()]) / "items_ins_v2_1000.json").write_text("{")
    with pytest.raises(ValueError, match=r"items_ins_v2_1000\.json is not JSON"):
        load_shop(folder)
    with pytest.raises(ValueError, match=r"items_shuffle_1000\.json holds a dict"):
        load_shop(write({}))
    with pytest.raises(ValueError, match="0 usable products"):
        load_shop(write([]))


def test_the_full_files_come_first(write):
    folder = write([record()])
    (folder / "items_shuffle.json").write_text(json.dumps([record(name="from the full file")]))
    assert load_shop(str(folder)).products["B1"]["Title"] == "from the full file"


@pytest.mark.parametrize(("count", "counts"), [(3, (0, 0, 3)), (501, (0, 1, 500)), (1501, (1, 1000, 500))])
def test_empty_splits_are_counted_with_what_to_do(count, counts, write, caplog):
    asins = [f"B{i}" for i in range(count)]
    shop = load_shop(write([record(asin) for asin in asins], wishes={asin: [wish()] for asin in asins}))
    assert {name: len(goals) for name, goals in shop.goals.items()} == dict(zip(SPLITS, counts))
    said = [record.message for record in caplog.records]
    if all(counts):
        assert not said
    else:
        assert f"0 in train, {counts[1]} in valid_seen, {counts[2]} in valid_unseen" in said[0]
        assert "goals=synthetic" in said[0]
