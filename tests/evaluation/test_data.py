"""Evaluation sets against BEIR's own loader, and everything that can be wrong with a folder."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st_m3se.core.errors import FormatError
from st_m3se.evaluation import EvaluationSet, open_set, per_query, qrels_set
from st_m3se.scores import TeacherScores

CORPUS = {"d1": ("Wings", "of aircraft"), "d2": ("", "boundary layers"), "d3": ("Heat", ""), "d4": ("", "shock waves")}
QUERIES = {"q1": "wing", "q2": "layer", "q3": "heat", "unused": "not judged"}
QRELS = {"q2": {"d2": 2, "d1": 0}, "q1": {"d1": 1, "d4": 3}, "q3": {"d3": 1}}

Open = Callable[..., EvaluationSet]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """``open_set`` with a cache of its own."""
    return lambda *args, **options: open_set(*args, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def parts(tmp_path: Path) -> Open:
    """``qrels_set`` with a cache of its own."""
    return lambda *args, **options: qrels_set(*args, cache_dir=tmp_path / "cache", **options)


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def corpus_lines(corpus: dict[str, tuple[str, str]] = CORPUS) -> str:
    return lines(*({"_id": key, "title": title, "text": text} for key, (title, text) in corpus.items()))


def query_lines(queries: dict[str, str] = QUERIES) -> str:
    return lines(*({"_id": key, "text": text, "metadata": {}} for key, text in queries.items()))


def tsv(qrels: dict[str, dict[str, int]] = QRELS) -> str:
    rows = [f"{query}\t{document}\t{grade}\n" for query in qrels for document, grade in qrels[query].items()]
    return "query-id\tcorpus-id\tscore\n" + "".join(rows)


def folder(path: Path, corpus: str = "", queries: str = "", qrels: str = "", split: str = "test") -> Path:
    (path / "qrels").mkdir(parents=True)
    (path / "corpus.jsonl").write_text(corpus or corpus_lines())
    (path / "queries.jsonl").write_text(queries or query_lines())
    (path / "qrels" / f"{split}.tsv").write_text(qrels or tsv())
    return path


def kinds(opened: EvaluationSet) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {finding.kind: (finding.count, finding.examples) for finding in opened.findings}


def as_beir(path: Path, split: str = "test") -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    loader = pytest.importorskip("beir.datasets.data_loader", reason='the oracle comes with pip install -e ".[test]"')
    corpus, queries, qrels = loader.GenericDataLoader(str(path)).load(split)
    # As beir's models join them.
    texts = {key: f"{text['title'] or ''} {text['text']}".strip() for key, text in corpus.items()}
    return texts, queries, qrels


def test_a_folder_opens_as_beir_opens_it(tmp_path: Path, opened: Open) -> None:
    path = folder(tmp_path / "wings")
    found = opened(path)
    corpus, queries, qrels = as_beir(path)
    assert dict(found.corpus or {}) == corpus
    assert list(found.corpus or []) == list(corpus)
    assert dict(found.queries or {}) == queries
    assert found.qrels == qrels == QRELS
    assert found.query_ids == tuple(found.queries or ()) == ("q2", "q1", "q3")
    assert (found.name, found.split, found.form, found.judgements) == ("wings", "test", "retrieval", 5)
    assert found.candidates is None
    assert found.findings == ()
    assert repr(found) == "EvaluationSet(wings test, retrieval, 3 queries, 4 documents)"
    assert opened(path, strict=True).fingerprint == found.fingerprint


def test_packed_files_and_other_splits(tmp_path: Path, opened: Open) -> None:
    path = folder(tmp_path / "set", split="dev")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"):
        file = path / name
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    found = opened(path, split="dev", name="mine")
    assert (found.qrels, found.split, found.name) == (QRELS, "dev", "mine")
    assert len(found.corpus or ()) == 4
    with pytest.raises(FormatError, match=r"no judgements for the split 'test'.*there are dev\. Choose one: split="):
        opened(path)


def test_trec_and_msmarco_files(tmp_path: Path, opened: Open) -> None:
    """MS MARCO's own names, and four columns where BEIR has three."""
    path = tmp_path / "msmarco"
    path.mkdir()
    (path / "collection.tsv").write_text("1\tone\n2\ttwo\n")
    (path / "queries.dev.small.tsv").write_text("7\tseven\n8\teight\n")
    (path / "qrels.dev.small.tsv").write_text("8\t0\t2\t1\n7\t0\t1\t1\n")
    found = opened(path, split="dev", strict=False)
    assert found.qrels == {"8": {"2": 1}, "7": {"1": 1}}
    assert dict(found.queries or {}) == {"8": "eight", "7": "seven"}
    assert dict(found.corpus or {}) == {"1": "one", "2": "two"}
    (path / "trec.txt").write_text("7 Q0 2 -1\n7 Q0 1 2\n")
    assert opened(path, split="dev", qrels=path / "trec.txt").qrels == {"7": {"2": -1, "1": 2}}
    assert opened(path, split="dev", qrels={"8": {"1": 1}}).qrels == {"8": {"1": 1}}


def write_parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name.replace("__", "-"): values for name, values in columns.items()}), path)


def test_nano_beir(tmp_path: Path, opened: Open) -> None:
    """A local copy of zeta-alpha-ai/NanoSciFact: one split, named train, and no grades."""
    path, shard = tmp_path / "NanoSciFact", "train-00000-of-00001.parquet"
    write_parquet(path / "corpus" / shard, _id=["d1", "d2"], text=["one", "two"])
    write_parquet(path / "queries" / shard, _id=["q1", "q2"], text=["first", "second"])
    write_parquet(path / "qrels" / shard, query__id=["q1", "q2"], corpus__id=["d2", "d1"])
    found = opened(path, strict=True)
    assert found.qrels == {"q1": {"d2": 1}, "q2": {"d1": 1}}
    assert dict(found.corpus or {}) == {"d1": "one", "d2": "two"}
    assert found.split == "train"
    assert kinds(found) == {"another split": (1, ("train",))}
    with pytest.raises(FormatError, match=r"no judgements for the split 'tset'.*there are train\."):
        opened(path, split="tset")
    assert opened(path, split="train").findings == ()


def test_nano_beir_of_many_sets(tmp_path: Path, opened: Open) -> None:
    """A local copy of sentence-transformers/NanoBEIR-en: a split for each set, and rows of several documents."""
    path = tmp_path / "NanoBEIR-en"
    for name, number in (("NanoNQ", 1), ("NanoFEVER", 2)):
        shard = f"{name}-00000-of-00001.parquet"
        write_parquet(path / "corpus" / shard, _id=["a", "b"], text=[f"a{number}", f"b{number}"])
        write_parquet(path / "queries" / shard, _id=["q"], text=[f"q{number}"])
        write_parquet(path / "qrels" / shard, query__id=["q"], corpus__id=[["a", "b"]])
    found = opened(path, split="NanoFEVER")
    assert dict(found.corpus or {}) == {"a": "a2", "b": "b2"}
    assert dict(found.queries or {}) == {"q": "q2"}
    assert found.qrels == {"q": {"a": 1, "b": 1}}
    with pytest.raises(FormatError, match="there are NanoFEVER, NanoNQ"):
        opened(path)


def test_the_hubs_beir_files(tmp_path: Path, opened: Open) -> None:
    """BeIR/scifact and the like: titles, graded judgements as floats, several shards and splits."""
    path = tmp_path / "scifact"
    for part in (0, 1):
        name = f"corpus-{part:05}-of-00002.parquet"
        write_parquet(path / "corpus" / name, _id=[f"d{part}"], title=["T"], text=["x"])
    write_parquet(path / "queries" / "queries-00000-of-00001.parquet", _id=["q"], title=[""], text=["y"])
    for split, grade in (("test", 2.0), ("train", 1.0)):
        shard = path / "qrels" / f"{split}-00000-of-00001.parquet"
        write_parquet(shard, query__id=["q"], corpus__id=["d1"], score=[grade])
    found = opened(path)
    assert found.qrels == {"q": {"d1": 2}}
    assert dict(found.corpus or {}) == {"d0": "T x", "d1": "T x"}
    write_parquet(path / "qrels" / "odd-00000-of-00001.parquet", query__id=["q"], corpus__id=["d1"], score=[0.5])
    with pytest.raises(FormatError, match=r"odd-\S+:1: the relevance must be an integer, got 0\.5"):
        opened(path, split="odd")


# What is broken.


def broken(path: Path) -> Path:
    corpus = corpus_lines() + lines(
        {"_id": "d2", "title": "New", "text": "layers"},
        {"_id": "d5", "title": "", "text": ""},
        {"_id": "d6", "title": " ", "text": "\n\t "},
        {"_id": "q3", "title": "", "text": "a document with a query's id"},
    )
    queries = query_lines() + lines(
        {"_id": "q1", "text": "wings"}, {"_id": "q4", "text": " "}, {"_id": "q5", "text": "x"}
    )
    qrels = tsv() + "q1\td1\t1\nq1\td4\t2\nq4\td1\t1\nq5\td1\t0\nq3\tgone\t1\nq3\tlost\t0\n"
    return folder(path, corpus, queries, qrels)


def test_every_fault_is_found_and_dealt_with_as_beir_does(tmp_path: Path, opened: Open) -> None:
    path = broken(tmp_path / "broken")
    found = opened(path)
    corpus, queries, qrels = as_beir(path)
    assert dict(found.corpus or {}) == corpus
    assert list(found.corpus or []) == list(corpus)  # what repeats keeps its first place
    assert corpus["d2"] == "New layers"
    assert dict(found.queries or {}) == queries
    assert queries["q1"] == "wings"
    assert found.qrels == qrels
    assert qrels["q1"]["d4"] == 2
    assert kinds(found) == {
        "documents whose id repeats": (1, ("d2",)),
        "queries whose id repeats": (1, ("q1",)),
        "empty documents": (2, ("d5", "d6")),
        "empty queries": (1, ("q4",)),
        "judgements that repeat": (1, ("q1 d1",)),
        "contradictory judgements": (1, ("q1 d4",)),
        "judgements of absent documents": (2, ("q3 gone", "q3 lost")),
        "queries without a relevant document": (1, ("q5",)),
        "query ids that are document ids": (1, ("q3",)),
    }
    effects = {finding.kind: finding.effect for finding in found.findings}
    assert effects["judgements of absent documents"].startswith("1 of them are relevant")
    assert all(effects.values())
    assert opened(path).findings == found.findings  # from the cache as well


def test_strict_mode_names_the_first_of_each(tmp_path: Path, opened: Open) -> None:
    path = broken(tmp_path / "broken")
    with pytest.raises(FormatError) as caught:
        opened(path, strict=True)
    for part in ("empty documents: 2 (d5, d6)", "contradictory judgements: 1 (q1 d4)", "leave strict mode"):
        assert part in str(caught.value)
    assert "query ids that are document ids" not in str(caught.value)  # ArguAna is not broken


def test_judgements_of_absent_queries(tmp_path: Path, opened: Open) -> None:
    """BEIR's loader stops; nobody can search for a query without a text, and its 0 would be nobody's fault."""
    path = folder(tmp_path / "set", qrels=tsv() + "nobody\td1\t1\nq2\td4\t1\n")
    with pytest.raises(KeyError):
        as_beir(path)
    found = opened(path)
    assert found.query_ids == ("q2", "q1", "q3")
    assert found.qrels["q2"] == {"d2": 2, "d1": 0, "d4": 1}
    assert kinds(found) == {"judgements of absent queries": (1, ("nobody",))}
    with pytest.raises(FormatError, match=r"judgements of absent queries: 1 \(nobody\)"):
        opened(path, strict=True)


def test_judgements_without_a_header_all_count(tmp_path: Path, opened: Open) -> None:
    path = folder(tmp_path / "set", qrels="q1\td1\t1\nq2\td2\t1\n")
    found = opened(path)
    assert found.qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}}
    assert kinds(found) == {"judgements without a header": (1, ("test.tsv",))}


def test_ids_with_blanks_and_quotes_are_read_as_beir_reads_them(tmp_path: Path, opened: Open) -> None:
    corpus = corpus_lines({"a b": ("", "x"), '"c"': ("", "y"), 'd"e': ("", "z")})
    qrels = 'query-id\tcorpus-id\tscore\nq1\ta b\t1\nq1\t"""c"""\t1\nq1\td"e\t1\n'
    path = folder(tmp_path / "set", corpus, qrels=qrels)
    assert opened(path).qrels == as_beir(path)[2] == {"q1": {"a b": 1, '"c"': 1, 'd"e': 1}}
    assert opened(path).findings == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", r"test\.tsv:2: expected `query-id<TAB>corpus-id"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\t1.5\n",
            r"test\.tsv:2: the relevance must be an integer",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "has no judgement"),
        ("qrels/test.tsv", "", "has no judgement"),
        ("qrels/test.tsv", "q1 0 d1 1 7\n", r"test\.tsv:1: expected"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\t\t1\n", r"test\.tsv:2: document id is empty"),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n{"_id": "d2", "text"\n', r"corpus\.jsonl:2: this is not JSON"),
        ("corpus.jsonl", '{"_id": "d1", "title": "x"}\n', r"corpus\.jsonl:1: expected one text"),
        ("corpus.jsonl", '{"_id": "d1", "text": null}\n', r"corpus\.jsonl:1: text must be a text"),
        ("corpus.jsonl", '{"_id": "", "text": "x"}\n', r"corpus\.jsonl:1: document id is empty"),
        ("corpus.jsonl", "", "holds no texts"),
        ("queries.jsonl", '{"_id": "other", "text": "x"}\n', "none of the 3 judged queries, such as 'q2', is among"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_place(
    name: str, content: str, message: str, tmp_path: Path, opened: Open
) -> None:
    path = folder(tmp_path / "set")
    (path / name).write_text(content)
    with pytest.raises(FormatError, match=message):
        opened(path)


def test_a_folder_that_is_none(tmp_path: Path, opened: Open) -> None:
    path = folder(tmp_path / "set")
    with pytest.raises(FormatError, match="this is a file: name the folder"):
        opened(path / "corpus.jsonl")
    with pytest.raises(FormatError, match="no such folder, and no BEIR set of this name"):
        opened(tmp_path / "absent")
    (path / "queries.jsonl").unlink()
    with pytest.raises(FormatError, match=r"has no queries: expected queries\.jsonl, \.tsv"):
        opened(path)
    shutil.rmtree(path / "qrels")
    with pytest.raises(
        FormatError, match=r"no judgements for the split 'test', such as qrels/test\.tsv, and no others"
    ):
        opened(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_random_folders_open_as_beir_opens_them(seed: int, tmp_path: Path) -> None:
    """Repeated ids, empty texts, absent documents, repeated judgements: whatever BEIR's loader takes, in its way."""
    rng = random.Random(seed)
    path = tmp_path / str(seed)
    texts = ["", " ", "é", "two words", " edge "]
    documents = [f"d{rng.randrange(12)}" for _ in range(rng.randrange(1, 15))]
    queries = [f"q{rng.randrange(6)}" for _ in range(rng.randrange(1, 8))]
    records = [{"_id": key, "title": rng.choice(texts), "text": rng.choice(texts)} for key in documents]
    asked = [{"_id": key, "text": rng.choice(texts)} for key in queries]
    judged = [
        f"{rng.choice(queries)}\td{rng.randrange(14)}\t{rng.randrange(-1, 4)}\n" for _ in range(rng.randrange(1, 20))
    ]
    folder(path, lines(*records), lines(*asked), "query-id\tcorpus-id\tscore\n" + "".join(judged))
    found = open_set(path, cache_dir=path / "cache")
    corpus, wanted, qrels = as_beir(path)
    assert list((found.corpus or {}).items()) == list(corpus.items())
    assert list((found.queries or {}).items()) == list(wanted.items())
    assert [(query, list(grades.items())) for query, grades in found.qrels.items()] == [
        (query, list(grades.items())) for query, grades in qrels.items()
    ]
    counted = {kind: count for kind, (count, _) in kinds(found).items()}
    assert counted.get("documents whose id repeats", 0) == sum(documents.count(key) > 1 for key in set(documents))
    assert counted.get("empty documents", 0) == sum(not text for text in corpus.values())
    assert counted.get("empty queries", 0) == sum(not text.strip() for text in wanted.values())
    absent = sum(document not in corpus for grades in qrels.values() for document in grades)
    assert counted.get("judgements of absent documents", 0) == absent
    shutil.rmtree(path)


# Runs to re-rank.

RUN = "q1 Q0 d4 1 2.5 me\nq1 Q0 d1 2 1.5 me\nq2 Q0 d1 1 0.5 me\nq2 Q0 d2 2 0.25 me\n"
LISTS = {"q1": (["d4", "d1"], [2.5, 1.5]), "q2": (["d1", "d2"], [0.5, 0.25])}


def listed(found: EvaluationSet) -> dict[str, tuple[list[str], list[float]]]:
    assert found.candidates is not None
    assert found.form == "re-ranking"
    return {str(row.query_id): (list(map(str, row.document_ids)), list(row.scores)) for row in found.candidates}


def test_a_run_to_rerank_from_every_form(tmp_path: Path, opened: Open) -> None:
    path = folder(tmp_path / "set")
    (tmp_path / "first.run").write_text(RUN)
    rows = [(query, documents, scores) for query, (documents, scores) in LISTS.items()]
    store = TeacherScores.from_rows(rows, tmp_path / "store")
    prints = set()
    for run in (tmp_path / "first.run", tmp_path / "store", store, store.select(["q2", "q1"])):
        found = opened(path, run=run)
        assert listed(found) == LISTS
        assert kinds(found) == {"queries without candidates": (1, ("q3",))}
        prints.add(found.fingerprint)
    (tmp_path / "ranks.tsv").write_text("q2\td2\t2\nq2\td1\t1\nq1\td4\t1\nq1\td1\t2\n")
    ranks = opened(path, run=tmp_path / "ranks.tsv")
    assert listed(ranks) == {"q1": (["d4", "d1"], [-1, -2]), "q2": (["d1", "d2"], [-1, -2])}
    prints.add(ranks.fingerprint)  # the lists are the same, and so is what a re-ranker sees
    assert len(prints) == 1
    assert prints != {opened(path).fingerprint}
    with pytest.raises(FormatError, match=r"queries without candidates: 1 \(q3\)"):
        opened(path, run=store, strict=True)


def test_a_run_of_every_form_that_is_converted(tmp_path: Path, opened: Open) -> None:
    """Prevents a ranking of ColBERT, whose scores are its own, from being taken for texts and ranked by its ids."""
    path = folder(tmp_path / "set")
    rows = [(query, *pair) for query, lists in LISTS.items() for pair in zip(*lists, strict=True)]
    ranks = [f"{query}\t{document}\t{rank % 2 + 1}\t{score}\n" for rank, (query, document, score) in enumerate(rows)]
    records = [{"query_id": query, "document_ids": ids, "scores": scores} for query, (ids, scores) in LISTS.items()]
    forms = {
        "ranking.tsv": "".join(ranks),
        "from0.tsv": "".join(ranks).replace("\t1\t", "\t0\t").replace("\t2\t", "\t1\t"),
        "lists.jsonl": lines(*records),
        "colbert.json": lines(*([query, *map(list, zip(*pair, strict=True))] for query, pair in LISTS.items())),
        "table.csv": "qid,docno,score\n" + "".join(f"{query},{document},{score}\n" for query, document, score in rows),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        assert listed(opened(path, run=tmp_path / name)) == LISTS, name
    pq.write_table(
        pa.table({name: [row[i] for row in rows] for i, name in enumerate(("qid", "pid", "score"))}),
        tmp_path / "long.parquet",
    )
    assert listed(opened(path, run=tmp_path / "long.parquet")) == LISTS
    (tmp_path / "spark").mkdir()
    (tmp_path / "long.parquet").rename(tmp_path / "spark" / "part-00000.parquet")
    assert listed(opened(path, run=tmp_path / "spark")) == LISTS
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    assert listed(opened(path, run=tmp_path / "saved")) == LISTS
    for content in ("q1\td4\td1\t2.5\nq2\td1\td2\t1.5\n", "q1\td4\t1\nq1\td1\t1\n"):
        (tmp_path / "none").write_text(content)
        with pytest.raises(FormatError, match=r"no run"):
            opened(path, run=tmp_path / "none")


def test_a_run_is_cleaned(tmp_path: Path, opened: Open) -> None:
    """Lists out of order, of other queries, and documents that the corpus lacks."""
    path = folder(tmp_path / "set")
    run = "q1 Q0 d1 2 1.5 me\nq1 Q0 gone 3 1.0 me\nq1 Q0 d4 1 2.5 me\nunused Q0 d1 1 1 me\nq3 Q0 lost 1 1 me\n"
    (tmp_path / "first.run").write_text(run)
    found = opened(path, run=tmp_path / "first.run")
    assert listed(found) == {"q1": LISTS["q1"]}
    assert kinds(found) == {
        "candidates of queries that are not evaluated": (1, ("unused",)),
        "candidates absent from the corpus": (2, ("q1 gone", "q3 lost")),
        "queries without candidates": (2, ("q2", "q3")),
    }
    assert kinds(opened(path, run=tmp_path / "first.run")) == kinds(found)  # from the cache
    values = per_query(found.candidates or [], found.qrels, ["RR@10"])
    assert values["RR@10"].tolist() == [0, 1, 0]
    (tmp_path / "first.run").write_text("x Q0 d1 1 1.0 me\n")
    with pytest.raises(FormatError, match="no document for any of the 3 evaluated queries, such as 'q2'"):
        opened(path, run=tmp_path / "first.run")
    (tmp_path / "first.run").write_text("q1 d1\n")
    with pytest.raises(FormatError, match=r"this is no run: .*Expected `query Q0 document rank score tag`"):
        opened(path, run=tmp_path / "first.run")


def test_a_run_changes_and_is_read_again(tmp_path: Path, opened: Open) -> None:
    """Prevents a cache that outlives its source."""
    path = folder(tmp_path / "set")
    (tmp_path / "first.run").write_text(RUN)
    before = opened(path, run=tmp_path / "first.run")
    (tmp_path / "first.run").write_text(RUN.replace("q2 Q0 d2", "q2 Q0 d3"))
    after = opened(path, run=tmp_path / "first.run")
    assert listed(after)["q2"][0] == ["d1", "d3"]
    assert before.fingerprint != after.fingerprint
    (path / "corpus.jsonl").write_text(corpus_lines({key: CORPUS[key] for key in ("d1", "d3", "d4")}))
    assert listed(opened(path, run=tmp_path / "first.run"))["q2"][0] == ["d1", "d3"]


def test_processes_that_open_the_same_run_at_once_all_get_it(tmp_path: Path, opened: Open) -> None:
    """As the ranks of a training run do."""
    path = folder(tmp_path / "set")
    (tmp_path / "first.run").write_text(RUN)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: opened(path, run=tmp_path / "first.run"), range(16)))
    assert all(listed(one) == LISTS for one in found)
    assert len({one.fingerprint for one in found}) == 1
    assert not list((tmp_path / "cache").glob(".*.tmp"))


TOP = "7\t11\tseven 7 7\televen\n8\t12\teight\ttwelve\n7\t12\tseven\ttwelve\n9\t11\tnine\televen\n"


def test_msmarcos_top_1000_brings_its_texts(tmp_path: Path, parts: Open) -> None:
    """Scattered lines without scores; and a judged query that BM25 found nothing for still counts, as 0."""
    (tmp_path / "top1000.dev").write_text(TOP)
    (tmp_path / "qrels.dev.small.tsv").write_text("8\t0\t12\t1\n7\t0\t12\t1\n7\t0\t99\t1\n5\t0\t11\t1\n")
    found = parts(tmp_path / "qrels.dev.small.tsv", name="msmarco", split="dev", run=tmp_path / "top1000.dev")
    assert listed(found) == {"7": (["11", "12"], [0, 0]), "8": (["12"], [0])}
    assert dict(found.queries or {}) == {"8": "eight", "7": "seven 7 7", "5": ""}
    assert dict(found.corpus or {}) == {"11": "eleven", "12": "twelve"}
    assert found.query_ids == ("8", "7", "5")
    assert kinds(found) == {
        "judged documents outside the run": (1, ("7 99",)),
        "candidates of queries that are not evaluated": (1, ("9",)),
        "candidates without scores": (1, ("7",)),
        "queries without candidates": (1, ("5",)),
    }
    values = per_query(found.candidates or [], found.qrels, ["R@10"], query_ids=found.query_ids)
    assert values["R@10"].tolist() == [1, 1 / 2, 0]
    own = parts({"7": {"11": 1}}, name="x", run=tmp_path / "top1000.dev", queries={"7": "Seven?"})
    assert dict(own.queries or {}) == {"7": "Seven?"}
    assert dict(own.corpus or {}) == {"11": "eleven", "12": "twelve"}
    (tmp_path / "top1000.dev").write_text(TOP + "7\t13\tno passage\n")
    with pytest.raises(FormatError, match=r"top1000\.dev:5: expected `qid<TAB>pid<TAB>query<TAB>passage`"):
        parts({"7": {"11": 1}}, name="x", run=tmp_path / "top1000.dev")


def test_a_set_of_ids_only(tmp_path: Path, parts: Open) -> None:
    (tmp_path / "first.run").write_text(RUN)
    found = parts(QRELS, name="dl19", run=tmp_path / "first.run")
    assert (found.queries, found.corpus) == (None, None)
    assert listed(found) == LISTS
    assert found.qrels == QRELS
    assert found.qrels is not QRELS
    assert kinds(found) == {"queries without candidates": (1, ("q3",))}
    assert repr(parts({7: {8: 1}}, name="n")) == "EvaluationSet(n test, retrieval, 1 queries, ids only)"
    with pytest.raises(FormatError, match="there is no judgement"):
        parts({}, name="n")
    with pytest.raises(FormatError, match="stand twice, as text and as number"):
        parts({"q": {"8": 1, 8: 0}}, name="n")
    with pytest.raises(FormatError, match="the relevance must be an integer, got True"):
        parts({"q": {"8": True}}, name="n")


# Identity.


def test_the_fingerprint_is_of_the_content(tmp_path: Path, opened: Open) -> None:
    first = opened(folder(tmp_path / "one")).fingerprint
    assert opened(folder(tmp_path / "two"), name="another").fingerprint == first
    assert len(first) == 32
    others = [
        folder(tmp_path / "a", corpus=corpus_lines() + lines({"_id": "d9", "text": "more"})),
        folder(tmp_path / "b", queries=query_lines({**QUERIES, "q1": "other"})),
        folder(tmp_path / "c", qrels=tsv({**QRELS, "q3": {"d3": 2}})),
    ]
    assert len({first, *(opened(path).fingerprint for path in others)}) == 4
    unused = folder(tmp_path / "d", queries=query_lines({**QUERIES, "unused": "other"}))
    assert opened(unused).fingerprint == first  # it is not evaluated


def test_a_set_goes_to_other_processes(tmp_path: Path, opened: Open) -> None:
    found = opened(broken(tmp_path / "set"))
    copy = pickle.loads(pickle.dumps(found))
    assert copy.qrels == found.qrels
    assert dict(copy.corpus) == dict(found.corpus or {})
    assert copy.fingerprint == found.fingerprint


# Real sets.


@pytest.mark.parametrize(
    ("name", "split"),
    [("scifact", "test"), ("scifact", "train"), ("cranfield", "test"), ("vaswani", "test"), ("nl2bash", "dev")],
)
def test_real_sets_open_as_beir_opens_them(name: str, split: str, opened: Open) -> None:
    path = Path(__file__).parents[2].parent / "shared" / "data" / name
    if not path.is_dir():
        pytest.skip(f"{name} is not on this machine")
    found = opened(path, split=split)
    corpus, queries, qrels = as_beir(path, split)
    assert dict(found.corpus or {}) == corpus
    assert dict(found.queries or {}) == queries
    assert found.qrels == qrels
