"""Candidate documents for each query, for a teacher to score: BM25, any bi-encoder, or several of them merged."""

from __future__ import annotations

from st_m3se.candidates.bm25 import BM25
from st_m3se.candidates.find import find_candidates

__all__ = ["BM25", "find_candidates"]
