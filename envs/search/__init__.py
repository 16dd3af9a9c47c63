"""Search QA: answer a question by searching passages. env.py is the environment, questions.py and facts.py its
questions, retrievers.py finds passages, server.py serves them, text.py judges answers, expert.py answers by script."""

from envs.search.env import DATA_SOURCES, GENERATED_SOURCES, SearchEnv, generated_corpus, read_action, vocabulary
from envs.search.retrievers import CorpusError, RetrieverError
from envs.search.text import exact_match, normalize

__all__ = [
    "DATA_SOURCES",
    "GENERATED_SOURCES",
    "CorpusError",
    "RetrieverError",
    "SearchEnv",
    "exact_match",
    "generated_corpus",
    "normalize",
    "read_action",
    "vocabulary",
]
