"""The command line of ``distill_msmarco.py``: its flags, and the defaults that depend on other flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval_data import UsageError
from training import LOSSES

QUICK = {"train_queries": 200, "dev_queries": 20, "test_queries": 60, "scored": 3, "pool": 10}
FULL = {"train_queries": 900, "dev_queries": 50, "test_queries": 450, "scored": 5, "pool": 12}


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(
        description="Distil a cross-encoder (teacher) into a bi-encoder (student). Without arguments: the "
        "documentation of this Python as data, demo models that come with pip, no network.",
        epilog="examples:  distill_msmarco.py --quick  |  distill_msmarco.py --data path/to/beir/scifact  |  "
        "distill_msmarco.py --data msmarco --student nreimers/MiniLM-L6-H384-uncased --train-queries 50000",
    )
    add = parser.add_argument
    group = parser.add_argument_group("data").add_argument
    group("--data", default="python", help="'python' (docstrings), 'msmarco' (hub), or a BEIR folder [%(default)s]")
    group("--packages", action="store_true", help="with --data python: add the docstrings of all installed packages")
    group(
        "--msmarco",
        default="lightonai/ms-marco-en-bge",
        metavar="NAME",
        help="with --data msmarco: data set or folder with the configs train, queries and documents [%(default)s]",
    )
    group(
        "--scores",
        type=Path,
        metavar="PATH",
        help="ready teacher scores: a store, or a file that st-m3se convert reads; train queries without scores are "
        "then left out",
    )
    group("--train-queries", type=positive, help=f"at most this many [{FULL['train_queries']}]")
    group("--dev-queries", type=positive, help=f"held out to check the teacher before training [{FULL['dev_queries']}]")
    group("--test-queries", type=positive, help=f"held out for the final table [{FULL['test_queries']}]")
    group = parser.add_argument_group("models").add_argument
    group("--student", default="minilm", help="'minilm' (all-MiniLM-L6-v2), 'tiny' (BERT-tiny), a path or a hub name")
    group("--teacher", default="demo", help="'demo' (ms-marco-MiniLM-L12-v2), a path or a hub name of a cross-encoder")
    group("--guide", default="minilm", help="bi-encoder for dense candidates and for --ensemble [%(default)s]")
    group("--teacher-max-length", type=positive, default=128, help="tokens of query and document [%(default)s]")
    group = parser.add_argument_group("teacher scores").add_argument
    group(
        "--ensemble",
        action=argparse.BooleanOptionalAction,
        help="teach with the mean of the per-query z-scores of cross-encoder and guide [on, off with ready scores]",
    )
    group("--finetune-teacher", action="store_true", help="first fine-tune the cross-encoder on the training queries")
    group(
        "--filter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out negatives that the teacher scores above the known relevant document [on]",
    )
    group("--scored", type=positive, help=f"documents per training query that the teacher scores [{FULL['scored']}]")
    group("--pool", type=positive, help=f"candidates that the teacher re-ranks per held-out query [{FULL['pool']}]")
    group = parser.add_argument_group("training").add_argument
    group(
        "--judgements",
        action=argparse.BooleanOptionalAction,
        help="train on the judgements of the training queries, too; without them the teacher is the only label "
        "[on, off for 'python', whose queries stand for those that nobody has judged]",
    )
    group(
        "--loss",
        choices=sorted([*LOSSES, "combined", "contrastive"]),
        help="[softmax-cross-entropy; with --judgements 'combined', which adds the labels' contrastive loss]",
    )
    group("--scale", type=float, help="the student's cosine times this is its score [20]")
    group(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train the student without the teacher, by the contrastive loss with the same budget: on the "
        "judgements, or without them on BM25's first result as the positive [on]",
    )
    group("--epochs", type=positive, default=1, help="[%(default)s]")
    group("--learning-rate", type=float, default=1e-4, help="[%(default)s]")
    group("--batch-size", type=positive, default=16, help="queries per step [%(default)s]")
    group(
        "--list-size",
        type=positive,
        default=4,
        help="documents per list, drawn afresh every epoch from those that were scored [%(default)s]",
    )
    group("--seed", type=int, default=1)
    add("--output", type=Path, default=Path("distilled"), help="model, teacher scores and results.json [%(default)s]")
    add("--quick", action="store_true", help="a small run: fewer queries, a smaller corpus")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the sizes, and refuse what does not fit together."""
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.judgements is None:
        args.judgements = args.data != "python"
    if args.loss is None:
        args.loss = "combined" if args.judgements else "softmax-cross-entropy"
    if args.list_size < 2 or args.scored < 2:
        raise UsageError(
            "--list-size and --scored: expected at least 2, a relevant document and a negative to compare."
        )
    if not args.learning_rate > 0 or (args.scale is not None and not args.scale > 0):
        raise UsageError("--scale and --learning-rate: expected numbers above 0.")
    if args.packages and args.data != "python":
        raise UsageError(f"--packages belongs to --data python, got --data {args.data}. Leave one of them out.")
    if args.scores and args.data == "msmarco":
        raise UsageError("--scores and --data msmarco both bring teacher scores. Leave one of them out.")
    return args
