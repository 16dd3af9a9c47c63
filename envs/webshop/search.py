"""Search over a catalogue: BM25 as the official engine's Lucene computes it, through the library bm25s.

Source: princeton-nlp/WebShop, search_engine/ (what is indexed: convert_product_file_format.py; pyserini's defaults are
k1 0.9, b 0.4, the English stop words and Porter's stemmer). Lucene keeps about four significant bits of a document's
length, here it is exact: scores of long documents differ by a few percent.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import bm25s
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from envs.ranking import ranked

HITS = 50  # most products that a search finds
K1, B = 0.9, 0.4
TOKEN = re.compile(r"\w+(?:['.]\w+)*")  # as Lucene's standard tokenizer: "3.5" and "men's" are one word
STOPWORDS = frozenset(STOPWORDS_EN)  # Lucene's 33
FORMAT = "1"  # of what is cached: another number for another tokenizer or library format


def document(product: dict) -> str:
    """What is indexed of a product: title, description, the first feature, and every option with its values."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return f"{product['Title']} {product['Description']} {first} {options}".lower()


@lru_cache(maxsize=1)
def stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("porter")


def tokens(text: str) -> list[str]:
    words = (word.removesuffix("'s") for word in TOKEN.findall(text.lower().replace("’", "'")))
    return stemmer().stemWords([word for word in words if word not in STOPWORDS])


class Index:
    """A catalogue's inverted index. Documents are numbered in the catalogue's order."""

    def __init__(self, engine: bm25s.BM25):
        self.engine = engine

    def search(self, query: str, most: int = HITS) -> list[int]:
        """Numbers of the best documents that share a word with the query, best first, equals in catalogue order."""
        return ranked(self.engine, tokens(query), most)[0].tolist()


def build(documents: Iterable[str]) -> bm25s.BM25:
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokens(text)] for text in documents]
    engine = bm25s.BM25(method="lucene", k1=K1, b=B)
    engine.index(bm25s.tokenization.Tokenized(rows, vocabulary), show_progress=False)
    return engine


def cached_index(products: Iterable[dict], cache: Path = Path("cache")) -> Index:
    """The index of `products`, built once and kept under `cache`, from where it is memory-mapped."""
    products = list(products)
    digest = hashlib.blake2b(FORMAT.encode(), digest_size=8)
    for product in products:
        digest.update(document(product).encode(errors="replace") + b"\0")
    folder = cache / f"webshop-index-{digest.hexdigest()}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process that is stopped, or a second one, leaves no half-written index behind.
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=cache))
        build(map(document, products)).save(str(unfinished))
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return Index(bm25s.BM25.load(str(folder), mmap=True, show_progress=False))
