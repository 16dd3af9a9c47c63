"""BM25 over a corpus, for `--env-options retriever=http://127.0.0.1:8000`

python -m envs.search serve --corpus FILE --port 8000
"""

from __future__ import annotations

import argparse

from envs.search.env import generated_corpus
from envs.search.questions import GENERATE
from envs.search.retrievers import BM25Retriever, CorpusError
from envs.search.server import make_server


def main(argv: list[str] | None = None) -> None:
    """Serve a corpus over HTTP until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m envs.search", description="Search QA's retrieval server.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="BM25 over a corpus, in the protocol of Search-R1 (POST /retrieve)")
    serve.add_argument("--corpus", default=GENERATE, help="JSON-lines file with id and contents, or 'generate'")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one")
    args = parser.parse_args(argv)
    try:
        retriever = BM25Retriever(generated_corpus() if args.corpus == GENERATE else args.corpus)
        server = make_server(retriever, args.port, args.host)
    except (CorpusError, OSError) as error:
        parser.error(str(error))
    print(f"serving {args.corpus} at http://{args.host}:{server.server_address[1]}/retrieve", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
