"""The closed share of the teacher's lead, and the model card that says it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_m3se.core.errors import FormatError
from st_m3se.diagnostics import add_to_model_card, closed_share, diagnose
from st_m3se.diagnostics.gap import ClosedShare, share_of_gap
from st_m3se.diagnostics.report import write_report
from st_m3se.diagnostics.separation import Estimate
from st_m3se.scores import TeacherScores

from .conftest import random_lists, random_scores

NAMES = ("before", "after", "teacher")


def test_the_share_is_that_of_the_means() -> None:
    values = np.array([[0.2, 0.4, 0.3], [0.5, 0.5, 0.5], [0.9, 0.7, 0.8]])
    found = share_of_gap(values, "RR@10", NAMES, n_resamples=200)
    assert found.share == pytest.approx((0.5 - 0.3) / (0.8 - 0.3))
    assert found.gap.value == pytest.approx(0.5)
    assert found.interval is not None
    assert 0 < found.interval[0] <= found.share <= found.interval[1] < 1
    assert str(found).startswith("RR@10 0.300 -> 0.500, teacher 0.800: 40% of the teacher's lead closed [")


def test_no_share_is_minus_zero() -> None:
    """-0 % reads like a loss."""
    still = Estimate(-1e-9, -1e-9, -1e-9)
    found = ClosedShare("AP", NAMES, still, still, still, still, -0.001, (-0.004, 0.02))
    assert str(found) == "AP 0.000 -> 0.000, teacher 0.000: 0% of the teacher's lead closed [0%, 2%]"
    assert "-0" not in str(still)


def test_a_lead_that_chance_explains_has_no_interval_and_no_lead_no_share() -> None:
    """Prevents "300 % of the gap closed" where there was no gap."""
    noise = np.random.default_rng(0).normal(size=(3, 30))
    noise[2] += noise[0].mean() - noise[2].mean() + 0.01
    found = share_of_gap(noise, "AP", NAMES)
    assert found.share is not None
    assert found.interval is None
    assert "cannot be told from chance" in str(found)
    behind = share_of_gap(np.array([[0.5, 0.6], [0.5, 0.6], [0.4, 0.6]]), "AP", NAMES)
    assert behind.share is None
    assert "no gap to close" in str(behind)


def test_the_measure_is_that_of_the_re_ranked_lists(tmp_path: Path) -> None:
    """Reciprocal ranks by a plain loop."""
    lists = random_lists(3)
    stores, expected = {}, []
    for seed, name in enumerate(NAMES):
        scores = random_scores(lists, seed)
        rows, ranks, start = [], [], 0
        for query, documents in lists.by_query().items():
            own = scores[start : start + len(documents)]
            flags = lists.positives[start : start + len(documents)]
            order = np.argsort(-own)
            ranks.append(1 / (1 + int(np.flatnonzero(flags[order])[0])))
            rows.append((query, documents, own))
            start += len(documents)
        stores[name] = TeacherScores.from_rows(rows, tmp_path / name)
        expected.append(np.mean(ranks))
    found = closed_share(lists, stores, NAMES, measure="RR", n_resamples=10)
    assert [found.before.value, found.after.value, found.teacher.value] == pytest.approx(expected)


def test_the_model_card_gets_the_plot_and_the_share_once(tmp_path: Path, make_model: object) -> None:
    lists = random_lists(4)
    stores = {}
    for place, name in enumerate(NAMES):
        rows, start = [], 0
        scores = random_scores(lists, 1) + place * lists.positives
        for query, documents in lists.by_query().items():
            rows.append((query, documents, scores[start : start + len(documents)]))
            start += len(documents)
        stores[name] = TeacherScores.from_rows(rows, tmp_path / name)
    found = diagnose(
        stores, lists.by_query(), lists.qrels(), tmp_path / "look", name="animals", gap=NAMES, n_resamples=20
    )
    folder = tmp_path / "model"
    make_model().save_pretrained(str(folder))  # type: ignore[operator]
    plain = (folder / "README.md").read_text()
    with pytest.raises(FormatError, match="has no figure"):
        add_to_model_card(folder, tmp_path / "look")
    write_report(found, tmp_path / "look")
    card = add_to_model_card(folder, tmp_path / "look").read_text()
    assert card.startswith("---")
    assert card.index("## Usage") < card.index("## How it separates relevant documents on animals")
    assert card.index("## How it separates") < card.index("## Training Details")
    assert "![Densities of the normalised margins](assets/st_m3se_margins.png)" in card
    picture = (folder / "assets" / "st_m3se_margins.png").read_bytes()
    assert picture == (tmp_path / "look" / "margins.png").read_bytes()
    assert isinstance(found.gap, ClosedShare)
    assert str(found.gap) in card
    assert add_to_model_card(folder, tmp_path / "look").read_text() == card
    start, end = "<!-- st-m3se diagnosis -->", "<!-- end of st-m3se diagnosis -->"
    rest = card[: card.index(start)].rstrip() + "\n" + card[card.index(end) + len(end) :].lstrip("\n")
    assert rest.split() == plain.split(), "the rest of the card changed"
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert start in (tmp_path / "again" / "README.md").read_text()
    about = json.loads((tmp_path / "look" / "diagnosis.json").read_text())
    hostile = f"<script>x</script>\n# Heading {end} | [a](http://b) `c`"
    about["scorers"][hostile] = about["scorers"].pop(NAMES[0])
    about["gap"]["names"][0] = about["data"]["name"] = hostile
    del about["checksum"]
    (tmp_path / "look" / "diagnosis.json").write_text(json.dumps(about))
    once = add_to_model_card(folder, tmp_path / "look").read_text()
    assert "<script" not in once.replace("\\<script", "")
    assert "\n# Heading" not in once
    assert once.count(end) == once.count(start) == 1
    assert add_to_model_card(folder, tmp_path / "look").read_text() == once
    with pytest.raises(FormatError, match="no card there"):
        add_to_model_card(tmp_path, tmp_path / "look")
