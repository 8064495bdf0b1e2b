"""The command line of ``distill_msmarco.py``: its flags, and the defaults that depend on other flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval_data import UsageError
from training import LOSSES

QUICK = {
    "epochs": 1,
    "warm_up": 1.0,
    "train_queries": 300,
    "dev_queries": 20,
    "test_queries": 80,
    "scored": 3,
    "pool": 10,
    "pseudo_queries": 300,
    "package_pairs": 300,
}
FULL = {
    "train_queries": 1500,
    "dev_queries": 50,
    "test_queries": 150,
    "scored": 3,
    "pool": 20,
    "pseudo_queries": 1500,
    "package_pairs": 8000,
}
TINY = {"epochs": 1, "learning_rate": 1e-4, "warm_up": 2.0}
OTHERS = {"epochs": 1, "learning_rate": 1e-5, "warm_up": 0.0, "pseudo_queries": 0, "package_pairs": 0}


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
        epilog="examples:  distill_msmarco.py --quick  |  distill_msmarco.py --data path/to/beir/scifact "
        "--student minilm  |  distill_msmarco.py --data msmarco --student nreimers/MiniLM-L6-H384-uncased "
        "--train-queries 50000",
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
    group("--student", default="tiny", help="'tiny' (BERT-tiny), 'minilm' (all-MiniLM-L6-v2), a path or a hub name")
    group("--teacher", default="demo", help="'demo' (ms-marco-MiniLM-L12-v2), a path or a hub name of a cross-encoder")
    group("--guide", default="minilm", help="bi-encoder for dense candidates and for --ensemble [%(default)s]")
    group("--teacher-max-length", type=positive, default=192, help="tokens of query and document [%(default)s]")
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
    group("--loss", choices=sorted(LOSSES), default="m3se", help="[%(default)s]")
    group(
        "--scale",
        type=float,
        default=20.0,
        help="the student's cosine times this is its score: wide enough for the teacher's margins [%(default)s]",
    )
    group(
        "--warm-up",
        type=float,
        metavar="EPOCHS",
        help="first train without a teacher, on pairs of texts against the rest of the batch "
        f"[{TINY['warm_up']:g} for tiny, else 0]",
    )
    group("--warm-up-rate", type=float, default=1e-3, help="its learning rate [%(default)s]")
    group(
        "--package-pairs",
        type=int,
        help="docstrings of installed packages for the warm-up, with --data python "
        f"[{FULL['package_pairs']} for tiny, else 0]",
    )
    group("--epochs", type=positive, help=f"[{TINY['epochs']} for tiny, else {OTHERS['epochs']}]")
    group(
        "--learning-rate",
        type=float,
        help=f"[{TINY['learning_rate']:g} for tiny, else {OTHERS['learning_rate']:g}]",
    )
    group("--batch-size", type=positive, default=64, help="queries per step [%(default)s]")
    group(
        "--list-size",
        type=positive,
        default=3,
        help="documents per list, drawn afresh every epoch from those that were scored [%(default)s]",
    )
    group(
        "--pseudo-queries",
        type=int,
        help="also train on this many sentences of the corpus as queries, scored by the "
        f"guide; 0: none [{FULL['pseudo_queries']} for tiny, else 0]",
    )
    group(
        "--spread",
        type=float,
        default=5.0,
        help="the guide's cosines times this and --scale are its scores of the pseudo-queries [%(default)s]",
    )
    group("--seed", type=int, default=1)
    add("--output", type=Path, default=Path("distilled"), help="model, teacher scores and results.json [%(default)s]")
    add("--quick", action="store_true", help="a small run: fewer queries, a smaller corpus")
    return parser


def _quick(quick: bool, tiny: bool) -> dict[str, float]:
    return {name: value for name, value in QUICK.items() if tiny or name not in OTHERS} if quick else {}


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other arguments, and refuse what does not fit together."""
    tiny = args.student == "tiny"
    for name, value in (FULL | (TINY if tiny else OTHERS) | _quick(args.quick, tiny)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.list_size < 2 or args.scored < 2:
        raise UsageError(
            "--list-size and --scored: expected at least 2, a relevant document and a negative to compare."
        )
    if min(args.pseudo_queries, args.package_pairs, args.warm_up) < 0:
        raise UsageError("--pseudo-queries, --package-pairs and --warm-up: expected numbers of at least 0.")
    if not min(args.scale, args.spread, args.learning_rate, args.warm_up_rate) > 0:
        raise UsageError("--scale, --spread, --learning-rate and --warm-up-rate: expected numbers above 0.")
    if args.packages and args.data != "python":
        raise UsageError(f"--packages belongs to --data python, got --data {args.data}. Leave one of them out.")
    if args.scores and args.data == "msmarco":
        raise UsageError("--scores and --data msmarco both bring teacher scores. Leave one of them out.")
    return args
