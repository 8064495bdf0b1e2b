"""The whole way: candidates, a check of the teacher, its scores, the training, and what came of it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import chain
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from st_m3se.core.files import digest, whole_folder, write_checked_json
from st_m3se.data.collection import open_texts
from st_m3se.distillation.card import add_to_card
from st_m3se.distillation.config import DistillationConfig
from st_m3se.distillation.data import SPLITS, DistillationData, Qrels, open_data
from st_m3se.distillation.estimate import duration, estimate
from st_m3se.distillation.lists import (
    AFTER,
    BEFORE,
    BM25_CANDIDATES,
    BY_GENERATION,
    BY_JUDGEMENTS,
    BY_TEACHER,
    CONTROL,
    ENSEMBLE,
    TEACHER,
    Candidates,
    Run,
    dev_evaluator,
    first_choices,
    run_of,
    search,
    training_epochs,
    training_lists,
)
from st_m3se.distillation.recipe import clean, load_student, train_student
from st_m3se.distillation.report import write_report
from st_m3se.distillation.results import compare_runs, render_text
from st_m3se.distillation.stages import claim, identity, rank, save_model, stage, stage_folder, write_text
from st_m3se.distillation.teacher_check import UNCHECKED, check_teacher
from st_m3se.evaluation.provenance import provenance
from st_m3se.retrieval.fingerprint import model_fingerprint
from st_m3se.retrieval.models import check_device, detect_kind, encoder_name
from st_m3se.retrieval.queries import GENERATED, generate_queries
from st_m3se.retrieval.scoring import as_teacher, score_candidates
from st_m3se.retrieval.teacher_models import check_saved
from st_m3se.scores.combine import combine, is_search
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST_FIELDS

__all__ = ["distill"]

SAMPLED_DOCUMENTS = 32  # whose queries a dry run makes
FEW_KEPT = 0.2  # of the queries that were made: the teacher chose among eleven documents
OPTIONS = "config.toml"
SENTENCES = "sentences"  # instead of a model that writes queries


def distill(
    data: str | Path | DistillationData | None = None,
    teacher: Any = None,
    student: Any = None,
    output: str | Path | None = None,
    *,
    config: DistillationConfig | None = None,
    dry_run: bool = False,
    command: str | None = None,
    show: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Distil a teacher into a student: from texts to a trained and measured model.

    Finds candidates with BM25 and the student, measures the teacher on held-out queries, lets it score the training
    candidates, trains the student, and measures it on test queries beside its start, the teacher and BM25. Each stage
    is a folder of ``output`` that is made once: the same call after a kill goes on where it was, the training
    included, and another option makes anew only what depends on it. What lies where is in
    :mod:`st_m3se.distillation`.

    Under ``accelerate launch`` or ``torchrun`` all processes call it: they share teacher scoring and training, and end
    where one process does.

    Args:
        data: A BEIR folder or the name of a BEIR set, see :func:`~st_m3se.distillation.open_data`; or what that gives.
        teacher: A cross-encoder or an encoder, loaded or by name or path; a function of (query, document) pairs; an
            :class:`~st_m3se.APITeacher`; a mapping from names to any of these; or a list of them, whose mean teaches.
        student: A SentenceTransformer, SparseEncoder or MultiVectorEncoder by name or path; or loaded, which is not
            changed.
        output: The folder for everything.
        config: Options from elsewhere, such as :meth:`DistillationConfig.from_toml`; arguments and ``options`` win.
        dry_run: Only say what would be done, and for how long; nothing is written.
        command: What the user typed, for the report.
        show: Print what is done.
        options: Fields of :class:`~st_m3se.distillation.DistillationConfig`.

    Returns:
        What ``results.json`` holds; of a dry run the stages with their numbers and seconds.

    Raises:
        PoorTeacherError: If the teacher is no better than the student on held-out queries, unless ``anyway``.
        ValueError: On options or data that cannot be used.
        ImportError: If the extra ``eval`` is not installed.

    Example:
        >>> distill("my-data", "cross-encoder/ms-marco-MiniLM-L12-v2", "all-MiniLM-L6-v2", "out")  # doctest: +SKIP
    """
    config = config or DistillationConfig()
    teachers = _teachers(teacher)
    given: dict[str, Any] = {
        "data": data.name if isinstance(data, DistillationData) else data,
        "teacher": tuple(teachers) or None,
        "student": student if isinstance(student, (str, Path)) or student is None else encoder_name(student),
        "output": output,
    }
    config = config.with_options({**options, **{name: value for name, value in given.items() if value is not None}})
    for name in ("data", "teacher", "student"):
        if not getattr(config, name):
            raise ValueError(f"{name} is missing. Name a folder of texts, a teacher and a student.")
    teachers = teachers or _teachers(list(config.teacher))
    parts = (config, data, teachers, student or config.student, command, show and rank() == 0)
    if dry_run:
        with TemporaryDirectory() as scratch:
            return _Distillation(*parts, scratch=Path(scratch)).plan()
    if rank():
        return _Distillation(*parts).run()
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, and {folder} is a file. Name another output.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another process distils into {folder}. Wait for it, or name another output.") from None
    try:
        written = folder / OPTIONS  # may be there before: --write-config wrote it
        own = written.is_file() and written.read_text(encoding="utf-8") == config.to_toml()
        claim(folder, {"made by": "st-m3se distill"}, beside=[OPTIONS] if own else [])
        return _Distillation(*parts).run()
    finally:
        lock.release()  # once: a second `with` would count, and an error that somebody keeps would keep the lock


def _teachers(teacher: Any) -> dict[str, Any]:
    """Teachers by name."""
    if teacher is None:
        return {}
    if isinstance(teacher, Mapping):
        return dict(teacher)
    if isinstance(teacher, (str, Path)) or not isinstance(teacher, Sequence):
        teacher = [teacher]
    names = [_teacher_name(each) for each in teacher]
    folders = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in names]
    if len(set(folders)) < len(names):
        raise ValueError(f"a teacher is named twice in {names}: it would only count twice.")
    return dict(zip(names, teacher, strict=True))


def _teacher_name(teacher: Any) -> str:
    """A name or path as it is; what a model calls itself; of a function or an APITeacher, the name in its manifest."""
    if isinstance(teacher, (str, Path)):
        return str(teacher)
    if hasattr(teacher, "model_card_data"):
        return encoder_name(teacher)
    return str(as_teacher(teacher).settings["teacher"])


@dataclass
class _Taught:
    """The teacher's lists of a split, and those that are taught: with the guide, where it joins."""

    teacher: TeacherScores
    ensemble: TeacherScores
    folder: Path
    pairs: int
    seconds: float


class _Distillation:
    """One run."""

    def __init__(
        self,
        config: DistillationConfig,
        data: Any,
        teachers: dict[str, Any],
        student: Any,
        command: str | None,
        show: bool,
        scratch: Path | None = None,
    ) -> None:
        self.config, self.teachers, self.show, self.scratch = config, teachers, show, scratch
        self.growth, self.sampled = 1.0, list[tuple[str, str, float]]()
        self.output = Path(config.output)
        self.given_student = None if isinstance(student, (str, Path)) else student
        self.command = command or self._command(data)
        self.folders: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        # A slip is found before hours of work.
        check_device(config.device)
        if not config.scores:
            self._check_teachers()
        for encoder in [config.guide, student]:
            if isinstance(encoder, (str, Path)):
                detect_kind(str(encoder))
        self.data = data if isinstance(data, DistillationData) else self._open(Path(config.data or ""))
        if len(self.data.corpus) < 2:
            raise ValueError(f"{self.data.name} has a corpus of one document: there is nothing to rank. Add more.")
        left = len(self.data.unjudged)
        if config.unjudged:
            if not left:
                self.data.notes.append("--unjudged adds nothing: no query without judgements is left aside")
            self.data.train_on_unjudged()
        elif left:
            self.data.notes.append(
                f"{left:,} queries have no judgements: left aside; --unjudged trains on them as well, with the teacher "
                "as their only label"
            )
        sizes = {split: getattr(config, f"{split}_queries") for split in SPLITS}
        self.data.cut({split: size and ceil(size / self.growth) for split, size in sizes.items()})
        self.ready, self.given_manifest = self._ready()
        lacking = self._lacking()
        if config.scores and (held_out := lacking["dev"] + lacking["test"]):
            try:
                self._check_teachers()
            except ValueError as error:
                raise ValueError(
                    f"{held_out} held-out queries have no scores in {config.scores}, so that the teacher has to score "
                    f"them, and it cannot: {error}"
                ) from None
        self.judged = self.data.judged("train") if config.judgements is None else config.judgements
        if self.judged and not self.data.judged("train"):
            raise ValueError("judgements of the training queries are asked for, and there are none.")
        self.loss = config.loss or ("combined" if self.judged else "softmax-cross-entropy")
        if self.loss in ("combined", "contrastive") and not self.judged and config.loss == "combined":
            raise ValueError("the loss 'combined' needs judgements of training queries. Leave it out.")

    def _check_teachers(self) -> None:
        config = self.config
        for named in self.teachers.values():
            if isinstance(named, (str, Path)):
                label, prompt, own_code = config.teacher_label, config.teacher_prompt, config.trust_remote_code
                check_saved(str(named), label=label, prompt=prompt, trust_remote_code=own_code)

    def _command(self, data: Any) -> str:
        """What makes all of this again: a command, or a call in Python, where a name does not say what was given."""
        options = str(self.output / OPTIONS)
        loaded = {name: each for name, each in self.teachers.items() if not isinstance(each, (str, Path))}
        given = [f"data={data.name}"] if isinstance(data, DistillationData) else []
        given += [f"teacher={{{', '.join(f'{name!r}: ...' for name in self.teachers)}}}"] if loaded else []
        given += ["student=..."] if self.given_student is not None else []
        if not given:
            return f"st-m3se distill --config {shlex.quote(options)}"
        return f"st_m3se.distill({', '.join(given)}, config=DistillationConfig.from_toml({options!r}))"

    def say(self, text: str = "") -> None:
        """Tell the user, in the first process."""
        if self.show:
            print(text, flush=True)

    def _open(self, source: Path) -> DistillationData:
        model = self.config.generate_queries
        if model is None:
            if source.is_dir() and not any(source.glob("queries*")):
                raise ValueError(
                    f"{source} has no queries. --generate-queries MODEL has a language model write them; "
                    f"--generate-queries {SENTENCES} takes titles and sentences of the documents, which is poorer."
                )
            return open_data(source)
        # A folder with queries of its own, made as a stage; it lies beside the others and resumes like them.
        name, teacher = next(iter(self.teachers.items()))
        options = {"name": name, **self.config.teacher_options(teacher)}
        settings = {
            **{"generator": identity(model), "teacher": _identity(name, teacher)},
            **{"corpus": open_texts(source, "corpus")[0].fingerprint, "queries and judgements": _asked(source)},
            **{key: value for key, value in options.items() if value is not None},
            "tokens": self.config.tokens,
        }
        generate = partial(
            generate_queries,
            model=None if model == SENTENCES else model,
            teacher=teacher,
            teacher_options=options,
            tokens=self.config.tokens,
            device=self.config.device,
            trust_remote_code=self.config.trust_remote_code,
            show_progress_bar=self.show,
        )
        if self.scratch is not None and not stage_folder(self.output, "queries", settings).is_dir():
            return self._sample(source, generate)
        folder, made = self._stage("queries", settings, lambda path: generate(source, output=path))
        data = open_data(folder)
        data.name = source.resolve().name
        how = "titles and sentences of the documents" if model == SENTENCES else f"written by {model}"
        data.notes.append(
            f"queries are {how}: {made['distinct']:,} from {made['documents']:,} documents; used are {made['kept']:,} "
            f"whose document {name} ranks first"
        )
        if made["kept"] < FEW_KEPT * made["distinct"]:
            data.notes.append(
                f"that is {made['kept'] / made['distinct']:.0%}, and a teacher that guesses keeps every eleventh: look "
                f"at the queries in {folder / 'generated'}, and measure the teacher on judged ones"
            )
        return data

    def _sample(self, source: Path, generate: Callable[..., dict[str, int]]) -> DistillationData:
        """For a dry run: queries of a few documents, somewhere else; what these took and gave tells of all."""
        assert self.scratch is not None
        start = time.perf_counter()
        made = generate(source, output=self.scratch / "queries", max_documents=SAMPLED_DOCUMENTS)
        data = open_data(self.scratch / "queries")
        self.growth = len(data.corpus) / made["documents"]
        what = f"{len(data.corpus):,} documents; some {made['kept'] * self.growth:,.0f} queries will be kept"
        self.sampled.append(("queries", what, (time.perf_counter() - start) * self.growth))
        data.name = source.resolve().name
        data.notes.append(f"queries of {made['documents']} documents were made for this estimate")
        return data

    def _ready(self) -> tuple[Run, dict[str, Any]]:
        """Scores that are there already, of the queries of this distillation, and what is known of them."""
        path, data = self.config.scores, self.data
        if path is None:
            return {}, {}
        if len(self.teachers) > 1:
            raise ValueError(
                f"scores are one teacher's, and there are {len(self.teachers)}. Combine their scores first."
            )
        store = TeacherScores.open(path)
        # A combined store may have no teacher's name: the one that was given stands for it.
        manifest = {name: value for name in MANIFEST_FIELDS if (value := store.manifest.get(name)) is not None}
        if manifest.get("scale") == "rank":
            raise ValueError(
                f"{path} has ranks and no scores, and it is scores that are taught. Make some of them: st-m3se combine "
                f"{path} OUT --calibration log-rank."
            )
        if is_search(store):
            raise ValueError(
                f"{path} has the scores of a search for candidates, and not a teacher's. Let one score them: st-m3se "
                f"score --teacher MODEL --candidates {path} OUT."
            )
        scorer, name = manifest.get("teacher"), next(iter(self.teachers))
        if scorer and Path(scorer).name != Path(name).name:
            data.notes.append(f"{path} has the scores of {scorer}: it teaches, and {name} scores what is lacking there")
        if manifest.get("inputs", {}).get("corpus", data.corpus.fingerprint) != data.corpus.fingerprint:
            data.notes.append(
                f"the documents are not all the ones that were scored for {path}: where the text of an id has changed, "
                "its scores are wrong"
            )
        if int in store.id_types:
            raise ValueError(f"{path} has ids that are numbers. Make them texts: st-m3se convert IN OUT --ids str.")
        asked = [query for split in data.qrels.values() for query in split if query in store]
        listed = run_of(store, asked)
        data.corpus.rows([document for found in listed.values() for document in found])  # all are there
        train = {query: relevant for query, relevant in data.qrels["train"].items() if query in listed}
        if not train:
            raise ValueError(f"{path} has scores for none of the {len(data.qrels['train'])} training queries.")
        if left := len(data.qrels["train"]) - len(train):
            data.notes.append(f"{left} training queries have no scores in {path}: left out")
        data.qrels["train"] = train
        return listed, manifest

    # What would be done.

    def _lacking(self) -> dict[str, int]:
        """The queries of each split that the teacher has to score."""
        return {split: sum(query not in self.ready for query in self.data.qrels[split]) for split in SPLITS}

    def _pairs(self) -> dict[str, int]:
        size = {"train": self.config.scored, "dev": self.config.pool, "test": self.config.pool}
        documents, lacking = len(self.data.corpus), self._lacking()
        return {split: round(lacking[split] * self.growth) * min(size[split], documents) for split in SPLITS}

    def plan(self) -> dict[str, Any]:
        """The stages, what is in them and how long they take: a small batch of teacher and student is timed."""
        self._introduce()
        self.say("  timing a small batch of the teacher and of the student")
        pairs, student = self._pairs(), self._load()
        planned = estimate(self.config, self.data, self.teachers, student, pairs, self.growth)
        stages = [*self.sampled, *planned]
        self.say("Stages:")
        for name, what, seconds in stages:
            self.say(f"  {name:<13} {what:<62} {duration(seconds):>10}")
        total = sum(seconds for *_, seconds in stages)
        self.say(f"  in all {duration(total)}, roughly; nothing was written")
        queries = {split: round(number * self.growth) for split, number in self.data.sizes.items()}
        return {"stages": stages, "seconds": total, "queries": queries, "pairs": pairs}

    def _introduce(self) -> None:
        sizes = ", ".join(f"{number:,} {split}" for split, number in self.data.sizes.items())
        self.say(f"Data: {self.data.name}: {len(self.data.corpus):,} documents; queries: {sizes}")
        for note in self.data.notes:
            self.say(f"  note: {note}")

    # What is done.

    def _load(self) -> Any:
        if self.given_student is not None:
            return self.given_student
        return load_student(str(self.config.student), self.config)

    def _stage(
        self, name: str, made_from: Mapping[str, Any], make: Any, shared: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        folder, known = stage(self.output, name, made_from, make, shared=shared, say=self.say)
        self.folders[name] = folder.name
        self.seconds[name] = known["seconds"]
        return folder, known

    def run(self) -> dict[str, Any]:
        """All stages; returns the results."""
        config, qrels = self.config, self.data.qrels
        self._introduce()
        if not rank():
            write_text(self.output / OPTIONS, config.to_toml())
        if self.given_student is not None and not rank():
            save_model(self.given_student, self.output / "start")
        start = str(self.output / "start") if self.given_student is not None else str(config.student)
        self.student, self.start = self._load(), identity(start)
        self.guide_name = config.guide or start
        same = self.guide_name == start
        pool = max(config.scored, config.pool)
        self.texts = {"corpus": self.data.corpus.fingerprint, "queries": self.data.queries.fingerprint}
        self.inputs: dict[str, Any] = {
            **self.texts,
            "qrels": _digest(qrels),
            "guide": identity(self.guide_name),
            "max_length": config.max_length,
            "exclude_same_id": config.exclude_same_id,
            "tokens": config.tokens,
            **({"scores": _digest(self.ready)} if self.ready else {}),
            **({"pool": pool} if pool > BM25_CANDIDATES else {}),
        }
        self.say("Candidates: BM25 and the student as it comes" if same else f"Candidates: BM25 and {config.guide}")
        guide = self.student if same else load_student(self.guide_name, config)
        folder, _ = self._stage(
            "candidates",
            self.inputs,
            lambda path: (
                Candidates.find(
                    self.data,
                    guide,
                    path,
                    pool=pool,
                    listed=self.ready,
                    exclude_same_id=config.exclude_same_id,
                    tokens=config.tokens,
                    show=self.show,
                )
                or {}
            ),
        )
        self.candidates = Candidates.open(self.data, folder, self.judged)

        self.say("Check of the teacher on held-out queries")
        dev = self._taught("dev") if qrels["dev"] else None
        check = self._check(dev, same)
        self.ensemble = check["ensemble"]
        taught_by = ENSEMBLE if self.ensemble else TEACHER

        self.say("Teacher scores of the training queries")
        train = self._taught("train")
        taught = train.ensemble if self.ensemble else train.teacher
        dev_qrels = self._measured_by("dev", dev)
        evaluator = None
        if dev is not None and dev_qrels:
            evaluator = dev_evaluator(self.data, dev_qrels, run_of(dev.teacher, dev_qrels))

        trainings: dict[str, list[dict[str, Any]]] = {}
        runs: dict[str, list[Run]] = {"BM25": [self.candidates.lexical]}
        runs[BEFORE] = [self.candidates.dense if same else self._found(start, "before")]
        plans = [(AFTER, self.loss)]
        if config.control and self.loss != "contrastive":
            plans.insert(0, (CONTROL, "contrastive"))
        for name, loss in plans:
            for seed in config.seeds:
                trained = self._train(name, loss, seed, taught, train.folder, evaluator, _digest(dev_qrels))
                trainings.setdefault(name, []).append(trained)
                runs.setdefault(name, []).append(self._found(trained["model"], f"{_slug(name)}-seed{seed}"))

        self.say("Evaluation on the test queries")
        test = self._taught("test")
        runs[TEACHER] = [run_of(test.teacher, qrels["test"])]
        runs[ENSEMBLE] = [run_of(test.ensemble, qrels["test"])]
        results = self._results(runs, self._measured_by("test", test), trainings, taught_by)
        results |= {
            "check_on_dev": check,
            "teacher_pairs": train.pairs,
            "teacher_pairs_per_second": train.pairs / train.seconds if train.seconds else None,
        }
        if not rank():
            self._write(results, trainings)
        return results

    def _taught(self, split: str) -> _Taught:
        """The teachers' scores of a split, each teacher's store, their mean, and their mean with the guide."""
        config = self.config
        size = config.scored if split == "train" else config.pool
        pools = self.candidates.pools(split, size)
        settings = {
            **self.texts,
            **{name: getattr(config, f"teacher_{name}") for name in ("max_length", "dtype", "prompt", "label")},
            "teacher": {name: _identity(name, teacher) for name, teacher in self.teachers.items()},
            "candidates": _digest(pools),
        }
        ready = {query: listed for query, listed in self.ready.items() if query in self.data.qrels[split]}
        if split != "train":  # what nobody found, such as a relevant document put there by hand, is no candidate
            found = {query: self.candidates.searched(query) for query in ready}
            ready = {q: {d: score for d, score in listed.items() if d in found[q]} for q, listed in ready.items()}
            ready = {query: listed for query, listed in ready.items() if listed}
        pools = {query: pool for query, pool in pools.items() if query not in ready}
        if ready:
            settings["scores"] = _digest(ready)

        def make(folder: Path) -> dict[str, Any]:
            scored = []
            for number, (name, teacher) in enumerate(self.teachers.items() if pools else (), start=1):
                scored.append(
                    score_candidates(
                        teacher,
                        pools,
                        self.data.queries,
                        self.data.corpus,
                        folder / ("lacking" if ready else f"teacher-{number}"),
                        name=name,
                        shard_queries=64,
                        show_progress_bar=self.show,
                        **config.teacher_options(teacher),
                    )
                )
            if ready and not rank():
                given = ((query, list(listed), list(listed.values())) for query, listed in ready.items())
                rows = chain[Any](given, *scored)
                manifest = {"teacher": next(iter(self.teachers)), **self.given_manifest}
                TeacherScores.from_rows(rows, folder / "teacher-1", manifest=manifest, overwrite=True)
            return {"pairs": sum(map(len, pools.values()))}

        folder, made = self._stage(f"teacher-{split}", settings, make, shared=True)
        stores = [folder / f"teacher-{number}" for number in range(1, len(self.teachers) + 1)]

        def mean(path: Path) -> dict[str, Any]:
            if len(stores) > 1:
                combine(stores, path / "teachers", missing="drop", overwrite=True)
            teachers = path / "teachers" if len(stores) > 1 else stores[0]
            dense, listed = self.candidates.dense, run_of(TeacherScores.open(teachers), self.data.qrels[split])
            lists = {q: [d for d in documents if d in dense.get(q, {})] for q, documents in listed.items()}
            guide = TeacherScores.from_rows(
                ((q, documents, [dense[q][d] for d in documents]) for q, documents in lists.items() if documents),
                path / "guide",
                manifest={"teacher": self.guide_name, "activation": "similarity"},
                overwrite=True,
            )
            combine([teachers, guide], path / "with-guide", missing="drop", overwrite=True)
            return {}

        both, _ = self._stage(f"mean-{split}", {"teacher": folder.name, "guide": self.folders["candidates"]}, mean)
        teachers = both / "teachers" if len(stores) > 1 else stores[0]
        return _Taught(
            TeacherScores.open(teachers),
            TeacherScores.open(both / "with-guide"),
            folder,
            made["pairs"],
            made["seconds"],
        )

    def _measured_by(self, split: str, taught: _Taught | None) -> Qrels:
        """Who counts as relevant: what was judged; without judgements the document that the teacher likes best."""
        if taught is None or self.data.judged(split):
            return self.data.qrels[split]
        store = taught.ensemble if self.ensemble else taught.teacher
        return first_choices(store, self.data.qrels[split])

    def _judge(self, split: str) -> str:
        """By what a split's documents are relevant: one of :data:`JUDGES`."""
        if not self.data.judged(split):
            return BY_TEACHER
        made = all(query.startswith(GENERATED) for query in self.data.qrels[split])
        return BY_GENERATION if made else BY_JUDGEMENTS

    def _check(self, dev: _Taught | None, same: bool) -> dict[str, Any]:
        """Measure the teacher against the student on dev queries, where somebody has judged these.

        Raises:
            PoorTeacherError: If there is nothing to learn.
        """
        config, qrels = self.config, self.data.qrels["dev"]
        check: dict[str, Any] = {"queries": len(qrels)}
        judge = self._judge("dev") if dev is not None else BY_TEACHER
        if dev is None or judge in UNCHECKED:
            self.say(f"  {UNCHECKED[judge]}")
            return {**check, "measured": False, "ensemble": config.ensemble is not False}
        teachers = run_of(dev.teacher, qrels)
        runs = {
            "BM25": {q: {d: self.candidates.lexical.get(q, {}).get(d, 0.0) for d in t} for q, t in teachers.items()},
            "student": self._student_on(teachers, same),
            TEACHER: teachers,
            ENSEMBLE: run_of(dev.ensemble, qrels),
        }
        return check | check_teacher(runs, qrels, ensemble=config.ensemble, anyway=config.anyway, say=self.say)

    def _student_on(self, lists: Run, same: bool) -> Run:
        """The student's scores of the teacher's candidates."""
        if same:
            return {q: {d: self.candidates.dense[q][d] for d in listed} for q, listed in lists.items()}
        folder, _ = self._stage(
            "student-dev",
            {**self.inputs, "student": self.start, "candidates": _digest({q: list(t) for q, t in lists.items()})},
            lambda path: (
                score_candidates(
                    self.student,
                    {q: list(t) for q, t in lists.items()},
                    self.data.queries,
                    self.data.corpus,
                    path / "scores",
                    name="student",
                )
                and {}
            ),
        )
        return run_of(TeacherScores.open(folder / "scores"), lists)

    def _train(
        self, name: str, loss: str, seed: int, taught: TeacherScores, folder: Path, evaluator: Any, dev: str
    ) -> dict[str, Any]:
        config = self.config
        train = self.data.qrels["train"]
        if self.judged:
            mixed = name == AFTER and not all(train.values())
            lists_by = "judgements and the teacher" if mixed else "judgements"
        else:
            lists_by = "the first result of the search" if name == CONTROL else "the teacher"
        own = ["scale", "learning_rate", "epochs", "batch_size", "list_size", "evaluations", "max_length"]
        own += ["start_weight", "false_negatives", "false_negative_margin"]
        settings = {
            **{option: getattr(config, option) for option in own},
            **{"loss": loss, "seed": seed, "student": self.start, "dev": dev, "positives": lists_by},
            **{"teacher_scores": folder.name, "candidates": self.folders["candidates"], "ensemble": self.ensemble},
            **{"mini_batch_num_tokens": config.mini_batch_num_tokens, "qrels": _digest(train)},
        }

        def make(path: Path) -> dict[str, Any]:
            lists = training_lists(
                taught,
                self.candidates,
                list_size=config.list_size,
                false_negatives=config.false_negatives,
                margin=config.false_negative_margin,
                seed=seed,
                teacher=name == AFTER,
            )
            self.say(f"Training {config.student} with {loss}, seed {seed}: {len(lists):,} lists, positives: {lists_by}")
            epochs = training_epochs(config.epochs, self.candidates, teacher=name == AFTER)
            return train_student(
                self._fresh(),
                lists,
                loss,
                path,
                # without dev nothing says whether the average is worse
                replace(config, epochs=epochs, start_weight=config.start_weight if evaluator else 0.0),
                seed=seed,
                evaluator=evaluator,
                keep_start=name == AFTER,
                show=self.show,
            )

        label = f"training-{_slug(name)}-seed{seed}"
        path, made = self._stage(label, settings, make, shared=True)
        if not rank():
            clean(path)
        if len(made["curve"]) > 1:
            values = [f"{point['value']:.3f}" for point in made["curve"]]
            self.say(f"  {name}, seed {seed}: dev nDCG@10 {values[0]} before, then {', '.join(values[1:])}")
            if made["kept"]:
                share = f", averaged with {made['start_weight']:.0%} of the start" if made["start_weight"] else ""
                self.say(f"  The model: the student after {made['kept']:,} steps{share}, dev {made['value']:.3f}")
        if made["kept"] == 0:
            self.say(
                "  It became worse on dev than it was before: the model is the student as it comes, unchanged. Try a "
                "lower --learning-rate, more training queries or another teacher."
            )
        return {**made, "seed": seed, "model": str(path / "model"), "folder": path.name}

    def _fresh(self) -> Any:
        """A student to train: as it comes."""
        if self.given_student is not None:
            return load_student(str(self.output / "start"), self.config)
        return load_student(str(self.config.student), self.config)

    def _found(self, model: str, name: str) -> Run:
        """What a model finds for the test queries."""
        test = list(self.data.qrels["test"])
        made_from = {**self.inputs, "model": identity(model)}
        folder, _ = self._stage(
            f"run-{name}",
            made_from,
            lambda path: self._search(load_student(model, self.config), test, path),
        )
        return run_of(TeacherScores.open(folder / "run"), test)

    def _search(self, model: Any, test: list[str], path: Path) -> dict[str, Any]:
        exclude = self.config.exclude_same_id
        search(model, self.data, test, path / "run", exclude_same_id=exclude, show=self.show)
        texts = self.data.queries.take(test)
        clock = time.perf_counter()
        model.encode_query(texts, show_progress_bar=False)
        return {"queries_per_second": len(texts) / (time.perf_counter() - clock)}

    def _results(
        self, runs: dict[str, list[Run]], qrels: Qrels, trainings: dict[str, list[dict[str, Any]]], taught_by: str
    ) -> dict[str, Any]:
        """What the systems reach, and everything that is to be known of how it came about."""
        found = compare_runs(runs, qrels, taught_by, exclude_same_id=self.config.exclude_same_id)
        best = max(trainings[AFTER], key=lambda training: training["value"] or 0.0)
        return {
            "data": self.data.name,
            "documents": len(self.data.corpus),
            "queries": self.data.sizes,
            "notes": self.data.notes,
            "teachers": [self.given_manifest["teacher"]] if "teacher" in self.given_manifest else list(self.teachers),
            "judged_by": self._judge("test"),
            "taught_by": taught_by,
            **found,
            "trainings": trainings,
            "model_from": best["folder"],
            "kept_start": best["kept"] == 0,
            "model": str(self.output / "model"),
            "command": self.command,
            "config": asdict(self.config),
            "stages": self.folders,
            "seconds": self.seconds,
            "student_queries_per_second": self._speed(),
            "provenance": provenance(),
            "query_ids": list(qrels),
            "relevant": qrels,
        }

    def _speed(self) -> float | None:
        name = self.folders.get(f"run-{_slug(AFTER)}-seed{self.config.seeds[0]}")
        if name is None:
            return None
        known = json.loads((self.output / name / "finished.json").read_text(encoding="utf-8"))
        return float(known["queries_per_second"])

    def _write(self, results: dict[str, Any], trainings: dict[str, list[dict[str, Any]]]) -> None:
        write_checked_json(self.output / "results.json", results)
        check = results["check_on_dev"]
        curves = {name: [each["curve"] for each in found] for name, found in trainings.items()}
        line = check.get("nDCG@10", {}).get(results["taught_by"])
        write_checked_json(self.output / "dev_curve.json", {"measure": "nDCG@10", "curves": curves, "teacher": line})
        source = self.output / results["model_from"] / "model"

        def finish(path: Path) -> None:
            import shutil

            shutil.copytree(source, path)
            add_to_card(path / "README.md", results)

        whole_folder(self.output / "model", finish)
        results["report"] = str(write_report(self.output, self.data))
        self.say(render_text(results))


def _asked(folder: Path) -> dict[str, str]:
    """The queries and judgements of a folder: the checksum of each of their files."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: digest(file) for name, file in files.items() if name.startswith(("queries", "qrels"))}


def _identity(name: str, teacher: Any) -> Any:
    """What tells a teacher from another one: of a function its name is all there is."""
    if isinstance(teacher, (str, Path)):
        return identity(str(teacher))
    return [name, model_fingerprint(teacher)] if hasattr(teacher, "state_dict") else name


def _digest(content: Any) -> str:
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _slug(name: str) -> str:
    return {AFTER: "student", CONTROL: "control"}[name]
