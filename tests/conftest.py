"""Small real models and real English lists, built offline: no test here downloads or mocks anything."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # model.fit, unlike training arguments, cannot be told

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Threads cost more than they give on matrices this small, and far more on a busy machine.
torch.set_num_threads(1)

DIMENSION = 32
PAIRS = (
    ("find where to insert an item in a sorted list", "Return the index at which the item keeps the list in order."),
    ("count the words of a text", "A counter maps each distinct word to the number of times it occurs."),
    ("read a table of values from a file", "Each row of the file becomes a list of strings, split at the commas."),
    ("wait until a thread has finished", "Join blocks the caller until the thread ends or the timeout is over."),
    ("copy a file with its permissions", "The contents and the mode bits of the source go to the destination."),
    ("remove white space at both ends", "Strip returns a copy without leading and trailing blanks."),
    ("open a network connection", "The socket connects to a remote host and port; it raises an error on failure."),
    ("sort objects by several keys", "A key function that returns a tuple sorts by its first element, then the next."),
    ("parse a date from a string", "The format describes where the year, the month and the day stand in the string."),
    ("measure how long code runs", "A counter with the highest resolution is read before and after the statement."),
    ("compress bytes in memory", "Data is deflated at the given level; the result starts with a short header."),
    ("make a temporary directory", "The directory is removed with everything in it when the context ends."),
    ("run a command in a shell", "The process gets its arguments as a list and returns its output and exit code."),
    ("match text against a pattern", "The regular expression is searched anywhere; groups hold what was found."),
    ("cache the results of a function", "The least recently used entries leave when the cache is full."),
    ("round a number to two digits", "Ties go to the even digit, so that long sums do not drift."),
)
"""What a user looks for, and the passage that answers it."""
ANSWERS = tuple(answer for _, answer in PAIRS)
WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Features = dict[str, Any]


def _teacher(row: int, documents: list[int]) -> list[float]:
    """Scores as a good teacher gives them: the answer first, the rest in an order of their own, no two alike."""
    return [2.0 if document == row else ((document * 7 + row * 3) % 16) / 10 - 0.8 for document in documents]


def _row(row: int, documents: list[int]) -> dict[str, Any]:
    return {
        "query": PAIRS[row][0],
        "documents": [ANSWERS[document] for document in documents],
        "scores": _teacher(row, documents),
    }


@pytest.fixture
def ragged_rows() -> list[dict[str, Any]]:
    """Sixteen lists of 2 to 5 documents, the positive first, with documents shared between neighbours."""
    return [_row(row, [row, *((row + step) % 16 for step in range(1, 2 + row % 4))]) for row in range(16)]


@pytest.fixture
def even_rows() -> list[dict[str, Any]]:
    """Sixteen lists of 3 documents; one query's positive is its neighbours' negative, in another place of the list."""
    return [_row(row, [row, (row + 1) % 16, (row - 1) % 16]) for row in range(16)]


def as_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with one column per document, as the stock collator takes them."""
    return [
        {"query": row["query"]}
        | {f"document_{place}": text for place, text in enumerate(row["documents"], start=1)}
        | {"label": row["scores"]}
        for row in rows
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained two-layer BERT with a vocabulary of the words above, saved as a user would have it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for pair in PAIRS for text in pair for word in re.findall(r"[a-z]+|[^\sa-z]", text.lower())})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*WORD_PIECES, *dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters), ":", "?"])]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=DIMENSION,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # the usual 0.02 gives every text about the same embedding
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(checkpoint: Path) -> Callable[..., SentenceTransformer]:
    """Build a student: mean pooling, cosine, and dropout only where a test asks for it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    def build(dropout: float = 0.0, include_prompt: bool = True, **kwargs: Any) -> SentenceTransformer:
        config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        transformer = Transformer(str(checkpoint), config_kwargs=config)
        pooling = Pooling(DIMENSION, "mean", include_prompt=include_prompt)
        return SentenceTransformer(modules=[transformer, pooling], device="cpu", **kwargs)

    return build


@pytest.fixture
def model(make_model: Callable[..., SentenceTransformer]) -> SentenceTransformer:
    """A student without dropout, in training mode, so that two ways to one gradient can be compared."""
    return make_model().train()


@pytest.fixture
def static_model(checkpoint: Path) -> SentenceTransformer:
    """A student whose features have no rows: a StaticEmbedding's token stream."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIMENSION)], device="cpu").train()


@dataclass(frozen=True)
class Batch:
    """What the trainer hands to a loss."""

    features: list[Features]
    labels: Any

    def fresh(self) -> list[Features]:
        """Features of their own for each call: modules write their outputs into the dict that they get."""
        return copy.deepcopy(self.features)


def split(inputs: dict[str, Any]) -> Batch:
    """The trainer's own split of a collated batch into features and labels."""
    from sentence_transformers import SentenceTransformerTrainer

    return Batch(*SentenceTransformerTrainer.collect_features(None, inputs))  # type: ignore[arg-type]


def collate(model: SentenceTransformer, rows: list[dict[str, Any]], **options: Any) -> Batch:
    """Ragged rows through this package's collator."""
    from st_m3se import DistillationCollator

    return split(DistillationCollator(preprocess_fn=model.preprocess, **options)(rows))


def collate_columns(model: SentenceTransformer, rows: list[dict[str, Any]], **options: Any) -> Batch:
    """The same rows, one column per document, through the stock collator."""
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    return split(SentenceTransformerDataCollator(preprocess_fn=model.preprocess, **options)(as_columns(rows)))


def gradients(loss: nn.Module, model: nn.Module, batch: Batch, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every parameter's gradient after one backward pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    value = loss(batch.fresh(), batch.labels)
    value.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), grads


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` of the largest entry, and not because both are zero."""
    assert one.keys() == other.keys()
    largest = max(float(grad.abs().max()) for grad in one.values())
    assert largest > 1e-4, "all gradients are zero: the comparison would say nothing"
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=0.0, atol=tolerance * max(1.0, largest), msg=name)


@dataclass(frozen=True)
class LossSpec:
    """A loss of the package with its own options, by name, so that tests can run over all of them."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    function: str = ""

    def __str__(self) -> str:
        return "-".join([self.name, *(value for value in self.options.values() if isinstance(value, str))])

    def build(self, model: nn.Module, **common: Any) -> Any:
        import st_m3se

        joining = ("in_batch_negatives", "gather_across_devices")  # which not every loss takes
        common = {name: value for name, value in common.items() if value or name not in joining}
        return getattr(st_m3se, self.name)(model, **common, **self.options)

    def functional(self, student: Tensor, teacher: Tensor, positives: Tensor, mask: Tensor | None = None) -> Tensor:
        """The pure function behind the loss, from scores."""
        from st_m3se import functional

        if self.name == "ContrastiveLoss":
            return functional.contrastive_loss(student, positives=positives, mask=mask)
        given = {"positives": positives} if self.name in ("M3SELoss", "MarginMSELoss") else {}
        return getattr(functional, self.function)(student, teacher, mask=mask, **given, **self.options)


LOSSES = [
    LossSpec("M3SELoss", {}, "m3se_loss"),
    LossSpec("MarginMSELoss", {}, "margin_mse_loss"),
    LossSpec("ScoreMSELoss", {}, "score_mse_loss"),
    LossSpec("AllMarginsMSELoss", {"top_temperature": 3.0}, "all_margins_mse_loss"),
    LossSpec("ContrastiveLoss", {}, "contrastive_loss"),
    LossSpec(
        "SoftmaxCrossEntropyLoss",
        {"student_temperature": 0.5, "teacher_temperature": 2.0},
        "softmax_cross_entropy_loss",
    ),
    LossSpec("RankDistilLoss", {"top_k": 2, "match": "binary", "penalty_weight": 0.5}, "rank_distil_loss"),
    LossSpec("RankDistilLoss", {"top_k": 2, "match": "score"}, "rank_distil_loss"),
    LossSpec("CoupledRankDistilLoss", {"num_samples": 4}, "coupled_rank_distil_loss"),
]
UNSCORED_LOSSES = [spec for spec in LOSSES if spec.name not in ("MarginMSELoss", "ScoreMSELoss", "AllMarginsMSELoss")]
"""The losses in which a document without a teacher score has a part, and so in-batch negatives."""
MARGIN_LOSSES = [spec for spec in LOSSES if "MSE" in spec.name or spec.name == "M3SELoss" or "score" in str(spec)]
"""The losses whose scale must fit the teacher's margins: M3SE, the MSE losses and RankDistil on scores."""
M3SE = LOSSES[0]


@pytest.fixture(params=LOSSES, ids=str)
def spec(request: pytest.FixtureRequest) -> LossSpec:
    """Each loss of the package in turn."""
    return request.param


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """Training arguments for a few quick steps on the CPU."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    def build(**changes: Any) -> Any:
        options: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return SentenceTransformerTrainingArguments(**options | changes)

    return build
