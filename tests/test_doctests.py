"""The examples in the docstrings of the pure functions say what they do."""

from __future__ import annotations

import doctest

import torch

from st_m3se import functional


def test_every_loss_shows_an_example_that_is_true() -> None:
    results = doctest.testmod(functional, extraglobs={"torch": torch})
    assert results.failed == 0
    named = [test.name for test in doctest.DocTestFinder().find(functional) if test.examples]
    losses = [name for name in functional.__all__ if name.endswith("_loss")]
    assert {f"st_m3se.functional.{name}" for name in losses} <= set(named)
