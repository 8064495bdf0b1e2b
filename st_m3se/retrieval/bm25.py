"""Candidates by BM25."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.extras import require
from st_m3se.retrieval.sources import Found, Job

__all__ = ["BM25", "load_bm25", "search_bm25"]

logger = logging.getLogger(__name__)

WORD = r"(?u)\b\w\w+\b"  # bm25s' own
UNSPACED = (
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]"
)
"""Letters of scripts that are written without blanks between words, or with blanks between whole phrases (Korean)."""
RUN = re.compile(f"{UNSPACED}+")
LOOKED_AT = 100
SHARE = 0.1  # of texts, from which BM25's words are the wrong ones

POSTINGS = 1 << 22  # what one thread looks at together: some 50 MB
BLOCK_QUERIES = 256


@dataclass(frozen=True)
class BM25:
    """BM25 in Lucene's form, by bm25s.

    A term's score is ``log(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean_length))``;
    terms are lower-cased words of two letters or more, unless ``tokens`` says otherwise.

    Args:
        k1: How slowly repetition of a term saturates; bm25s' default.
        b: How far long documents are discounted; bm25s' default.
        stopwords: A language whose stop words are dropped ("english", "german", ...), or None.
        stemmer: A language of the Snowball stemmers, or None. With it "scores" matches "scoring".
        tokens: "words"; or "bigrams", for scripts without blanks between words: of Chinese, Japanese, Korean, Thai,
            Lao, Khmer and Burmese each two neighbouring letters are a term, as in Lucene's CJKAnalyzer, and a letter
            alone is one too. Words of other scripts in such texts remain words.

    Raises:
        ValueError: If ``tokens`` is neither.
    """

    k1: float = 1.5
    b: float = 0.75
    stopwords: str | None = "english"
    stemmer: str | None = "english"
    tokens: str = "words"

    def __post_init__(self) -> None:
        if self.tokens not in ("words", "bigrams"):
            raise ValueError(f'tokens must be "words" or "bigrams", got {self.tokens!r}.')

    @property
    def description(self) -> dict[str, Any]:
        """For the manifest of a run."""
        return {"name": "bm25", **asdict(self)}


def load_bm25(settings: BM25) -> tuple[Any, Any]:
    """The module bm25s, and the stemmer or None.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no such stemmer.
    """
    bm25s = require("bm25s", "candidates")
    if settings.stemmer is None:
        return bm25s, None
    stemmers = require("Stemmer", "candidates")
    if settings.stemmer not in stemmers.algorithms():
        raise ValueError(f"there is no stemmer {settings.stemmer!r}; there are {', '.join(stemmers.algorithms())}.")
    return bm25s, stemmers.Stemmer(settings.stemmer)


def search_bm25(settings: BM25, job: Job) -> Found:
    """The best documents for each query.

    bm25s makes the index. The search is ours: bm25s sums over the whole corpus for each query and leaves the order of
    equal scores to chance. Here a block of queries is multiplied with the index as sparse matrices, which touches
    matching documents only, and blocks run in threads, since SciPy and NumPy let go of the lock.
    """
    index, tokens = _index(settings, job)
    from scipy.sparse import csr_matrix
    from tqdm.auto import tqdm

    matrix = csr_matrix(
        (index.scores["data"], index.scores["indices"], index.scores["indptr"]),
        shape=(len(index.scores["indptr"]) - 1, len(job.corpus)),
    )
    postings = np.diff(matrix.indptr)
    terms = [Counter(index.vocab_dict[token] for token in query if token in index.vocab_dict) for query in tokens]
    found = Found.nothing(job)

    def search_block(block: range) -> int:
        ends = np.cumsum([0, *(len(terms[query]) for query in block)])
        # In the order of the query's words, not of the vocabulary, which differs from process to process: sums of
        # float32 depend on the order.
        columns = np.array([term for query in block for term in terms[query]], dtype=np.int32)
        counts = np.array([count for query in block for count in terms[query].values()], dtype=np.float32)
        product = csr_matrix((counts, columns, ends), shape=(len(block), matrix.shape[0])) @ matrix
        for place, query in enumerate(block):
            part = slice(product.indptr[place], product.indptr[place + 1])
            documents, scores = product.indices[part], product.data[part]
            pairs = job.wanted.range(query)
            for pair in range(pairs.start, pairs.stop):
                found.wanted[pair] = scores[documents == job.wanted.documents[pair]].sum()  # one, or none: 0
            keep = ~job.everywhere[documents]
            if len(without := job.excluded.documents[job.excluded.range(query)]):
                keep &= ~np.isin(documents, without)
            documents, scores = _best(documents[keep], scores[keep], job.depth)
            found.rows[query, : len(documents)] = documents
            found.scores[query, : len(documents)] = scores
        return len(block)

    blocks = list(_blocks([int(postings[list(query)].sum()) for query in terms]))
    bar = tqdm(total=len(terms), desc="BM25", unit=" queries", disable=not job.show_progress_bar)
    with bar, ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        for done in threads.map(search_block, blocks):
            bar.update(done)
    return found


def _index(settings: BM25, job: Job) -> tuple[Any, list[list[str]]]:
    """The index of the corpus, and the queries' words."""
    bm25s, stemmer = load_bm25(settings)
    options = {"stopwords": settings.stopwords or [], "stemmer": stemmer}
    prepare: Callable[[str], str] = str
    if settings.tokens == "bigrams":
        prepare = bigrams
        options["token_pattern"] = f"{WORD}|{UNSPACED}+"
    else:
        _warn_of_unspaced(job)
    documents = bm25s.tokenize(
        (prepare(text) for _, texts in job.corpus.batches() for text in texts),
        show_progress=job.show_progress_bar,
        **options,
    )
    if not documents.vocab:
        raise FormatError(
            f"no text of the {job.corpus.name} has a word of two letters, so BM25 has nothing to index. Are they blank?"
        )
    index = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene", backend="numpy")
    index.index(documents, show_progress=job.show_progress_bar)
    queries = (prepare(text) for _, texts in job.queries.batches() for text in texts)
    return index, bm25s.tokenize(queries, return_ids=False, show_progress=False, **options)


def bigrams(text: str) -> str:
    """The text with each run of letters of scripts without blanks as its overlapping pairs, blanks between them."""

    def pairs(run: re.Match[str]) -> str:
        letters = run.group()
        if len(letters) == 1:
            return f" {letters} "
        return f" {' '.join(map(''.join, itertools.pairwise(letters)))} "

    return RUN.sub(pairs, text)


def _warn_of_unspaced(job: Job) -> None:
    """Say it where the words of a language cannot be told apart by blanks."""
    for texts in (job.queries, job.corpus):
        _, some = next(texts.batches(LOOKED_AT), ([], []))
        found = sum(bool(RUN.search(text)) for text in some)
        if found > SHARE * len(some):
            logger.warning(
                f"BM25: {found} of the first {len(some)} {texts.name} have Chinese, Japanese, Korean, Thai, Lao, Khmer "
                "or Burmese letters, whose words no blanks separate: whole sentences are taken for words and match "
                'nothing. Use BM25(tokens="bigrams"), or --tokens bigrams.'
            )
            return


def _blocks(postings: Sequence[int]) -> Iterator[range]:
    """Consecutive queries that share out the work: each block looks at about as many postings."""
    start, total = 0, 0
    for query, count in enumerate(postings):
        if query > start and (total + count > POSTINGS or query - start == BLOCK_QUERIES):
            yield range(start, query)
            start, total = query, 0
        total += count
    if start < len(postings):
        yield range(start, len(postings))


def _best(documents: np.ndarray, scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The best ``depth``, best first, equal ones by document."""
    if len(scores) > depth:
        last = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        keep = scores >= last  # with all that tie for the last place
        documents, scores = documents[keep], scores[keep]
    order = np.lexsort((documents, -scores))[:depth]
    return documents[order], scores[order]
