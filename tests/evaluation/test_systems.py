"""Which systems there are, by which name, and which kind of model lies in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from retrieval.test_scoring import make_cross_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer

from evaluation.beir_folder import save_encoder
from st_m3se import BM25
from st_m3se.evaluation import Encoder, GivenRun, ReRanker
from st_m3se.evaluation.systems import file_stem, systems_of
from st_m3se.retrieval.models import detect_kind


def names(systems: Any) -> list[tuple[str, str]]:
    return [(system.name, system.group) for system in systems_of(systems)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("dense", "bi-encoder"), ("sparse", "sparse encoder"), ("multi-vector", "multi-vector encoder")],
)
def test_the_kind_is_read_from_the_folder(kind: str, expected: str, checkpoint: Path, tmp_path: Path) -> None:
    """Prevents a sparse encoder that is searched as a dense one: the host would convert it without an error."""
    folder = save_encoder(kind, checkpoint, tmp_path / "model")
    assert detect_kind(str(folder)) == expected
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    del config["model_type"]  # as models of older versions have it: the modules alone are left
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert detect_kind(str(folder)) == expected


def test_models_of_other_libraries_are_known(checkpoint: Path, tmp_path: Path) -> None:
    assert detect_kind(str(checkpoint)) == "bi-encoder"  # a plain transformers checkpoint, as the host takes it
    pylate = save_encoder("multi-vector", checkpoint, tmp_path / "pylate")
    (pylate / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "ColBERT"}))
    assert detect_kind(str(pylate)) == "multi-vector encoder"
    stanford = tmp_path / "colbert"
    stanford.mkdir()
    (stanford / "config.json").write_text(json.dumps({"architectures": ["HF_ColBERT"], "model_type": "bert"}))
    assert detect_kind(str(stanford)) == "multi-vector encoder"


def test_a_length_beyond_the_positions_is_refused_before_the_search(checkpoint: Path, tmp_path: Path) -> None:
    """Prevents an index error in the middle of a corpus, at the first text that is long enough."""
    folder = str(save_encoder("dense", checkpoint, tmp_path / "model"))
    assert Encoder(folder, max_length=64).load("cpu").max_seq_length == 64
    with pytest.raises(ValueError, match=r"max_length=65 is beyond the model's 64 positions"):
        Encoder(folder, max_length=65).load("cpu")


def test_a_cross_encoder_cannot_search(checkpoint: Path, tmp_path: Path) -> None:
    """Prevents a re-ranker whose trunk is searched with mean pooling and gives meaningless figures."""
    plain = make_cross_encoder(checkpoint, tmp_path / "plain")
    saved = tmp_path / "saved"
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(saved))
    for folder in (plain, saved):
        with pytest.raises(ValueError, match=r"is a cross-encoder.*--rerank"):
            detect_kind(str(folder))
    with pytest.raises(TypeError, match="re-rank with it"):
        systems_of([CrossEncoder(str(plain), device="cpu")])
    (saved / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "Telepath"}))
    with pytest.raises(ValueError, match="'Telepath'"):
        detect_kind(str(saved))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", "[{"),
        ("modules.json", "{}"),
        ("modules.json", "[3]"),
        ("config.json", "[]"),
        ("config_sentence_transformers.json", '"x"'),
    ],
)
def test_a_damaged_file_of_a_model_is_named(file: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"^{file} of the model .* is damaged.*Save or download it again"):
        detect_kind(str(tmp_path))


def test_systems_are_named_after_their_models(make_model: Any) -> None:
    model: SentenceTransformer = make_model()
    found = systems_of(["bm25", "org/my-model", Path("runs/student/"), GivenRun("dl19/bm25.dl19.run.gz"), "candidates"])
    assert [system.name for system in found] == ["bm25", "my-model", "student", "bm25.dl19", "candidates"]
    assert [type(system.source).__name__ for system in found] == ["BM25", "Encoder", "Encoder", "GivenRun", "GivenRun"]
    assert systems_of(BM25(k1=0.9))[0].source == BM25(k1=0.9)
    assert systems_of(model)[0].source == Encoder(model)
    assert systems_of({"mine": model})[0].name == "mine"
    assert file_stem("qrels.dl19-passage.txt") == "qrels.dl19-passage"


def test_several_models_under_a_name_are_seeds(checkpoint: Path) -> None:
    assert names({"ours": ["a", "b"], "bm25": "bm25"}) == [("ours-1", "ours"), ("ours-2", "ours"), ("bm25", "bm25")]


def test_re_rankers_follow_their_first_stages_seed_by_seed() -> None:
    systems = {
        "twice": ReRanker("ce2", "once", depth=5),
        "once": ReRanker("ce", "ours"),
        "bm25": "bm25",
        "ours": ["a", "b"],
    }
    found = systems_of(systems)
    assert [(system.name, getattr(system.source, "first_stage", None)) for system in found] == [
        ("bm25", None),
        ("ours-1", None),
        ("ours-2", None),
        ("once-1", "ours-1"),
        ("once-2", "ours-2"),
        ("twice-1", "once-1"),
        ("twice-2", "once-2"),
    ]
    assert {system.group for system in found} == {"bm25", "ours", "once", "twice"}
    assert names(["bm25", ReRanker("org/ce", "bm25")])[1][0] == "bm25+ce"
    assert names([ReRanker("org/ce")])[0][0] == "ce"  # of the run that the set comes with


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({"x": ReRanker("ce", "bm25")}, "re-ranks 'bm25', which is no other system here"),
        ({"x": ReRanker("ce", "x")}, "'x' re-ranks 'x'"),
        ({"x": ReRanker("ce", "y"), "y": ReRanker("ce", "x")}, "no other system"),
        (["a/model", "b/model"], "two systems are named 'model'"),
        ({"a-1": "bm25", "a": ["x", "y"]}, "two systems are named 'a-1'"),
        ({"my model": "bm25"}, "'my model' names a folder"),
        ({"../x": "bm25"}, "names a folder"),
        ({".x": "bm25"}, "names a folder"),
        ({"a": []}, "'a' has no model"),
        ([], "no system to evaluate"),
    ],
    ids=str,
)
def test_what_cannot_be_named_is_refused(systems: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        systems_of(systems)


def test_what_is_no_system_is_refused() -> None:
    with pytest.raises(TypeError, match="a system is"):
        systems_of([7])
    with pytest.raises(ValueError, match="depth must be at least 1"):
        ReRanker("ce", depth=0)
