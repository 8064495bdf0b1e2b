"""Training lists from a store: what is in them, and what reaches the real trainer in which epoch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ANSWERS, PAIRS
from damage import damaged
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch.utils.data import DataLoader

from st_m3se import DistillationCollator, M3SELoss, MarginMSELoss, ResampleCallback, build_distillation_dataset
from st_m3se.core.errors import FormatError
from st_m3se.losses.gather import Known, not_relevant
from st_m3se.scores import TeacherScores
from st_m3se.training.reader import list_readers
from st_m3se.training.sampling import SAMPLINGS, random_keys, sample_list

COUNT = len(PAIRS)
QUERIES = {f"q{row}": query for row, (query, _) in enumerate(PAIRS)}
CORPUS = {f"d{row}": answer for row, answer in enumerate(ANSWERS)}
QRELS = {f"q{row}": {f"d{row}": 1} for row in range(COUNT)}
IDS = {text: text_id for text_id, text in CORPUS.items()}

Make = Callable[..., Dataset]
Arguments = Callable[..., Any]


def score(row: int, document: int) -> float:
    """The answer first, the rest in an order of the query's own, no two alike."""
    return 9.0 if document == row else ((document * 7 + row * 3) % 16) / 2 - 3.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TeacherScores:
    rows = [(f"q{row}", list(CORPUS), [score(row, document) for document in range(COUNT)]) for row in range(COUNT)]
    return TeacherScores.from_rows(rows, tmp_path_factory.mktemp("store") / "scores")


@pytest.fixture
def build(store: TeacherScores, tmp_path: Path) -> Make:
    """Build from the store and texts above, with what a test changes."""

    def make(**changes: Any) -> Dataset:
        given = {"scores": store, "queries": QUERIES, "corpus": CORPUS, "qrels": QRELS, "cache_dir": tmp_path / "cache"}
        return build_distillation_dataset(**{**given, **changes})

    return make


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., TeacherScores]:
    """A store of given rows."""

    def make(*rows: Any) -> TeacherScores:
        return TeacherScores.from_rows(rows, tmp_path / f"store{len(list(tmp_path.iterdir()))}")

    return make


def at_epoch(dataset: Dataset, epoch: int) -> Dataset:
    for reader in list_readers(dataset):
        reader.set_epoch(epoch)
    return dataset


def lists(dataset: Dataset) -> dict[str, list[tuple[str, float, bool]]]:
    """Each query's list by text: (document id, score, positive)."""
    return {
        row["query"]: list(zip(map(IDS.get, row["documents"]), row["scores"], row["positives"], strict=True))
        for row in dataset
    }


# What is in a list.


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_list_is_the_positive_and_drawn_negatives(build: Make, sampling: Any) -> None:
    """Against the draw of each query on its own, from a candidate list sorted in Python."""
    dataset = at_epoch(build(list_size=6, sampling=sampling, seed=4), 3)
    assert len(dataset) == COUNT
    found = lists(dataset)
    for row, query in enumerate(QUERIES.values()):
        order = sorted(range(COUNT), key=lambda document: (document != row, -score(row, document)))
        keys = random_keys(4, 3, f"q{row}", COUNT)
        places, _ = sample_list(1, COUNT - 1, keys, list_size=6, max_positives=3, sampling=sampling)
        expected = [(f"d{order[place]}", score(row, order[place]), place == 0) for place in places]
        assert found[query] == expected
    assert found != lists(at_epoch(dataset, 4)) or sampling == "top"
    assert found == lists(at_epoch(dataset, 3))


def test_columns_hold_the_same_lists(build: Make) -> None:
    """The host groups by the prefix of a name: there must be no column `document` beside `document_1`."""
    wide, long = (build(list_size=5, layout=layout, max_positives=1, seed=2) for layout in ("columns", "lists"))
    assert list(wide[0]) == ["query", "document_1", "document_2", "document_3", "document_4", "document_5", "label"]
    for one, other in zip(wide, long, strict=True):
        assert [one[f"document_{place}"] for place in range(1, 6)] == other["documents"]
        assert one["query"] == other["query"]
        assert one["label"] == other["scores"]
        assert other["positives"] == [True, False, False, False, False]
    assert wide[2:5]["document_1"] == [ANSWERS[2], ANSWERS[3], ANSWERS[4]]


def test_everything_where_the_list_has_no_size(build: Make) -> None:
    dataset = build(list_size=None)
    assert all(len(row["documents"]) == COUNT and sum(row["positives"]) == 1 for row in dataset)
    assert lists(dataset) == lists(at_epoch(dataset, 1))


def test_the_ids_and_all_candidates_can_be_seen(build: Make) -> None:
    row = build().with_format(None)[3]
    assert row["qid"] == "q3"
    assert row["candidate_ids"][0] == "d3"
    assert row["num_positives"] == 1
    assert row["scores"] == sorted(row["scores"], reverse=True)


def test_integer_ids(rows_of: Any, tmp_path: Path) -> None:
    store = rows_of((7, [70, 71, 72], [3.0, 2.0, 1.0]), (8, [70, 72], [0.5, 1.5]))
    queries = Dataset.from_dict({"id": [8, 7], "text": ["eight", "seven"]})
    corpus = Dataset.from_dict({"id": [72, 71, 70], "text": ["c", "b", "a"]})
    dataset = build_distillation_dataset(store, queries, corpus, {7: {71: 1}, 8: {70: 1}}, cache_dir=tmp_path / "c")
    assert [row["query"] for row in dataset] == ["seven", "eight"]
    assert [row["documents"] for row in dataset] == [["b", "a", "c"], ["a", "c"]]


def test_files_of_beir(store: TeacherScores, build: Make, tmp_path: Path) -> None:
    """Paths all the way: a store, a BEIR folder, a qrels file."""
    import json

    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": text_id, "text": text}) for text_id, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    qrels = "".join(f"{query}\t{document}\t1\n" for query, judged in QRELS.items() for document in judged)
    (tmp_path / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels, encoding="utf-8")
    store.save(tmp_path / "saved")
    given = {"scores": tmp_path / "saved", "queries": tmp_path, "corpus": tmp_path, "qrels": tmp_path / "train.tsv"}
    assert lists(build(**given)) == lists(build())


# Positives.


def test_positives_of_the_teacher_of_the_judgements_and_of_both(rows_of: Any, tmp_path: Path) -> None:
    store = rows_of(("q0", ["d0", "d1", "d2", "d3"], [1.0, 4.0, 3.0, 2.0]))
    judged = {"q0": {"d0": 1, "d3": 0}}

    def positives(**options: Any) -> set[str]:
        dataset = build_distillation_dataset(
            store, QUERIES, CORPUS, cache_dir=tmp_path / "c", list_size=None, **options
        )
        (found,) = lists(dataset).values()
        return {document for document, _, positive in found if positive}

    assert positives() == {"d1"}
    assert positives(teacher_positives=2) == {"d1", "d2"}
    assert positives(qrels=judged) == {"d0"}
    assert positives(qrels=judged, min_relevance=1, teacher_positives=1) == {"d0", "d1"}
    assert positives(qrels={"q0": {"d0": 1, "d2": 2}}, min_relevance=2) == {"d2"}


def test_several_positives_take_turns(rows_of: Any, tmp_path: Path) -> None:
    """At most half of the list; the others are never drawn as negatives."""
    store = rows_of(("q0", list(CORPUS), [score(0, document) for document in range(COUNT)]))
    judged = {"q0": {f"d{document}": 1 for document in range(6)}}
    dataset = build_distillation_dataset(store, QUERIES, CORPUS, judged, list_size=4, cache_dir=tmp_path / "c")
    seen = set()
    for epoch in range(20):
        (found,) = lists(at_epoch(dataset, epoch)).values()
        assert [positive for _, _, positive in found] == [True, True, False, False]
        assert not {document for document, _, positive in found if not positive} & set(judged["q0"])
        seen |= {document for document, _, positive in found if positive}
    assert seen == set(judged["q0"])
    one = build_distillation_dataset(
        store, QUERIES, CORPUS, judged, list_size=4, layout="columns", cache_dir=tmp_path / "c"
    )
    assert {at_epoch(one, epoch)[0]["document_1"] for epoch in range(40)} == {
        CORPUS[text_id] for text_id in judged["q0"]
    }


def test_rows_name_all_that_is_relevant(rows_of: Any, make_model: Any, tmp_path: Path) -> None:
    """Prevents a relevant document from being an in-batch negative: one not drawn, and one without a teacher score."""
    store = rows_of(("q0", ["d0", "d1", "d2", "d3"], [5.0, 4.0, 3.0, 2.0]), ("q1", ["d1", "d9", "d0"], [3.0, 1.0, 0.0]))
    judged = {"q0": {"d0": 1, "d1": 1, "d9": 1, "nowhere": 1, "d3": 0}, "q1": {"d1": 1}, "q7": {"d7": 1}}
    dataset = build_distillation_dataset(
        store, QUERIES, CORPUS, judged, list_size=3, max_positives=1, cache_dir=tmp_path
    )
    first, second = dataset[0], dataset[1]
    assert [CORPUS[document_id] for document_id in first["document_ids"]] == first["documents"]
    assert set(first["relevant_ids"]) == {"d0", "d1", "d9"}
    assert second["relevant_ids"] == ["d1"]
    by_teacher = build_distillation_dataset(store, QUERIES, CORPUS, teacher_positives=2, cache_dir=tmp_path)
    assert [sorted(row["relevant_ids"]) for row in by_teacher] == [["d0", "d1"], ["d1", "d9"]]
    known = DistillationCollator(preprocess_fn=make_model().preprocess)([first, second])["label"]["known"]
    assert not_relevant(Known(**known), known["queries"], 5).sum() == 5 * 2 - 4  # d9 and both d0 and d1; d1


def test_margins_leave_out_likely_false_negatives(rows_of: Any, tmp_path: Path) -> None:
    store = rows_of(("q0", ["d0", "d1", "d2", "d3"], [5.0, 6.0, 4.5, 2.0]))

    def negatives(**options: Any) -> list[str]:
        dataset = build_distillation_dataset(store, QUERIES, CORPUS, {"q0": {"d0": 1}}, cache_dir=tmp_path, **options)
        (found,) = lists(dataset).values()
        return [document for document, _, positive in found if not positive]

    assert negatives() == ["d1", "d2", "d3"]
    assert negatives(absolute_margin=0.0) == ["d2", "d3"]
    assert negatives(absolute_margin=1.0, sampling="top") == ["d3"]
    assert negatives(relative_margin=0.2) == ["d3"]  # 5 - 5 * 0.2 = 4
    assert negatives(absolute_margin=0.0, sampling="random", list_size=2)[0] in ("d2", "d3")
    assert negatives(absolute_margin=0.0, relabel=True, list_size=None) == ["d2", "d3"]
    relabelled = build_distillation_dataset(
        store, QUERIES, CORPUS, {"q0": {"d0": 1}}, absolute_margin=1.0, relabel=True, list_size=None, cache_dir=tmp_path
    )
    (found,) = lists(relabelled).values()
    assert [(document, positive) for document, _, positive in found] == [
        ("d1", True),
        ("d0", True),
        ("d2", True),
        ("d3", False),
    ]


# What cannot be used.


def test_copies_of_a_text_leave_one(rows_of: Any, tmp_path: Path) -> None:
    """The collator refuses a text that is a positive and a negative of one row: training would stop there."""
    corpus = CORPUS | {"copy0": CORPUS["d0"], "copy1": CORPUS["d1"]}
    store = rows_of(("q0", ["copy0", "d1", "d0", "copy1", "d2"], [8.0, 1.0, 7.0, 2.0, 0.0]))
    dataset = build_distillation_dataset(store, QUERIES, corpus, {"q0": {"d0": 1}}, cache_dir=tmp_path / "c")
    assert dataset.with_format(None)[0]["candidate_ids"] == ["d0", "copy1", "d2"]
    DistillationCollator(preprocess_fn=lambda texts, **_: {"input_ids": torch.zeros(len(texts), 1)})([dataset[0]])
    assert "2 candidates repeat" in dataset.info.description


def test_what_is_left_out_is_counted_and_said(rows_of: Any, tmp_path: Path, caplog: Any) -> None:
    store = rows_of(
        ("q0", ["d0", "d1"], [2.0, 1.0]),
        ("q1", ["d0", "d2"], [2.0, 1.0]),  # its positive was not scored
        ("q2", ["d2"], [2.0]),  # no negative
        ("q3", [], []),
        ("q4", ["d4", "d1", "d2"], [2.0, 1.0, 0.0]),
    )
    given = {"queries": QUERIES, "corpus": CORPUS, "qrels": QRELS, "cache_dir": tmp_path / "c"}
    dataset = build_distillation_dataset(store, **given)
    assert [row["query"] for row in dataset] == [QUERIES["q0"], QUERIES["q4"]]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    for part in ("2 of 5 queries", "2 without a scored positive", "1 without a negative", "2 of their 5 relevant"):
        assert part in record.message
    caplog.clear()
    assert len(build_distillation_dataset(store, **given)) == 2  # from the cache, and said again
    assert [other.message for other in caplog.records if other.levelname == "WARNING"] == [record.message]
    columns = build_distillation_dataset(store, layout="columns", list_size=3, **given)
    assert [row["query"] for row in columns] == [QUERIES["q4"]]
    assert "1 with fewer than 2 negatives" in columns.info.description


def test_a_sigmoid_is_named_each_time(rows_of: Any, tmp_path: Path, caplog: Any) -> None:
    """Also where the joined lists are found again; cosines of a bi-encoder are what they are."""
    rows = [("q0", ["d0", "d1", "d2"], [0.999, 0.5, 0.001])]
    for _ in range(2):
        caplog.clear()
        build_distillation_dataset(rows_of(*rows), QUERIES, CORPUS, QRELS, cache_dir=tmp_path / "cache")
        assert [r.getMessage() for r in caplog.records if "all scores lie in [0, 1], as a sigmoid's" in r.getMessage()]
    caplog.clear()
    cosines = TeacherScores.from_rows(rows, tmp_path / "cosines", manifest={"activation": "cosine similarity"})
    build_distillation_dataset(cosines, QUERIES, CORPUS, QRELS, cache_dir=tmp_path / "cache")
    assert caplog.records == []


def test_a_judged_document_outside_the_corpus_marks_nobody_else(rows_of: Any, tmp_path: Path) -> None:
    """The corpus's last document is a candidate of the query before: their numbers must not meet."""
    last = list(CORPUS)[-1]
    store = rows_of(("q0", ["d0", last], [2.0, 1.0]), ("q1", ["d1", last], [2.0, 1.0]))
    judged = {"q0": {"d0": 1}, "q1": {"d1": 1, "elsewhere": 1}}
    dataset = build_distillation_dataset(store, QUERIES, CORPUS, judged, cache_dir=tmp_path / "c")
    assert [row["positives"] for row in dataset] == [[True, False], [True, False]]
    assert "1 of their 3 relevant documents have no teacher score" in dataset.info.description


def test_damaged_lists_are_joined_anew(build: Make, tmp_path: Path, caplog: Any) -> None:
    expected = build(cache_dir=tmp_path).with_format(None)[:]
    arrow, counts = next(tmp_path.glob("lists-*.arrow")), next(tmp_path.glob("lists-*.json"))
    for path in (arrow, counts):
        for content in damaged(path.read_bytes(), 12):
            path.write_bytes(content)
            caplog.clear()
            assert build(cache_dir=tmp_path).with_format(None)[:] == expected
            assert "the joined lists in the cache, is damaged" in caplog.text


def test_nothing_left_is_an_error(build: Make) -> None:
    with pytest.raises(ValueError, match=r"nothing to train on.*16 without a scored positive.*compare the ids"):
        build(qrels={"another": {"d1": 1}})
    with pytest.raises(ValueError, match=r"nothing to train on.*fewer than 16 negatives.*list_size"):
        build(layout="columns", list_size=17)


def test_a_missing_text_is_named_when_the_dataset_is_built(build: Make) -> None:
    """Prevents hours of training that end at the first row with the missing id."""
    corpus = {text_id: text for text_id, text in CORPUS.items() if text_id != "d11"}
    with pytest.raises(FormatError, match=r"not in the corpus.*'d11'"):
        build(corpus=corpus)
    queries = {text_id: text for text_id, text in QUERIES.items() if text_id != "q9"}
    with pytest.raises(FormatError, match=r"not in the queries.*'q9'"):
        build(queries=queries)


def test_ids_of_another_type_are_an_error(build: Make) -> None:
    """Prevents an empty join from passing for missing judgements."""
    with pytest.raises(FormatError, match=r"not in the corpus.*'d0'"):
        build(corpus=dict(enumerate(ANSWERS)), qrels=None)
    with pytest.raises(FormatError, match="query ids of the qrels are int"):
        build(qrels={1: {"d1": 1}})
    with pytest.raises(FormatError, match="document ids of the qrels are int"):
        build(qrels={"q1": {1: 1}})


def test_a_store_with_holes_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, scores in (("short", [[1.0, 2.0], [3.0]]), ("nan", [[1.0, 2.0], [3.0, float("nan")]])):
        table = pa.table({"query_id": ["q0", "q1"], "document_ids": [["d0", "d1"]] * 2, "scores": scores})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(FormatError, match=r"'q1'.*validate"):
            build_distillation_dataset(tmp_path / f"{name}.parquet", QUERIES, CORPUS, cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "hard"}, "sampling must be one of"),
        ({"layout": "wide"}, "layout must be"),
        ({"list_size": 1}, "list_size must be"),
        ({"list_size": None, "layout": "columns"}, "needs a list_size"),
        ({"max_positives": 16}, "below list_size"),
        ({"max_positives": 2, "layout": "columns"}, "one positive"),
        ({"qrels": None, "teacher_positives": 0}, "nothing else says"),
        ({"seed": -1}, "seed must be"),
        ({"absolute_margin": -1.0}, "absolute_margin must be"),
        ({"relabel": True}, "say how near with absolute_margin"),
        ({"relative_margin": float("nan")}, "relative_margin must be"),
    ],
)
def test_options_out_of_range(build: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


# Reproducible, whoever reads.


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(order=st.permutations(range(COUNT)), size=st.integers(1, 7), epoch=st.integers(0, 9))
def test_lists_do_not_depend_on_the_order_of_reading(build: Make, order: list[int], size: int, epoch: int) -> None:
    dataset = at_epoch(build(list_size=5, sampling="random", seed=1), epoch)
    expected = [dataset[row] for row in order]
    found = [row for start in range(0, COUNT, size) for row in dataset.__getitems__(order[start : start + size])]
    assert found == expected
    assert list(dataset.select(order)) == expected
    assert list(at_epoch(build(list_size=5, sampling="random", seed=1), epoch).select(order)) == expected


def test_the_order_of_the_store_and_of_the_texts_changes_no_list(build: Make, store: TeacherScores) -> None:
    ids = [f"q{row}" for row in reversed(range(COUNT))]
    other = build(
        scores=store.select(ids), corpus=dict(reversed(CORPUS.items())), queries=dict(reversed(QUERIES.items()))
    )
    assert lists(other) == lists(build())
    assert [row["query"] for row in other] == [QUERIES[query] for query in ids]


def test_views_of_a_dataset_share_its_epoch(build: Make) -> None:
    """with_format copies a dataset deeply; a copied epoch would stay behind."""
    dataset = build(list_size=4)
    parts = dataset.train_test_split(0.25, seed=0)
    views = [
        dataset.shuffle(seed=3),
        parts["train"],
        dataset.filter(lambda row: "a" in row["query"]),
        dataset.select([1]),
    ]
    before = [lists(view) for view in views]
    at_epoch(dataset, 1)
    everything = lists(dataset)
    for view, old in zip(views, before, strict=True):
        found = lists(view)
        assert found != old
        assert found == {query: everything[query] for query in found}


def test_a_copy_in_another_process_draws_the_same(build: Make) -> None:
    dataset = at_epoch(build(list_size=4), 2)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


def test_a_mapped_dataset_says_how_to_go_on(build: Make) -> None:
    """Prevents lists from being drawn from lists, and added columns from vanishing."""
    dataset = build(list_size=4)
    with pytest.raises(ValueError, match="remove_columns"):
        dataset.map(lambda row: row)[0]
    fixed = dataset.map(lambda row: row, remove_columns=dataset.column_names).with_format(None)
    assert list(fixed) == list(dataset)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_persistent_workers_hear_of_the_epoch(build: Make, method: str) -> None:
    """Their copy of the dataset was made in the first epoch; without shared memory it would stay there."""
    dataset = build(list_size=4)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=4,
        num_workers=2 if method == "fork" else 1,  # a spawned one imports everything again
        persistent_workers=True,
        prefetch_factor=4,
        multiprocessing_context=method,
        collate_fn=list,
    )
    for epoch in (0, 1, 5):
        at_epoch(dataset, epoch)
        found = [row for batch in loader for row in batch]
        assert found == list(dataset)
    assert found != list(at_epoch(dataset, 1))


# In the trainer.


class Recorder(SentenceTransformerTrainer):
    """The host's trainer, which also notes what each step was given: by query tokens, the list's teacher scores."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        scores = inputs["label"]["scores"] if isinstance(inputs["label"], dict) else inputs["label"]
        tokens = zip(inputs["query_input_ids"].tolist(), inputs["query_attention_mask"].tolist(), strict=True)
        queries = [tuple(token for token, real in zip(*row, strict=True) if real) for row in tokens]
        if not hasattr(self, "steps"):
            self.steps: list[dict[Any, Any]] = []
        if model.training:
            self.steps.append(dict(zip(queries, map(tuple, scores.tolist()), strict=True)))
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(make_model: Any, dataset: Any, args: Any, resume: str | None = None, **options: Any) -> list[dict[Any, Any]]:
    """The batches of a run, in order."""
    model = make_model().train()
    columns = not isinstance(dataset, DatasetDict) and "label" in dataset[0]
    given = {
        "loss": M3SELoss(model, scale=3.0),
        "data_collator": None if columns else DistillationCollator(preprocess_fn=model.preprocess),
        "callbacks": [ResampleCallback()],
    }
    if callable(options.get("loss")):
        options["loss"] = options["loss"](model)
    trainer = Recorder(model=model, args=args, train_dataset=dataset, **{**given, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer.steps


def epochs(steps: list[dict[Any, Any]], length: int = 4) -> list[dict[Any, Any]]:
    """The lists of each epoch of a run."""
    return [
        {query: found for step in steps[start : start + length] for query, found in step.items()}
        for start in range(0, len(steps), length)
    ]


def expected_lists(model: SentenceTransformer, dataset: Dataset, epoch: int) -> dict[Any, Any]:
    """What the dataset holds in an epoch, noted as the Recorder does."""
    rows = list(at_epoch(dataset, epoch))
    batch = DistillationCollator(preprocess_fn=model.preprocess)(rows)
    tokens = zip(batch["query_input_ids"].tolist(), batch["query_attention_mask"].tolist(), strict=True)
    queries = [tuple(token for token, real in zip(*row, strict=True) if real) for row in tokens]
    return dict(zip(queries, map(tuple, batch["label"]["scores"].tolist()), strict=True))


LONG = {"max_steps": -1, "num_train_epochs": 3}


def test_every_epoch_of_a_run_has_its_own_lists(make_model: Any, arguments: Arguments, build: Make) -> None:
    """And they are those of (seed, epoch, query), each query once an epoch."""
    steps = train(make_model, build(list_size=4, seed=7), arguments(**LONG))
    model, other = make_model(), build(list_size=4, seed=7)
    assert len(steps) == 12
    for epoch, found in enumerate(epochs(steps)):
        assert found == expected_lists(model, other, epoch)
    assert all(one != two for one, two in zip(epochs(steps), epochs(steps)[1:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(make_model: Any, arguments: Arguments, build: Make, persistent: bool) -> None:
    alone = train(make_model, build(list_size=4), arguments(**LONG))
    workers = arguments(
        **LONG, dataloader_num_workers=2, dataloader_persistent_workers=persistent, dataloader_prefetch_factor=2
    )
    assert train(make_model, build(list_size=4), workers) == alone


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates"])
def test_resuming_within_an_epoch(
    make_model: Any, arguments: Arguments, build: Make, sampler: str, tmp_path: Any
) -> None:
    """From the middle of the second epoch, and from its end: the lists of the unbroken run."""
    options = {**LONG, "save_strategy": "steps", "save_steps": 2, "batch_sampler": sampler}
    whole = train(make_model, build(list_size=4), arguments(**options, dataloader_num_workers=2))
    assert len(whole) == 12
    for step in (6, 8):
        again = arguments(**options, dataloader_num_workers=2, dataloader_persistent_workers=True)
        rest = train(make_model, build(list_size=4), again, resume=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert rest == whole[step:]


def test_gradient_accumulation_counts_the_same_epochs(make_model: Any, arguments: Arguments, build: Make) -> None:
    """Three batches of 6 make two updates: the trainer's own count of epochs, at the start and after resuming."""
    options = {
        **LONG,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    args = arguments(**options)
    whole = train(make_model, build(list_size=4), args)
    assert len(whole) == 9
    model, other = make_model(), build(list_size=4)
    assert [found == expected_lists(model, other, epoch) for epoch, found in enumerate(epochs(whole, 3))] == [True] * 3
    rest = train(make_model, build(list_size=4), args, resume=str(Path(args.output_dir) / "checkpoint-3"))
    assert rest == whole[5:]


@pytest.mark.parametrize("layout", ["lists", "columns"])
def test_no_duplicates_fills_its_batches(
    make_model: Any, arguments: Arguments, rows_of: Any, tmp_path: Path, layout: str
) -> None:
    """Equal flags, scores or relevant documents of two rows are no duplicate: their batches would hold one row each."""
    documents = [(0, row + 1) if layout == "lists" else (2 * row, 2 * row + 1) for row in range(8)]
    store = rows_of(*[(f"q{row}", [f"d{one}", f"d{two}"], [3.0, 1.0]) for row, (one, two) in enumerate(documents)])
    qrels = {f"q{row}": {f"d{one}": 1} for row, (one, _) in enumerate(documents)}
    dataset = build_distillation_dataset(
        store, QUERIES, CORPUS, qrels, list_size=2, layout=layout, cache_dir=tmp_path / "cache"
    )
    model = make_model()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(batch_sampler="no_duplicates"),
        train_dataset=dataset,
        loss=M3SELoss(model, scale=3.0),
        data_collator=DistillationCollator(preprocess_fn=model.preprocess) if layout == "lists" else None,
    )
    assert [len(batch["query_input_ids"]) for batch in trainer.get_train_dataloader()] == [4, 4]


def test_columns_with_the_stock_collator(make_model: Any, arguments: Arguments, build: Make) -> None:
    dataset = build(list_size=4, layout="columns")
    steps = train(make_model, dataset, arguments(**LONG, dataloader_num_workers=2), loss=MarginMSELoss)
    model, other = make_model(), build(list_size=4, max_positives=1)
    for epoch, found in enumerate(epochs(steps)):
        assert found == expected_lists(model, other, epoch)


@pytest.mark.parametrize("name", ["ListNetLoss", "LambdaLoss", "MarginMSELoss"])
def test_a_cross_encoder_as_the_student(checkpoint: Path, tmp_path: Path, build: Make, name: str) -> None:
    """Two layouts are all that its losses take: lists with their scores, and columns."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses

    dataset = build(list_size=3, layout="columns" if name == "MarginMSELoss" else "reranker")
    assert next(iter(dataset[0])) == "query"
    assert list(dataset[0])[-1] == "label"
    model = CrossEncoder(str(checkpoint), num_labels=1, device="cpu")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = getattr(losses, name)(model)
    CrossEncoderTrainer(model=model, args=args, train_dataset=dataset, loss=loss).train()
    assert any(not before[key].equal(value) for key, value in model.state_dict().items())


def test_columns_with_model_fit(make_model: Any, build: Make, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.readers import InputExample

    model = make_model()
    rows = build(list_size=4, layout="columns")
    names = [name for name in rows[0] if name != "label"]
    examples = [InputExample(texts=[row[name] for name in names], label=row["label"]) for row in rows]
    loader = DataLoader(examples, batch_size=4)  # type: ignore[arg-type]
    before = model.encode(["sort"])
    model.fit([(loader, M3SELoss(model, scale=3.0))], epochs=1, show_progress_bar=False, warmup_steps=0)
    assert np.abs(model.encode(["sort"]) - before).max() > 1e-4


def test_several_datasets_with_a_loss_each(make_model: Any, arguments: Arguments, build: Make, store: Any) -> None:
    """The trainer wraps each transform to add the dataset's name; the callback finds what is inside."""
    halves = {name: store.select([f"q{row}" for row in rows]) for name, rows in (("a", range(8)), ("b", range(8, 16)))}
    datasets = DatasetDict({name: build(scores=half, list_size=4) for name, half in halves.items()})
    losses = lambda model: {"a": M3SELoss(model, scale=3.0), "b": MarginMSELoss(model, scale=3.0)}  # noqa: E731
    args = arguments(**LONG, dataloader_num_workers=2, dataloader_persistent_workers=True)
    steps = train(make_model, datasets, args, loss=losses)
    model, other = make_model(), build(list_size=4)
    for epoch, found in enumerate(epochs(steps)):
        assert found == expected_lists(model, other, epoch)


def test_an_evaluation_set_keeps_its_lists(make_model: Any, arguments: Arguments, build: Make) -> None:
    """The same eval loss for the same weights: the callback tells the training dataset alone."""
    held_out = build(list_size=4, seed=3)
    args = arguments(**LONG, eval_strategy="epoch", learning_rate=0.0)
    train(make_model, build(list_size=4), args, eval_dataset=held_out)
    (reader,) = list_readers(held_out)
    assert reader.state.tolist()[0] == 0
    fixed = build(list_size=4, seed=3, resample=False)
    assert list(at_epoch(fixed, 2)) == list(held_out)


def test_without_the_callback_the_lists_repeat_and_it_is_said_once(build: Make, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("st_m3se.training.reader.READS_BEFORE_TRAINING", 0)
    dataset = build(list_size=4)
    for _ in range(4):
        assert len(list(dataset)) == COUNT
    assert [record.message for record in caplog.records if "ResampleCallback" in record.message] != []
    caplog.clear()
    for told in (
        at_epoch(build(list_size=4), 0),
        build(list_size=4, resample=False),
        build(sampling="top", list_size=4),
    ):
        for _ in range(4):
            list(told)
    list(dataset)
    assert not [record for record in caplog.records if "ResampleCallback" in record.message]


def test_the_callback_needs_a_dataset_to_tell(make_model: Any, arguments: Arguments, build: Make) -> None:
    dataset = build(list_size=4)
    fixed = dataset.map(lambda row: row, remove_columns=dataset.column_names).with_format(None)
    with pytest.raises(ValueError, match="no training dataset"):
        train(make_model, fixed, arguments())


def one_rank(rank: int, folder: str) -> None:
    """One of two processes as a launcher starts them: the trainer finds its place in the environment."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (Path(folder) / "port").read_text()
    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformerTrainingArguments

    dataset = build_distillation_dataset(
        f"{folder}/scores", QUERIES, CORPUS, QRELS, list_size=4, cache_dir=f"{folder}/cache"
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/run",
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    steps = train(lambda: SentenceTransformer(f"{folder}/model", device="cpu"), dataset, args)
    torch.save(steps, f"{folder}/steps{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_lists_of_an_epoch(
    make_model: Any, store: TeacherScores, build: Make, tmp_path: Path
) -> None:
    """accelerate tells a dataset its epoch for a single process alone: with two, lists would quietly stay the same."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    make_model().save_pretrained(str(tmp_path / "model"))
    store.save(tmp_path / "scores")
    # Forked: the imports of two new processes would take longer than everything else.
    torch.multiprocessing.start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"steps{rank}.pt") for rank in range(2)]
    model, other = make_model(), build(list_size=4)
    for epoch in range(2):
        halves = [epochs(steps, 2)[epoch] for steps in ranks]
        assert not set(halves[0]) & set(halves[1])
        assert halves[0] | halves[1] == expected_lists(model, other, epoch)
