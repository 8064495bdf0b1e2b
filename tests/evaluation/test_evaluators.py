"""The trainer's evaluator beside sentence-transformers' own, on the same data and in the real trainer."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAIRS
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

from evaluation.encoders import CORPUS, KINDS, QUERIES, make_encoder
from st_m3se.evaluation import RetrievalEvaluator, open_set, qrels_set

# Two relevant documents for most queries, of which one has an equal twin; unlike texts only, so that no rank is a tie.
DOCUMENTS = {key: text for key, text in CORPUS.items() if not key.startswith("again")}
KEYS = [key for key in DOCUMENTS if key != "empty"]
QRELS = {f"q{row}": {KEYS[row]: 1, KEYS[(row + 5) % 16]: 1, KEYS[(row + 1) % 16]: 0} for row in range(12)}
MEASURES = ("nDCG@10", "RR@10", "R@5", "P@3", "Success@1")
HOSTS = {
    "nDCG@10": "ndcg@10",
    "RR@10": "mrr@10",
    "R@5": "recall@5",
    "P@3": "precision@3",
    "Success@1": "accuracy@1",
}
EVALUATORS: dict[str, Any] = {
    "dense": InformationRetrievalEvaluator,
    "sparse": SparseInformationRetrievalEvaluator,
    "multi-vector": MultiVectorInformationRetrievalEvaluator,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_beir(folder: Path, qrels: dict[str, dict[str, int]], documents: dict[str, str] = DOCUMENTS) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", QUERIES)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{query}\t{key}\t{grade}" for query, grades in qrels.items() for key, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small", QRELS)


def by_the_host(kind: str, model: Any, **options: Any) -> dict[str, float]:
    """The same measures by sentence-transformers' evaluator."""
    relevant = {query: {key for key, grade in grades.items() if grade} for query, grades in QRELS.items()}
    options = {"precision_recall_at_k": [3, 5], "accuracy_at_k": [1], **options}
    found = EVALUATORS[kind](QUERIES, DOCUMENTS, relevant, write_csv=False, **options)(model)
    return {name: found[f"{model.similarity_fn_name}_{host}"] for name, host in HOSTS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_measures_are_those_of_sentence_transformers(
    kind: str, chunk_size: int | None, checkpoint: Path, folder: Path
) -> None:
    """With prompts of the model's own, for each kind of encoder, in one chunk and in four."""
    model = make_encoder(kind, checkpoint, prompts={"query": "find: ", "document": "text: "})
    evaluator = RetrievalEvaluator(folder, measures=MEASURES, chunk_size=chunk_size)
    found = evaluator(model)
    assert list(found) == [f"small_{name}" for name in MEASURES]
    expected = by_the_host(kind, model)
    assert found == pytest.approx({f"small_{name}": value for name, value in expected.items()})
    assert 0.05 < found["small_nDCG@10"] < 0.95
    assert evaluator.primary_metric == "small_nDCG@10"


def test_prompts_and_dimension_are_handed_on(checkpoint: Path, folder: Path) -> None:
    model = make_encoder("dense", checkpoint, prompts={"find": "find: "})
    options: list[dict[str, Any]] = [
        {},
        {"truncate_dim": 4},
        {"query_prompt": "a date: ", "corpus_prompt": "a file: "},
        {"query_prompt_name": "find", "corpus_prompt_name": "find"},
    ]
    found = []
    for each in options:
        found.append(RetrievalEvaluator(folder, measures=MEASURES, name="", **each)(model))
        assert found[-1] == pytest.approx(by_the_host("dense", model, **each))
    assert len({tuple(each.values()) for each in found}) > 2, "the options change nothing: the comparison says little"


def test_grades_and_own_documents(checkpoint: Path, tmp_path: Path) -> None:
    """What the host's evaluator does not know: grades, and a query that is a document of the corpus, too."""
    model = make_encoder("dense", checkpoint)
    documents = {**DOCUMENTS, **QUERIES}
    qrels = {f"q{row}": {KEYS[row]: 3, KEYS[(row + 5) % 16]: 1, f"q{(row + 1) % 16}": 2} for row in range(12)}
    folder = write_beir(tmp_path / "own", qrels, documents)
    without = RetrievalEvaluator(folder, measures=["nDCG@10", "P@1"], depth=10)
    kept = RetrievalEvaluator(folder, measures=["nDCG@10", "P@1"], depth=10, exclude_same_id=False)
    rows = {key: row for row, key in enumerate(documents)}
    texts = model.encode_document(list(documents.values()))
    for evaluator, excluded in ((without, True), (kept, False)):
        values = evaluator.evaluate_queries(model)["nDCG@10"]
        for value, (query, grades) in zip(values, qrels.items(), strict=True):
            scores = model.similarity(model.encode_query(QUERIES[query]), texts)[0].numpy().copy()
            if excluded:
                scores[rows[query]] = -np.inf
            gains = [grades.get(list(documents)[row], 0) for row in np.argsort(-scores)[:10]]
            ideal = sorted(grades.values(), reverse=True)
            dcg, best = (sum(gain / np.log2(rank + 2) for rank, gain in enumerate(each)) for each in (gains, ideal))
            assert value == pytest.approx(dcg / best)
    assert kept(model)["own_P@1"] == 0.0  # each query finds itself first, and is not relevant to itself
    assert without(model)["own_P@1"] > 0.0
    assert without.search(model).rows.shape == (12, 10)
    assert (without.search(model).rows >= 0).all()


def test_a_chunk_is_dropped_before_the_next_is_encoded(checkpoint: Path, folder: Path, monkeypatch: Any) -> None:
    """Prevents an evaluator that fills the GPU with the corpus."""
    model = make_encoder("dense", checkpoint)
    encode, alive, sizes = model.encode_document, [], []

    def watched(texts: list[str], **options: Any) -> Any:
        assert all(each() is None for each in alive)
        found = encode(texts, **options)
        alive.append(weakref.ref(found))
        sizes.append(len(texts))
        return found

    monkeypatch.setattr(model, "encode_document", watched)
    RetrievalEvaluator(folder, chunk_size=5)(model)
    assert sizes == [5, 5, 5, 2]


def test_csv_and_log(checkpoint: Path, folder: Path, tmp_path: Path, caplog: Any) -> None:
    evaluator = RetrievalEvaluator(folder, measures=MEASURES)
    model = make_encoder("dense", checkpoint)
    with caplog.at_level(logging.INFO):
        first = evaluator(model, str(tmp_path / "out"), epoch=0.5, steps=10)
        evaluator(model, str(tmp_path / "out"), epoch=1, steps=20)
    assert "12 queries, 17 documents, small in epoch 0.5 after 10 steps" in caplog.text
    with (tmp_path / "out" / "RetrievalEvaluator_small_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["steps"]) for row in rows] == [("0.5", "10"), ("1", "20")]
    assert [float(rows[0][name]) for name in MEASURES] == list(first.values())
    RetrievalEvaluator(folder, write_csv=False)(model, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def train(model: SentenceTransformer, evaluator: Any, args: Any) -> SentenceTransformerTrainer:
    rows = Dataset.from_dict({"query": [query for query, _ in PAIRS], "answer": [answer for _, answer in PAIRS]})
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model), evaluator=evaluator
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_in_the_trainer(
    make_model: Callable[..., SentenceTransformer], folder: Path, arguments: Callable[..., Any], tmp_path: Path
) -> None:
    """Logged under the host's names, better after training, the best checkpoint loaded, and on the model card."""
    model = make_model()
    evaluator = RetrievalEvaluator(folder, measures=MEASURES)
    before = evaluator(model)
    args = arguments(
        max_steps=12,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_small_nDCG@10",
    )
    trainer = train(model, evaluator, args)
    logged = [entry for entry in trainer.state.log_history if "eval_small_nDCG@10" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    assert all(f"eval_small_{name}" in entry for entry in logged for name in MEASURES)
    best = max(entry["eval_small_nDCG@10"] for entry in logged)
    assert trainer.state.best_metric == best > before["small_nDCG@10"] + 0.1
    assert evaluator(trainer.model)["small_nDCG@10"] == pytest.approx(best)
    assert by_the_host("dense", trainer.model)["nDCG@10"] == pytest.approx(best)
    with (tmp_path / "run" / "eval" / "RetrievalEvaluator_small_results.csv").open() as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["4", "8", "12"]
    trainer.model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "### Metrics" in card
    assert "small" in card
    assert f"{best:.4f}".rstrip("0") in card
    for name in MEASURES:
        assert name in card


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "run").write_text("".join(f"{query} Q0 {KEYS[0]} 1 1.0 x\n" for query in QRELS))
    with pytest.raises(ValueError, match="is a run to re-rank, and this evaluator searches a corpus"):
        RetrievalEvaluator(open_set(folder, run=tmp_path / "run"))
    with pytest.raises(ValueError, match="is ids without texts"):
        RetrievalEvaluator(qrels_set(QRELS, name="ids"))
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        RetrievalEvaluator(folder, depth=0)
    with pytest.raises(ValueError, match="nDGC@10"):
        RetrievalEvaluator(folder, measures=["nDGC@10"])
    with pytest.raises(ValueError, match="truncate_dim=4 is for dense embeddings"):
        RetrievalEvaluator(folder, truncate_dim=4)(make_encoder("sparse", checkpoint))
    opened = open_set(folder)
    assert RetrievalEvaluator(opened, name="mine").name == "mine"


# Two processes: run as a script, this file is the training that is launched.


def launched(folder: Path) -> None:
    torch.set_num_threads(1)
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    calls: list[int] = []

    class Counted(RetrievalEvaluator):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return super().__call__(*arguments, **options)

    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = train(model, Counted(folder / "small", measures=MEASURES, chunk_size=5), args)
    logged = [entry for entry in trainer.state.log_history if "eval_small_nDCG@10" in entry]
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps({"calls": len(calls), "logged": logged}))
    if rank == "0":
        model.save_pretrained(str(folder / "after"))
    # All is saved. The interpreter's own exit meets the threads of the process group and was seen to abort; leaving the
    # group first was seen to hang.
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.slow
def test_two_processes_evaluate_once(make_model: Callable[..., SentenceTransformer], folder: Path) -> None:
    """On the first process alone, each in one line of the CSV file; and nobody waits."""
    root = folder.parent
    make_model().save_pretrained(str(root / "model"))
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, __file__, str(root)], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    first, second = (json.loads((root / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["calls"], second["calls"]) == (2, 0)
    assert [entry["step"] for entry in first["logged"]] == [1, 2]
    with (root / "run" / "eval" / "Counted_small_results.csv").open() as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["1", "2"]
    alone = RetrievalEvaluator(folder, measures=MEASURES)(SentenceTransformer(str(root / "after"), device="cpu"))
    assert {name: first["logged"][-1][f"eval_{name}"] for name in alone} == pytest.approx(alone)


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
