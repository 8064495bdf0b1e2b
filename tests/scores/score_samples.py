"""One small valid file for each format, as its publishers write it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def _jsonl(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


SAMPLES: dict[str, bytes] = {
    "marginmse": b"9.5\t-1.25\t7\td1\td2\n9.5\t3.0\t7\td1\td3\n8.0\t0.5\t5\td4\td2\n",
    "marginmse-text": b"9.5\t-1.25\twhat is it\tthis is it\tthat is not\n8.0\t0.5\twho was\tshe was\tthat is not\n",
    "gpl": b"q7\td1\td2\t10.75\nq7\td1\td3\t6.5\nq5\td4\td2\t7.5\n",
    "hard-negatives": _jsonl(
        {"qid": 7, "pos": [{"pid": 1, "ce-score": 9.5}], "neg": {"bm25": [{"pid": 2, "ce-score": -1.25}]}},
        {"qid": 5, "pos": [{"pid": 4, "ce-score": 8.0}], "neg": {"bm25": [], "tas-b": [{"pid": 2, "ce-score": 0.5}]}},
    ),
    "score-pickle": pickle.dumps({7: {1: 9.5, 2: -1.25}, 5: {4: 8.0}}, protocol=4),
    "flagembedding": _jsonl(
        {"query": "what", "pos": ["this"], "neg": ["that", "them"], "pos_scores": [9.5], "neg_scores": [-1.25, 3]},
        {"query": "who", "pos": ["she"], "neg": ["that"], "pos_scores": [8.0], "neg_scores": [0.5], "prompt": "x"},
    ),
    "pylate": _jsonl(
        {"query_id": 7, "document_ids": [1, 2], "scores": [9.5, -1.25]},
        {"query_id": 5, "document_ids": "[4, 2]", "scores": "[8.0, 0.5]"},
    ),
    "tevatron": _jsonl(
        {
            "query_id": "7",
            "query": "what",
            "positive_passages": [{"docid": "d1", "title": "It", "text": "this", "score": 9.5}],
            "negative_passages": [{"docid": "d2", "title": "", "text": "that", "score": -1.25}],
        },
    ),
    "margins": _jsonl(
        {"query_id": "q7", "positive_id": "d1", "negative_id": "d2", "score": 10.75},
        {"query_id": "q7", "positive_id": "d1", "negative_id": "d3", "score": 6.5},
        {"query_id": "q5", "positive_id": "d4", "negative_id": "d2", "score": 7.5},
    ),
    "tuples": _jsonl(
        {"anchor": "what", "answer": "this", "negative_1": "that", "negative_2": "them", "scores": [9.5, -1.25, 3]},
        {"anchor": "who", "answer": "she", "negative_1": "that", "negative_2": "this", "scores": [8.0, 0.5, 0.25]},
    ),
    "rank-llm": json.dumps(
        [
            {
                "query": {"text": "what", "qid": "7"},
                "candidates": [
                    {"docid": "d1", "score": 9.5, "doc": {"contents": "this", "title": "It"}},
                    {"docid": "d2", "score": -1.25, "doc": {"contents": "that"}},
                ],
            }
        ],
        indent=2,
    ).encode(),
    "rankify": _jsonl(
        {
            "question": "what?",
            "answers": ["this"],
            "ctxs": [{"score": 9.5, "has_answer": True, "id": 1}, {"score": -1.25, "has_answer": False, "id": 2}],
        },
    ),
    "colbert": b"[7, [1, 9.5], [2, -1.25]]\n[5, [4, 8.0], [2, 0.5]]\n",
    "trec": b"7 Q0 d1 1 9.5 bm25\n7 Q0 d2 2 -1.25 bm25\n5 Q0 d4 1 8.0 bm25\n",
    "ranking": b"7\td1\t1\t9.5\n7\td2\t2\t-1.25\n5\td4\t1\t8.0\n",
    "csv": b'query_id,document_id,score\n7,d1,9.5\n7,"d,2",-1.25\n5,d4,8.0\n',
    "parquet": _parquet(query_id=[7, 5], document_ids=[[1, 2], [4]], scores=[[9.5, -1.25], [8.0]]),
}

AMBIGUOUS = ("ranking",)
"""Formats that must be named: GPL's margins may look like a ranking."""


def write_sample(folder: Path, name: str) -> Path:
    path = folder / f"sample-{name}"
    path.write_bytes(SAMPLES[name])
    return path
