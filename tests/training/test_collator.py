"""The collator: each distinct text once, labels that find it again, and rows that are refused."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import ANSWERS, collate, split
from datasets import Dataset
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import DataLoader

from st_m3se import DistillationCollator, M3SELoss
from st_m3se.functional import m3se_loss

NAN = math.nan


@pytest.fixture
def collator(model: Any) -> DistillationCollator:
    return DistillationCollator(preprocess_fn=model.preprocess)


def row(**changes: Any) -> dict[str, Any]:
    """A good row, to be spoilt."""
    return {"query": "sort objects", "documents": list(ANSWERS[:3]), "scores": [3.0, 1.0, -2.0]} | changes


def texts_of(model: Any, batch: dict[str, Any], column: str) -> list[str]:
    return model.tokenizer.batch_decode(batch[f"{column}_input_ids"], skip_special_tokens=True)


# The batch


def test_every_list_finds_its_texts_and_scores_again(
    model: Any, collator: DistillationCollator, ragged_rows: list[dict[str, Any]]
) -> None:
    """Prevents a teacher score that stands beside another document: training goes on, towards noise."""
    batch = collator(ragged_rows)
    label, texts = batch["label"], texts_of(model, batch, "document")
    assert len(set(texts)) == len(texts), "a text is encoded twice"
    assert set(texts) == {text.lower() for text in _plain(model, ragged_rows)}
    assert texts_of(model, batch, "query") == _decoded(model, [row["query"] for row in ragged_rows])
    for place, listed in enumerate(ragged_rows):
        count = len(listed["documents"])
        assert label["mask"][place].tolist() == [True] * count + [False] * (5 - count)
        assert label["positives"][place].tolist() == [True] + [False] * 4
        assert [texts[found] for found in label["index"][place, :count]] == _decoded(model, listed["documents"])
        assert label["scores"][place, :count].tolist() == pytest.approx(listed["scores"])


def _decoded(model: Any, texts: list[str]) -> list[str]:
    return model.tokenizer.batch_decode(model.tokenizer(texts)["input_ids"], skip_special_tokens=True)


def _plain(model: Any, rows: list[dict[str, Any]]) -> list[str]:
    return _decoded(model, [text for row in rows for text in row["documents"]])


def test_the_types_and_shapes_of_the_label(collator: DistillationCollator) -> None:
    label = dict(collator([row(), row(documents=[ANSWERS[5]], scores=[1])])["label"])
    known = label.pop("known")
    assert all(value.dtype == torch.int64 for value in known.values())
    assert {key: value.dtype for key, value in label.items()} == {
        "scores": torch.float32,
        "positives": torch.bool,
        "mask": torch.bool,
        "index": torch.int64,
    }
    assert all(value.shape == (2, 3) for value in label.values())
    assert not label["positives"][1, 1:].any()
    assert int(label["index"].min()) >= 0
    assert int(label["index"].max()) < 4


def test_positives_are_kept_in_their_places(collator: DistillationCollator) -> None:
    """Prevents a dataset whose positive is not the first document from being trained upside down."""
    label = collator([row(positives=[False, True, True]), row(positives=[False, False, True])])["label"]
    assert label["positives"].tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("unscored", [None, NAN])
def test_an_unscored_document_is_nan_and_no_zero(collator: DistillationCollator, unscored: float | None) -> None:
    """Prevents 'not scored' from being learned as a score of 0."""
    scores = collator([row(scores=[1.0, unscored, -1.0])])["label"]["scores"]
    assert scores.isnan().tolist() == [[False, True, False]]


def test_scores_may_be_whole_numbers(collator: DistillationCollator) -> None:
    assert collator([row(scores=[3, 1, -2])])["label"]["scores"].tolist() == [[3.0, 1.0, -2.0]]


def test_ids_may_stand_beside_the_texts(collator: DistillationCollator, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents ids from being tokenised and trained on as text, and a warning about it where it does not happen."""
    batch = collator([row(query_id="q1", document_ids=["a", "b", "c"])])
    assert not [key for key in batch if "id" in key and not key.endswith("input_ids") and "token_type" not in key]
    assert len(split(batch).features) == 2
    assert caplog.records == []


def test_what_is_relevant_has_the_keys_of_its_texts_and_ids(collator: DistillationCollator) -> None:
    """Prevents an id from being taken for a text or for an id of another type, and ids from being tied to a process."""
    rows = [
        row(document_ids=["a", 1, "1"], relevant_ids=["a", "elsewhere"]),
        row(documents=["a", ANSWERS[0]], document_ids=["b", "c"], scores=[1.0, 0.0]),
    ]
    known = collator(rows)["label"]["known"]
    by_document = {place: set(known["documents"][known["rows"] == place].tolist()) for place in range(4)}
    assert [len(keys) for keys in by_document.values()] == [3, 2, 2, 2]  # answer 0 has the ids "a" and "c"
    assert len(set.union(*by_document.values())) == 9
    first, second = ({key for key in keys if key >= 0} for keys in known["relevant"].tolist())
    assert len(first) == 3  # the text of the positive, its id, and the id of a document that is not here
    assert len(first & by_document[0]) == 2
    assert second == by_document[3]


def test_the_dataset_name_is_kept(collator: DistillationCollator) -> None:
    """It chooses the loss where a dict of losses is trained."""
    assert collator([row(dataset_name="docs"), row(dataset_name="docs")])["dataset_name"] == "docs"


def test_no_rows_give_an_empty_batch(collator: DistillationCollator) -> None:
    assert collator([]) == {}


def test_rows_are_not_changed(collator: DistillationCollator, ragged_rows: list[dict[str, Any]]) -> None:
    """A dataset in memory hands out the same rows again in the next epoch."""
    before = copy.deepcopy(ragged_rows)
    collator(ragged_rows)
    assert ragged_rows == before


def test_a_datasets_own_rows_fit(collator: DistillationCollator, ragged_rows: list[dict[str, Any]]) -> None:
    """Nones, nested lists and flags after a trip through Arrow."""
    ragged_rows[1]["scores"][1] = None
    rows = [row | {"positives": [place == 0 for place in range(len(row["documents"]))]} for row in ragged_rows]
    dataset = Dataset.from_list(rows)
    label = collator([dataset[place] for place in range(4)])["label"]
    direct = collator(rows[:4])["label"]
    assert all(torch.equal(label[key].nan_to_num(99.0), direct[key].nan_to_num(99.0)) for key in ("scores",))
    assert all(torch.equal(label[key], direct[key]) for key in ("positives", "mask", "index"))


def test_it_is_the_hosts_collator(collator: DistillationCollator) -> None:
    """The trainer reads ``valid_label_columns``, ``prompts`` and ``router_mapping`` off it."""
    assert isinstance(collator, SentenceTransformerDataCollator)
    assert collator.valid_label_columns


# Prompts, tasks and lengths


def test_prompts_go_to_their_columns(model: Any) -> None:
    """Prevents prompts that are accepted and never seen by the model."""
    collator = DistillationCollator(
        preprocess_fn=model.preprocess, prompts={"query": "query: ", "documents": "passage: "}
    )
    plain, prompted = DistillationCollator(preprocess_fn=model.preprocess)([row()]), collator([row()])
    for column, prompt in (("query", "query :"), ("document", "passage :")):
        before, after = texts_of(model, plain, column), texts_of(model, prompted, column)
        prompt = _decoded(model, [prompt])[0]
        assert after == [f"{prompt} {text}" for text in before]


def test_one_prompt_for_all_columns(model: Any) -> None:
    batch = DistillationCollator(preprocess_fn=model.preprocess, prompts="text: ")([row()])
    prompt = _decoded(model, ["text:"])[0]
    assert all(text.startswith(prompt) for text in texts_of(model, batch, "query") + texts_of(model, batch, "document"))


def test_prompts_by_dataset(model: Any) -> None:
    """Two datasets in one run may ask for two prompts."""
    prompts = {"docs": {"query": "docs: "}, "code": {"query": "code: "}}
    collator = DistillationCollator(preprocess_fn=model.preprocess, prompts=prompts)
    for name in prompts:
        text = texts_of(model, collator([row(dataset_name=name)]), "query")[0]
        assert text.startswith(_decoded(model, [f"{name}:"])[0])


@pytest.mark.parametrize("option", ["prompts", "router_mapping"])
def test_a_prompt_or_task_for_an_unknown_column_is_refused(model: Any, option: str) -> None:
    """Prevents a misspelt column from leaving all texts without their prompt."""
    collator = DistillationCollator(preprocess_fn=model.preprocess, **{option: {"document": "document"}})
    with pytest.raises(ValueError, match=rf"{option}.*\['document'\].*'query' and 'documents'"):
        collator([row()])


def test_a_prompt_left_out_of_pooling_is_left_out(make_model: Any) -> None:
    """Prevents a model that ignores prompts when it pools from learning them: ``prompt_length`` must get through.

    One prompt over all documents, in lists of unlike lengths, cut and sorted on the way to the model.
    """
    model = make_model(include_prompt=False).train()
    rows = [row(), row(query="copy a file", documents=[ANSWERS[7], ANSWERS[2]], scores=[2.0, 0.0])]
    options = {"prompts": {"query": "query: ", "documents": "passage: "}}
    batch = collate(model, rows, **options)
    assert all("prompt_length" in features for features in batch.features)
    plain = M3SELoss(model, scale=3.0)(batch.fresh(), batch.labels)
    batch_cached = M3SELoss(model, scale=3.0, mini_batch_num_tokens=20)(batch.fresh(), batch.labels)

    whole = [model(features)["sentence_embedding"] for features in batch.fresh()]
    cosines = 3.0 * torch.nn.functional.cosine_similarity(whole[0][:, None], whole[1][None], dim=-1)
    student = cosines.gather(1, batch.labels["index"])
    labels = batch.labels
    expected = m3se_loss(student, labels["scores"], positives=labels["positives"], mask=labels["mask"])
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch_cached, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("max_length", "widths"),
    [(6, (6, 6)), ({"query": 4, "document": 8}, (4, 8))],
)
def test_lengths_are_cut_as_asked(model: Any, max_length: Any, widths: tuple[int, int]) -> None:
    """Prevents long documents from being trained at full length where a limit was set."""
    collator = DistillationCollator(
        preprocess_fn=model.preprocess,
        max_length=max_length,
        router_mapping={"query": "query", "documents": "document"},
    )
    batch = collator([row(query="sort objects by several keys and then by the next")])
    assert (batch["query_input_ids"].shape[1], batch["document_input_ids"].shape[1]) == widths


def test_tasks_go_to_the_model_and_on_to_the_loss(model: Any) -> None:
    """A Router reads ``task`` from the features; without it every text takes the default route."""
    seen = []

    def preprocess(texts: list[str], **options: Any) -> Any:
        seen.append(options["task"])
        return model.preprocess(texts, **options)

    mapping = {"query": "query", "documents": "document"}
    batch = DistillationCollator(preprocess_fn=preprocess, router_mapping=mapping)([row()])
    assert seen == ["query", "document"]
    assert [features["task"] for features in split(batch).features] == ["query", "document"]


@pytest.mark.parametrize("given", [{"prompts": {}}, {"prompts": {"query": "find: "}}, {}])
def test_texts_are_read_as_the_model_reads_them_in_search(make_model: Any, given: dict[str, Any]) -> None:
    """Prevents a model that is trained on other texts than it is searched with: its own prompts, lengths and tasks."""
    model = make_model(prompts={"query": "query: ", "passage": "never", "document": "text: "})
    model[0].query_length, model[0].document_length = 6, 9
    batch = DistillationCollator(preprocess_fn=model.preprocess, **given)([row(query="sort objects by several keys")])
    seen = []
    forward = model.forward
    model.forward = lambda features, **_: seen.append(dict(features)) or forward(features)
    queries = {} if not given else {"prompt": given["prompts"].get("query", "")}
    model.encode_query(["sort objects by several keys"], **queries)
    model.encode_document(row()["documents"], **({} if not given else {"prompt": ""}))
    for features, column in zip(seen, ("query", "document"), strict=True):
        assert texts_of(model, batch, column) == _unsorted(model, batch, column, features["input_ids"])
        assert f"{column}_task" not in batch, "no module of the model reads it"
    assert batch["query_input_ids"].shape[1] == 6


def _unsorted(model: Any, batch: dict[str, Any], column: str, ids: torch.Tensor) -> list[str]:
    """encode sorts by length; the texts are a set."""
    found = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sorted(found, key=texts_of(model, batch, column).index)


def test_prompts_of_another_dataset_leave_the_models_own(make_model: Any) -> None:
    model = make_model(prompts={"query": "query: "})
    prompts = {"pairs": {"anchor": "same: "}, "code": {"query": "code: "}}
    collator = DistillationCollator(preprocess_fn=model.preprocess, prompts=prompts)
    for name, prompt in (("docs", "query:"), ("code", "code:")):
        (text,) = texts_of(model, collator([row(dataset_name=name)]), "query")
        assert text.startswith(_decoded(model, [prompt])[0])
    with pytest.raises(ValueError, match="nested dictionary"):
        collator([row()])


def test_a_prompt_that_stands_in_the_texts_already_is_refused(make_model: Any) -> None:
    """Prevents "query: query: ...": many write a model's prompt into their texts, as its trainer gives it none."""
    model = make_model(prompts={"query": "query: "})
    rows = [row(query="query: sort objects"), row(query="query: copy a file")]
    with pytest.raises(ValueError, match=r"begin with the model's own prompt 'query: '.*twice.*prompts=\{\}"):
        DistillationCollator(preprocess_fn=model.preprocess)(rows)
    DistillationCollator(preprocess_fn=model.preprocess, prompts={})(rows)
    DistillationCollator(preprocess_fn=model.preprocess)([rows[0], row()])


def test_a_length_beyond_the_positions_is_refused(model: Any) -> None:
    """Prevents an index error in the middle of a run."""
    for length in (65, {"query": 8, "document": 65}):
        with pytest.raises(ValueError, match=r"max_length=65 is beyond the model's 64 positions"):
            DistillationCollator(preprocess_fn=model.preprocess, max_length=length)([row()])


def test_a_mapping_by_dataset_needs_its_names(model: Any) -> None:
    """The host takes it for no mapping at all."""
    mapping = {"docs": {"query": "query", "documents": "document"}}
    collator = DistillationCollator(preprocess_fn=model.preprocess, router_mapping=mapping)
    assert collator([row(dataset_name="docs")])["query_task"] == "query"
    with pytest.raises(ValueError, match="by dataset, and this dataset has no name"):
        collator([row()])


# Rows of ordinary datasets


@pytest.mark.parametrize(
    "other",
    [
        {"anchor": "sort objects", "positive": ANSWERS[7]},
        {"query": "sort objects", "document_1": ANSWERS[7], "document_2": ANSWERS[1], "scores": [2.0, 1.0]},
        {"sentence1": "one", "sentence2": "two", "score": 0.5},
    ],
)
def test_rows_without_lists_go_the_hosts_way(model: Any, collator: DistillationCollator, other: dict[str, Any]) -> None:
    """One trainer has one collator: lists beside pairs could not be trained."""
    rows, stock = [other, other], SentenceTransformerDataCollator(preprocess_fn=model.preprocess)
    batch, expected = collator(rows), stock(rows)
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value


def test_a_misspelt_column_of_lists_does_not_go_the_hosts_way(collator: DistillationCollator) -> None:
    """Prevents lists from being tokenised as one text."""
    other = {"query": "sort objects", "docs": list(ANSWERS[:2]), "scores": [2.0, 1.0]}
    with pytest.raises(ValueError, match=r"lacks \['documents'\]"):
        collator([other])


# Workers


def test_batches_from_workers_are_those_of_the_main_process(
    model: Any, collator: DistillationCollator, ragged_rows: list[dict[str, Any]]
) -> None:
    """Prevents a collator that works until ``dataloader_num_workers`` is set."""
    dataset = Dataset.from_list(ragged_rows)
    workers = DataLoader(dataset, batch_size=4, collate_fn=collator, num_workers=2, persistent_workers=True)
    direct = DataLoader(dataset, batch_size=4, collate_fn=collator)
    for _ in range(2):
        batches = list(workers)
        assert len(batches) == 4
        for one, other in zip(batches, direct, strict=True):
            assert one.keys() == other.keys()
            assert torch.equal(one["document_input_ids"], other["document_input_ids"])
            assert all(torch.equal(one["label"][key], other["label"][key]) for key in ("positives", "mask", "index"))
    del workers


def test_it_can_be_pickled(collator: DistillationCollator) -> None:
    """Worker processes that are spawned, as on macOS and Windows, get it as a pickle."""
    batch = pickle.loads(pickle.dumps(collator))([row()])
    assert torch.equal(batch["document_input_ids"], collator([row()])["document_input_ids"])


# Refusals


def without(column: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != column}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without("query"), r"row 1 lacks \['query'\].*Rename"),
        (without("documents"), r"row 1 lacks \['documents'\]"),
        (without("scores"), r"row 1 lacks \['scores'\]"),
        (row(answer="text"), r"column\(s\) \['answer'\].*remove_columns"),
        (row(query=7), r"row 1: `query` must be a str, got int"),
        (row(query=None), r"row 1: `query` must be a str, got NoneType"),
        (row(documents=[], scores=[]), r"row 1: `documents` must be a list of at least one str"),
        (row(documents=None), r"row 1: `documents` must be a list of at least one str, got None"),
        (row(documents="a single text"), r"row 1: `documents` must be a list of at least one str, got 'a single"),
        (row(documents=[ANSWERS[0], 12, 13]), r"row 1: `documents` must be a list of at least one str"),
        (row(documents=[ANSWERS[0], None, ANSWERS[1]]), r"row 1: `documents` must be a list of at least one str"),
        (row(scores=[1.0, 2.0]), r"row 1: `scores`.*each of the 3 documents, got 2 scores"),
        (row(scores=[1.0, 2.0, 3.0, 4.0]), r"row 1: `scores`.*each of the 3 documents, got 4 scores"),
        (row(scores=1.0), r"row 1: `scores` must be a list.*got float"),
        (row(scores=["1.0", "0.0", "0.0"]), r"row 1: a teacher score must be a float.*got '1.0'"),
        (row(scores=[True, False, False]), r"row 1: a teacher score must be a float.*got True"),
        (row(scores=[1.0, math.inf, 0.0]), r"row 1: .*must be finite.*None"),
        (row(scores=[-math.inf, 1.0, 0.0]), r"row 1: .*must be finite"),
        (row(scores=[1e39, 1.0, 0.0]), r"row 1: .*finite in single precision too, got 1e\+39"),
        (
            row(documents=[ANSWERS[0], ANSWERS[1], ANSWERS[0]]),
            r"row 1: the document .* as a positive and as a negative",
        ),
        (row(document_ids=["a", "b"]), r"row 1: `document_ids` must be a list of 3 ids.*got \['a', 'b'\].*remove it"),
        (row(document_ids="abc"), r"row 1: `document_ids` must be a list of 3 ids"),
        (row(document_ids=["a", None, "c"]), r"row 1: `document_ids` must be a list of 3 ids"),
        (row(document_ids=["a", "b", "c"], relevant_ids="a"), r"row 1: `relevant_ids` must be a list of ids.*got 'a'"),
        (
            row(document_ids=["a", "b", "c"], relevant_ids=None),
            r"row 1: `relevant_ids` must be a list of ids.*got None",
        ),
        (row(relevant_ids=["a"]), r"row 1: `relevant_ids` without `document_ids`.*Add"),
    ],
)
def test_a_bad_row_is_refused_by_its_place(collator: DistillationCollator, bad: dict[str, Any], message: str) -> None:
    """Prevents a row that is mended by a guess: an empty text, a dropped score, a shifted list."""
    with pytest.raises(ValueError, match=message):
        collator([row(), bad])


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        ([True, False], r"row 1: `positives` must be a list of 3 bools"),
        ([True, False, False, False], r"row 1: `positives` must be a list of 3 bools"),
        ([1, 0, 0], r"row 1: `positives` must hold bools"),
        ([1.0, 0.0, 0.0], r"row 1: `positives` must hold bools"),
        ([True, None, False], r"row 1: `positives` must hold bools"),
        (0, r"row 1: `positives` must be a list of 3 bools, got 0"),
        ("True", r"row 1: `positives` must be a list of 3 bools"),
    ],
)
def test_bad_positives_are_refused(collator: DistillationCollator, positives: Any, message: str) -> None:
    """Prevents indices of positives, or graded judgements, from being read as flags."""
    with pytest.raises(ValueError, match=message):
        collator([row(positives=[True, False, False]), row(positives=positives)])


def test_positives_in_some_rows_only_are_refused(collator: DistillationCollator) -> None:
    """Prevents half of a mixture of datasets from getting document 0 as its positive."""
    for rows in ([row(positives=[True, False, False]), row()], [row(), row(positives=[True, False, False])]):
        with pytest.raises(ValueError, match=r"row 1: either every row has `positives` or none"):
            collator(rows)


def test_the_hosts_column_order_warning_does_not_come(
    collator: DistillationCollator, caplog: pytest.LogCaptureFixture
) -> None:
    """The columns go by name here: a dataset with ``documents`` first is in order."""
    with caplog.at_level(logging.WARNING):
        collator([dict(reversed(row().items()))])
    assert caplog.records == []
