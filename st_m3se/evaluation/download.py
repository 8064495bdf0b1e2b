"""BEIR sets by name: downloaded through beir, checked, and kept."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BEIR_SETS", "download_set"]

BEIR_SETS: dict[str, str] = {}
"""Name to the MD5 of its archive."""


def download_set(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of a BEIR set, downloaded unless it is there already; "cqadupstack/android" for one of its parts."""
    raise NotImplementedError
