#!/usr/bin/env bash
# sentence-transformers 6.2.0 (datasets 5.2.0): three things that mine_hard_negatives does without a word.
#
# 1. It never calls the cross_encoder that it is given, unless a margin, max_score or min_score is set too. Candidates
#    and, with output_scores=True, scores are the bi-encoder's: cosines, where a teacher's scores are expected. "A
#    CrossEncoder model to use for rescoring the candidates" and "computed by the model or cross_encoder", say the docs.
# 2. It normalises all embeddings, also of a model whose similarity is the dot product: it mines and scores by the cosine,
#    so that "negatives" are not those that the model finds when it searches.
# 3. cache_folder knows a model by its card's base_model: the docs say "the model name". That is empty for whatever comes
#    from modules or a folder, and of a model of the hub it outlasts training. The second round of mining, with the
#    trained model, gets the embeddings of the first.
# Score the mined texts with the teacher yourself (CrossEncoder.predict with activation_fn=torch.nn.Identity()), or set
# min_score=float("-inf"), which turns the cross-encoder on; give every model a cache_folder of its own.
# Exit status 0: all are so. 1: one has changed, and the last line says which.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers[train]==6.2.0" "transformers==5.23.0" \
    "datasets==5.2.0"
cd "$folder"
export HF_HUB_OFFLINE=1 ACCELERATE_USE_CPU=true
"$folder/env/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -1 "$folder/log"; exit 1; }
import sys
from contextlib import redirect_stdout
from importlib.metadata import version

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import mine_hard_negatives
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.3, **sizes)).save_pretrained("base")
BertTokenizerFast(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained("base")
names = [(one, two) for one in "abcdefgh" for two in "ijklmnop"]
rows = [{"query": f"{one} {two}", "document": f"{two} {one} {one}"} for one, two in names]
pairs = Dataset.from_list(rows)
model = SentenceTransformer(modules=[Transformer("base"), Pooling(32, "mean")], similarity_fn_name="dot", device="cpu")
teacher = CrossEncoder("base", num_labels=1, device="cpu")
calls, predict = [], teacher.predict
teacher.predict = lambda *args, **options: calls.append(1) or predict(*args, **options)


def mined(model, **options):
    return mine_hard_negatives(
        pairs, model, num_negatives=2, output_format="n-tuple", output_scores=True, verbose=False, **options
    )


def texts(row):
    return [row["document"], row["negative_1"], row["negative_2"]]


def rounded(scores):
    return [round(float(score), 3) for score in scores]


def say(number, holds, text):
    print(f"{number}. {text}")
    assert holds, f"number {number} has changed: {text}"


print("sentence-transformers", version("sentence-transformers"))
row = mined(model, cross_encoder=teacher)[0]
unused, scores, true = len(calls), rounded(row["scores"]), rounded(predict([(row["query"], text) for text in texts(row)]))
other = mined(model, cross_encoder=teacher, min_score=float("-inf"))[0]
again = rounded(predict([(other["query"], text) for text in texts(other)]))
say(1, unused == 0 and scores != true and len(calls) > 0 and rounded(other["scores"]) == again, f"cross_encoder alone: called "
    f"{unused} times, scores of a row {scores}, the cross-encoder's own {true}; with min_score=-inf called {len(calls)} times, "
    f"scores {rounded(other['scores'])}, its own {again}")

documents = pairs["document"][:]
inner = model.similarity(model.encode_query(pairs["query"][:]), model.encode_document(documents))
first = [documents[place] for place in inner.masked_fill(torch.eye(len(pairs), dtype=torch.bool), -torch.inf).argmax(1)]
found = mined(model)
same = sum(a == b for a, b in zip(found["negative_1"], first))
dots = rounded(inner[0, [documents.index(text) for text in texts(row)]])
cosines = max(map(max, found["scores"])) <= 1.001 and min(dots) > 2
say(2, cosines and same < len(pairs) - 5, f"a model of dot products: scores of a row {scores}, its own similarity {dots}; the "
    f"hardest negative is the one that its own search finds first for {same} of {len(pairs)} queries")

before = mined(model, cache_folder="cache")
loss = MultipleNegativesRankingLoss(model)
arguments = Arguments(output_dir="run", use_cpu=True, report_to="none", save_strategy="no", max_steps=30, learning_rate=1e-2)
with redirect_stdout(sys.stderr):
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
model.save_pretrained("trained")
trained = SentenceTransformer("trained", device="cpu")
cached, fresh = mined(trained, cache_folder="cache"), mined(trained)
stale = cached.to_dict() == before.to_dict() and cached["scores"][:] != fresh["scores"][:]
changed = sum({*texts(a)[1:]} != {*texts(b)[1:]} for a, b in zip(cached, fresh))
say(3, stale and changed > 5, f"trained, saved, loaded and mined again in the same cache_folder: a row's scores "
    f"{rounded(cached[0]['scores'])}, as before training; without a cache "
    f"{rounded(fresh[0]['scores'])}, and other negatives for {changed} of {len(pairs)} queries")
PYTHON
