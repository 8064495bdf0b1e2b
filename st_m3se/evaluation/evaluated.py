"""What a results file says about an evaluated set, and the checks of what such a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import Finding

if TYPE_CHECKING:
    from st_m3se.evaluation.data import EvaluationSet

__all__ = ["EvaluatedSet", "is_count", "is_number", "is_texts", "json_object"]


@dataclass(frozen=True)
class EvaluatedSet:
    """What a report says about a set, without its texts.

    Attributes:
        documents: Documents of the corpus; None where the set has no corpus, only qrels.
        judgements: Judged pairs of the evaluated queries.
        split: "test", "dev", ...
        form: "retrieval", or "re-ranking" where the candidates were given.
        fingerprint: Of the set's contents: values are compared per query only where it is the same.
        query_ids: The evaluated queries, in the order of the values.
        findings: What was unusual about the data, and what was done.
    """

    documents: int | None
    judgements: int
    split: str
    form: str
    fingerprint: str
    query_ids: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, source: EvaluationSet) -> EvaluatedSet:
        """The description of an opened set."""
        query_ids = tuple(source.query_ids)
        return cls(
            documents=None if source.corpus is None else len(source.corpus),
            judgements=sum(len(source.qrels[query]) for query in query_ids),
            split=source.split,
            form=source.form,
            fingerprint=source.fingerprint,
            query_ids=query_ids,
            findings=tuple(source.findings),
        )

    @property
    def queries(self) -> int:
        """How many queries were evaluated."""
        return len(self.query_ids)

    def to_json(self) -> dict[str, Any]:
        """As ``results.json`` holds it."""
        return {
            "documents": self.documents,
            "queries": self.queries,
            "judgements": self.judgements,
            "split": self.split,
            "form": self.form,
            "fingerprint": self.fingerprint,
            "query_ids": list(self.query_ids),
            "findings": [{**finding._asdict(), "examples": list(finding.examples)} for finding in self.findings],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], place: str) -> EvaluatedSet:
        """Check and take over what a results file has under ``place``.

        Raises:
            FormatError: If something is missing or of the wrong type.
        """
        documents = data.get("documents")
        wrong = [name for name in ("split", "form", "fingerprint") if not isinstance(data.get(name), str)]
        wrong += [name for name in ("queries", "judgements") if not is_count(data.get(name))]
        wrong += [] if documents is None or is_count(documents) else ["documents"]
        wrong += [] if is_texts(data.get("query_ids")) else ["query_ids"]
        wrong += [] if isinstance(data.get("findings"), list) else ["findings"]
        if wrong:
            raise FormatError(f"{place}: missing or of a wrong type: {', '.join(wrong)}.")
        if data["queries"] != len(data["query_ids"]):
            raise FormatError(
                f"{place} says {data['queries']:,} queries and lists {len(data['query_ids']):,} query_ids."
            )
        findings = tuple(
            _read_finding(finding, f"{place}['findings'][{row}]") for row, finding in enumerate(data["findings"])
        )
        texts = {name: data[name] for name in ("split", "form", "fingerprint")}
        return cls(documents, data["judgements"], **texts, query_ids=tuple(data["query_ids"]), findings=findings)


def _read_finding(data: Any, place: str) -> Finding:
    data = json_object(data, place)
    texts = isinstance(data.get("kind"), str) and isinstance(data.get("effect"), str)
    if not (texts and is_count(data.get("count")) and is_texts(data.get("examples"))):
        raise FormatError(f"{place} needs the texts kind and effect, a count, and examples, a list of texts.")
    return Finding(data["kind"], data["count"], tuple(data["examples"]), data["effect"])


def json_object(value: Any, place: str) -> dict[str, Any]:
    """The value, which must be an object.

    Raises:
        FormatError: If it is not, or is missing; it names the place.
    """
    if not isinstance(value, dict):
        what = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise FormatError(f"{place} should be a JSON object, and is {what}.")
    return value


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float can hold."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000
    )


def is_count(value: Any) -> bool:
    """Whether it is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
