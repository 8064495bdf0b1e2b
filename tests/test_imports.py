"""What importing costs and where it may reach: each check in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path

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


def test_the_losses_reach_no_extra() -> None:
    """What sentence-transformers itself imports is its own affair: nothing comes on top."""
    code = f"""
import sys, sentence_transformers
host = set(sys.modules)
import st_m3se.losses, st_m3se.training.collator
print(*[name for name in {EXTRAS!r} if name in set(sys.modules) - host])
"""
    assert run(code) == ""


BELOW: dict[str, set[str]] = {
    "core": set(),
    "functional": set(),
    "data": {"core"},
    "encoding": {"core"},
    "scores": {"core", "data"},
    "losses": {"core", "functional", "encoding"},
    "retrieval": {"core", "data", "encoding", "scores"},
    "training": {"core", "data", "encoding", "scores", "losses"},
    "evaluation": {"core", "data", "encoding", "scores", "retrieval"},
    "diagnostics": {"core", "data", "encoding", "scores", "retrieval", "evaluation"},
    "distillation": {
        *("core", "data", "scores", "losses", "retrieval", "training", "evaluation", "diagnostics"),
    },
    "cli": {"core", "data", "encoding", "scores", "retrieval", "training", "evaluation", "diagnostics", "distillation"},
}
"""What each part of the package may import, besides itself and the package's own version."""


def imported() -> dict[str, set[str]]:
    """Each module of the package, and those that it imports anywhere: in functions and for types as well."""
    folder = Path(st_m3se.__file__).parent
    files = {".".join(file.relative_to(folder.parent).with_suffix("").parts): file for file in folder.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: a relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name if name in modules else str(node.module) for name in whole}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = (names & modules.keys()) - {module}
    return found


def part(module: str) -> str:
    return module.removeprefix("st_m3se").removeprefix(".").split(".")[0]


def test_every_import_points_downwards() -> None:
    """Prevents knowledge from settling above those who need it, who would then write it a second time."""
    assert {part(module) for module in imported()} == {*BELOW, "", "__main__"}
    wrong = [
        f"{module} imports {name}"
        for module, names in imported().items()
        if part(module) in BELOW
        for name in names
        if part(name) not in BELOW[part(module)] | {part(module), ""}
    ]
    assert wrong == []


def test_no_import_is_circular() -> None:
    """Also none that hides in a function. The package's own file is lazy and stands above all."""
    graph = {module: {name for name in names if part(name)} for module, names in imported().items() if part(module)}
    while ends := {m for m in graph if not graph[m] & graph.keys() or not any(m in names for names in graph.values())}:
        graph = {module: names for module, names in graph.items() if module not in ends}
    assert graph == {}


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
        "scores",
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
