"""The systems that `st-m3se evaluate` is given, as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_m3se.cli.options import split_name

if TYPE_CHECKING:
    from st_m3se.retrieval.models import EncoderKind

__all__ = ["Given", "read_systems"]

KINDS: dict[str, EncoderKind] = {
    "bi-encoder": "bi-encoder",
    "sparse": "sparse encoder",
    "multi-vector": "multi-vector encoder",
}


@dataclass(frozen=True)
class Given:
    """Options of the command line, as they were typed.

    Attributes: options: "kind", "query-prompt", "document-prompt", "max-length" and "label": each ``VALUE`` for all
        models that it suits or ``NAME=VALUE`` for one. first_stages: Names of what is re-ranked; none is every system
        that searches, or else every run.
    """

    systems: Sequence[str]
    runs: Sequence[str]
    rerank: Sequence[str]
    rerank_depth: int
    first_stages: Sequence[str]
    dtype: Any
    options: Mapping[str, Sequence[str]]
    trust_remote_code: bool = False
    tokens: str = "words"

    def option(self, option: str, name: str, *, for_all: bool = True) -> str | None:
        """The value of an option for a system: its own, or else the one for all."""
        values = dict(split_name(text) for text in self.options[option])
        return values.get(name, values.get(None) if for_all else None)

    def number(self, option: str, name: str, *, for_all: bool = True) -> int | None:
        """The number of "max-length" or "label" for a system.

        Raises:
            ValueError: If it is none.
        """
        value = self.option(option, name, for_all=for_all)
        if value is not None and (not value.isdecimal() or (option == "max-length" and int(value) < 1)):
            raise ValueError(f"--{option} must be a number, got {value!r}.")
        return None if value is None else int(value)

    def check(self, systems: Collection[str], encoders: Collection[str], rerankers: Collection[str]) -> None:
        """Refuse an option for a system that is not there, or that cannot take it.

        Raises:
            ValueError: Naming the first.
        """
        names = dict.fromkeys([*systems, *rerankers])
        for option, texts in self.options.items():
            for text in texts:
                owner, _ = split_name(text)
                if owner is not None and owner not in names:
                    raise ValueError(
                        f"--{option} is for {owner!r}, which is no system here; there are {', '.join(names)}."
                    )
                takers = [] if option == "label" else [*encoders]
                # One length for all is the encoders': pairs are longer than texts.
                if option == "label" or (option == "max-length" and owner is not None):
                    takers += rerankers
                if not takers or (owner is not None and owner not in takers):
                    who = "no system here takes it" if owner is None else f"{owner!r} does not take it"
                    raise ValueError(f"--{option} {text}: {who}, so that it would change nothing. Leave it out.")


def read_systems(given: Given, *, candidates: bool, unscored: bool) -> dict[str, list[Any]]:
    """What :func:`~st_m3se.evaluation.evaluate` takes: a name to the seeds of a system.

    Args:
        given: The options.
        candidates: Whether the sets come with a run; it becomes a system of its own, and what is re-ranked.
        unscored: Whether that run has no scores, so that there is no order of its own to measure.

    Raises:
        ValueError: If names clash or are missing.
    """
    from st_m3se.evaluation.systems import Encoder, GivenRun, file_stem
    from st_m3se.retrieval.bm25 import BM25

    bm25 = BM25(tokens=given.tokens)
    systems: dict[str, list[Any]] = {"candidates": [GivenRun()]} if candidates and not unscored else {}
    for option, texts in (("--system", given.systems), ("--run", given.runs)):
        taken = set(systems)  # by systems of another kind, of which this is no seed
        for text in texts:
            own, value = split_name(text)
            name = own or (file_stem(value) if option == "--run" else _last_part(value))
            parts = _parts(value)
            if not parts:
                raise ValueError(f"{option} {text} names nothing.")
            if own is None and len(parts) > 1:
                raise ValueError(f"{option} {text}: several are seeds of one system; name it: NAME={text}.")
            if name in taken or (own is None and name in systems):
                raise ValueError(
                    f"two systems would be named {name!r}: give one a name of its own, {option} NAME={value}."
                )
            if option == "--run":
                sources: list[Any] = [GivenRun(file) for file in parts]
            else:
                sources = [bm25 if model == "bm25" else Encoder(model, **_encoder(given, name)) for model in parts]
            seeds = systems.setdefault(name, [])
            seeds += sources
            if len(seeds) > 1 and any(seed is bm25 or seed in seeds[:place] for place, seed in enumerate(seeds)):
                what = "BM25, which has no seeds" if bm25 in seeds else "the same one twice"
                raise ValueError(
                    f"{option} {text}: systems of one name are seeds, and {name!r} has {what}. Rename one."
                )
    encoders = [name for name, sources in systems.items() if isinstance(sources[0], Encoder)]
    given.check(list(systems), encoders, [split_name(text)[0] or _last_part(text) for text in given.rerank])
    if given.tokens != "words" and not any(bm25 in sources for sources in systems.values()):
        raise ValueError(f"--tokens {given.tokens} is for BM25: add --system bm25, or leave it out.")
    _add_rerankers(systems, given, candidates)
    return systems


def _add_rerankers(systems: dict[str, list[Any]], given: Given, candidates: bool) -> None:
    from st_m3se.evaluation.systems import GivenRun, ReRanker

    if given.first_stages and not given.rerank:
        raise ValueError("--first-stage says what to re-rank, and there is no --rerank.")
    if unknown := [name for name in given.first_stages if name not in systems]:
        raise ValueError(f"--first-stage {unknown[0]} is no system here; there are {', '.join(systems)}.")
    searching = [name for name, sources in systems.items() if not isinstance(sources[0], GivenRun)]
    stages: Sequence[str | None] = given.first_stages or searching or list(systems)
    if candidates and not given.first_stages:
        stages = [None]
    for text in given.rerank:
        own, value = split_name(text)
        name = own or _last_part(value)
        options = {
            "dtype": given.dtype,
            "max_length": given.number("max-length", name, for_all=False),
            "label": given.number("label", name),
            "trust_remote_code": given.trust_remote_code,
        }
        for stage in stages:
            label = name if stage is None else f"{stage}+{name}"
            if label in systems:
                raise ValueError(f"two systems would be named {label!r}: give one a name, --rerank NAME={value}.")
            systems[label] = [
                ReRanker(model, first_stage=stage, depth=given.rerank_depth, **options) for model in _parts(value)
            ]


def _encoder(given: Given, name: str) -> dict[str, Any]:
    """The arguments of an Encoder beside its model."""
    kind = given.option("kind", name)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return {
        "kind": None if kind is None else KINDS[kind],
        "query_prompt": given.option("query-prompt", name),
        "document_prompt": given.option("document-prompt", name),
        "max_length": given.number("max-length", name),
        "dtype": given.dtype,
        "trust_remote_code": given.trust_remote_code,
    }


def _parts(text: str) -> list[str]:
    """MODEL1,MODEL2 or FILE1,FILE2; a path that holds "," is a path."""
    return [text] if Path(text).exists() else [part for part in text.split(",") if part]


def _last_part(text: str) -> str:
    return Path(text.rstrip("/")).name
