"""BM25 over a corpus file, the HTTP retriever against real sockets, and what happens when a search cannot be done."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs import on_this_machine
from envs.search.__main__ import main
from envs.search.retrievers import (
    BM25Retriever,
    CachedRetriever,
    CorpusError,
    HttpRetriever,
    Passage,
    RetrieverError,
    index_folder,
    read_corpus,
)
from envs.search.server import make_server

TEXTS = ['"Lima"\nLima is the capital of Peru.', '"Peru"\nPeru lies by the Pacific.', '"Oslo"\nOslo is in Norway. Øre!']


def corpus(folder, texts=TEXTS):
    path = folder / "corpus.jsonl"
    rows = (json.dumps({"id": str(i), "contents": text}, ensure_ascii=False) for i, text in enumerate(texts))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def bm25(tmp_path):
    return BM25Retriever(corpus(tmp_path), tmp_path)


# ---- BM25 -----------------------------------------------------------------------------------------------------------


def contents(found):
    return [[passage.contents for passage in passages] for passages in found]


def test_bm25_ranks_by_shared_words(bm25):
    assert contents(bm25.search(["what is the capital of peru", "OSLO"], 3)) == [TEXTS[:2], [TEXTS[2]]]
    assert contents(bm25.search(["capitals in peru"], 1)) == [[TEXTS[0]]]  # stems: capital
    scores = [passage.score for passage in bm25.search(["capital of peru"], 3)[0]]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0


@pytest.mark.parametrize("count", [20, 300])
def test_equals_come_in_the_corpus_order(count, tmp_path):
    """And so on every processor alike: numpy's vectorised sorting has an order of its own on each kind."""
    equals = [f'"City{i}"\nCity{i} lies in Peru.' for i in range(count)]
    best = '"Peru"\nPeru lies by Peru.'
    retriever = BM25Retriever(corpus(tmp_path, [*equals[:7], best, *equals[7:]]), tmp_path)
    assert contents(retriever.search(["peru", "zebra peru"], 6)) == [[best, *equals[:5]]] * 2


def test_a_query_that_shares_no_word_finds_nothing(bm25):
    assert bm25.search(["zebra", "", "the of", "!?"], 3) == [[], [], [], []]
    assert bm25.search([], 3) == []


def test_index_is_kept_and_made_anew_for_another_corpus(tmp_path):
    path = corpus(tmp_path)
    BM25Retriever(path, tmp_path)
    folder = index_folder(path, tmp_path)
    stamp = (folder / "offsets.npy").stat().st_mtime_ns
    BM25Retriever(path, tmp_path)
    assert (folder / "offsets.npy").stat().st_mtime_ns == stamp
    corpus(tmp_path, [*TEXTS, '"Quito"\nQuito lies high.'])
    assert index_folder(path, tmp_path) != folder
    assert contents(BM25Retriever(path, tmp_path).search(["quito"], 3)) == [['"Quito"\nQuito lies high.']]
    assert not [left for left in tmp_path.iterdir() if left.is_dir() and not (left / "offsets.npy").is_file()]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8))
def test_any_passage_comes_back_as_it_was_written(tmp_path, texts):
    path = corpus(tmp_path, [f"word{i} {text}" for i, text in enumerate(texts)])
    retriever = BM25Retriever(path, tmp_path)
    for i, text in enumerate(texts):
        assert f"word{i} {text}" in contents(retriever.search([f"word{i}"], len(texts)))[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2: not a JSON object with 'contents'"),
        ('{"id": "1", "text": "x"}', "line 2.*KeyError"),
        ('["x"]', "line 2"),
        ('{"id": "1", "contents": 3}', "line 2: 'contents' is not a text"),
        ("[" * 100_000, "line 2.*RecursionError"),
    ],
)
def test_bad_corpus_lines_are_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"id": "0", "contents": "x y"}}\n{line}\n')
    with pytest.raises(CorpusError, match=message):
        list(read_corpus(path))


def test_a_corpus_that_is_not_there_packed_or_empty(tmp_path):
    with pytest.raises(CorpusError, match=r"no corpus at .*nowhere"):
        BM25Retriever(tmp_path / "nowhere.jsonl", tmp_path)
    packed = tmp_path / "wiki-18.jsonl.gz"
    packed.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    with pytest.raises(CorpusError, match="gzip -d"):
        BM25Retriever(packed, tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="no passage"):
        BM25Retriever(tmp_path / "empty.jsonl", tmp_path)


# ---- HTTP -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scripted(*answers):
    """A server that gives `answers` in turn, the last one for ever: (status, body) or seconds to wait before one."""
    left, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, float):
                time.sleep(answer)
                answer = (200, GOOD)
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = seen
    return server


GOOD = b'{"result": [[{"document": {"id": "7", "contents": "c"}, "score": 1.5}]]}'


def test_http_gives_what_bm25_gives(bm25):
    queries = ["capital of peru", "oslo", "zebra", "Øre"] * 80  # more than one request
    with running(make_server(bm25, 0)) as url:
        assert HttpRetriever(url).search(queries, 2) == bm25.search(queries, 2)
        assert HttpRetriever(f"{url}/retrieve").search([], 2) == []


def test_the_server_speaks_search_r1s_protocol(bm25):
    def post(url, body):
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=5) as answer:
            return json.loads(answer.read())

    with running(make_server(bm25, 0)) as url:
        body = {"queries": ["lima"], "topk": 1, "return_scores": True}
        [[item]] = post(f"{url}/retrieve", json.dumps(body).encode())["result"]
        assert item["document"]["contents"] == TEXTS[0] and item["score"] > 0
        plain = post(f"{url}/retrieve", json.dumps({"queries": ["lima"]}).encode())
        assert plain == {"result": [[{"contents": TEXTS[0]}]]}
        for wrong in (
            b"x",
            b"[]",
            b'{"queries": "lima"}',
            b'{"queries": [1]}',
            b'{"queries": [], "topk": -1}',
            b"[" * 100_000,
        ):
            with pytest.raises(urllib.error.HTTPError, match="422"):
                post(f"{url}/retrieve", wrong)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(f"{url}/search", b"{}")


def test_the_request_is_search_r1s():
    with running(server := scripted((200, GOOD))) as url:
        assert HttpRetriever(url).search(["q"], 3) == [[Passage("c", 1.5)]]
        assert server.seen == [{"queries": ["q"], "topk": 3, "return_scores": True}]


def test_a_score_is_optional():
    body = b'{"result": [[{"document": {"contents": "c"}}, {"document": {"contents": "d"}, "score": null}]]}'
    with running(scripted((200, body))) as url:
        assert HttpRetriever(url).search(["q"], 3) == [[Passage("c", None), Passage("d", None)]]


def test_a_dead_server_is_a_clear_error():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(RetrieverError, match=r"did not answer in 2 tries.*refused.*envs\.search serve"):
        HttpRetriever(url, tries=2, pause=0.01).search(["q"], 3)


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
def test_no_proxy_is_asked_for_a_server_on_this_machine(name, monkeypatch):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with running(scripted((200, GOOD))) as url:
        assert HttpRetriever(url, tries=1).search(["q"], 3) == [[Passage("c", 1.5)]]
    with running(scripted((200, GOOD))) as url:
        there = url.replace("127.0.0.1", "localhost")
        assert HttpRetriever(there, tries=1).search(["q"], 3) == [[Passage("c", 1.5)]]


def test_servers_on_this_machine():
    for host in ("localhost:8000", "127.0.0.1/v1", "[::1]:8000/retrieve", "127.1.2.3", "a.localhost"):
        assert on_this_machine(f"http://{host}")
    for host in ("localhost.example.org", "10.0.0.1", "my-server:8000", "api.openai.com/v1", ""):
        assert not on_this_machine(f"https://{host}")


def test_a_slow_server_is_given_up_on():
    message = r"did not answer in 2 tries of 0\.1 s \(last: .*timed out"
    with running(scripted(1.0)) as url, pytest.raises(RetrieverError, match=message):
        HttpRetriever(url, timeout=0.1, tries=2, pause=0.01).search(["q"], 3)


def test_a_server_that_recovers_is_asked_again():
    with running(server := scripted((503, b"busy"), (429, b"busy"), 1.5, (200, GOOD))) as url:
        assert HttpRetriever(url, timeout=1.0, tries=4, pause=0.01).search(["q"], 3) == [[Passage("c", 1.5)]]
        assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>hello</html>", "does not speak"),
        (200, b'{"results": []}', "does not speak"),
        (200, b'{"result": [["c"]]}', "does not speak"),
        (200, b'{"result": [[{"document": {"text": "c"}, "score": 1}]]}', "does not speak"),
        (200, b'{"result": [[{"document": {"contents": null}}]]}', "does not speak.*no text: None"),
        (200, b'{"result": []}', "answered 0 of 1 queries"),
        (200, b"\xff\xfe", "does not speak"),
        (200, b"[" * 100_000, "does not speak.*RecursionError"),
        (200, GOOD.replace(b"1.5", b"1" + b"0" * 400), "does not speak.*OverflowError"),
        (404, b"", "refused a search.*404"),
    ],
)
def test_garbage_is_an_error_at_once(status, body, message):
    with running(server := scripted((status, body))) as url:
        with pytest.raises(RetrieverError, match=message):
            HttpRetriever(url).search(["q"], 3)
        assert len(server.seen) == 1


def test_what_is_no_http_at_all_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble():
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(b"220 mail ready\r\n")
                connection.close()

        thread = threading.Thread(target=babble)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RetrieverError, match="did not answer in 2 tries"):
            HttpRetriever(url, tries=2, pause=0.01).search(["q"], 3)
        thread.join()


def test_serve_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "envs.search", "serve", "--corpus", str(corpus(tmp_path)), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[-1]
        assert contents(HttpRetriever(url, tries=2).search(["oslo"], 3)) == [[TEXTS[2]]]
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()


def test_serving_what_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--corpus", str(tmp_path / "none.jsonl")])
    assert "no corpus at" in capsys.readouterr().err


# ---- cache ----------------------------------------------------------------------------------------------------------


class Counting:
    """A retriever that notes what it was asked."""

    def __init__(self):
        self.calls = []

    def search(self, queries, k):
        self.calls.append(list(queries))
        return [[Passage(f"{query} {i}", 1.0) for i in range(k)] for query in queries]


def test_cache_asks_once_and_in_one_call():
    retriever = Counting()
    cached = CachedRetriever(retriever, 2)
    cached.warm(["a", "b", "a"])
    assert cached("a") == ["a 0", "a 1"] and cached("b") == ["b 0", "b 1"]
    assert cached("c") == ["c 0", "c 1"]
    cached.warm(["c", "d"])
    cached.warm([])
    assert retriever.calls == [["a", "b"], ["c"], ["d"]]


def test_cache_forgets_what_was_not_used_longest():
    retriever = Counting()
    cached = CachedRetriever(retriever, 1, size=2)
    for query in ("a", "b", "a", "c", "a", "b"):  # b is gone when c comes
        cached(query)
    assert retriever.calls == [["a"], ["b"], ["c"], ["b"]]
    cached.warm(["x", "y", "z"])
    assert list(cached.known) == ["y", "z"]


def test_a_failed_search_is_not_remembered():
    class Failing(Counting):
        def search(self, queries, k):
            if not self.calls:
                self.calls.append([])
                raise RetrieverError("down")
            return super().search(queries, k)

    cached = CachedRetriever(Failing(), 1)
    with pytest.raises(RetrieverError):
        cached("a")
    assert cached("a") == ["a 0"]
