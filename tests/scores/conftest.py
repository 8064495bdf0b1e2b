"""Fixtures of the score tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def shared_data() -> Path:
    """Real files, where the checkout has them beside it."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder {folder.name} with real files is not beside this checkout")
    return folder
