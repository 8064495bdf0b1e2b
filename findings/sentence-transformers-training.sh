#!/usr/bin/env bash
# sentence-transformers 6.2.0 (transformers 5.23.0, datasets 5.2.0): seven things that training does without a word.
#
# 1. A Router's column that router_mapping leaves out takes the default route: the query tower gets no gradient.
# 2. The trainer gives texts neither the model's own prompts nor a task, on which query_length hangs; encode_query has both.
# 3. MatryoshkaLoss normalises the full embedding too, so that a dot-product loss is another one inside it.
# 4. batch_sampler="no_duplicates" compares every column but the label as text: equal flags put each row into a batch of
#    its own.
# 5. model.fit cuts all rows to the shortest `texts`.
# 6. A model saved in bfloat16 is loaded in bfloat16, and there one step of AdamW at 2e-5 changes few of its weights.
# 7. Dataset.from_list keeps the columns of its first row; in reverse order, the trainer fails with a TypeError.
#
# Prints a line for each. Exit status 0: all are so. 1: one has changed, and the last line says which.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers[train]==6.2.0" "transformers==5.23.0" "datasets==5.2.0"
cd "$folder"
export HF_HUB_OFFLINE=1 ACCELERATE_USE_CPU=true
"$folder/env/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -1 "$folder/log"; exit 1; }
import copy

import torch
from datasets import Dataset
from sentence_transformers import InputExample, SentenceTransformer, SentenceTransformerTrainer, util
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.losses import MarginMSELoss, MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", "find", ":"]
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.3, **sizes)).save_pretrained("base")
BertTokenizerFast(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained("base")
ROWS = [{"query": f"{one} {two}", "document": f"{two} {one}"} for one, two in zip("abcdefgh", "ijklmnop")]


def tower():
    return [Transformer("base"), Pooling(32, "mean")]


def plain(**options):
    return SentenceTransformer(modules=tower(), device="cpu", **options)


def trainer(model, rows, loss=None, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3} | options
    arguments = Arguments(output_dir="run", use_cpu=True, report_to="none", save_strategy="no", **options)
    dataset = Dataset.from_list(rows)
    loss = loss or MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)


def say(number, holds, text):
    print(f"{number}. {text}")
    assert holds, f"number {number} has changed: {text}"


model = SentenceTransformer(modules=[Router.for_query_document(tower(), tower())], device="cpu")
before = copy.deepcopy(model.state_dict())
trainer(model, ROWS, router_mapping={"document": "document"}).train()
after = model.state_dict()
changed = {route: any(not before[n].equal(after[n]) for n in after if f"{route}.0" in n) for route in ("query", "document")}
say(1, changed == {"query": False, "document": True}, f"with the query unmapped, trained towers: {changed}")

model = plain(prompts={"query": "find : "})
model[0].query_length = 3
batch = next(iter(trainer(model, ROWS).get_train_dataloader()))
seen = []
forward, model.forward = model.forward, lambda features, **_: seen.append(features["input_ids"]) or forward(features)
model.encode_query(["a i"])
trained, searched = (model.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (batch["query_input_ids"], seen[0]))
widths = batch["query_input_ids"].shape[1], seen[0].shape[1]
say(2, widths == (4, 3) and "find" not in trained and "find" in searched, f"tokens of a query in training and in "
    f"encode_query: {widths}; as text {trained!r} and {searched!r}")

model = plain()
texts = [{"input_ids": torch.tensor([[2, 5 + n, 6 + n, 3]]), "attention_mask": torch.ones(1, 4)} for n in range(3)]
loss = MarginMSELoss(model, similarity_fct=util.pairwise_dot_score)
label = torch.tensor([10.0])
alone, inside = (
    float(each(copy.deepcopy(texts), label)) for each in (loss, MatryoshkaLoss(model, loss, [32], matryoshka_weights=[1]))
)
say(3, abs(alone - inside) > 1e-3, f"Margin MSE of dot products alone {alone:.2f}, in MatryoshkaLoss of the full size {inside:.2f}")

flagged = [row | {"flags": [True, False]} for row in ROWS]
plain_sizes, flagged_sizes = (
    [len(batch["query_input_ids"]) for batch in trainer(plain(), ROWS, batch_sampler="no_duplicates").get_train_dataloader()],
    [len(rows) for rows in trainer(plain(), flagged, batch_sampler="no_duplicates").get_train_dataloader().batch_sampler],
)
say(4, plain_sizes == [4, 4] and flagged_sizes == [1] * 8, f"batches of 8 rows: {plain_sizes}; with equal flags {flagged_sizes}")

columns = []


class Counting(MultipleNegativesRankingLoss):
    def forward(self, features, labels):
        features = list(features)
        columns.append(len(features))
        return super().forward(features, labels)


model = plain()
examples = [InputExample(texts=["a b", "b a", "c d", "e f"]) for _ in range(3)] + [InputExample(texts=["g h", "h g"])]
model.fit([(DataLoader(examples, batch_size=2), Counting(model))], epochs=1, warmup_steps=0, show_progress_bar=False)
say(5, set(columns) == {2}, f"columns that a loss sees of rows with 4, 4, 4 and 2 texts: {sorted(set(columns))}")

shares = {}
for dtype in (torch.float32, torch.bfloat16):
    plain().to(dtype).save_pretrained("saved")
    model = SentenceTransformer("saved", device="cpu")
    before = copy.deepcopy(model.state_dict())
    trainer(model, ROWS, max_steps=1, learning_rate=2e-5, lr_scheduler_type="constant").train()
    moved = [(before[name] != value).float().flatten() for name, value in model.state_dict().items() if "encoder" in name]
    shares[str(model.dtype)] = float(torch.cat(moved).mean())
say(6, shares["torch.float32"] > 0.9 and shares["torch.bfloat16"] < 0.3, "share of encoder weights that a step of AdamW "
    + "at 2e-5 changes: " + ", ".join(f"{share:.0%} in {dtype}" for dtype, share in shares.items()))

names = Dataset.from_list([ROWS[0], ROWS[1] | {"positives": [True]}]).column_names
try:
    trainer(plain(), [ROWS[0] | {"positives": [True]}, ROWS[1]])
    error = None
except TypeError as caught:
    error = caught
say(7, "positives" not in names and error is not None, f"columns of two rows, of which the second has positives: {names}; "
    f"in reverse order the trainer says {error!r}")
PYTHON
