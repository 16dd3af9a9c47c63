"""Search-based QA as a text environment (the protocol of Search-R1): search, read, answer; prompts, parser, reward.

Each turn is a search or the answer. A search brings the top 3 passages; the answer ends the episode, and so does the
last turn. Reward 1 for an exact match with a golden answer, else 0. Questions: questions.py; passages:
retrievers.py; the generated default: facts.py.

Prompts. "official": the words of the authors' release (agent_system/environments/prompts/search.py), responses
`<think>...</think><search>...</search>` or `<answer>...</answer>`. "compact": lower-case words, responses are bare
commands, "search capital of france" or "answer paris"; short enough for a model of a million parameters.

python -m envs.search serve --corpus FILE --port 8000     # BM25 over a corpus, for --env-options retriever=http://127.0.0.1:8000
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from data import Prompt, Slot
from envs.prompts import COMPACT_ANALYSIS, COMPACT_EPISODE_SLOT, COMPACT_STEP_SLOT, STEP_SLOT
from envs.search.facts import HOPS, passages
from envs.search.questions import GENERATE, ONE_HOP, SPLITS, TWO_HOP, file_of, load_questions
from envs.search.retrievers import (
    CACHE,
    BM25Retriever,
    CachedRetriever,
    HttpRetriever,
    Retriever,
)
from envs.search.text import compact_results, exact_match, official_results, words

# The columns of the paper's table, in its order; the generated questions have a table of their own.
DATA_SOURCES = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
GENERATED_SOURCES = {ONE_HOP: "1-hop", TWO_HOP: "2-hop"}

EPISODE_SLOT = Slot(
    "episode",
    "\n**Episode-Level Skill**\nRefer to this episode-level skill when deciding what action to take in the current "
    "episode:\n[{text}]\n",
)
ROLE = "\nYou are an expert agent tasked with answering the given question step-by-step.\nYour question: "
YOUR_TURN = "Now it's your turn to respond for the current step.\n"
CHOOSE = (
    "You should first conduct reasoning process. This process MUST be enclosed within <think> </think> tags. \n"
    "After completing your reasoning, choose only one of the following actions (do not perform both):\n"
    "(1) If you find you lack some knowledge, you can call a search engine to get more external information using "
    "format: <search> your query </search>.\n"
    "(2) If you have enough knowledge to answer the question confidently, provide your final answer within <answer> "
    "</answer> tags, without detailed illustrations. For example, <answer>Beijing</answer>.\n"
)

COMPACT_INVALID = "nothing happens"
COMPACT_WORDS = f"{COMPACT_INVALID} no results doc 1 2 3 question did saw skill hint search answer"
ACTION = re.compile(r"\s*(?:<(search|answer)>(.*?)</\1>|(search|answer)\s(.*))\s*", re.DOTALL | re.IGNORECASE)


# ---- what the environments of one process share ----------------------------------------------------------------------


@lru_cache
def generated_corpus(cache: Path = CACHE) -> Path:
    """The generated passages as a corpus file under cache/, named by its content, written where it is not there yet."""
    rows = (json.dumps({"id": str(i), "contents": contents}) for i, contents in enumerate(passages()))
    text = "".join(f"{row}\n" for row in rows)
    path = cache / f"search-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.getpid()}")
        work.write_text(text)
        work.replace(path)
    return path


@lru_cache
def shared_retriever(source: str, k: int) -> CachedRetriever:
    """One retriever a process for each source: "generate", the URL of a retrieval server, or a corpus file for BM25."""
    if source.startswith(("http://", "https://")):
        return CachedRetriever(HttpRetriever(source), k)
    corpus = generated_corpus() if source == GENERATE else Path(os.path.expandvars(source)).expanduser()
    return CachedRetriever(BM25Retriever(corpus), k)


@lru_cache
def vocabulary() -> tuple[str, ...]:
    """Every word, sorted, that the generated questions, answers and passages, the compact prompts and the expert's
    searches are made of."""
    texts = [COMPACT_WORDS, *passages(), *(hop.query.format(given="") for hop in HOPS.values())]
    for split in SPLITS:
        for question in load_questions(GENERATE, split):
            texts += [question.question, *question.golden_answers]
    return tuple(sorted({word for text in texts for word in words(text).split()}))


# ---- the environment -------------------------------------------------------------------------------------------------


def read_action(action: str) -> tuple[str, str] | None:
    """("search" or "answer", its text) of an action in either style, or None."""
    match = ACTION.fullmatch(action)
    if match is None:
        return None
    kind, text = (match[1], match[2]) if match[1] else (match[3], match[4])
    return kind.lower(), text.strip()


class SearchEnv:
    """The environment of envs/__init__.py. A task is a string, "search/SPLIT/NUMBER".

    `questions`: see questions.load_questions. `retriever`: "generate", a JSON-lines corpus for BM25, the URL of
    a retrieval server, or any object with Retriever's `search`. It is opened by `tasks` or the first search, and
    shared by all environments of the process.
    """

    new_words = ("questions", "retriever")
    time_limit = 180.0  # a server that is gone is asked four times, 30 s each: retrievers.py names it

    def __init__(
        self,
        games: list[str] | None = None,
        max_steps: int = 4,
        prompt: str = "official",
        history: int = 4,
        questions: str = GENERATE,
        retriever: str | Retriever = GENERATE,
        top_k: int = 3,
    ):
        if prompt not in ("official", "compact"):
            raise ValueError(f"unknown Search QA prompt {prompt!r}; known: official, compact")
        self.games, self.max_steps, self.prompt, self.history = games or [], max_steps, prompt, history
        self.questions, self.top_k = questions, top_k
        self.generated = questions == GENERATE
        self.held_out = ("valid_seen", "valid_unseen") if self.generated else ("test",)
        self.columns = GENERATED_SOURCES if self.generated else DATA_SOURCES
        self.source = retriever if isinstance(retriever, str) else CachedRetriever(retriever, top_k)
        self.question, self.steps = None, 0

    def sources(self) -> dict[str, str]:
        """See envs/__init__.py."""
        found = {}
        if not self.generated:
            for split in ("train", *self.held_out):
                found[f"questions of {split}"] = str(file_of(self.questions, split) or self.questions)
        if isinstance(self.source, str) and self.source != GENERATE:
            found["retriever"] = os.path.expanduser(os.path.expandvars(self.source))
        return found

    @property
    def retriever(self) -> CachedRetriever:
        return shared_retriever(self.source, self.top_k) if isinstance(self.source, str) else self.source

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Ask the question of `options["game"]`, or of the one of `games` that `seed` selects. The first observation is
        the question. Raises ValueError for a task that is not there."""
        game = (options or {}).get("game")
        if game is None:
            if not self.games:
                raise ValueError('no question to ask: pass games=[...] or reset(options={"game": "search/train/0"})')
            game = self.games[(seed or 0) % len(self.games)]
        parts = re.fullmatch(r"search/([^/]+)/(\d+)", str(game))
        if parts is None:
            raise ValueError(f"{game!r} is no task of Search QA; they read search/SPLIT/NUMBER")
        questions = load_questions(self.questions, parts[1])
        if int(parts[2]) >= len(questions):
            raise ValueError(f"no task {game}: {self.questions} has {len(questions)} questions in {parts[1]}")
        self.question, self.steps, self.done = questions[int(parts[2])], 0, False
        task = self._text(self.question.question)
        info = {"task": task, "task_type": self.question.source, "game": game, "admissible_actions": [], "won": False}
        return task, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Search or answer. Reward 1 for a right answer, else 0; the observation is empty once the episode is over.

        A search in the last turn is not carried out: nobody would read it. Raises RuntimeError before reset and after
        the end, RetrieverError where a search fails.
        """
        if self.question is None or self.done:
            raise RuntimeError("call reset() before step()")
        self.steps += 1
        kind, text = read_action(action) or ("", "")
        answered = kind == "answer"
        won = answered and exact_match(text, self.question.golden_answers)
        truncated = not answered and self.steps >= self.max_steps
        self.done = answered or truncated
        observation = "" if self.done else self._observation(text if kind == "search" else "")
        return observation, float(won), answered, truncated, {"admissible_actions": [], "won": won}

    def _observation(self, query: str) -> str:
        if not query:
            return COMPACT_INVALID if self.prompt == "compact" else ""
        found = self.retriever(query)
        return compact_results(found) if self.prompt == "compact" else official_results(found)

    def prefetch(self, responses: list[str]) -> None:
        """Carry out the searches of a whole turn's responses, of all live episodes, in one call to the retriever. The
        steps that follow find their results in the cache that the environments share. Call it on any live one."""
        if self.steps + 1 >= self.max_steps:
            return  # the last turn searches for nothing
        actions = (read_action(self.parse_action(response, [])[0]) for response in responses)
        self.retriever.warm([text for kind, text in filter(None, actions) if kind == "search" and text])

    def tasks(self, split: str, count: int | None = None) -> list[str]:
        """The tasks that this environment was given for `split`, or, given none, all of them.

        The retriever is opened here: a first index may take hours. Raises CorpusError for a corpus that has none.
        """
        _ = self.retriever
        if self.games:
            return [game for game in self.games if game.startswith(f"search/{split}/")][:count]
        return [f"search/{split}/{i}" for i in range(len(load_questions(self.questions, split)))][:count]

    def build_prompt(
        self, style: str, task: str, history: list[tuple[str, str]], observation: str, admissible: list[str]
    ) -> Prompt:
        """See envs/__init__.py. With its slots empty, the official "window" prompt is the authors', byte for byte: the
        last `self.history` actions, each with what it brought."""
        if self.prompt == "compact":
            return self._compact_prompt(style, task, history, observation)
        if history and style == "chat":
            return (f"{observation}\n\n" if observation else "", STEP_SLOT, YOUR_TURN)
        if not history or not self.history:  # with a history of 0 the authors show no past at all
            return (f"{ROLE}{task}\n", EPISODE_SLOT, "\n", STEP_SLOT, YOUR_TURN + CHOOSE)
        taken, first = self._taken(history, observation)
        shown = "\n".join(f"Step {i}:{action} {brought}\n" for i, (action, brought) in enumerate(taken, first))
        past = (
            f"\nPrior to this step, you have already taken {len(history)} step(s). Below is the interaction history "
            "where <search> </search> wrapped your past search queries and <information> </information> wrapped the "
            f"corresponding search results returned by the external search engine. History:\n{shown}\n\n"
        )
        return (f"{ROLE}{task}\n", EPISODE_SLOT, past, STEP_SLOT, YOUR_TURN + CHOOSE)

    def _compact_prompt(self, style: str, task: str, history: list[tuple[str, str]], observation: str) -> Prompt:
        if style == "chat" and history:
            return (observation, COMPACT_STEP_SLOT)
        past = "".join(f" did {action} saw {brought}" for action, brought in self._taken(history, observation)[0])
        return (f"question {task}", COMPACT_EPISODE_SLOT, past, COMPACT_STEP_SLOT)

    def _taken(self, history: list[tuple[str, str]], observation: str) -> tuple[list[tuple[str, str]], int]:
        """The last `self.history` (action, what it brought), and the number of the first of them, from 1."""
        seen = [*(before for before, _ in history), observation]
        taken = [(action, after) for (_, action), after in zip(history, seen[1:], strict=True)]
        first = max(0, len(taken) - self.history)
        return taken[first:], first + 1

    def parse_action(self, response: str, admissible: list[str]) -> tuple[str, bool]:
        """ "official": as the authors parse (projection.py): the first search, else the first answer, else nothing;
        valid if the response has one of these tags, and once. "compact": the whole response, valid if it is what `step`
        reads a search or an answer from, of something."""
        if self.prompt == "compact":
            action = " ".join(response.split())
            _, text = read_action(action) or ("", "")
            return action, bool(text)
        cut = next((response.split(end)[0] + end for end in ("</search>", "</answer>") if end in response), response)
        searches, answers = (len(re.findall(f"<{tag}>", response, re.IGNORECASE)) for tag in ("search", "answer"))
        for tag in ("search", "answer"):
            if found := re.search(f"<{tag}>(.*?)</{tag}>", cut, re.DOTALL | re.IGNORECASE):
                return f"<{tag}>{found[1].strip()}</{tag}>", searches + answers == 1
        return "", False

    def analysis_prompt(self) -> str | None:
        return COMPACT_ANALYSIS if self.prompt == "compact" else None

    def _text(self, text: str) -> str:
        return words(text) if self.prompt == "compact" else text
