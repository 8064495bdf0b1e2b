"""What importing costs and where it may reach: each check in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

import st_m3se

EXTRAS = (
    "matplotlib",
    "beir",
    "onnxruntime",
    "onnx",
    "bm25s",
    "Stemmer",
    "ir_measures",
    "scipy",
    "faiss",
    "peft",
    "typer",
)
HEAVY = ("sentence_transformers", "transformers", "datasets", "accelerate")


def run(code: str) -> str:
    """The output of a program in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    return run(f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])").split()


def test_the_package_imports_no_extra() -> None:
    """Prevents a base install that fails on a package it never asked for."""
    assert loaded_by("import st_m3se", EXTRAS) == []


def test_the_package_and_its_functions_are_cheap() -> None:
    """Prevents ten seconds of imports in front of a function of two tensors."""
    assert loaded_by("import st_m3se\nimport st_m3se.functional", HEAVY + EXTRAS) == []


def test_torch_is_all_that_the_functions_need() -> None:
    """With the host blocked the pure functions still run: they may be vendored into any training loop."""
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import torch
from st_m3se.functional import m3se_loss
print(m3se_loss(torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])).item())
"""
    assert float(run(code)) == ((5 - 3) - (4 - 1)) ** 2 + (2 - 1) ** 2


def test_the_losses_reach_no_extra_and_imports_point_one_way() -> None:
    """encoding <- losses, and what sentence-transformers itself imports is its own affair: nothing comes on top."""
    code = f"""
import sys, sentence_transformers
host = set(sys.modules)
import st_m3se.encoding
assert not {{"st_m3se.losses", "st_m3se.collator", "st_m3se.functional"}} & set(sys.modules)
import st_m3se.losses, st_m3se.collator
print(*[name for name in {EXTRAS!r} if name in set(sys.modules) - host])
"""
    assert run(code) == ""


def test_the_functions_import_nothing_else_of_the_package() -> None:
    others = ("st_m3se.losses", "st_m3se.collator", "st_m3se.encoding")
    assert loaded_by("import st_m3se.functional", others) == []


def test_every_public_name_resolves() -> None:
    assert len(set(st_m3se.__all__)) == len(st_m3se.__all__)
    for name in st_m3se.__all__:
        assert getattr(st_m3se, name).__name__ == name
        assert name in dir(st_m3se)
    names: dict[str, object] = {}
    exec("from st_m3se import *", names)
    assert set(st_m3se.__all__) <= names.keys()


@pytest.mark.parametrize(
    "module",
    [
        "functional",
        "losses",
        "collator",
        "encoding",
        "scores",
        "texts",
        "candidates",
        "dataset",
        "evaluation",
        "diagnostics",
    ],
)
def test_every_name_of_a_submodule_resolves(module: str) -> None:
    names: dict[str, object] = {}
    exec(f"from st_m3se.{module} import *", names)
    assert len(names) > 1


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Prevents ``hasattr`` and pickling from failing in a strange way on a lazy package."""
    with pytest.raises(AttributeError, match=r"st_m3se.*NoSuchLoss"):
        _ = st_m3se.NoSuchLoss
    assert not hasattr(st_m3se, "NoSuchLoss")


def test_submodules_are_found_after_a_plain_import() -> None:
    assert run("import st_m3se.functional\nprint(st_m3se.functional.m3se_loss.__module__)") == "st_m3se.functional"


def test_types_are_declared_and_the_version_is_one() -> None:
    assert resources.files("st_m3se").joinpath("py.typed").is_file()
    assert st_m3se.__version__.count(".") >= 2
