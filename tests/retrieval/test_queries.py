"""Generated queries: real (tiny, random) models of transformers, and functions whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from st_m3se import TeacherScores, build_distillation_dataset, generate_queries
from st_m3se.data.qrels import read_qrels
from st_m3se.data.texts import Texts
from st_m3se.retrieval import queries as module

CORPUS = {f"d{place}": text for place, text in enumerate(ANSWERS)}
CHAT = "{% for turn in messages %}? {{ turn['content'] }} :{% endfor %}"


@pytest.fixture(autouse=True)
def _small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(module, "SHARD", 6)


def generate(model: Any, output: Path, corpus: Any = CORPUS, **options: Any) -> dict[str, int]:
    return generate_queries(corpus, model, output, show_progress_bar=False, **options)


def written(folder: Path) -> dict[str, list[str]]:
    lines = [line for path in sorted(folder.glob("generated/*.jsonl")) for line in path.read_text().splitlines()]
    return {record["document"]: record["queries"] for record in map(json.loads, lines)}


def relevant(folder: Path) -> dict[str, set[str]]:
    """Text of each query to its documents, over all splits, which must not share a query or a document."""
    queries = Texts.open(folder, "queries")
    found: dict[str, set[str]] = {}
    for path in (folder / "qrels").glob("*.tsv"):
        for query, grades in read_qrels(path).items():
            assert queries[query] not in found
            found[queries[query]] = set(map(str, grades))
    return found


@pytest.fixture(scope="module", params=["t5", "gpt2", "chat"])
def language_model(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained T5, GPT-2, or Llama with a chat template, whose weights are large enough to heed what they read."""
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id, "bos_token_id": 2}
    sizes: dict[str, Any] = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "chat": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    }[request.param]
    kind = {"chat": "llama"}.get(request.param, request.param)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **special)
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if request.param == "t5" else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    if request.param == "chat":
        tokenizer.chat_template = CHAT
    if request.param == "gpt2":  # as its own tokenizer comes
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_writes_the_same_queries_again(language_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_document": 2, "max_new_tokens": 6, "seed": 3}
    counts = generate(str(language_model), tmp_path / "one", **options)
    assert counts["documents"] == len(CORPUS)
    assert counts["kept"] == counts["distinct"] > len(CORPUS)
    found = written(tmp_path / "one")
    assert {len(queries) for queries in found.values()} == {2}
    assert all(queries[0] != queries[1] for queries in found.values())  # sampled
    assert all(len(query.split()) <= 6 for queries in found.values() for query in queries)  # and not the prompt
    generate(str(language_model), tmp_path / "two", **options)
    (tmp_path / "two" / "generated" / "000001.jsonl").unlink()
    (tmp_path / "two" / "queries.json").unlink()
    assert generate(str(language_model), tmp_path / "two", **options) == counts
    assert written(tmp_path / "two") == found  # also where only one shard was written anew
    generate(str(language_model), tmp_path / "three", **options | {"seed": 4})
    assert written(tmp_path / "three") != found
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        generate(str(language_model), tmp_path / "one", **options | {"seed": 4})


def test_queries_do_not_depend_on_the_padding_and_long_documents_keep_the_prompt(
    language_model: Path, tmp_path: Path
) -> None:
    """Prevents a causal model that goes on from padding, and a prompt whose end is cut off with the document."""
    options: dict[str, Any] = {"per_document": 1, "max_new_tokens": 5, "temperature": 1e-4, "max_length": 4}
    options["prompt"] = "find {document} in a list"
    cut = {name: " ".join(text.split()[:4]) for name, text in CORPUS.items()}
    for folder, corpus, more in (("batch", CORPUS, {}), ("single", CORPUS, {"batch_size": 1}), ("cut", cut, {})):
        generate(str(language_model), tmp_path / folder, corpus, **options | more)
    assert written(tmp_path / "batch") == written(tmp_path / "single")
    short = [name for name, text in cut.items() if text.replace(",", "").isalpha() or "," not in text]
    found, expected = written(tmp_path / "batch"), written(tmp_path / "cut")
    assert [found[name] for name in short] == [expected[name] for name in short]
    assert len({queries[0] for queries in found.values()}) > 1  # it reads the document


def test_what_a_function_writes_is_cleaned_merged_and_kept_by_document(tmp_path: Path) -> None:
    answers = {
        "a": ['Query: "how to sort?"', "", "  \n"],
        "b": ["How to\tsort?\nAnd more", "insert"],
        "c": [],
        "d": ["Question 2: «insert  »", "insert"],
    }
    texts = {name: f"text of {name}" for name in answers} | {"blank": " "}
    counts = generate(lambda documents, _: [answers[text[-1]] for text in documents], tmp_path / "data", texts)
    assert counts == {"documents": 5, "generated": 5, "distinct": 2, "kept": 2}
    assert relevant(tmp_path / "data") == {"how to sort?": {"a", "b"}, "insert": {"b", "d"}}
    assert dict(Texts.open(tmp_path / "data", "corpus")) == texts


def test_an_interrupted_call_asks_again_only_for_what_was_not_saved(tmp_path: Path) -> None:
    asked: list[str] = []

    def write(documents: list[str], number: int) -> list[list[str]]:
        if len(asked) == 12:
            raise KeyboardInterrupt
        asked.extend(documents)
        return [[f"{document} {place}" for place in range(number)] for document in documents]

    with pytest.raises(KeyboardInterrupt):
        generate(write, tmp_path, batch_size=3)
    asked += ["."]
    counts = generate(write, tmp_path, batch_size=3)
    assert sorted(asked) == sorted([*ANSWERS, "."])
    assert counts["kept"] == 3 * len(ANSWERS)
    assert generate(write, tmp_path, batch_size=3) == counts
    assert len(asked) == len(ANSWERS) + 1


def test_a_query_of_words_that_no_document_has_must_beat_others_too(tmp_path: Path) -> None:
    """Prevents the filter from letting everything pass where BM25 finds nothing beside the document itself."""
    asked: dict[str, set[str]] = {}

    def teacher(pairs: list[tuple[str, str]]) -> list[float]:
        for query, document in pairs:
            asked.setdefault(query, set()).add(document)
        return [float(len(document)) for _, document in pairs]

    counts = generate(
        lambda documents, n: [[f"zzz{len(d)} qqq"] for d in documents], tmp_path, teacher=teacher, depth=4
    )
    assert all(len(documents) >= min(5, len(CORPUS)) for documents in asked.values())
    assert counts["kept"] < counts["distinct"]


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_teacher_keeps_what_finds_its_document(tmp_path: Path, top_k: int) -> None:
    """The teacher likes long documents: what it keeps can be counted from the lists that it scored."""

    def teacher(pairs: list[tuple[str, str]]) -> list[float]:
        return [float(len(document)) for _, document in pairs]

    def write(documents: list[str], number: int) -> list[list[str]]:
        return [[document.split(";")[0], " ".join(document.split()[-3:])] for document in documents]

    counts = generate(write, tmp_path, teacher=teacher, top_k=top_k, depth=4)
    store = TeacherScores.open(tmp_path / "round-trip" / "teacher-scores")
    lists = {str(row.query_id): dict(zip(map(str, row.document_ids), row.scores, strict=True)) for row in store}
    texts = list(dict.fromkeys(query for queries in written(tmp_path).values() for query in queries))
    kept = {}
    for query, scores in lists.items():
        text = texts[int(query.split("-")[1])]
        own = [name for name, queries in written(tmp_path).items() if text in queries]
        assert set(own) <= set(scores)
        if max(map(scores.__getitem__, own)) in sorted(scores.values(), reverse=True)[:top_k]:
            kept[text] = set(own)
    assert 0 < counts["kept"] == len(kept) < counts["distinct"] == len(lists)
    assert relevant(tmp_path) == kept
    # False negatives are left to the training lists, made from the same folder: none scores above the positive.
    judged = {q: g for path in (tmp_path / "qrels").glob("*.tsv") for q, g in read_qrels(path).items()}
    rows = build_distillation_dataset(store.select(list(judged)), tmp_path, tmp_path, judged, absolute_margin=0.0)
    assert all(row["scores"][0] == max(row["scores"]) for row in rows)


@pytest.mark.parametrize("as_file", [True, False])
def test_without_a_model_titles_and_sentences_are_queries(tmp_path: Path, as_file: bool) -> None:
    records: dict[str, Any] = {
        "a": {"title": "Sorted lists", "text": "Sorted lists keep an order. Insert with bisect! Yes."},
        "b": {"title": "", "text": "one sentence without an end"},
    }
    corpus: Any = records
    if as_file:
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"_id": name} | record) + "\n" for name, record in records.items()))
    generate(None, tmp_path / "data", corpus)
    found = written(tmp_path / "data")
    assert found["a"][0] == "Sorted lists"
    assert sorted(found["a"][1:]) == ["Insert with bisect!", "Sorted lists keep an order."]
    assert found["b"] == ["one sentence without an end"]


@pytest.mark.parametrize(
    ("file", "lines"),
    [("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td3\t2\n"), ("qrels.test.txt", "q1 0 d3 2\n")],
)
def test_queries_and_judgements_of_the_folder_are_kept(tmp_path: Path, file: str, lines: str) -> None:
    """Prevents judged queries, the only ones that can tell how good a student is, from being left behind."""
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": name, "text": text}) for name, text in CORPUS.items()]
    (data / "corpus.jsonl").write_text("\n".join(corpus))
    (data / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "sort"}))
    (data / file).write_text(lines)
    generate(None, tmp_path / "out", data)
    queries = Texts.open(tmp_path / "out", "queries")
    assert queries["q1"] == "sort"
    assert len(queries) > len(CORPUS)
    assert read_qrels(tmp_path / "out" / "qrels" / "test.tsv") == {"q1": {"d3": 2}}
    assert len(read_qrels(tmp_path / "out" / "qrels" / "train.tsv")) == len(queries) - 1


def blank(documents: list[str], number: int) -> list[list[str]]:
    return [[""] * number for _ in documents]


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda documents, _: ["one text"] * len(documents), {}, "expected a list of texts for each"),
        (lambda documents, _: [["q"]], {}, "expected a list of texts for each of 6"),
        (lambda documents, _: [[None]] * len(documents), {}, "expected a list of texts"),
        (blank, {}, "no query is left: of 16 documents came 0"),
        (blank, {"prompt": "no place"}, "where the document goes"),
        (blank, {"per_document": 0}, "per_document must be at least 1"),
        ("no/such-model", {}, "no/such-model is no model"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, write: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(write, tmp_path, **options)
