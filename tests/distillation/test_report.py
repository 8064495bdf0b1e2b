"""The page of a distillation, read strictly, and a distillation from documents alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.test_report import Page
from example_fixtures import shared_words, texts

from st_m3se.distillation.report import write_report

SHOWN = ("student before", "student without a teacher", "student after")
Run = Callable[..., dict[str, Any]]


def read(folder: Path) -> tuple[Page, str]:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    return page, " ".join(" ".join(page.text).split())


def test_the_page_tells_the_whole_story(run: Run, tmp_path: Path) -> None:
    """Everything on it comes from the folder: figures of the results, texts of queries won, costs and settings."""
    results = run(control=True, seeds=(1, 2))
    page, text = read(tmp_path / "out")
    systems = page.tables[0]
    assert [row[0].strip() for row in systems[1:]] == list(results["systems"])
    for row in systems[1:]:
        assert row[2].startswith(f"{results['systems'][row[0].strip()]['nDCG@10']:.3f}")
    before, after = (results["per_query"][name]["nDCG@10"] for name in ("student before", "student after"))
    gains = {q: new - old for q, old, new in zip(results["query_ids"], before, after, strict=True)}
    most = max(gains, key=gains.__getitem__)
    corpus, queries, relevant = texts()
    assert gains[most] > 0
    assert queries[most] in text
    assert corpus[relevant[most]] in text
    assert results["command"] in text
    assert all(name in text for name in results["stages"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["relevant"][most] == {relevant[most]: 1}
    assert [attrs["alt"].split(".")[0] for attrs in page.all("img")] == [
        "nDCG@10 on dev queries",
        f"Densities of the normalised margins of {', '.join([*SHOWN, results['taught_by']])}",
    ]
    assert all(attrs["src"].startswith("data:image/svg+xml") for attrs in page.all("img"))
    assert "-0.000" not in text

    shutil.rmtree(tmp_path / "beir")  # the data have gone: the page is still there, with ids
    write_report(tmp_path / "out")
    _, text = read(tmp_path / "out")
    assert "no longer where they were" in text
    assert most in text
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        write_report(tmp_path / "out")


def test_a_model_that_became_worse_and_agreement_are_told(run: Run, tmp_path: Path, beir: Path) -> None:
    shutil.rmtree(beir / "qrels")
    run(learning_rate=1e-9, epochs=1)
    _, text = read(tmp_path / "out")
    assert "Nobody has judged these queries" in text


def test_documents_alone_are_enough(run: Run, beir: Path, tmp_path: Path, capsys: Any) -> None:
    """Queries are made of the documents, kept where the teacher finds them, and split; the page says what they are."""
    shutil.rmtree(beir / "qrels")
    (beir / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no queries\. --generate-queries MODEL"):
        run()
    planned = run(generate_queries="sentences", epochs=1, dry_run=True)
    assert planned["stages"][0][0] == "queries"
    assert not list((tmp_path / "out").glob("*-*")), "a dry run writes nothing"
    results = run(generate_queries="sentences", epochs=1, show=True)
    printed = capsys.readouterr().out
    assert not results["check_on_dev"]["measured"], "these queries were chosen by the teacher"
    assert "they cannot tell whether it is better than the student" in printed
    assert all(results["queries"].values())
    assert sum(planned["queries"].values()) == pytest.approx(sum(results["queries"].values()), rel=0.5)
    assert results["data"] == "beir"
    assert results["judged_by"] == "generated queries"
    (stage,) = (tmp_path / "out").glob("queries-*")
    made = json.loads((stage / "finished.json").read_text())
    assert sum(results["queries"].values()) == made["kept"] < made["generated"]
    _, text = read(tmp_path / "out")
    assert "titles and sentences of the documents" in text
    assert "which favours the teacher" in text
    assert run(generate_queries="sentences", epochs=1, teacher={"again": shared_words}, anyway=True)["queries"]
    with (beir / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "a pink hen sleeps near the old barn"}\n')
    assert run(generate_queries="sentences", epochs=1)["documents"] == results["documents"] + 1, "not those before"
