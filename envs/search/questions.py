"""The questions of Search QA: Search-R1's data sets, or any with the same columns, through `datasets`; or generated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from envs import digest
from envs.order import alternating
from envs.search.facts import SPLITS, generated_questions

GENERATE = "generate"
FORMATS = {"parquet": "parquet", "jsonl": "json", "json": "json"}  # file ending -> the loader's name
ONE_HOP, TWO_HOP = "one_hop", "two_hop"


@dataclass(frozen=True)
class Question:
    question: str
    golden_answers: tuple[str, ...]
    source: str  # the data set that it comes from


@lru_cache(maxsize=16)
def load_questions(source: str, split: str) -> tuple[Question, ...]:
    """The questions of one split, in a fixed order.

    `source` is "generate"; a folder with SPLIT.parquet, SPLIT.jsonl or SPLIT.json; one such file, for every split but
    train, since nothing would be held out; or a hub id such as PeterJinGo/nq_hotpotqa_train. Columns: `question`, and
    `golden_answers` or `reward_model.ground_truth.target`; `data_source`, or else the file or folder names it. Splits
    other than train alternate between their data sources, so that the first N questions tell about all of them alike.
    Raises ValueError or FileNotFoundError with what to do.
    """
    if source == GENERATE:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the generated questions; known: {', '.join(SPLITS)}")
        return tuple(
            Question(q.question, (q.answer,), ONE_HOP if len(q.hops) == 1 else TWO_HOP)
            for q in generated_questions()[split]
        )
    name = f"{source}, split {split}"
    questions = [_question(row, f"{name}, row {i}", Path(source).stem) for i, row in enumerate(_rows(source, split))]
    if not questions:
        raise ValueError(f"{name} holds no question")
    if split == "train":
        return tuple(questions)
    return tuple(alternating(Random(0).sample(questions, len(questions)), lambda question: question.source))


def file_of(source: str, split: str) -> Path | None:
    """The file that the questions of one split come from; None: they come from the hub. Raises ValueError or
    FileNotFoundError where there is none that can be read."""
    path = Path(os.path.expandvars(source)).expanduser()
    files = [path / f"{split}.{ending}" for ending in FORMATS] if path.is_dir() else [path]
    if found := [file for file in files if file.is_file()]:
        if found[0].suffix.removeprefix(".") not in FORMATS:
            raise ValueError(f"{found[0]}: questions come as one of {', '.join(FORMATS)}")
        if split == "train" and path.is_file():
            raise ValueError(
                f"{path} is one file, of which nothing is held out: give a folder with train and test files"
            )
        return found[0]
    if path.is_dir() or path.suffix.removeprefix(".") in FORMATS:
        raise FileNotFoundError(f"no questions at {' or '.join(map(str, files))}")
    return None


def _rows(source: str, split: str):
    import datasets.config
    import datasets.exceptions

    file = file_of(source, split)
    if file:
        kind = FORMATS[file.suffix.removeprefix(".")]
        # `datasets` knows a file by its name and time of change alone: by its content it gets a cache of its own
        cache = Path(datasets.config.HF_DATASETS_CACHE, f"questions-{digest(file)}")
        try:
            rows = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(cache))
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{file} cannot be read as {kind}: {error.__cause__ or error}") from None
    else:
        rows = datasets.load_dataset(source, split=split)
    answers = "golden_answers" if "golden_answers" in rows.column_names else "reward_model"
    wanted = ("question", answers, "data_source")
    return rows.select_columns([column for column in wanted if column in rows.column_names])


def _question(row: Mapping, place: str, default_source: str) -> Question:
    answers = row.get("golden_answers")
    if answers is None:
        try:
            answers = row["reward_model"]["ground_truth"]["target"]
        except (KeyError, TypeError):
            raise ValueError(f"{place}: neither 'golden_answers' nor 'reward_model.ground_truth.target'") from None
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        answers = (answers,)  # one answer, not a list of letters or digits
    answers, question = tuple(str(answer) for answer in answers), row.get("question")
    if not isinstance(question, str) or not question.strip() or not answers:
        raise ValueError(f"{place}: a row needs a 'question' and at least one golden answer")
    source = str(row.get("data_source") or default_source)
    return Question(question.strip(), answers, source.removeprefix("searchR1_"))  # as some processed files tag it
