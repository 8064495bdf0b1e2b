"""The benchmark of the whole job: both ways do the same work, from the same folder, to a measured student."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from benchmark_fixtures import load_benchmark
from example_fixtures import make_beir, make_student, make_teacher

from st_m3se.scores import TeacherScores


def test_both_ways_end_with_a_measured_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a comparison of jobs of which one scores or trains on less than the other."""
    job = load_benchmark("main_job", monkeypatch)
    make_beir(tmp_path / "whole")
    job.make_data(tmp_path / "whole", tmp_path / "data", 8, 30)
    corpus = [json.loads(line) for line in (tmp_path / "data" / "corpus.jsonl").read_text().splitlines()]
    options = Namespace(
        student=str(make_student(tmp_path / "student")),
        teacher=str(make_teacher(tmp_path / "teacher")),
        list_size=4,
        batch_size=4,
        epochs=1,
    )
    for way in ("plain", "ours"):
        clock, folder = job.Clock(), tmp_path / way
        last = "DistillKLDivLoss" if way == "plain" else None
        value = getattr(job, way)(tmp_path / "data", options, folder, clock, last)
        assert 0 <= value <= 1
        assert tuple(clock.wall) == job.STAGES
        assert (folder / "model" / "model.safetensors").is_file()
    scored = TeacherScores.open(tmp_path / "ours" / "scores")
    assert len(scored) == 8
    assert all(4 <= len(row.document_ids) <= 5 for row in scored), "the plain script scores 4 a query"
    assert len(corpus) == len({document["_id"] for document in corpus}) <= 30
