"""How fast WebShop's search is and what it holds, at several sizes of the generated catalogue, on one core.

    python lab/benchmarks/webshop_search.py --sizes 1000 100000 1000000

Building reads every product's words, a second start finds the index under cache/ and maps it into memory. Each size is
measured in a process of its own; memory is that process's peak, before there is anything, after building, and in
another process that only opens the cached index and searches.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from envs.webshop.catalogue import sample_product
from envs.webshop.data import process
from envs.webshop.search import Index, cached_index

QUERIES = 200


def catalogue(size: int) -> list[dict]:
    return [process(record, {"attributes": own}) for record, own in (sample_product(i, 0) for i in range(size))]


def queries(size: int) -> list[str]:
    """What a shopper types: two attributes, the kind, and the first value of each option."""
    rng, texts = Random(1), []
    for _ in range(QUERIES):
        record, attributes = sample_product(rng.randrange(size), 0)
        values = [values[0]["value"] for values in record["customization_options"].values()]
        texts.append(" ".join([*attributes[:2], record["query"], *values]))
    return texts


def peak() -> float:
    """The most memory this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Linux" else 1024**2)


def build(size: int, folder: str) -> dict[str, float]:
    products = catalogue(size)
    before, start = peak(), time.perf_counter()
    cached_index(products, Path(folder))
    return {"build s": time.perf_counter() - start, "catalogue MiB": before, "build peak MiB": peak()}


def search(size: int, folder: str) -> dict[str, float]:
    import bm25s

    (path,) = Path(folder).glob("webshop-index-*")
    texts, before, start = queries(size), peak(), time.perf_counter()
    index = Index(bm25s.BM25.load(str(path), mmap=True, show_progress=False))
    opened = time.perf_counter()
    found = [index.search(text) for text in texts]
    spent = time.perf_counter() - opened
    assert all(found), "a search for a product's own words finds nothing"
    disk = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    return {
        "open s": opened - start,
        "queries/s": len(texts) / spent,
        "index MiB": disk,
        "search peak MiB": peak() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000, 1_000_000], help="products")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {QUERIES} queries a size, 50 hits each")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = {}
            for step in (build, search):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    row |= pool.submit(step, size, folder).result()
        print(f"{size:>9} products: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
