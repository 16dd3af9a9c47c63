"""Questions from files with the columns of Search-R1's data sets, and what is wrong with others."""

import json

import pytest
from datasets import Dataset

from envs.search import SearchEnv
from envs.search.questions import Question, load_questions


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_variables_and_the_home_folder_are_read_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [{"question": "q?", "golden_answers": ["a"]}])
    write(tmp_path / "corpus.jsonl", [{"id": "0", "contents": '"Lima"\nLima is in Peru.'}])
    for folder in ("~", "$QUESTIONS"):
        env = SearchEnv(questions=folder, retriever=f"{folder}/corpus.jsonl")
        assert env.tasks("train") == ["search/train/0"]
        assert env.retriever("peru") == ['"Lima"\nLima is in Peru.']


def test_search_r1_parquet(tmp_path):
    """The columns of PeterJinGo/nq_hotpotqa_train, with the prompt and the rest that nobody asks for here."""
    rows = [
        {
            "id": f"test_{i}",
            "question": f"q{i}? ",
            "golden_answers": [f"a{i}", "b"],
            "data_source": "nq",
            "prompt": [{"role": "user", "content": "Answer the given question."}],
            "ability": "fact-reasoning",
            "reward_model": {"ground_truth": {"target": [f"a{i}"]}, "style": "rule"},
            "extra_info": {"index": i, "split": "test"},
        }
        for i in range(3)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert load_questions(str(tmp_path), "train") == tuple(Question(f"q{i}?", (f"a{i}", "b"), "nq") for i in range(3))


def test_processed_files_keep_answers_in_reward_model(tmp_path):
    rows = [{"question": "q?", "reward_model": {"ground_truth": {"target": ["a"]}}, "data_source": "searchR1_nq"}]
    assert load_questions(write(tmp_path / "x.jsonl", rows), "test") == (Question("q?", ("a",), "nq"),)


def test_without_a_data_source_the_file_names_it(tmp_path):
    path = write(tmp_path / "bamboogle.json", [{"question": "q?", "golden_answers": "one string"}])
    assert load_questions(path, "test") == (Question("q?", ("one string",), "bamboogle"),)


def test_held_out_questions_alternate_between_data_sets(tmp_path):
    rows = [{"question": f"{s}{i}", "golden_answers": ["a"], "data_source": s} for s in "xy" for i in range(4)]
    rows += [{"question": "z0", "golden_answers": ["a"], "data_source": "z"}]
    write(tmp_path / "test.jsonl", rows)
    write(tmp_path / "train.jsonl", rows)
    order = [question.source for question in load_questions(str(tmp_path), "test")]
    assert order == list("xyzxyxyxy")
    assert [question.question for question in load_questions(str(tmp_path), "train")] == [
        row["question"] for row in rows
    ]
    assert sorted(q.question for q in load_questions(str(tmp_path), "test")) == sorted(row["question"] for row in rows)


def test_a_number_is_one_answer_and_may_name_the_data_set(tmp_path):
    rows = [{"question": "how many?", "golden_answers": 42, "data_source": 7}]
    assert load_questions(write(tmp_path / "q.jsonl", rows), "test") == (Question("how many?", ("42",), "7"),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q?"}], "row 0: neither 'golden_answers' nor"),
        ([{"question": "q?", "golden_answers": ["a"]}, {"question": "q?", "golden_answers": []}], "row 1: a row needs"),
        ([{"question": " ", "golden_answers": ["a"]}], "row 0: a row needs"),
        ([{"text": "q?", "golden_answers": ["a"]}], "row 0: a row needs"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(tmp_path / "q.jsonl", rows), "test")


def test_of_one_file_nothing_is_held_out_so_nobody_trains_on_it(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "q?", "golden_answers": ["a"]}])
    with pytest.raises(ValueError, match=r"q\.jsonl is one file, of which nothing is held out"):
        load_questions(path, "train")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "q?", "golden_answers": ["a"]}\n{"question": \n')
    with pytest.raises(ValueError, match=r"q\.jsonl cannot be read as json"):
        load_questions(str(tmp_path / "q.jsonl"), "test")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.parquet or .*train\.jsonl"):
        load_questions(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r"no questions at .*none\.parquet"):
        load_questions(str(tmp_path / "none.parquet"), "train")
    (tmp_path / "q.csv").write_text("question\n")
    with pytest.raises(ValueError, match="parquet, jsonl, json"):
        load_questions(str(tmp_path / "q.csv"), "train")
    with pytest.raises(ValueError, match=r"unknown split 'test'.*train, valid_seen"):
        load_questions("generate", "test")
