"""Teachers behind an API: small calls, several at a time, tried again where they fail, and counted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from st_m3se.retrieval.teacher import Pairs, Scored, as_scores, settings

__all__ = ["APITeacher"]

BUGS = (TypeError, NameError, AttributeError, ImportError)  # which no other try mends


class APITeacher:
    """A function of a query and some of its documents as a teacher for :func:`score_candidates`.

    Args:
        call: Takes a query and a list of documents and returns as many numbers, the higher the better; called from
            several threads.
        name: What the manifest calls it; change it when the model behind it or the prompt changes.
        concurrency: Calls at a time.
        documents: Of one query in a call, at most.
        retries: How often a call is tried again that raises, or returns anything but numbers; errors of programming
            are raised at once.
        backoff: Seconds before the first retry, about; each next wait is twice as long, a minute at most.
        cost: The cost of a call by its query and documents, in any unit. None counts nothing.

    Attributes:
        calls: Calls that returned scores, in this process.
        cost: Their cost.
    """

    def __init__(
        self,
        call: Callable[[str, list[str]], Any],
        name: str,
        *,
        concurrency: int = 4,
        documents: int = 20,
        retries: int = 5,
        backoff: float = 1.0,
        cost: Callable[[str, list[str]], float] | None = None,
    ) -> None:
        if concurrency < 1 or documents < 1 or retries < 0:
            raise ValueError(
                "concurrency and documents must be at least 1 and retries 0, got "
                f"{concurrency}, {documents}, {retries}."
            )
        self._call, self._concurrency, self._documents = call, concurrency, documents
        self._retries, self._backoff, self._price = retries, backoff, cost
        self.calls, self.cost = 0, 0.0
        self.settings: dict[str, Any] = settings(name, backend="api")

    def prepare(self, pairs: Pairs) -> list[tuple[np.ndarray, str, list[str]]]:
        """The calls: places of their pairs, the query, the documents."""
        calls = []
        for query in np.unique(pairs.query_index):
            places = np.flatnonzero(pairs.query_index == query)
            for start in range(0, len(places), self._documents):
                part = places[start : start + self._documents]
                texts = [pairs.documents[document] for document in pairs.document_index[part].tolist()]
                calls.append((part, pairs.queries[int(query)], texts))
        return calls

    def score(self, prepared: list[tuple[np.ndarray, str, list[str]]]) -> Scored:
        """The answers as they come; after a call that failed for good, those that were under way still count."""
        failure: BaseException | None = None
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="teacher") as pool:
            waiting = {pool.submit(self._ask, query, texts): (part, query, texts) for part, query, texts in prepared}
            try:
                for future in as_completed(waiting):
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is not None:
                        failure = failure or error
                        for each in waiting:  # not by shutdown, of which as_completed would never hear
                            each.cancel()
                        continue
                    part, query, texts = waiting[future]
                    self.calls += 1
                    self.cost += 0.0 if self._price is None else self._price(query, texts)
                    yield part, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, query: str, texts: list[str]) -> np.ndarray:
        for again in range(self._retries + 1):
            try:
                return as_scores(self._call(query, texts), len(texts), self.settings["teacher"])
            except BUGS:
                raise
            except Exception as error:
                if again == self._retries:
                    raise RuntimeError(
                        f"the teacher {self.settings['teacher']} failed {again + 1} times for the query {query!r:.80}, "
                        f"at last with: {error}. What it has scored is kept: the same again goes on."
                    ) from error
                time.sleep(min(60.0, self._backoff * 2**again) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")
