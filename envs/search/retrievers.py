"""Retrievers of Search QA behind one method: BM25 in this process, and the HTTP server of Search-R1.

A corpus is a JSON-lines file with `id` and `contents` on each line, as the wiki-18 dump of Search-R1 has them
(contents = '"Title"\\ntext').
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple, Protocol

import numpy as np

from envs import digest, on_this_machine
from envs.ranking import ranked

CACHE = Path("cache")
INDEX_VERSION = 1  # of what `_build` writes; part of the index folder's name
SERVE_HINT = "start one with `python -m envs.search serve --corpus FILE --port 8000`, or set --env-options retriever"


BUSY = (408, 425, 429)  # refusals that waiting mends


class RetrieverError(OSError):
    """A search could not be carried out. Never an empty result: that would be a wrong reward."""


class CorpusError(ValueError):
    """A corpus file that cannot be used."""


class Passage(NamedTuple):
    contents: str  # '"Title"\ntext'
    score: float | None  # None where a server names none (Search-R1's Google and SERP servers): nothing depends on it


class Retriever(Protocol):
    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. Raises RetrieverError where that is not possible."""


# ---- BM25 -----------------------------------------------------------------------------------------------------------


def read_corpus(path: str | Path) -> Iterator[tuple[int, str]]:
    """(byte offset, contents) of each passage of a JSON-lines corpus. Raises CorpusError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no corpus at {path}: give a JSON-lines file with 'id' and 'contents' on each line")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield offset, _contents(line, f"{path}, line {number}")
            offset += len(line)


def _contents(line: bytes, place: str) -> str:
    try:
        contents = json.loads(line)["contents"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(
            f"{place}: not a JSON object with 'contents' ({error!r}); unpack a .gz file first (gzip -d)"
        ) from error
    if not isinstance(contents, str):
        raise CorpusError(f"{place}: 'contents' is not a text")
    return contents


@lru_cache
def _stemmer():
    import Stemmer

    return Stemmer.Stemmer("english")


def _tokens(texts: list[str]) -> list[list[str]]:
    """English stems without stop words, of corpus and queries alike (Search-R1's BM25, Pyserini, stems too)."""
    import bm25s

    tokens = bm25s.tokenize(texts, stopwords="en", stemmer=_stemmer(), return_ids=False, show_progress=False)
    assert isinstance(tokens, list)  # with return_ids it is an object of bm25s
    return tokens


class BM25Retriever:
    """BM25 (bm25s) over a JSON-lines corpus. The index is built once, kept under cache/ and memory-mapped, and so are
    the passages' places in the file: of a large corpus only what is looked at is in memory."""

    def __init__(self, corpus: str | Path, cache: str | Path = CACHE):
        import bm25s

        self.corpus = Path(corpus)
        folder = index_folder(self.corpus, Path(cache))
        if not folder.is_dir():
            _build(self.corpus, folder)
        self.index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")  # (passages,) bytes
        self.file = self.corpus.open("rb")

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Passages that share no word with a query are no results, so there may be fewer than `k`, or none. Equals come
        in the corpus' order."""
        hits = [ranked(self.index, words, k) for words in _tokens(queries)] if queries else []
        return [
            [Passage(self._passage(int(row)), float(score)) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in hits
        ]

    def _passage(self, row: int) -> str:
        self.file.seek(int(self.offsets[row]))
        return _contents(self.file.readline(), f"{self.corpus}, passage {row + 1}")


def index_folder(corpus: Path, cache: Path) -> Path:
    """Where a corpus' index is kept: a changed file gets another folder."""
    if not corpus.is_file():
        raise CorpusError(f"no corpus at {corpus}: give a JSON-lines file with 'id' and 'contents' on each line")
    state = corpus.stat()
    key = f"{INDEX_VERSION} {corpus.resolve()} {state.st_size} {state.st_mtime_ns} {digest(corpus)}"
    return cache / f"bm25-{corpus.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _build(corpus: Path, folder: Path) -> None:
    """Writes the index beside its place, then renames it, so that processes that start together do not collide."""
    import bm25s

    offsets, tokens, passages = [], [], read_corpus(corpus)
    while chunk := list(islice(passages, 4096)):
        offsets += [offset for offset, _ in chunk]
        tokens += _tokens([contents for _, contents in chunk])
    if not any(tokens):
        raise CorpusError(f"{corpus} holds no passage with a word in it")
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        index.save(work, show_progress=False)
        np.save(work / "offsets.npy", np.array(offsets, dtype=np.int64))
        os.rename(work, folder)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        if not folder.is_dir():  # another process was first, otherwise
            raise


# ---- HTTP -----------------------------------------------------------------------------------------------------------


class HttpRetriever:
    """Search-R1's retrieval server: POST {"queries", "topk", "return_scores"} -> {"result": [[{"document", "score"}]]},
    `score` being optional.

    `timeout` is in seconds a request. A server that does not answer, is busy, or answers 5xx, is asked `tries` times
    in all, with a pause that doubles from `pause` seconds; then, or at once for an answer that is wrong,
    RetrieverError.
    """

    BATCH = 256  # queries a request

    def __init__(self, url: str, timeout: float = 30.0, tries: int = 4, pause: float = 1.0):
        self.url = url if url.rstrip("/").endswith("/retrieve") else f"{url.rstrip('/')}/retrieve"
        self.timeout, self.tries, self.pause = timeout, tries, pause
        no_proxy = [urllib.request.ProxyHandler({})] if on_this_machine(self.url) else []  # which http_proxy may name
        self.opener = urllib.request.build_opener(*no_proxy)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self.BATCH):
            found += self._request(queries[start : start + self.BATCH], k)
        return found

    def _request(self, queries: list[str], k: int) -> list[list[Passage]]:
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        problem: Exception | None = None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                answer = self._post(body)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in BUSY:
                    raise RetrieverError(f"the retrieval server at {self.url} refused a search: {error}") from error
                problem = error
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off, no HTTP
                problem = error
            else:
                return self._read(answer, len(queries), k)
        raise RetrieverError(
            f"the retrieval server at {self.url} did not answer in {self.tries} tries of {self.timeout:g} s "
            f"(last: {problem}); {SERVE_HINT}"
        ) from problem

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with self.opener.open(request, timeout=self.timeout) as response:
            return response.read()

    def _read(self, answer: bytes, queries: int, k: int) -> list[list[Passage]]:
        try:
            result = json.loads(answer)["result"]
            found = [[self._passage(item) for item in row[:k]] for row in result]
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
            raise RetrieverError(
                f"the server at {self.url} does not speak Search-R1's retrieval protocol: {error!r} in {answer[:200]!r}"
            ) from error
        if len(found) != queries:
            raise RetrieverError(f"the server at {self.url} answered {len(found)} of {queries} queries")
        return found

    @staticmethod
    def _passage(item: dict) -> Passage:
        contents, score = item["document"]["contents"], item.get("score")
        if not isinstance(contents, str):
            raise TypeError(f"contents of a document that are no text: {contents!r:.50}")
        return Passage(contents, None if score is None else float(score))


# ---- cache ----------------------------------------------------------------------------------------------------------


class CachedRetriever:
    """What the environments of one process share: the last `size` queries' results. `warm` fills it in one batch."""

    def __init__(self, retriever: Retriever, k: int, size: int = 65536):
        self.retriever, self.k, self.size = retriever, k, size
        self.known: OrderedDict[str, list[str]] = OrderedDict()

    def warm(self, queries: list[str]) -> None:
        """Ask for every query that is not known yet, in one call."""
        missing = [query for query in dict.fromkeys(queries) if query not in self.known]
        for query, found in zip(missing, self.retriever.search(missing, self.k) if missing else [], strict=True):
            self.known[query] = [passage.contents for passage in found]
        for query in dict.fromkeys(queries):
            self.known.move_to_end(query)
        while len(self.known) > self.size:
            self.known.popitem(last=False)

    def __call__(self, query: str) -> list[str]:
        """The contents of at most k passages."""
        self.warm([query])
        return self.known[query]
