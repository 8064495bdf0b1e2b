"""Distil a slow cross-encoder into a fast bi-encoder in Python: what `st-m3se distill` does, as one call.

    pip install -e ".[demo]" && python examples/distill_msmarco.py              # --quick: a small run
    python examples/distill_msmarco.py --data path/to/msmarco --output distilled    # your own texts

What: without --data, the docstrings of the running Python (summary line -> body without it). Teacher: the 12-layer MS
MARCO MiniLM cross-encoder, averaged with the student as per-query z-scores. Student: all-MiniLM-L6-v2 as it comes.
Nobody has judged the training queries: BM25 and the student find five candidates each, the teacher scores them, and the
student learns its distribution over them, with the other lists' documents as negatives. A control is trained beside it
without a teacher: BM25's first result is its positive. All weights and texts come with Python packages, no hub.

Hardware, time and what came out: 10 minutes on 2 CPU cores; see "Results measured here" in README.md.

With a BEIR folder (corpus.jsonl, queries.jsonl, qrels/*.tsv) its judgements are trained on as well, where it has any.
Every stage is a folder of the output: killed at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from st_m3se import distill
from st_m3se.distillation import DistillationConfig
from st_m3se.distillation.demo import demo_options, load_demo_data, load_demo_teacher
from st_m3se.distillation.demo_models import MINILM, demo_teacher_folder, weights_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help="a BEIR folder; without it the documentation of this Python")
    parser.add_argument("--teacher", help="a cross-encoder by name or path; without it the demo's")
    parser.add_argument("--student", help="an encoder by name or path; without it the demo's")
    parser.add_argument("--output", default="distilled", help="model, report and every stage [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a small run: fewer queries, a smaller corpus")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # loading reports of heads that are not used here
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        named = {name: value for name, value in vars(args).items() if name in ("teacher", "student") and value}
        if args.data is None:
            options = {**demo_options(args.quick), **named, "output": args.output}
            config = DistillationConfig(**options)
            distill(load_demo_data(args.quick), load_demo_teacher(config), config=config)
        else:
            named = {"teacher": str(demo_teacher_folder()), "student": str(weights_folder(*MINILM)), **named}
            sizes: dict[str, Any] = {"train_queries": 200, "test_queries": 60} if args.quick else {}
            distill(args.data, output=args.output, control=True, **named, **sizes)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
