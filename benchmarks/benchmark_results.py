"""What all benchmarks share: where a result comes from, its file, and the tables that README.md shows of it.

A result is a file `results/NAME.json` with "benchmark", "command", "provenance" and "tables"; a table has a "title",
"columns" and "rows".
`python benchmarks/benchmark_results.py` writes the tables of every result into README.md, between its markers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
PACKAGES = ("st-m3se", "sentence-transformers", "transformers", "datasets", "torch", "pyarrow", "numpy")

Table = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """One table; cells are numbers, texts, or None where there is nothing to say."""
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"each row of {title!r} needs {len(columns)} cells.")
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def provenance() -> dict[str, Any]:
    """The machine, the versions and the moment."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or None,
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: other work slows a measurement down
    }


def save(path: Path, benchmark: str, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """Write a result; ``facts`` is what :func:`provenance` said before the measurements."""
    command = f"python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    result = {"benchmark": benchmark, "command": command, "provenance": facts, "tables": list(tables)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    facts = result["provenance"]
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}"
    parts = [
        f"`{result['command']}`, {facts['date'][:10]}, commit {facts['commit']}: {machine}, Python {facts['python']}, "
        f"load {facts['load']} at the start."
    ]
    for each in result["tables"]:
        parts.append(f"**{each['title']}**")
        rows = [
            each["columns"],
            ["---"] * len(each["columns"]),
            *([_cell(cell) for cell in row] for row in each["rows"]),
        ]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def fill(text: str, results: Path = HERE / "results") -> str:
    """README.md with the tables of all results between `<!-- NAME.json -->` and `<!-- end -->`."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((results / match[1]).read_text(encoding="utf-8"))
        return f"<!-- {match[1]} -->\n\n{render(result)}\n\n<!-- end -->"

    return re.sub(r"^<!-- (\w+\.json) -->$.*?^<!-- end -->$", section, text, flags=re.DOTALL | re.MULTILINE)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 4
        return f"{value:,.{digits}f}"
    return str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
