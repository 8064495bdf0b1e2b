"""A retrieval data set that every Python carries: its own documentation.

A docstring whose summary (its first paragraph, 4 to 25 words) is followed by a body of at least 12 words becomes one
query and one document: the query is the summary, the document is the body *without* it. Finding the body again from
the summary is a fair, small retrieval task with one relevant document per query.

Sources are parsed with :mod:`ast`; no module is imported, so nothing of them runs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from st_m3se.data.texts import Texts
from st_m3se.distillation.data import DistillationData, split_by_hash

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idle_test", "lib2to3"}
SUMMARY_WORDS = (4, 25)
BODY_WORDS = 12
DEV_SHARE, TEST_SHARE = 0.1, 0.2


def library_folder() -> Path:
    """The standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_folders() -> list[Path]:
    """Where this environment's installed packages lie."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths["purelib"]), Path(paths["platlib"])})


def source_files(folder: Path) -> list[Path]:
    """All Python sources below ``folder``, in a fixed order, without tests."""
    return sorted(
        path for path in folder.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)
    )


def docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of the module, its classes and its functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and sources for another Python
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                pending.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                pending.append((name, child))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, inspect.cleandoc(text)


def split_docstring(text: str) -> tuple[str, str] | None:
    """Split a docstring into (summary, body without the summary), or None where it has no fitting summary and body."""
    paragraphs = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
    if len(paragraphs) < 2:
        return None
    summary, body = (" ".join(part.split()) for part in paragraphs)
    body = re.sub(re.escape(summary), " ", body, flags=re.IGNORECASE)
    body = " ".join(body.split())
    lowest, highest = SUMMARY_WORDS
    if not lowest <= len(summary.split()) <= highest or len(body.split()) < BODY_WORDS:
        return None
    if summary.lower() in body.lower() or not re.search(r"[A-Za-z]{3}", summary):
        return None
    return summary, body


def normalised(text: str) -> str:
    """A text without case and punctuation: two with the same words are copies."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def load_python_docs(packages: bool = False, folders: list[Path] | None = None) -> DistillationData:
    """Build the data set from the running Python's documentation.

    Repeated summaries and repeated bodies (inherited and copied docstrings) are kept once, the standard library's
    first, so that no text occurs in two splits. The split depends on a hash of the summary alone.

    Args:
        packages: add the packages installed in this environment.
        folders: read these folders instead; for tests.
    """
    roots = folders if folders is not None else [library_folder(), *(package_folders() if packages else [])]
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    seen: set[str] = set()
    for root in roots:
        files = source_files(root)
        for path in tqdm(files, desc=f"Reading docstrings of {root.name}", leave=False):
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            for name, text in docstrings(path, module):
                pair = split_docstring(text)
                if pair is None or name in corpus:
                    continue
                keys = {normalised(part) for part in pair}
                if keys & seen:
                    continue
                seen |= keys
                queries[name], corpus[name] = pair
    if not corpus:
        raise ValueError(
            f"Expected Python sources with docstrings in {', '.join(str(root) for root in roots)}, found none. This "
            "Python seems to be installed without its sources: use another one, or a BEIR folder with --data DIR."
        )
    qrels = split_by_hash({name: {name: 1} for name in queries}, dev=DEV_SHARE, test=TEST_SHARE, key=queries)
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"documentation of Python {version}" + (" and its installed packages" if packages else "")
    return DistillationData(name, Texts.open(corpus), Texts.open(queries, "queries"), qrels)
