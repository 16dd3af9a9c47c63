"""A corpus over HTTP, in the protocol of Search-R1's retrieval server (search_r1/search/retrieval_server.py)."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from envs.search.retrievers import Retriever

DEFAULT_TOPK = 3


def make_server(retriever: Retriever, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever()`. Port 0 takes a free one: `server.server_address[1]`."""
    lock = threading.Lock()  # a retriever need not be safe to use from several threads

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/retrieve":
                return self._answer(404, {"detail": f"no {self.path} here, only /retrieve"})
            try:
                queries, k, scores = read_request(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            except ValueError as error:
                return self._answer(422, {"detail": str(error)})
            with lock:
                found = retriever.search(queries, k)
            result = [[item(passage, scores) for passage in passages] for passages in found]
            return self._answer(200, {"result": result})

        def _answer(self, status: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args) -> None:
            """Silent: a line a request would bury everything else."""

    return ThreadingHTTPServer((host, port), Handler)


def item(passage, scores: bool) -> dict:
    document = {"contents": passage.contents}
    return {"document": document, "score": passage.score} if scores else document


def read_request(body: bytes) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores). Raises ValueError, worded for the client."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    queries = fields.get("queries") if isinstance(fields, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("'queries' must be a list of texts")
    k = fields.get("topk") or DEFAULT_TOPK
    if not isinstance(k, int) or k < 1:
        raise ValueError("'topk' must be a positive whole number")
    return queries, k, bool(fields.get("return_scores"))
