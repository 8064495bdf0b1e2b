#!/usr/bin/env bash
# sentence-transformers 6.2.0: ReciprocalRankFusionEvaluator and CrossEncoderRerankingEvaluator reward short lists.
#
# Relevant documents that a list lacks are put right behind its end, as if they had been found there, wherever at least
# one was found. A list with one of ten relevant documents and nothing else has nDCG@10 and MAP 1; with every irrelevant
# document that is appended below, it falls. In trec_eval both lists have nDCG@10 0.22 and MAP 0.1. So it is with the
# dense and the sparse list and their fusion, and with the "base" of a reranker; MAP is too high at any length.
# A union of two lists is longer than either: fusion with a list of nothing relevant costs it much, and "Gain vs Dense"
# compares two yardsticks. With always_rerank_positives=False a reranker is measured in the third way, without the missing
# ones: one that keeps the order gains. The docs say of it that the maximum then is below 1 and the evaluation "more realistic".
# Fuse the runs yourself and measure them with trec_eval, all to the same depth.
# Exit status 0: it is so. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers==6.2.0" "transformers==5.23.0" "numpy==2.4.6" \
    "pytrec_eval-terrier==0.5.11"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

import numpy as np
import pytrec_eval
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sparse_encoder.evaluation import ReciprocalRankFusionEvaluator
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

print(*(f"{name} {version(name)}" for name in ("sentence-transformers", "pytrec_eval-terrier")), sep=", ")
RELEVANT = [f"relevant {number}" for number in range(10)]


def noise(count, name="other"):
    return [f"{name} {number}" for number in range(count)]


def trec(documents):
    run = {"q": {document: -float(place) for place, document in enumerate(documents)}}
    found = pytrec_eval.RelevanceEvaluator({"q": dict.fromkeys(RELEVANT, 1)}, {"ndcg_cut.10", "map"}).evaluate(run)["q"]
    return round(found["ndcg_cut_10"], 3), round(found["map"], 3)


def sample(documents):
    return [{"query_id": "q", "query": "query", "positive": RELEVANT, "documents": documents}]


def fused(dense, sparse):
    found = ReciprocalRankFusionEvaluator(sample(dense), sample(sparse), write_csv=False)()
    return [(round(float(found[f"{name}ndcg@10"]), 3), round(float(found[f"{name}map"]), 3)) for name in ("dense_", "")]


print("nDCG@10 and MAP of lists with one of ten relevant documents, at the top:")
values = []
for count in (0, 2, 4, 9, 99):
    documents = [RELEVANT[0], *noise(count)]
    values.append(fused(documents, documents)[0])
    print(f"  {count} irrelevant ones below it: {values[-1]}, by trec_eval {trec(documents)}")
    assert trec(documents) == (0.22, 0.1)
assert values[0] == (1, 1) and values == sorted(values, reverse=True) and values[-1][1] > 0.12, "the lists have changed"

dense, sparse = [RELEVANT[0], *noise(2)], noise(3, "sparse")
before, after = fused(dense, sparse)
merged = [document for both in zip(dense, sparse) for document in both]  # reciprocal rank fusion of these two
print(f"a list of 3 {before}, fused with one of nothing relevant {after}; by trec_eval {trec(dense)} and {trec(merged)}")
assert before[0] - after[0] > 0.2, "the fusion has changed"

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **sizes)).save_pretrained("base")
BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained("base")
reranker = CrossEncoder("base", device="cpu")
reranker.predict = lambda pairs, **options: -np.arange(len(pairs), dtype=float)  # it keeps the order that it is given
evaluator = CrossEncoderRerankingEvaluator(sample([RELEVANT[0], *noise(4)]), always_rerank_positives=False, write_csv=False)
found = {name: round(float(value), 3) for name, value in evaluator(reranker).items()}
base, reranked = ((found[f"{name}ndcg@10"], found[f"{name}map"]) for name in ("base_", ""))
print(f"a reranker that changes nothing: base {base}, reranked {reranked}")
assert reranked == (1, 1) and max(base) < 0.7, "the reranker has changed"
PYTHON
