"""What a distillation is made of: every field is an option of ``distill``, a flag of the command and a key in TOML."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DistillationConfig"]

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax-cross-entropy": ("SoftmaxCrossEntropyLoss", {}),
    "m3se": ("M3SELoss", {"in_batch_negatives": True}),
    "rank-distil": ("RankDistilLoss", {"top_k": 3}),
    "coupled-rank-distil": ("CoupledRankDistilLoss", {"top_k": 3}),
    "margin-mse": ("MarginMSELoss", {}),
    "all-margins-mse": ("AllMarginsMSELoss", {}),
    "score-mse": ("ScoreMSELoss", {}),
}
"""A loss's name, its class and its options in the paper's setting."""

LOSS_NAMES = ("combined", "contrastive", *LOSSES)
FALSE_NEGATIVES = ("leave-out", "relabel", "keep")
TOKENS = ("words", "bigrams")
DTYPES = ("float32", "bfloat16", "float16", "int8")


def _option(kind: type, default: Any, group: str, text: str, least: float | None = None) -> Any:
    """A field: what one value of it is, where ``--help`` shows it, what it means, and the least that it may be."""
    return field(default=default, metadata={"kind": kind, "group": group, "help": text, "least": least})


@dataclass(frozen=True)
class DistillationConfig:
    """All options of a distillation; what each means is in ``st-m3se distill --help``, which is made from this class.

    The defaults of the training are those that did best in ``benchmarks/loss_comparison.py``; a value of None is
    chosen from the data, the teacher or the model.

    Raises:
        ValueError: If an option is of another type or out of its range; the message names it.
    """

    data: str | None = _option(
        str,
        None,
        "what",
        "A folder as BEIR has them: corpus.jsonl, queries.jsonl and, where there are judgements, qrels/train.tsv, "
        "qrels/dev.tsv, qrels/test.tsv. What is missing is held out.",
    )
    teacher: tuple[str, ...] = _option(
        str, (), "what", "A cross-encoder, or an encoder, by name or path. Repeat it to teach with the mean of several."
    )
    student: str | None = _option(
        str, None, "what", "The dense, sparse or multi-vector encoder to train, by name or path."
    )
    output: str = _option(
        str, "distilled", "what", "Model, report and every stage. The same command goes on where it was."
    )
    generate_queries: str | None = _option(
        str,
        None,
        "data",
        "A language model that writes queries for the documents, by name or path; or sentences, which takes titles and "
        "sentences of the documents, the poorer way. Kept are those whose document the teacher finds.",
    )
    train_queries: int | None = _option(int, None, "data", "Train on at most so many queries.", 1)
    dev_queries: int = _option(
        int, 200, "data", "At most so many held-out queries check the teacher and choose the checkpoint.", 1
    )
    test_queries: int | None = _option(int, None, "data", "At most so many held-out queries for the final table.", 1)
    judgements: bool | None = _option(
        bool,
        None,
        "data",
        "Train on judgements, too. Without, the teacher is the only label. Default: where training queries have any.",
    )
    unjudged: bool = _option(
        bool,
        False,
        "data",
        "Where some training queries have judgements, also train on those without: the teacher is their only label.",
    )
    tokens: str = _option(
        str,
        "words",
        "data",
        "What BM25 matches: words, or bigrams, for scripts without blanks between words, such as Chinese and Thai.",
    )
    exclude_same_id: bool = _option(
        bool, False, "data", "Leave out the document that has the query's own id, unless it is judged for it."
    )
    guide: str | None = _option(
        str, None, "teacher scores", "The encoder that finds candidates beside BM25. Default: the student as it comes."
    )
    scores: str | None = _option(
        str,
        None,
        "teacher scores",
        "Scores that the teacher has given already: a store, as st-m3se score and convert make it. Training queries "
        "without scores are left out; what held-out queries lack the teacher scores.",
    )
    scored: int = _option(int, 8, "teacher scores", "Candidates of a training query that the teacher scores.", 2)
    pool: int = _option(int, 20, "teacher scores", "Candidates of a held-out query that the teacher re-ranks.", 2)
    ensemble: bool | None = _option(
        bool,
        None,
        "teacher scores",
        "Teach with the mean of the per-query z-scores of teacher and guide. Default: what is better on held-out "
        "queries; where these have no judgements, on.",
    )
    false_negatives: str = _option(
        str,
        "leave-out",
        "teacher scores",
        "Unjudged documents that the teacher scores above a known relevant one: leave-out, relabel (as relevant), or "
        "keep (as negatives).",
    )
    false_negative_margin: float = _option(
        float, 0.0, "teacher scores", "The same of those that are lower by less than this, in the teacher's units.", 0
    )
    anyway: bool = _option(bool, False, "teacher scores", "Go on with a teacher that is no better than the student.")
    teacher_max_length: int | None = _option(
        int, None, "teacher scores", "Tokens of a pair; longer ones are cut. Default: the teacher's own.", 1
    )
    teacher_dtype: str | None = _option(str, None, "teacher scores", f"The teacher's precision: {', '.join(DTYPES)}.")
    teacher_prompt: str | None = _option(
        str, None, "teacher scores", "Text in front of each query. Default: the teacher's own prompt."
    )
    teacher_label: int | None = _option(
        int, None, "teacher scores", "Of a cross-encoder with several labels, the one that is the score.", 0
    )
    loss: str | None = _option(
        str,
        None,
        "training",
        f"One of {', '.join(LOSS_NAMES)}. Default: softmax-cross-entropy; with judgements combined, which adds the "
        "labels' contrastive loss.",
    )
    scale: float | None = _option(
        float, None, "training", "The student's score is this times its similarity. Default: 20 for a cosine, else 1."
    )
    learning_rate: float = _option(float, 1e-4, "training", "The highest learning rate.")
    epochs: float = _option(float, 2.0, "training", "Passes over the training queries.")
    start_weight: float = _option(
        float,
        0.3,
        "training",
        "The share that the student as it came has in the weights of the model; the trained one has the rest. It damps "
        "what a few hundred queries overfit. Where dev shows that it does harm, it is not done; 0 never does it.",
        0,
    )
    batch_size: int = _option(int, 16, "training", "Queries per step, over all processes.", 1)
    list_size: int = _option(
        int, 4, "training", "Documents per list, drawn afresh every epoch from those that were scored.", 2
    )
    max_length: int | None = _option(int, None, "training", "Tokens of a text for the student. Default: its own.", 1)
    mini_batch_num_tokens: int | None = _option(
        int, None, "training", "Cache gradients over mini-batches of so many tokens, where memory runs out.", 1
    )
    seeds: tuple[int, ...] = _option(
        int, (1,), "training", "Repeat it for several trainings; the one that is best on dev becomes the model.", 0
    )
    control: bool = _option(
        bool, False, "training", "Also train without the teacher, on the same lists and budget, for the table."
    )
    evaluations: int = _option(int, 4, "training", "How often the student is measured on dev during training.", 1)
    checkpoint_minutes: float = _option(
        float, 2.0, "training", "Save the state of the training so often; a kill costs no more.", 0
    )
    device: str | None = _option(str, None, "machine", "Such as cuda:1 or cpu. Default: a GPU, where there is one.")
    trust_remote_code: bool = _option(bool, False, "machine", "Let models run code of their own from the hub.")

    def __post_init__(self) -> None:
        """Bring values to their types and check their ranges."""
        for each in fields(self):
            value, kind, least = getattr(self, each.name), each.metadata["kind"], each.metadata["least"]
            many = isinstance(each.default, tuple)
            if many:
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            elif kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            elif kind is str and isinstance(value, Path):
                value = str(value)
            object.__setattr__(self, each.name, value)
            if value is None and each.default is None:
                continue
            for one in value if many else (value,):
                if not isinstance(one, kind) or (isinstance(one, bool) and kind is not bool):
                    raise ValueError(f"{each.name} must be {_named(kind, many)}, got {one!r}.")
                if least is not None and not least <= one < math.inf:
                    raise ValueError(f"{each.name} must be at least {least:g}, got {one!r}.")
        for name in ("learning_rate", "scale", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
        if self.start_weight >= 1:
            raise ValueError(f"start_weight must be below 1, got {self.start_weight!r}: nothing would be learned.")
        for name, value, known in (
            ("loss", self.loss, LOSS_NAMES),
            ("teacher_dtype", self.teacher_dtype, DTYPES),
            ("false_negatives", self.false_negatives, FALSE_NEGATIVES),
            ("tokens", self.tokens, TOKENS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must hold one number or several different ones, got {list(self.seeds)}.")

    def teacher_options(self, teacher: Any) -> dict[str, Any]:
        """What ``score_candidates`` gets with a teacher: a function sees to its own."""
        if isinstance(teacher, (str, Path)):
            own = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        elif hasattr(teacher, "predict") or hasattr(teacher, "encode"):
            own = {}
        else:
            return {}
        return own | {name: getattr(self, f"teacher_{name}") for name in ("max_length", "dtype", "prompt", "label")}

    def with_options(self, options: Mapping[str, Any], source: str = "options") -> DistillationConfig:
        """The same with other options.

        Raises:
            ValueError: On an option that there is not.
        """
        known = [each.name for each in fields(self)]
        if unknown := sorted(set(options) - set(known)):
            near = get_close_matches(unknown[0].replace("-", "_"), known, 1)
            meant = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"{source}: there is no option {', '.join(unknown)}.{meant} `st-m3se distill --help` has all."
            )
        return replace(self, **options)

    @classmethod
    def from_toml(cls, path: str | Path) -> DistillationConfig:
        """Read a file of options; those it leaves out have their defaults.

        Raises:
            ValueError: If there is no such file, it is no TOML, or it has a key that is no option.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"there is no file {path}. Mind the spelling; --write-config FILE makes one to begin with."
            )
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no TOML: {error}") from None
        try:
            return cls().with_options(content, str(path))
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None

    def to_toml(self) -> str:
        """A file with all options, what each means, and those without a value as a comment."""
        lines = ["# Options of st-m3se distill. An option without a value is chosen from data and models."]
        for each in fields(self):
            value = asdict(self)[each.name]
            given = each.name if value is not None and value != () else f"# {each.name}"
            text = "" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value)
            lines += ["", f"# {each.metadata['help']}", f"{given} = {text}".rstrip()]
        return "\n".join(lines) + "\n"


def _named(kind: type, many: bool) -> str:
    names: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return f"{names[kind]}, or several" if many else names[kind]
