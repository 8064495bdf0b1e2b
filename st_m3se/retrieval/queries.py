"""Queries for a corpus that has none: written by a language model, or taken from the documents, and filtered."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock
from tqdm.auto import tqdm

from st_m3se.core.files import atomic_file, read_checked_json, write_checked_json
from st_m3se.core.ids import Id
from st_m3se.core.reading import Reading, parse_object
from st_m3se.data.collection import open_texts, qrels_files
from st_m3se.data.qrels import Qrels, read_qrels
from st_m3se.data.text_files import choose_file
from st_m3se.data.texts import Texts
from st_m3se.retrieval.bm25 import BM25
from st_m3se.retrieval.candidates import find_candidates
from st_m3se.retrieval.models import check_device, model_file
from st_m3se.retrieval.scoring import score_candidates
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from st_m3se.retrieval.scoring import TeacherSource, TextSource

    Generated: TypeAlias = dict[str, dict[Id, int]]
    QueryWriter: TypeAlias = Callable[[list[str], int], Sequence[Sequence[str]]]

__all__ = ["GENERATED", "generate_queries"]

GENERATED = "generated-"  # what the ids of such queries begin with

SETTINGS, FINISHED = "generation.json", "queries.json"
SHARD = 64  # documents: a minute's work of a small model on a CPU, which is all that a kill costs
HELD_OUT = 0.2, 0.1  # shares of the documents whose queries are for test and dev
INSTRUCTION = (
    "Write one short search query that the following document answers. Give the query alone.\n\n"
    "Document: {document}\n\nQuery:"
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
SENTENCE_LETTERS, TITLE_LETTERS = range(10, 300), 300
LABEL = re.compile(r"^(search )?(query|question)( \d+)?:", re.IGNORECASE)
QUOTES = "\"'`\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb "


def generate_queries(
    corpus: TextSource,
    model: str | Path | QueryWriter | None,
    output: str | Path,
    *,
    teacher: TeacherSource | None = None,
    per_document: int = 3,
    top_k: int | None = 1,
    depth: int = 10,
    max_documents: int | None = None,
    prompt: str | None = None,
    max_length: int = 350,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    tokens: str = "words",
    teacher_options: Mapping[str, Any] | None = None,
    show_progress_bar: bool = True,
) -> dict[str, int]:
    """Write queries for the documents of a corpus, into a folder of data as BEIR has it.

    A query's positive is the document that it was written for, or documents, where the same query came of several. With
    a ``teacher`` only those queries are kept that find their way back: BM25 gives ``depth`` candidates, filled up with
    random documents, and among these the teacher must rank the query's own document first, or among its best
    ``top_k``. This is GPL (arXiv 2112.07577) with the round trip of Promptagator (arXiv 2209.11755), by the teacher
    instead of a retriever.

    Documents that answer a query as well and are not labelled so (false negatives) are the teacher's to find, when the
    training lists are made: ``build_distillation_dataset`` leaves them out with ``absolute_margin``, and relabels them
    with ``teacher_positives``.

    A call that was killed goes on where it was, and ends with the same queries. One with other settings is refused.

    Args:
        corpus: Whatever :meth:`Texts.open <st_m3se.data.texts.Texts.open>` takes. Of a folder that has queries or
            judgements already they are kept, and what is generated is for training alone.
        model: One of

            - the name or path of a model of transformers, sequence to sequence or causal;
            - a function of a list of documents and a number n that returns n queries for each, such as a call of an
              API. Queries that are blank are dropped, so that fewer are no error;
            - None: titles and sentences of the documents. This is the poorer way: they are no questions, and share
              more words with their document than a user's query does.
        output: The folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/``, split by document into train, dev and
            test; ``round-trip/`` with the candidates and the store of the teacher's scores; ``generated/`` with what
            was written for each document, before any filter.
        teacher: Whatever :func:`score_candidates` takes. None keeps every query.
        per_document: Queries to write for a document; 3 as in GPL.
        top_k: See above. None scores without a filter.
        depth: Candidates of a query for the teacher, besides its own documents.
        max_documents: Write for so many documents, drawn with the seed. None is all.
        prompt: What the model reads, with ``{document}`` in it. None is the document alone for a sequence-to-sequence
            model, as doc2query's are trained, and an instruction for a causal one. A model with a chat template gets
            it as the user's turn.
        max_length: Tokens of a document; the rest is cut off, never the prompt. 350 as in GPL.
        max_new_tokens: Tokens of a query, at most.
        temperature: Queries are sampled, so that a document's differ; lower is more alike.
        top_p: They are sampled from the likeliest tokens that have so much probability together.
        batch_size: Documents that the model reads at once.
        seed: For the samples.
        device: Of a model by name. None is a GPU, where there is one.
        trust_remote_code: Let the model run code of its own.
        tokens: What BM25 matches, see :class:`~st_m3se.retrieval.bm25.BM25`.
        teacher_options: More arguments of :func:`score_candidates`.
        show_progress_bar: Show progress.

    Returns:
        How many: "documents" read, "generated" queries that are not blank, "distinct" ones, "kept" by the filter.

    Raises:
        ValueError: If an option is out of range, the folder was begun with others, no query is left, or a function does
            not return a list for each document.
        FormatError: If the corpus cannot be read.

    Example:
        >>> generate_queries(  # doctest: +SKIP
        ...     "my-data", "doc2query/all-t5-base-v1", "with-queries", teacher="cross-encoder/ms-marco-MiniLM-L6-v2"
        ... )
    """
    for name, value in (("per_document", per_document), ("top_k", top_k or 1), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if prompt is not None and "{document}" not in prompt:
        raise ValueError(f"the prompt must say where the document goes, with {{document}}; got {prompt!r:.200}.")
    output = Path(output)
    texts, _ = open_texts(corpus, "corpus")
    settings = {
        "corpus": texts.fingerprint,
        "model": getattr(model, "__qualname__", type(model).__qualname__) if callable(model) else model and str(model),
        "teacher": None if teacher is None else teacher if isinstance(teacher, str) else _name(teacher),
        **{"per_document": per_document, "top_k": top_k, "depth": depth, "max_documents": max_documents},
        **{"prompt": prompt, "max_length": max_length, "max_new_tokens": max_new_tokens, "seed": seed},
        **{"temperature": temperature, "top_p": top_p, "batch_size": batch_size, "tokens": tokens},
    }
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        _begin(output, settings)
        if (output / FINISHED).is_file():
            return read_checked_json(output / FINISHED)
        rows = list(range(len(texts)))
        if max_documents is not None:
            rows = sorted(random.Random(seed).sample(rows, min(max_documents, len(rows))))
        write: QueryWriter
        if callable(model):
            write = model
        elif model is None:
            write = partial(_sentences, titles=_titles(corpus), seed=seed)
        else:
            sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
            write = _LanguageModel(str(model), prompt, max_length, sampling, device, trust_remote_code)
        for start in tqdm(range(0, len(rows), SHARD), "queries", unit="shard", disable=not show_progress_bar):
            path = output / "generated" / f"{start // SHARD:06d}.jsonl"
            if not path.is_file():
                _write_shard(path, texts, rows[start : start + SHARD], write, per_document, batch_size, seed + start)
        positives, generated = _collect(output / "generated")
        queries = {f"{GENERATED}{number}": text for number, text in enumerate(positives)}
        qrels: Generated = {query: dict.fromkeys(positives[text], 1) for query, text in queries.items()}
        counts = {"documents": len(rows), "generated": generated, "distinct": len(queries)}
        if teacher is not None and queries:
            options = {"show_progress_bar": show_progress_bar, **(teacher_options or {})}
            found = _round_trip(teacher, queries, texts, qrels, output / "round-trip", depth, top_k, tokens, options)
            qrels = {query: qrels[query] for query in found}
        counts["kept"] = len(qrels)
        if not qrels:
            raise ValueError(
                f"no query is left: of {len(rows)} documents came {generated} queries, {len(queries)} distinct, and "
                f"the teacher ranks the document of none among its best {top_k}. Look at {output / 'generated'}."
            )
        _write_data(output, corpus, texts, {query: queries[query] for query in qrels}, qrels)
        write_checked_json(output / FINISHED, counts)
    return counts


def _name(teacher: Any) -> str:
    return str(teacher) if isinstance(teacher, Path) else getattr(teacher, "__qualname__", type(teacher).__qualname__)


def _begin(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS
    if not path.is_file():
        write_checked_json(path, settings)
    known = read_checked_json(path)
    if differing := [name for name in settings if known.get(name) != settings[name]]:
        listed = "; ".join(f"{name} was {known.get(name)!r} and is {settings[name]!r}" for name in differing)
        raise ValueError(f"{output} was begun with other settings: {listed}. Choose another output.")


def _write_shard(
    path: Path, texts: Texts, rows: list[int], write: QueryWriter, number: int, batch_size: int, seed: int
) -> None:
    """One file: {"document", "queries"} a line. The seed is the shard's, so that a call that resumes draws the same."""
    import torch

    path.parent.mkdir(exist_ok=True)
    ids = [texts.ids[row].as_py() for row in rows]
    listed = [(document, text) for document, text in zip(ids, texts.take(ids), strict=True) if text.strip()]
    listed.sort(key=lambda pair: len(pair[1]))  # batches with little padding
    lines = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(listed), batch_size):
            batch = listed[start : start + batch_size]
            written = write([text for _, text in batch], number)
            if len(written) != len(batch) or not all(map(_is_texts, written)):
                raise ValueError(
                    f"expected a list of texts for each of {len(batch)} documents, got {written!r:.200}: queries would "
                    "go to the wrong documents."
                )
            for (document, _), queries in zip(batch, written, strict=True):
                line = {"document": document, "queries": [_clean(query) for query in queries]}
                lines.append(json.dumps(line, ensure_ascii=False))
    _write_lines(path, lines)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _clean(written: str) -> str:
    """The first line that a model wrote, without quotes and a label; white space is one blank."""
    lines = [line.strip() for line in written.strip().splitlines()]
    return LABEL.sub("", " ".join((lines or [""])[0].split()).strip(QUOTES)).strip(QUOTES)


def _collect(folder: Path) -> tuple[dict[str, list[Id]], int]:
    """The documents of each distinct query, and how many were written. Queries that differ by case alone are one."""
    spelled: dict[str, str] = {}
    documents: dict[str, dict[Id, None]] = {}
    generated = 0
    for path in sorted(folder.glob("*.jsonl")):
        for record in Reading(path).parsed(lambda line, _: parse_object(line, ["document", "queries"])):
            for query in filter(None, record["queries"]):
                generated += 1
                text = spelled.setdefault(query.casefold(), query)
                documents.setdefault(text, {})[record["document"]] = None
    return {text: list(found) for text, found in documents.items()}, generated


def _round_trip(
    teacher: TeacherSource,
    queries: dict[str, str],
    corpus: Texts,
    qrels: Generated,
    folder: Path,
    depth: int,
    top_k: int | None,
    tokens: str,
    options: dict[str, Any],
) -> list[str]:
    """The queries for which the teacher ranks a document of their own among its best; equal scores count as found."""
    bar = options["show_progress_bar"]
    candidates = find_candidates(
        queries,
        corpus,
        [BM25(tokens=tokens)],
        folder / "candidates",
        depth=depth,
        positives=qrels,
        overwrite=True,
        show_progress_bar=bar,
    )
    candidates = TeacherScores.from_rows(
        _filled(candidates, corpus, depth, qrels), folder / "filled-candidates", overwrite=True
    )
    found = []
    for row in score_candidates(teacher, candidates, queries, corpus, folder / "teacher-scores", **options):
        scores = dict(zip(row.document_ids, row.scores, strict=True))
        own = max(scores[document] for document in qrels[str(row.query_id)])
        if top_k is None or sum(score > own for score in row.scores) < top_k:
            found.append(str(row.query_id))
    return found


def _filled(
    candidates: TeacherScores, corpus: Texts, depth: int, qrels: Generated
) -> Iterator[tuple[Id, list[Id], list[float]]]:
    """Lists with random documents where BM25 found fewer than ``depth``: alone, any document is the first."""
    for row in candidates:
        documents, own = list(row.document_ids), qrels[str(row.query_id)]
        lacking = depth - sum(document not in own for document in documents)
        if lacking > 0:
            drawn = random.Random(str(row.query_id)).sample(
                range(len(corpus)), min(len(corpus), depth + len(documents))
            )
            others = [document for place in drawn if (document := corpus.ids[place].as_py()) not in documents]
            documents += others[:lacking]
        yield row.query_id, documents, [0.0] * len(documents)


def _write_data(output: Path, source: Any, corpus: Texts, queries: dict[str, str], qrels: Generated) -> None:
    """Corpus, queries and judgements, the source's own among them."""
    split: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
    folder = Path(source) if isinstance(source, (str, Path)) else None
    own = []
    if folder is not None and any(folder.glob("queries*")):
        own = [Texts.open(choose_file(folder, "queries"), "queries", id_type="str", duplicates="last")]
        split |= {part: read_qrels(path) for part, path in qrels_files(folder).items()}
    for query, relevant in qrels.items():
        # By document: its queries resemble each other, and would give away what was held out.
        share = int(hashlib.sha256(str(next(iter(relevant))).encode()).hexdigest()[:12], 16) / 16**12
        part = "train" if own or share >= sum(HELD_OUT) else "test" if share < HELD_OUT[0] else "dev"
        split[part][query] = relevant
    _write_texts(output / "corpus.jsonl", [corpus])
    _write_texts(output / "queries.jsonl", [*own, Texts.open(queries, "queries")])
    (output / "qrels").mkdir(exist_ok=True)
    for part, judged in split.items():
        lines = ["query-id\tcorpus-id\tscore"]
        lines += [f"{query}\t{doc}\t{grade}" for query, grades in judged.items() for doc, grade in grades.items()]
        if judged:
            _write_lines(output / "qrels" / f"{part}.tsv", lines)


def _write_texts(path: Path, parts: Iterable[Texts]) -> None:
    batches = (batch for texts in parts for batch in texts.batches())
    rows = (row for ids, texts in batches for row in zip(ids, texts, strict=True))
    _write_lines(path, (json.dumps({"_id": text_id, "text": text}, ensure_ascii=False) for text_id, text in rows))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_file(path, overwrite=True) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _titles(corpus: Any) -> frozenset[str]:
    """The titles in a mapping or a jsonl file; of another source there are none to tell from the texts."""
    records: Iterable[Any] = ()
    if isinstance(corpus, Mapping) and not isinstance(corpus, Texts):
        records = corpus.values()
    elif isinstance(corpus, (str, Path)) and ".jsonl" in (path := choose_file(Path(corpus), "corpus")).suffixes:
        records = Reading(path).parsed(lambda line, _: parse_object(line, []))
    found = [record["title"] for record in records if isinstance(record, Mapping) and "title" in record]
    return frozenset(str(title).strip() for title in found)


def _sentences(documents: list[str], number: int, *, titles: frozenset[str], seed: int) -> list[list[str]]:
    """The title of each document and sentences drawn from it."""
    drawn = []
    for document in documents:
        fronts = [document[: blank.start()] for blank in re.finditer(r"\s|$", document[:TITLE_LETTERS])]
        title = max((front for front in fronts if front in titles), key=len, default="")
        parts = [part.strip() for part in SENTENCE_END.split(document[len(title) :])]
        parts = list(dict.fromkeys(part for part in parts if len(part) in SENTENCE_LETTERS))
        order = random.Random(f"{seed} {document}")
        drawn.append([*filter(None, [title]), *order.sample(parts, len(parts))][:number])
    return drawn


class _LanguageModel:
    """A model of transformers as a writer of queries."""

    def __init__(
        self,
        name: str,
        prompt: str | None,
        max_length: int,
        sampling: dict[str, Any],
        device: str | None,
        trust_remote_code: bool,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        check_device(device)
        if model_file(name, "config.json", None) is None:
            raise ValueError(
                f"{name} is no model: there is no folder of this name with config.json in it, and nothing that can be "
                "reached on the Hugging Face Hub. Mind the spelling, and the current directory."
            )
        options = {"trust_remote_code": trust_remote_code}
        self.seq2seq = bool(AutoConfig.from_pretrained(name, **options).is_encoder_decoder)
        # Behind a prompt with its padding on the right a causal model would go on from the padding.
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **options)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if device.startswith("cuda") else "float32"
        kind: Any = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        self.model = kind.from_pretrained(name, dtype=dtype, **options).to(device).eval()
        self.prompt = prompt or ("{document}" if self.seq2seq else INSTRUCTION)
        self.max_length = max_length
        self.sampling = {"do_sample": True, "pad_token_id": self.tokenizer.pad_token_id, **sampling}

    def __call__(self, documents: list[str], number: int) -> list[list[str]]:
        import torch

        prompts = [self.prompt.replace("{document}", self._cut(document)) for document in documents]
        chat = not self.seq2seq and self.tokenizer.chat_template is not None
        if chat:
            turns = [[{"role": "user", "content": text}] for text in prompts]
            # A template that knows nothing of thinking does not look at the option.
            template: Any = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            prompts = [str(self.tokenizer.apply_chat_template(turn, **template)) for turn in turns]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=not chat)
        known = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            written = self.model.generate(**known, num_return_sequences=number, **self.sampling)
        start = 0 if self.seq2seq else known["input_ids"].shape[1]
        queries = self.tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
        return [queries[place : place + number] for place in range(0, len(queries), number)]

    def _cut(self, document: str) -> str:
        found = self.tokenizer(document, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        if len(found["input_ids"]) <= self.max_length:
            return document
        if self.tokenizer.is_fast:
            return document[: found["offset_mapping"][self.max_length - 1][1]]
        return str(self.tokenizer.decode(found["input_ids"][: self.max_length]))
