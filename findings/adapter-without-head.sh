#!/usr/bin/env bash
# sentence-transformers 6.2.0: a CrossEncoder's LoRA adapter is saved without the classification head.
#
# CrossEncoder(base, num_labels=1) draws a new head for a base model that has none. add_adapter(...) then trains the
# adapter, save_pretrained writes the adapter alone, and every load draws another head: two loads of one folder give a
# pair two scores, and neither is the trained model's. With LoraConfig(modules_to_save=["classifier"]) the head is kept.
# Exit status 0: it is so. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers[train]==6.2.0" "transformers==5.23.0" "peft==0.21.2"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import torch
from peft import LoraConfig
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertModel, BertTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "dog"]
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BertModel(BertConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained("base")
BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained("base")


def scores(**options):
    """The trained model's score of a pair, and those of two loads of its folder."""
    model = CrossEncoder("base", num_labels=1, device="cpu")
    model.add_adapter(LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **options))
    model.save_pretrained("adapter")
    models = [model, CrossEncoder("adapter", device="cpu"), CrossEncoder("adapter", device="cpu")]
    return [float(each.predict([("red cat", "red dog")])[0]) for each in models]


without, kept = scores(), scores(modules_to_save=["classifier"])
print("trained, loaded, loaded again:", *(f"{score:.3f}" for score in without))
print("the same with modules_to_save:", *(f"{score:.3f}" for score in kept))
assert max(without) - min(without) > 1e-3 and max(kept) - min(kept) < 1e-6, "this has changed"
PYTHON
