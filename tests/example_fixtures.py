"""Tiny random models, a tiny BEIR folder and teachers for it, made on the fly: no weights, no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from st_m3se.distillation.data import in_hash_order

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]
ANIMALS = ["cat", "dog", "horse", "cow", "hen", "goat"]
WORDS = [*COLOURS, *ANIMALS, "the", "a", "runs", "sleeps", "eats", "near", "house", "where", "is", "in", "barn", "old"]


def make_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizer(str(vocabulary), model_max_length=64).save_pretrained(folder)


def tiny_config(labels: int = 1) -> BertConfig:
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    config.num_labels = labels
    return config


def make_student(folder: Path) -> Path:
    torch.manual_seed(0)
    trunk = folder / "trunk"
    make_tokenizer(trunk)
    BertModel(tiny_config()).save_pretrained(trunk)
    transformer = Transformer(str(trunk), max_seq_length=48)
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    model.save_pretrained(str(folder / "student"))
    return folder / "student"


def make_teacher(folder: Path, labels: int = 1) -> Path:
    torch.manual_seed(1)
    path = folder / f"teacher{labels}"
    make_tokenizer(path)
    BertForSequenceClassification(tiny_config(labels)).save_pretrained(path)
    return path


def texts() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Corpus, queries, and the relevant document of each query."""
    corpus, queries, relevant = {}, {}, {}
    for i, colour in enumerate(COLOURS):
        for j, animal in enumerate(ANIMALS):
            document, query = f"d{i}{j}", f"q{i}{j}"
            corpus[document] = (
                f"the {colour} {animal} sleeps near the old house. a {animal} eats in the barn. it is {colour}"
            )
            queries[query] = f"where is the {colour} {animal}"
            relevant[query] = document
    return corpus, queries, relevant


def make_beir(folder: Path, splits: tuple[str, ...] = ("train", "dev", "test")) -> Path:
    corpus, queries, relevant = texts()
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for identifier, text in corpus.items():
            file.write(json.dumps({"_id": identifier, "title": text.split(".")[0], "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for identifier, text in queries.items():
            file.write(json.dumps({"_id": identifier, "text": text}) + "\n")
    names = in_hash_order(relevant)  # so that every split has every colour and animal
    for number, split in enumerate(splits):
        lines = [f"{query}\t{relevant[query]}\t1" for query in names[number :: len(splits)]]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def shared_words(pairs: list[tuple[str, str]]) -> list[float]:
    """A good teacher: a document is as relevant as it has words of the query."""
    return [4.0 * len(set(query.split()) & set(document.split())) - len(document) / 1e3 for query, document in pairs]


def other_words(pairs: list[tuple[str, str]]) -> list[float]:
    """A bad one: the opposite."""
    return [-score for score in shared_words(pairs)]
