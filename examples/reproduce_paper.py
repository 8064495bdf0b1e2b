"""See on your own data what the paper behind M3SE saw: the train/test gap, the table of losses, margins, evolution.

    pip install -e ".[demo,plot]" && python examples/reproduce_paper.py --output paper          # --help: the manual
    python examples/reproduce_paper.py --data path/to/beir/medquad --student minilm --output paper-medquad

What: a cross-encoder (CA) and bi-encoders (DE) from the same trunk, trained on the same lists with the same budget, and
bi-encoders distilled from a large cross-encoder that is first fine-tuned on these lists. All systems re-rank what BM25
finds. Exhibits, each of which goes on where it was when the same command is given again:

    teacher    is the teacher better than the student that nobody taught? If not, nothing can be learned from it
    table      BM25, CA, teacher, DE, and DE distilled with every loss, several seeds, significance
    gap        RR@10 on training and on test queries against the size of the embedding, and against dropout
    margins    score densities and normalised margins of BM25, teacher, CA, DE and distilled DE on the test queries
    evolution  scores of a few documents of one training query during training, CA beside DE beside distilled DE

OUT gets units/ (each training's scores and values per query), teacher/, table/ (report.html, results.json), gap_size,
gap_dropout, evolution (.png, .svg, .json or .csv), diagnosis/ (report.html), summary.json and summary.md, which says
where the paper's picture is confirmed and where it is not. made_from.json says what it all comes from: another teacher,
other data or settings need another OUT.

Hardware and time: a GPU is used where there is one. Without arguments it took 100 minutes on one CPU core beside other
work: 20 minutes of it for the 12-layer teacher, fine-tuned on 2,400 pairs and scoring 14,400, and one to two for each
of the 60 trainings. What came of it is in benchmarks/results/paper_python_docs. On medquad (64 tokens, 1,000 lists)
there was nothing to learn: the bi-encoder that nobody taught reached RR@10 0.91 on test, the fine-tuned teacher 0.90.
Larger students take hours: one exhibit at a time, with --exhibits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paper_exhibits import Reproduction
from paper_summary import render_summary
from transformers.utils import logging as transformers_logging

from st_m3se.distillation.config import LOSSES
from st_m3se.distillation.stages import read_result, write_text

EXHIBITS = ("teacher", "table", "gap", "margins", "evolution")


def build_parser() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="python", help="'python' (docstrings of this Python) or a BEIR folder")
    add("--output", type=Path, default=Path("paper"), help="everything goes here")
    add("--exhibits", nargs="+", choices=EXHIBITS, default=list(EXHIBITS), help="what to make")
    add("--student", default="tiny", help="trunk of CA and DE: 'tiny', 'minilm', a path or a hub name")
    add("--teacher", default="demo", help="'demo' (ms-marco-MiniLM-L12-v2), a path or a hub name of a cross-encoder")
    add("--teacher-epochs", type=float, default=1.0, help="fine-tuning of the teacher on the training lists; 0: none")
    add("--train-queries", type=int, default=600, help="queries to train on")
    add("--measured-queries", type=int, default=300, help="queries of each split to measure")
    add("--depth", type=int, default=20, help="documents to re-rank")
    add("--list-size", type=int, default=4, help="documents of a training list")
    add("--sizes", type=int, nargs="+", help="embedding sizes of the gap, the last one that of the table")
    add("--dropouts", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="dropouts of the gap's second axis")
    add("--dropout", type=float, default=0.1, help="everywhere else")
    add("--losses", nargs="+", choices=sorted(LOSSES), default=list(LOSSES), help="the losses of the table")
    add("--distilled", choices=sorted(LOSSES), default="m3se", help="the loss of the other exhibits")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the trainings")
    add("--epochs", type=float, default=5.0, help="of every training but the teacher's")
    add("--batch-size", type=int, default=32, help="lists per step")
    add("--learning-rate", type=float, help="of CA and DE; 5e-4 for tiny, else 5e-5")
    add("--scale", type=float, default=20.0, help="a student's score is this times its cosine")
    add("--max-length", type=int, default=80, help="tokens of a text or pair")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the exhibits."""
    args = build_parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        reproduction = Reproduction(args)
        # The margins before the table, whose page shows them.
        for exhibit in sorted(args.exhibits, key=("teacher", "margins", "table", "gap", "evolution").index):
            getattr(reproduction, f"show_{exhibit}")()
            args.output.mkdir(parents=True, exist_ok=True)
            file = args.output / "summary.json"
            summary = (read_result(file) or {}) | reproduction.summary
            write_text(file, json.dumps(summary, indent=1) + "\n")
            write_text(args.output / "summary.md", render_summary(summary))
        print((args.output / "summary.md").read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
