"""The layouts of published sets, as jsonl, Parquet, a folder of parts and from a hub's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damaged
from datasets import Dataset
from evaluation.encoders import make_encoder

from st_m3se.core.errors import FormatError
from st_m3se.data.qrels import read_qrels
from st_m3se.scores import TeacherScores, convert, text_id

T = text_id
Lists = dict[Any, dict[Any, float]]

PUBLISHED: dict[str, tuple[list[dict[str, Any]], Lists, Any]] = {
    "lightonai/ms-marco-en-bge-gemma": (
        [{"query_id": "7", "document_ids": "['1', '2']", "scores": "[9.5, -1.25]"}],
        {"7": {"1": 9.5, "2": -1.25}},
        None,
    ),
    "sentence-transformers/msmarco bert-ensemble-margin-mse": (
        [
            {"query_id": "7", "positive_id": "1", "negative_id": "2", "score": 10.75},
            {"query_id": "5", "positive_id": "4", "negative_id": "2", "score": 7.5},
            {"query_id": "7", "positive_id": "1", "negative_id": "3", "score": 6.5},
        ],
        {"5": {"4": 0.0, "2": -7.5}, "7": {"1": 0.0, "2": -10.75, "3": -6.5}},
        {"7": {"1": 1}, "5": {"4": 1}},
    ),
    "sentence-transformers/msmarco bert-ensemble-mse": (
        [
            {"query_id": "7", "passage_id": "1", "score": 9.5},
            {"query_id": "5", "passage_id": "4", "score": 8.0},
            {"query_id": "7", "passage_id": "2", "score": -1.25},
        ],
        {"7": {"1": 9.5, "2": -1.25}, "5": {"4": 8.0}},
        None,
    ),
    "sentence-transformers/msmarco rankgpt4-colbert": (
        [{"query_id": "7", "doc_ids": ["2", "1", "9"]}],
        {"7": {"2": -1.0, "1": -2.0, "9": -3.0}},
        None,
    ),
    "sentence-transformers/msmarco-scores list": (
        [
            {"query_id": 7, "corpus_id": [1, 2], "score": [9.5, -1.25]},
            {"query_id": 5, "corpus_id": [4], "score": [8.0]},
        ],
        {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0}},
        None,
    ),
    "sentence-transformers/msmarco-scores pair": (
        [{"query_id": 7, "corpus_id": 1, "score": 9.5}, {"query_id": 7, "corpus_id": 2, "score": -1.25}],
        {7: {1: 9.5, 2: -1.25}},
        None,
    ),
    "cross-encoder/lightonai-embeddings-fine-tuning-reranked-v1 scores": (
        [
            {"query_id": 7, "document_ids": [1, 2], "scores": [9.5, -1.25], "positive_ids": [1]},
            {"query_id": 5, "document_ids": [4, 2], "scores": [8.0, 0.5], "positive_ids": [4]},
            {"query_id": 7, "document_ids": [3, 2], "scores": [7.0, -1.25], "positive_ids": [3]},
        ],
        {5: {4: 8.0, 2: 0.5}, 7: {1: 9.5, 3: 7.0, 2: -1.25}},
        {5: {4: 1}, 7: {1: 1, 3: 1}},
    ),
    "pyterrier": (
        [{"qid": "7", "docno": "a", "score": 9.5, "rank": 0}, {"qid": "7", "docno": "b", "score": -1.25, "rank": 1}],
        {"7": {"a": 9.5, "b": -1.25}},
        None,
    ),
    "FlagEmbedding": (
        [{"query": "what", "pos": ["this"], "neg": ["that"], "pos_scores": [9.5], "neg_scores": [-1.25]}],
        {T("what"): {T("this"): 9.5, T("that"): -1.25}},
        {T("what"): {T("this"): 1}},
    ),
    "hotchpotch/mmarco-hard-negatives-reranker-filtered": (
        [{"query": "what", "pos_text": "this", "negs_text": ["that"], "pos_score": 0.9, "negs_score": [0.25]}],
        {T("what"): {T("this"): pytest.approx(0.9), T("that"): 0.25}},
        {T("what"): {T("this"): 1}},
    ),
    "Tevatron": (
        [
            {
                "query_id": "7",
                "query": "what",
                "positive_passages": [{"docid": "d1", "title": "It", "text": "this", "score": 9.5}],
                "negative_passages": [{"docid": "d2", "title": "", "text": "that", "score": -1.25}],
            }
        ],
        {"7": {"d1": 9.5, "d2": -1.25}},
        {"7": {"d1": 1}},
    ),
    "Tevatron annotated": (
        [
            {
                "query_id": "7",
                "query": "what",
                "passages": [
                    {"title": "It", "text": "this"},
                    {"title": "", "text": "that"},
                    {"title": "", "text": "that"},
                ],
                "scores": [9.5, -1.25, -1.25],
            }
        ],
        {"7": {T("It this"): 9.5, T("that"): -1.25}},
        {"7": {T("It this"): 1}},
    ),
    "rank_llm": (
        [
            {
                "query": {"text": "what", "qid": "7"},
                "candidates": [{"docid": "d1", "score": 9.5, "doc": {"contents": "x"}}],
            }
        ],
        {"7": {"d1": 9.5}},
        None,
    ),
    "Rankify re-ranked": (
        [
            {
                "question": "what?",
                "answers": ["x"],
                "ctxs": [{"score": 1.0, "has_answer": True, "id": "a"}, {"score": 2.0, "has_answer": True, "id": "b"}],
                "reranked_ctxs": [
                    {"score": 2.0, "has_answer": True, "id": "b"},
                    {"score": 1.0, "has_answer": True, "id": "a"},
                ],
            }
        ],
        {T("what?"): {"b": -1.0, "a": -2.0}},
        None,
    ),
}
FORMS = ("jsonl", "array", "parquet", "parts", "arrow")
NOTED = {  # of what the conversion says something, and the scale that the manifest then has
    "hotchpotch/mmarco-hard-negatives-reranker-filtered": None,  # a sigmoid's outputs
    "sentence-transformers/msmarco bert-ensemble-margin-mse": "margin",
    "sentence-transformers/msmarco rankgpt4-colbert": "rank",
    "Rankify re-ranked": "rank",
}


def write(rows: list[dict[str, Any]], form: str, path: Path) -> Path:
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "array":
        path.write_text(json.dumps(rows, indent=4))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "parts":  # as Spark leaves them
        path.mkdir()
        (path / "_SUCCESS").touch()
        for number, row in enumerate(rows):
            pq.write_table(pa.Table.from_pylist([row]), path / f"part-{number:05}.snappy.parquet")
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return path


def lists(store: TeacherScores) -> Lists:
    return {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in store}


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "jsonl") for name in PUBLISHED]
    + [(name, form) for name in ("pyterrier", "FlagEmbedding", "rank_llm") for form in FORMS[1:]],
)
def test_a_published_layout(name: str, form: str, tmp_path: Path) -> None:
    rows, expected, positives = PUBLISHED[name]
    result = convert(write(rows, form, tmp_path / "in"), tmp_path / "store")
    store = TeacherScores.open(tmp_path / "store")
    store.validate()
    assert lists(store) == expected
    assert store.manifest["scale"] == NOTED.get(name)
    assert bool(result.notes) == (name in NOTED)
    qrels = tmp_path / "store" / "qrels" / "train.tsv"
    if positives is None:
        assert not qrels.exists()
    else:
        kinds: list[Any] = ["int" if kind is int else "str" for kind in store.id_types]
        assert read_qrels(qrels, id_type=kinds[0], document_id_type=kinds[1]) == positives


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_from_the_hub(name: str, tmp_path: Path) -> None:
    """On the hub everything is Parquet, of which no more than one layout is a store as it is."""
    rows, expected, positives = PUBLISHED[name]
    (tmp_path / "repository").mkdir()
    write(rows, "parquet", tmp_path / "repository" / "train.parquet")
    store = TeacherScores.from_hub(str(tmp_path / "repository"), cache_dir=tmp_path / "cache")
    assert lists(store) == expected
    assert store.manifest["source"]["repository"] == "repository"
    assert lists(TeacherScores.from_hub(str(tmp_path / "repository"), cache_dir=tmp_path / "cache")) == expected
    for shard in (tmp_path / "cache").glob("scores-*/*.parquet"):  # none where the layout is a store as it is
        shard.write_bytes(next(damaged(shard.read_bytes(), 1)))
    assert lists(TeacherScores.from_hub(str(tmp_path / "repository"), cache_dir=tmp_path / "cache")) == expected
    assert bool(list((tmp_path / "cache").rglob("qrels/train.tsv"))) == (positives is not None)


def test_columns_by_other_names(tmp_path: Path) -> None:
    rows = [{"q": 7, "found": [1, 2], "by_teacher": [9.5, -1.25]}]
    columns = {"query_id": "q", "document_ids": "found", "scores": "by_teacher"}
    for form in ("parquet", "parts", "arrow"):
        convert(write(rows, form, tmp_path / form), tmp_path / f"{form}-store", columns=columns)
        assert lists(TeacherScores.open(tmp_path / f"{form}-store")) == {7: {1: 9.5, 2: -1.25}}
    path = write(rows, "jsonl", tmp_path / "x.jsonl")
    for kind in (None, "pylate"):
        convert(path, tmp_path / f"{kind}-store", source_format=kind, columns=columns)
        assert lists(TeacherScores.open(tmp_path / f"{kind}-store")) == {7: {1: 9.5, 2: -1.25}}
    (tmp_path / "x.csv").write_text("q,found,by_teacher\n7,1,9.5\n")
    columns = {"query_id": "q", "document_id": "found", "score": "by_teacher"}
    convert(tmp_path / "x.csv", tmp_path / "csv-store", columns=columns)
    assert lists(TeacherScores.open(tmp_path / "csv-store")) == {"7": {"1": 9.5}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query_id": "7", "doc_ids": ["1"], "labels": [1]}, "labels and no scores: these are judgements"),
        ({"query_id": "7", "document_ids": ["1"], "logits": [1.5]}, "expected one column for score.*columns="),
        ({"query_id": "7", "document_id": "1"}, "expected one column for score"),
        ({"a": "x", "b": "y", "c": "z", "negative": "w", "scores": [1.0, 2.0]}, "which are the query and the positive"),
        ({"query": "x", "pos": ["y"], "neg": ["z"]}, "there is no pos_scores"),
        ({"query": "x", "answer": "y", "label": 1}, "labels and no scores: these are judgements"),
        ({"query": "x", "answer": ["y"], "labels": [1]}, "labels and no scores: these are judgements"),
        ({"q": "x", "docs": ["y"], "scores": [1.5]}, r"could be parquet \(ids.*\) or tuples \(texts"),
        ({"q": "x", "doc": "y", "score": 1.5}, r"could be parquet \(ids.*\) or tuples \(texts"),
        (
            {"query_id": "7", "passages": [], "scores": [], "pos": [], "neg": [], "query": "x"},
            "tevatron or flagembedding",
        ),
    ],
)
def test_what_could_be_something_else_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Prevents ranks from lists whose scores have another name, and a text for another one's role."""
    with pytest.raises(FormatError, match=message):
        convert(write([row], "parquet", tmp_path / "x"), tmp_path / "store")


@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_what_the_hosts_mining_gives(output_format: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The real function, with a name of the user's own for the answer."""
    from conftest import PAIRS
    from sentence_transformers.util import mine_hard_negatives

    mined = mine_hard_negatives(
        Dataset.from_dict({"question": [pair[0] for pair in PAIRS], "answer": [pair[1] for pair in PAIRS]}),
        make_encoder("dense", checkpoint),
        num_negatives=3,
        output_format=output_format,
        output_scores=True,
        verbose=False,
    )
    mined.save_to_disk(tmp_path / "mined")
    result = convert(tmp_path / "mined", tmp_path / "store")
    assert "bi-encoder's scores" in result.notes[0]
    assert "unless it was given a cross-encoder and a margin" in result.notes[0]
    store = TeacherScores.open(tmp_path / "store")
    for row in mined:
        scores = dict(zip(store[T(row["question"])].document_ids, store[T(row["question"])].scores, strict=True))
        values = [value for name, value in row.items() if name not in ("question", "scores", "score")]
        texts = values[0] if output_format == "labeled-list" else values
        given = row["scores"] if "scores" in row else [row["score"]]
        assert [scores[T(text)] for text in texts] == pytest.approx(given)
    for query, answer in PAIRS:
        assert store[T(query)].document_ids[0] == T(answer)
        assert len(store[T(query)].document_ids) == 4
    qrels = tmp_path / "store" / "qrels" / "train.tsv"
    if output_format == "labeled-pair":  # which does not say where a query's positives end
        assert not qrels.exists()
    else:
        assert read_qrels(qrels)[T(PAIRS[0][0])] == {T(PAIRS[0][1]): 1}
