"""Teacher scores: a store on disk, and readers and writers of the formats in which others publish them."""

from __future__ import annotations

from st_m3se.core.reading import text_id
from st_m3se.core.scored_list import ScoredList
from st_m3se.scores.combine import combine
from st_m3se.scores.convert import Conversion, convert
from st_m3se.scores.describe import Histogram, ScoreSummary
from st_m3se.scores.formats import sniff
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import TeacherScoresWriter

__all__ = [
    "Conversion",
    "Histogram",
    "ScoreSummary",
    "ScoredList",
    "TeacherScores",
    "TeacherScoresWriter",
    "combine",
    "convert",
    "sniff",
    "text_id",
]
