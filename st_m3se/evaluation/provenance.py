"""Where results come from: versions, machine, moment and command."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance"]

PACKAGES = (
    "sentence-transformers",
    "transformers",
    "torch",
    "numpy",
    "pyarrow",
    "scipy",
    "ir-measures",
    "pytrec-eval-terrier",
    "bm25s",
    "PyStemmer",
    "beir",
)


def provenance(device: str | None = None, *, seed: int = 0) -> dict[str, Any]:
    """What ``results.json`` says of its origin.

    Args:
        device: Where the models ran; None is the best there is.
        seed: Of all that is drawn at random.
    """
    import torch

    from st_m3se import __version__

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "st_m3se": __version__,
        "packages": packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "device": f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
