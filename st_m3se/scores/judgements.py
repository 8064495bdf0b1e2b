"""Relevance judgements."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["is_own_document"]


def is_own_document(query: object, document: object, judged: Container[object] = ()) -> bool:
    """Whether ``exclude_same_id`` leaves a document out of a query's list: the one rule, wherever there is the option.

    BEIR leaves out the document that has the query's own id, since in ArguAna and Quora queries are documents too, and
    each would find itself first. Where a set numbers questions and answers alike, that rule would take the answer away.
    A document that is judged for the query, with whatever grade, is therefore never left out.

    Args:
        query: The query's id, str or int.
        document: The document's id, likewise; 7 and "7" are the same here.
        judged: The documents that are judged for the query.
    """
    return str(document) == str(query) and document not in judged
