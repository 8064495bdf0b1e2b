from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scores.score_samples import write_sample
from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.scores import ScoredList, TeacherScores, convert
from st_m3se.scores.convert import DESTINATIONS
from st_m3se.scores.formats import FORMATS
from st_m3se.scores.formats.runs import read_run, write_run

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
LINE = ANY.filter(lambda text: "\n" not in text and "\r" not in text)
IDS = {
    "pylate": ANY,
    "csv": LINE,
    "marginmse": LINE.filter(lambda text: "\t" not in text),
    "trec": ANY.map(lambda text: "".join(text.split()).replace("\ufeff", "x")).filter(bool),
}


@st.composite
def tables(draw: st.DrawFn, name: str, least: int) -> tuple[bool, list[ScoredList]]:
    numbers = draw(st.booleans())
    ids = integers if numbers else IDS[name]
    rows = []
    for query_id in draw(st.lists(ids, unique=True, min_size=1, max_size=4)):
        documents = draw(st.lists(ids, unique=True, min_size=least, max_size=5))
        scores = draw(st.lists(floats, min_size=len(documents), max_size=len(documents)))
        rows.append(ScoredList(query_id, documents, scores))
    return numbers, rows


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", DESTINATIONS[1:])
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, name: str, suffix: str) -> None:
    """Ids keep their type and every character, and scores every bit of their float32."""
    path = tmp_path_factory.mktemp("written") / f"file{suffix}"

    @settings(max_examples=40, deadline=None)
    @given(drawn=tables(name, least=2 if name == "marginmse" else 1))
    def check(drawn: tuple[bool, list[ScoredList]]) -> None:
        numbers, rows = drawn
        FORMATS[name].write([row._replace(positives=row.document_ids[:1]) for row in rows], path, overwrite=True)
        reading = Reading(path, id_type="int" if numbers and name != "pylate" else None)
        found = {
            row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in FORMATS[name].read(reading)
        }
        assert found == {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in rows}
        assert [path] == list(path.parent.iterdir())

    check()


def test_runs_are_ranked_by_score(tmp_path: Path) -> None:
    write_run([ScoredList("q", ["a", "b", "c"], [0.5, 2.0, 0.5])], tmp_path / "run", tag="mine")
    assert (tmp_path / "run").read_text() == "q Q0 b 1 2.0 mine\nq Q0 a 2 0.5 mine\nq Q0 c 3 0.5 mine\n"
    assert next(read_run(Reading(tmp_path / "run"))).document_ids == ["b", "a", "c"]
    with pytest.raises(ValueError, match="one word"):
        write_run([], tmp_path / "other", tag="two words")


@pytest.mark.parametrize(
    ("name", "identity"),
    [("trec", "a b"), ("trec", "\ufeffa"), ("csv", "a\rb"), ("marginmse", "a\tb"), ("trec", "\xa0")],
)
def test_an_id_that_would_be_read_as_another_is_refused(tmp_path: Path, name: str, identity: str) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(FormatError, match="cannot be written in this format"):
        FORMATS[name].write([ScoredList("q", ["d", identity], [1.0, 2.0], ["d"])], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_pairs_need_positives(tmp_path: Path) -> None:
    rows = [ScoredList("q", ["a", "b", "c"], [1.0, 2.0, 3.0], ["b", "z"]), ScoredList("r", ["a"], [1.0], ["a"])]
    FORMATS["marginmse"].write(rows, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "2.0\t1.0\tq\tb\ta\n2.0\t3.0\tq\tb\tc\n"
    run = write_sample(tmp_path, "trec")
    with pytest.raises(FormatError, match="no pair to write"):
        convert(run, tmp_path / "pairs.tsv")
    (tmp_path / "qrels").write_text("7 0 d2 1\n")
    convert(run, tmp_path / "pairs.tsv", qrels=tmp_path / "qrels")
    assert (tmp_path / "pairs.tsv").read_text() == "-1.25\t9.5\t7\td2\td1\n"
    (tmp_path / "qrels").write_text("8 0 d2 1\n")
    with pytest.raises(FormatError, match="no pair to write"):
        convert(run, tmp_path / "pairs.tsv", qrels=tmp_path / "qrels", overwrite=True)
    assert (tmp_path / "pairs.tsv").read_text() == "-1.25\t9.5\t7\td2\td1\n"


def test_positives_of_the_source_are_used(tmp_path: Path) -> None:
    convert(write_sample(tmp_path, "hard-negatives"), tmp_path / "pairs.tsv.gz")
    convert(tmp_path / "pairs.tsv.gz", tmp_path / "store", id_type="int")
    assert TeacherScores.open(tmp_path / "store")[7] == ScoredList(7, [1, 2], [9.5, -1.25])


def test_a_store_keeps_its_manifest(tmp_path: Path) -> None:
    convert(write_sample(tmp_path, "trec"), tmp_path / "one", manifest={"teacher": "bm25"})
    convert(tmp_path / "one", tmp_path / "two", id_type="str")
    manifest = TeacherScores.open(tmp_path / "two").manifest
    assert manifest["teacher"] == "bm25"
    assert manifest["source"] == {"file": "sample-trec", "format": "trec"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_format": "word"}, "no format 'word' to read"),
        ({"destination_format": "word"}, "no format 'word' to write"),
        ({"on_error": "ignore"}, "on_error"),
        ({"id_type": "float"}, "id_type"),
        ({"columns": {"score": "x"}}, "columns belongs"),
        ({"qrels": "x"}, "qrels is only"),
        ({"destination_format": "csv", "manifest": {"teacher": "x"}}, "no manifest"),
        ({"manifest": {"techer": "x"}}, "no field"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(write_sample(tmp_path, "trec"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="does not say what to write"):
        convert(tmp_path / "sample-trec", tmp_path / "out.docx")


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    path = write_sample(tmp_path, "trec")
    with pytest.raises(FileExistsError):
        convert(path, path, destination_format="csv", overwrite=True)
