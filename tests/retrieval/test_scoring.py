"""Scores of real, small teachers beside those of sentence-transformers' own methods, and what is refused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAIRS
from evaluation.encoders import make_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer
from students import multi_vector_student, sparse_student

from st_m3se import APITeacher, score_candidates
from st_m3se.core.errors import FormatError
from st_m3se.core.files import checked_json
from st_m3se.evaluation.rankers import pair_scorer
from st_m3se.retrieval.candidate_lists import CandidateLists
from st_m3se.retrieval.int8 import Int8Linear
from st_m3se.scores import TeacherScores

QUERIES = {f"q{place}": query for place, (query, _) in enumerate(PAIRS)}
CORPUS = {place: " ".join([answer] * (1 + place % 5)) for place, (_, answer) in enumerate(PAIRS)}
CANDIDATES = {
    query_id: [(place + 3 * step) % 16 for step in range(place % 6)] for place, query_id in enumerate(QUERIES)
}
TEXTS = [(QUERIES[query], CORPUS[document]) for query, documents in CANDIDATES.items() for document in documents]


def make_cross_encoder(checkpoint: Path, folder: Path, labels: int = 1, seed: int = 0) -> Path:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig.from_pretrained(checkpoint, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cross_encoder_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cross_encoder(checkpoint, tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture
def cross_encoder(cross_encoder_path: Path) -> CrossEncoder:
    return CrossEncoder(str(cross_encoder_path), device="cpu")


def stub(pairs: list[tuple[str, str]]) -> list[float]:
    return [len(query) - len(document) / 8 for query, document in pairs]


def score(teacher: Any, output: Path, **options: Any) -> np.ndarray:
    """All scores, flat, in the order of the candidates."""
    given = {"candidates": CANDIDATES, "queries": QUERIES, "corpus": CORPUS} | options
    store = score_candidates(teacher, output=output, show_progress_bar=False, **given)
    store.validate()
    lists = given["candidates"] if isinstance(given["candidates"], dict) else CANDIDATES
    assert [row.query_id for row in store] == list(lists)
    assert [list(row.document_ids) for row in store] == [list(documents) for documents in lists.values()]
    return np.concatenate([np.asarray(row.scores, dtype=np.float32) for row in store])


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_tokens": 1}, {"batch_tokens": 100, "shard_queries": 3}, {"max_length": 20}, {"prompt": "find: "}],
    ids=str,
)
def test_a_cross_encoder_scores_as_its_predict(
    cross_encoder: CrossEncoder, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Packing, padding and tokenising ahead must not change a score; truncation and prompts are the host's."""
    got = score(cross_encoder, tmp_path / "store", **options)
    if "max_length" in options:
        cross_encoder.max_seq_length = options["max_length"]
    expected = cross_encoder.predict(TEXTS, activation_fn=torch.nn.Identity(), prompt=options.get("prompt"))
    assert np.ptp(expected) > 0.1, "all scores are alike: the comparison would say nothing"
    np.testing.assert_allclose(got, expected, atol=1e-5)
    manifest = TeacherScores.open(tmp_path / "store").manifest
    assert manifest["dtype"] == "float32"
    assert manifest["activation"] == "identity"
    assert manifest["max_length"] == options.get("max_length", 64)
    assert manifest["source"]["prompt"] == options.get("prompt")


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "modernbert"])
def test_pairs_are_packed_where_the_head_reads_the_first_token(
    checkpoint: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents attention across pairs, places counted from the wrong one, and a head that reads another's token."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from st_m3se.retrieval import teacher_models

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_labels=1)
    config.update({"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 80})
    config.update({"pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.5, "initializer_cutoff_factor": 9.0})
    config.update({"classifier_pooling": "cls", "local_attention": 8})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = CrossEncoder(str(tmp_path / "model"), device="cpu")
    model.max_seq_length = 64
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity())
    assert np.ptp(expected) > 0.1
    packed: list[int] = []
    rows = teacher_models.CrossEncoderTeacher._rows

    def spy(teacher: Any, prepared: Any, lengths: np.ndarray, token: int) -> Any:
        packed.append(len(lengths))
        return rows(teacher, prepared, lengths, token)

    monkeypatch.setattr(teacher_models.CrossEncoderTeacher, "_rows", spy)
    for tokens in (1, 100, 10_000):
        np.testing.assert_allclose(score(model, tmp_path / str(tokens), batch_tokens=tokens), expected, atol=1e-5)
    assert max(packed) == sum(packed[-1:]) == len(TEXTS), "all pairs in one batch"
    if kind == "roberta":  # which skips the padding token when it counts places, and so does a text that spells it
        packed.clear()
        queries = {**QUERIES, "q1": f"one {tokenizer.pad_token} two"}
        texts = [(queries[query], CORPUS[document]) for query, listed in CANDIDATES.items() for document in listed]
        got = score(model, tmp_path / "spelt", queries=queries)
        np.testing.assert_allclose(got, model.predict(texts, activation_fn=torch.nn.Identity()), atol=1e-5)
        assert not packed


def test_int8_orders_as_float32_whatever_the_batch(cross_encoder: CrossEncoder, tmp_path: Path) -> None:
    """A token's scale is its own: the pairs beside it must not change its score. The given model stays as it is."""
    expected = cross_encoder.predict(TEXTS, activation_fn=torch.nn.Identity())
    got = score(cross_encoder, tmp_path / "store", dtype="int8")
    for tokens in (1, 10_000):
        other = score(cross_encoder, tmp_path / str(tokens), dtype="int8", batch_tokens=tokens)
        np.testing.assert_allclose(other, got, atol=1e-3)
    assert 1e-5 < np.abs(got - expected).max() < 0.05 * np.ptp(expected)
    manifest = TeacherScores.open(tmp_path / "store").manifest
    assert manifest["dtype"] == "int8"
    assert "activations asymmetric, per token" in manifest["source"]["quantisation"]
    assert {parameter.dtype for parameter in cross_encoder.parameters()} == {torch.float32}
    np.testing.assert_array_equal(cross_encoder.predict(TEXTS, activation_fn=torch.nn.Identity()), expected)


def test_an_integer_product_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(24, 8)
    tokens = torch.randn(2, 3, 24, generator=generator) * torch.tensor([0.01, 1.0, 50.0])[:, None]
    tokens[0, 0] = 0.0
    tokens[0, 1] = 3.7  # nothing to take steps over
    high, low = tokens.double().amax(-1, keepdim=True), tokens.double().amin(-1, keepdim=True)
    middle, step = (high + low) / 2, ((high - low) / 254).clamp(min=1e-12)
    weight = linear.weight.detach().double()
    scale = weight.abs().amax(-1, keepdim=True) / 127
    rounded = ((tokens - middle) / step).round() * step + middle, (weight / scale).round() * scale
    expected = torch.nn.functional.linear(*rounded, linear.bias.double())
    torch.testing.assert_close(Int8Linear(linear)(tokens).double(), expected, rtol=1e-5, atol=1e-5)


def test_integers_waste_no_bit_on_what_lies_above_zero() -> None:
    """As what a GELU puts out: steps on both sides of zero would be twice as coarse."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 16)
    tokens = torch.nn.functional.gelu(3 * torch.randn(50, 64, generator=generator))
    errors = []
    for each in (tokens, torch.cat([tokens, -tokens], dim=1)):  # the second half makes the range symmetric
        weight = torch.zeros(16, each.shape[1] - 64)
        wide = torch.nn.Linear(each.shape[1], 16)
        wide.load_state_dict({"weight": torch.cat([linear.weight.detach(), weight], 1), "bias": linear.bias.detach()})
        errors.append((Int8Linear(wide)(each) - wide(each)).square().mean().sqrt().item())
    assert errors[0] < 0.75 * errors[1]


def test_the_default_prompt_is_the_models(cross_encoder_path: Path, tmp_path: Path) -> None:
    model = CrossEncoder(
        str(cross_encoder_path), device="cpu", prompts={"query": "find: "}, default_prompt_name="query"
    )
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(score(model, tmp_path / "store"), expected, atol=1e-5)
    assert TeacherScores.open(tmp_path / "store").manifest["source"]["prompt"] == "find: "


QWEN2 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_is_padded_on_its_side(checkpoint: Path, tmp_path: Path, side: str) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side=side)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        **QWEN2,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = CrossEncoder(str(tmp_path / "model"), device="cpu")
    assert model.tokenizer.padding_side == side
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(score(model, tmp_path / "store"), expected, atol=1e-4)


def test_a_name_loads_what_it_names(
    cross_encoder_path: Path,
    make_model: Callable[..., SentenceTransformer],
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model()
    model.save(str(tmp_path / "student"))
    stores = {
        name: score_candidates(teacher, CANDIDATES, QUERIES, CORPUS, tmp_path / name, device="cpu")
        for name, teacher in (("cross", str(cross_encoder_path)), ("bi", tmp_path / "student"))
    }
    expected = CrossEncoder(str(cross_encoder_path), device="cpu").predict(TEXTS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(np.concatenate([row.scores for row in stores["cross"]]), expected, atol=1e-5)
    pairs = zip(*TEXTS, strict=True)
    queries, documents = (model.encode(list(texts), convert_to_tensor=True) for texts in pairs)
    expected = model.similarity_pairwise(queries, documents).numpy()
    np.testing.assert_allclose(np.concatenate([row.scores for row in stores["bi"]]), expected, atol=1e-5)
    assert stores["bi"].manifest["activation"] == "cosine similarity"
    assert [
        record.getMessage() for record in caplog.records if "similarities of embeddings" in record.getMessage()
    ] == [
        f"{tmp_path / 'student'} is a SentenceTransformer: its scores are similarities of embeddings, not a "
        "cross-encoder's."
    ]
    with pytest.raises(ValueError, match=r"cross-encodr is no model.*Mind the spelling"):
        score_candidates("ms-marco/cross-encodr", CANDIDATES, QUERIES, CORPUS, tmp_path / "x")
    with pytest.raises(ValueError, match="neither a cross-encoder"):
        score_candidates(str(checkpoint), CANDIDATES, QUERIES, CORPUS, tmp_path / "x")


def encoder(kind: str, checkpoint: Path, make_model: Callable[..., SentenceTransformer]) -> Any:
    if kind == "sparse":
        return sparse_student(checkpoint).eval()
    if kind == "multi-vector":
        return multi_vector_student(checkpoint, {"strategy": "fixed", "attend": False, "length": 14}).eval()
    return make_model()


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
def test_an_encoder_encodes_each_text_once(
    make_model: Callable[..., SentenceTransformer],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """In all shards together: a document stands in many lists. Without room for more than a shard the scores stay."""
    model = encoder(kind, checkpoint, make_model)
    seen: list[str] = []
    for name in ("encode_query", "encode_document"):
        encode = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda texts, encode=encode, **options: (seen.extend(texts), encode(texts, **options))[1]
        )
    corpus = CORPUS | dict.fromkeys([100, 101], next(iter(CORPUS.values())))
    lists = {query: [*documents, 100, 101] for query, documents in CANDIDATES.items()}
    found = score(model, tmp_path / "store", shard_queries=1, candidates=lists, corpus=corpus)
    assert len(seen) == len(set(seen)) < len(TEXTS)
    once = len(seen)
    monkeypatch.setattr("st_m3se.retrieval.teacher_models.KEPT", 0)
    again = score(model, tmp_path / "again", shard_queries=1, candidates=lists, corpus=corpus)
    assert len(seen) > 2 * once
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["name", "model"])
@pytest.mark.parametrize("kind", ["sparse", "multi-vector"])
def test_an_encoder_of_any_kind_is_a_teacher(
    checkpoint: Path, make_model: Callable[..., SentenceTransformer], tmp_path: Path, kind: str, by: str
) -> None:
    """Its own similarity of each pair; queries are expanded and documents lose their punctuation."""
    model = teacher = encoder(kind, checkpoint, make_model)
    if by == "name":
        model.save_pretrained(str(tmp_path / "teacher"))
        teacher = str(tmp_path / "teacher")
    found = score(teacher, tmp_path / "store", device="cpu")
    expected = [
        float(model.similarity(model.encode_query([query]), model.encode_document([document])))
        for query, document in TEXTS
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    manifest = TeacherScores.open(tmp_path / "store").manifest
    assert manifest["activation"] == ("dot similarity" if kind == "sparse" else "maxsim similarity")
    if kind == "multi-vector":
        with pytest.raises(ValueError, match="query_length and a document_length"):
            score(teacher, tmp_path / "other", max_length=8)
        if by == "model":
            weights = manifest["source"]["weights"]
            model[0].document_length = 8
            score(model, tmp_path / "shorter")
            assert TeacherScores.open(tmp_path / "shorter").manifest["source"]["weights"] != weights


def test_several_teachers_make_a_store_each(cross_encoder: CrossEncoder, tmp_path: Path) -> None:
    stores = score_candidates(
        {"cross": cross_encoder, "stub": stub}, CANDIDATES, QUERIES, CORPUS, tmp_path, show_progress_bar=False
    )
    assert list(stores) == ["cross", "stub"]
    assert TeacherScores.open(tmp_path / "stub").manifest["teacher"] == "stub"
    np.testing.assert_allclose(np.concatenate([row.scores for row in stores["stub"]]), stub(TEXTS), rtol=1e-6)
    with pytest.raises(ValueError, match="can name a folder"):
        score_candidates({"../up": stub}, CANDIDATES, QUERIES, CORPUS, tmp_path)


def test_a_sigmoid_is_named_after_the_first_shard(
    cross_encoder: CrossEncoder,
    make_model: Callable[..., SentenceTransformer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prevents hours of work for scores without margins: predict is what everybody knows, and it has a Sigmoid."""
    seen: list[int] = []

    def teacher(pairs: list[tuple[str, str]]) -> Any:
        seen.append(len(caplog.records))
        return cross_encoder.predict(pairs)

    score(teacher, tmp_path / "function", shard_queries=1)
    (record,) = caplog.records
    assert "all scores lie in [0, 1]" in record.getMessage()
    assert 1 in seen, "it is said at the end only"
    caplog.clear()
    score(cross_encoder, tmp_path / "model")
    score(make_model(), tmp_path / "cosines")
    assert caplog.records == []


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_function_may_return_any_numbers(tmp_path: Path, kind: Callable[..., Any]) -> None:
    got = score(lambda pairs: kind(stub(pairs)), tmp_path / "s", name="stub")
    np.testing.assert_allclose(got, stub(TEXTS), rtol=1e-6)


def test_candidates_may_be_a_store_of_any_order(tmp_path: Path) -> None:
    """Ids of both types, lists without documents, a run of dicts; the scores of the store are ignored."""
    run = TeacherScores.from_rows(
        [(query, documents, np.zeros(len(documents))) for query, documents in CANDIDATES.items()], tmp_path / "run"
    )
    dicts = {query: dict.fromkeys(documents, 0.5) for query, documents in CANDIDATES.items()}
    expected = score(stub, tmp_path / "0")
    for place, candidates in enumerate((run, tmp_path / "run", dicts), start=1):
        np.testing.assert_array_equal(score(stub, tmp_path / str(place), candidates=candidates), expected)
    assert CandidateLists(run).fingerprint == CandidateLists(dicts).fingerprint
    reversed_run = run.select(list(CANDIDATES)[::-1])
    assert CandidateLists(reversed_run).fingerprint != CandidateLists(run).fingerprint
    assert [row.query_id for row in score_candidates(stub, reversed_run, QUERIES, CORPUS, tmp_path / "r")] == list(
        CANDIDATES
    )[::-1]


def test_a_broken_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    seen: list[str] = []

    def teacher(pairs: list[tuple[str, str]], broken_at: int = 25) -> list[float]:
        if len(seen) + len(pairs) > broken_at:
            raise RuntimeError("out of memory")
        seen.extend(query for query, _ in pairs)
        return stub(pairs)

    output = tmp_path / "store"
    with pytest.raises(RuntimeError, match="out of memory"):
        score(teacher, output, shard_queries=2, name="stub")
    with pytest.raises(FormatError, match=r"not finished. Run the same command again"):
        TeacherScores.open(output)
    kept = list(seen)
    assert kept
    got = score(lambda pairs: teacher(pairs, 10**6), output, shard_queries=2, name="stub")
    np.testing.assert_allclose(got, stub(TEXTS), rtol=1e-6)
    assert sorted(seen) == sorted(query for query, _ in TEXTS), "a pair was scored twice, or not at all"
    before = len(seen)
    score(lambda pairs: teacher(pairs, 0), output, name="stub")  # a finished run asks the teacher for nothing
    assert len(seen) == before


def test_an_interrupt_loses_the_call_that_it_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard holds everything, as in any small run: what came before is kept, said, and never asked for again."""
    monkeypatch.setattr("st_m3se.retrieval.teacher.PAIRS", 10)
    seen: list[tuple[str, str]] = []

    def teacher(pairs: list[tuple[str, str]], calls: int = 2) -> list[float]:
        if len(seen) >= 10 * calls:
            raise KeyboardInterrupt
        seen.extend(pairs)
        return stub(pairs)

    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt, match=r"stopped, 20 of 36 pairs saved; the same command continues"):
        score(teacher, output, name="stub")
    with pytest.raises(KeyboardInterrupt, match=r"stopped, 30 of 36 pairs saved"):
        score(lambda pairs: teacher(pairs, 3), output, name="stub")
    (kept,) = output.glob("parts/*.some")
    np.testing.assert_allclose(score(lambda pairs: teacher(pairs, 9), output, name="stub"), stub(TEXTS), rtol=1e-6)
    assert sorted(seen) == sorted(TEXTS)
    assert not kept.exists()


def test_an_api_is_tried_again_and_loses_one_small_call(tmp_path: Path) -> None:
    """Prevents paying twice: each answer that came is kept, whichever call fails for good."""
    asked: Counter[str] = Counter()
    answered: list[tuple[str, str]] = []

    def call(query: str, documents: list[str]) -> list[float]:
        asked[query] += 1
        if asked[query] == 1:
            raise ConnectionError("429")
        if query == QUERIES["q5"] and asked[query] < 5:
            return [0.0]
        answered.extend((query, document) for document in documents)
        return stub([(query, document) for document in documents])

    options: dict[str, Any] = {"documents": 9, "backoff": 0.0, "cost": lambda query, documents: len(documents) / 2}
    with pytest.raises(RuntimeError, match=r"failed 3 times for the query .*one number for each of 5 pairs"):
        score(APITeacher(call, "llm", retries=2, concurrency=1, **options), tmp_path / "store")
    first = len(answered)
    assert first > 0
    teacher = APITeacher(call, "llm", retries=2, **options)
    np.testing.assert_allclose(score(teacher, tmp_path / "store"), stub(TEXTS), rtol=1e-6)
    assert sorted(answered) == sorted(TEXTS)
    assert teacher.cost == (len(TEXTS) - first) / 2
    with pytest.raises(TypeError, match="positional"):
        score(APITeacher(lambda: 0, "bug", backoff=60), tmp_path / "bug")


@pytest.mark.parametrize("finished", [False, True])
def test_what_differs_is_named(
    cross_encoder: CrossEncoder, checkpoint: Path, tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a store in which two teachers, or two precisions, are mixed."""
    output = tmp_path / "store"
    if finished:
        score(cross_encoder, output)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(cross_encoder, "forward", lambda *given, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                score(cross_encoder, output)
    other = CrossEncoder(str(make_cross_encoder(checkpoint, tmp_path / "other", seed=1)), device="cpu")
    changes = {
        "max_length was 64 and is 32": {"max_length": 32},
        "dtype was 'float32' and is 'bfloat16'": {"dtype": "bfloat16"},
        "prompt was None and is 'x'": {"prompt": "x"},
        "queries was": {"queries": {**QUERIES, "q0": "another"}},
        "corpus was": {"corpus": {**CORPUS, 0: "another"}},
        "candidates was": {"candidates": {**CANDIDATES, "q0": [1]}},
        "shard_queries was": {"shard_queries": 7},
        "weights was": {"teacher": other},
    }
    for message, change in changes.items():
        given = {"teacher": cross_encoder, "candidates": CANDIDATES, "queries": QUERIES, "corpus": CORPUS} | change
        with pytest.raises(ValueError, match="begun with something else") as caught:
            score_candidates(output=output, show_progress_bar=False, **given)
        assert message in str(caught.value)
        assert str(caught.value).count(" was ") == 3, "and nothing else differs"
    score(cross_encoder, output, batch_tokens=64)


def test_half_precision_leaves_the_given_model_alone(cross_encoder: CrossEncoder, tmp_path: Path) -> None:
    got = score(cross_encoder, tmp_path / "store", dtype="bfloat16")
    assert cross_encoder.dtype == torch.float32
    expected = cross_encoder.predict(TEXTS, activation_fn=torch.nn.Identity())
    assert 0 < np.abs(got - expected).max() < 0.1
    assert TeacherScores.open(tmp_path / "store").manifest["dtype"] == "bfloat16"


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_int8_model_whose_scale_is_the_batchs_scores_pairs_one_by_one(
    cross_encoder_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dynamic: bool
) -> None:
    """Prevents scores that depend on the pairs beside them, from an exported model of which torch knows nothing."""

    class Exported(CrossEncoder):
        def get_backend(self) -> Any:
            return "onnx"

    folder = tmp_path / "model" / "onnx"
    folder.mkdir(parents=True)
    (folder / "model_qint8.onnx").write_bytes(b"\x08\x07" + b"DynamicQuantizeLinear" * dynamic)
    model = Exported(str(cross_encoder_path), device="cpu")
    batches: list[int] = []
    model[0].register_forward_pre_hook(lambda _, given: batches.append(len(given[0]["input_ids"])))
    score(model, tmp_path / "store", name=str(folder.parent), batch_tokens=500)
    assert (max(batches) == 1) == dynamic
    assert TeacherScores.open(tmp_path / "store").manifest["dtype"] == (
        "dynamic int8, each text alone" if dynamic else None
    )
    assert ("scored one by one" in caplog.text) == dynamic


def test_a_backend_that_cannot_be_imported_says_what_failed(
    cross_encoder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents "not installed" about packages that are there, and whose versions do not go together."""
    for missing in ("optimum", "optimum.onnxruntime", "onnxruntime"):
        monkeypatch.setitem(sys.modules, missing, None)  # what Python itself leaves where an import is halted
    with pytest.raises(ImportError, match=r"'onnx' cannot be imported: .*halted.*sentence-transformers\[onnx\]"):
        score(str(cross_encoder_path), tmp_path / "store", backend="onnx")


@pytest.mark.parametrize("kind", ["sparse", "multi-vector"])
def test_the_pair_scorer_of_an_encoder_is_a_function_like_any_other(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = make_encoder(kind, checkpoint)
    got = score(pair_scorer(model, 4), tmp_path / "store", name=kind)
    queries, documents = ([pair[place] for pair in TEXTS] for place in (0, 1))
    expected = model.similarity_pairwise(model.encode_query(queries), model.encode_document(documents))
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4)


def test_one_label_of_several_is_the_score(checkpoint: Path, tmp_path: Path) -> None:
    """As a classifier of "irrelevant, partly, perfect" has it; the run is one of that label alone."""
    folder = make_cross_encoder(checkpoint, tmp_path / "three", labels=3)
    model = CrossEncoder(str(folder), device="cpu")
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity())
    for label in (0, 2):
        got = score(str(folder), tmp_path / str(label), label=label, device="cpu")
        np.testing.assert_allclose(got, expected[:, label], atol=1e-5)
        assert TeacherScores.open(tmp_path / str(label)).manifest["activation"] == f"identity, label {label}"
    with pytest.raises(ValueError, match="activation"):
        score(model, tmp_path / "2", label=1, name=str(folder))
    with pytest.raises(ValueError, match=r"label=3 chooses one of several scores .* this model gives 3"):
        score(model, tmp_path / "none", label=3)
    with pytest.raises(ValueError, match="this model gives 1"):
        score(
            CrossEncoder(str(make_cross_encoder(checkpoint, tmp_path / "one")), device="cpu"), tmp_path / "x", label=0
        )
    with pytest.raises(ValueError, match="label is for models"):
        score(stub, tmp_path / "x", label=0)


def test_models_that_cannot_teach_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = CrossEncoder(str(make_cross_encoder(checkpoint, tmp_path / "three", labels=3)), device="cpu")
    with pytest.raises(ValueError, match="has 3 labels, and a teacher gives one score"):
        score(model, tmp_path / "store")
    with pytest.raises(ValueError, match="has 3 labels"):  # before the first teacher has worked for hours
        score_candidates({"stub": stub, "three": tmp_path / "three"}, CANDIDATES, QUERIES, CORPUS, tmp_path / "store")
    model = CrossEncoder(str(make_cross_encoder(checkpoint, tmp_path / "one")), device="cpu")
    model.max_seq_length = int(1e30)
    with pytest.raises(ValueError, match="knows no maximum length"):
        score(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def make_language_model(checkpoint: Path, folder: Path, words: list[str], **options: Any) -> CrossEncoder:
    """A CrossEncoder of a causal model, as the host makes it of any: with a head of the tokens "yes" and "no"."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(words)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **QWEN2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", **options)


def test_a_language_model_that_is_asked_nothing_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Prevents plausible numbers of a base model, which gets a yes/no head and no prompt. A reranker has a prompt."""
    make_language_model(checkpoint, tmp_path / "base", ["yes", "no"])
    with pytest.raises(ValueError, match=r"language model without a prompt.*prompt="):
        score(str(tmp_path / "base"), tmp_path / "store")
    model = make_language_model(checkpoint, tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"compares token 1 with itself.*no token for 'yes'"):
        score(model, tmp_path / "store", prompt="is it relevant? ")
    model = make_language_model(
        checkpoint, tmp_path / "own", ["yes", "no"], prompts={"rerank": "answer: "}, default_prompt_name="rerank"
    )
    for place, (teacher, prompt) in enumerate([(model, None), (str(tmp_path / "base"), "find: "), (model, "")]):
        got = score(teacher, tmp_path / f"store{place}", prompt=prompt, batch_tokens=90)
        expected = model.predict(TEXTS, activation_fn=torch.nn.Identity(), prompt=prompt)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_language_model_without_a_padding_token_gets_a_remedy_that_works(checkpoint: Path, tmp_path: Path) -> None:
    model = make_language_model(checkpoint, tmp_path / "model", ["yes", "no", "<end>"])
    model.tokenizer.pad_token, model.tokenizer.eos_token = None, "<end>"
    with pytest.raises(ValueError, match=r"no padding token.*pad_token = model.tokenizer.eos_token"):
        score(model, tmp_path / "store", prompt="find: ")
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.config.pad_token_id = model.tokenizer.pad_token_id
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity(), prompt="find: ")
    np.testing.assert_allclose(score(model, tmp_path / "store", prompt="find: "), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_length_beyond_the_positions_is_refused_at_the_start(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """Prevents an index error hours later, at the first pair that is long enough; the longest length that fits runs."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = 66  # more than either model's positions
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_labels=1)
    config.update({"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    end = {"bert": 64, "roberta": 63}[kind]  # RoBERTa counts from behind the padding token's number, here 0
    long = {"queries": {query: f"{text} " * 9 for query, text in QUERIES.items()}}
    with pytest.raises(ValueError, match=rf"max_length={end + 1} is beyond the model's {end} positions"):
        score(str(tmp_path / "model"), tmp_path / "store", max_length=end + 1, **long)
    fits = score(str(tmp_path / "model"), tmp_path / "fits", max_length=end, **long)
    assert TeacherScores.open(tmp_path / "fits").manifest["max_length"] == end
    np.testing.assert_array_equal(score(str(tmp_path / "model"), tmp_path / "default", **long), fits)


@pytest.mark.parametrize("saved", [None, ["classifier"]])
def test_an_adapter_without_its_head_is_refused(
    checkpoint: Path, tmp_path: Path, saved: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a head that each load draws anew: a CrossEncoder's adapter is saved without the base's new head."""
    peft = pytest.importorskip("peft")
    model = CrossEncoder(str(checkpoint), num_labels=1, device="cpu")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=saved))
    model.save_pretrained(str(tmp_path / "adapter"))
    caplog.clear()
    score(CrossEncoder(str(tmp_path / "adapter"), device="cpu"), tmp_path / "loaded")
    assert len([r for r in caplog.records if "its head is new" in r.getMessage()]) == (saved is None)
    if saved is None:
        with pytest.raises(ValueError, match=r"adapter of .*without a classification head.*modules_to_save"):
            score(str(tmp_path / "adapter"), tmp_path / "store")
    else:
        expected = model.predict(TEXTS, activation_fn=torch.nn.Identity())
        np.testing.assert_allclose(score(str(tmp_path / "adapter"), tmp_path / "store"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda pairs: [0.0] * (len(pairs) - 1), r"one number for each of \d+ pairs"),
        (lambda pairs: ["high"] * len(pairs), "must return numbers"),
        (lambda pairs: [float("nan")] * len(pairs), "gives nan to query 'q1' and document 1"),
        (lambda pairs: np.zeros((len(pairs), 2)), "got shape"),
    ],
)
def test_what_is_no_score_never_reaches_the_disk(tmp_path: Path, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(teacher, tmp_path / "store", name="bad")
    assert not list((tmp_path / "store").glob("parts/*.parquet"))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (FormatError, "not in the corpus", {"candidates": {"q1": [99]}}),
        (FormatError, "not in the queries", {"candidates": {"q99": [1]}}),
        (FormatError, r"the corpus has 7 \(int\)", {"candidates": {"q1": ["7"]}}),
        (FormatError, "stands twice in the list", {"candidates": {"q1": [1, 1]}}),
        (FormatError, "one type, str or int", {"candidates": {"q1": [1, "d"]}}),
        (FormatError, "got set", {"candidates": {"q1": {1, 2}}}),
        (FormatError, "not one query", {"candidates": {}}),
        (FormatError, "no such file or folder", {"candidates": tmp_path / "lost"}),
        (TypeError, "a mapping from query id", {"candidates": [("q1", [1])]}),
        (TypeError, r"score_candidates\(\) has no option batch_size\..*batch_tokens", {"batch_size": 32}),
        (ValueError, "shard_queries must be at least 1", {"shard_queries": 0}),
        (ValueError, "dtype is for models", {"dtype": "float16"}),
        (ValueError, "backend belongs to a teacher by name", {"backend": "onnx"}),
    ]
    for place, (kind, message, options) in enumerate(cases):
        with pytest.raises(kind, match=message):
            score(stub, tmp_path / str(place), **options)
    with pytest.raises(ValueError, match="has no name"):
        score(lambda pairs: stub(pairs), tmp_path / "lambda")
    with pytest.raises(TypeError, match="a teacher must be"):
        score(3, tmp_path / "three")

    class Foreign(torch.nn.Module):  # a bi-encoder of another library: callable, but of features
        def encode_query(self, texts: list[str]) -> torch.Tensor:
            return torch.ones(len(texts), 2)

    with pytest.raises(TypeError, match=r"a Foreign has no scores of pairs.*pair_scorer"):
        score(Foreign(), tmp_path / "foreign", name="foreign")
    (tmp_path / "run.trec").write_text("q1 Q0 1 1 0.5 bm25\n")
    with pytest.raises(FormatError, match="st-m3se convert"):
        score(stub, tmp_path / "y", candidates=tmp_path / "run.trec")


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="left alone"):
        score(stub, tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file"):
        score(stub, tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == ["thesis.txt"]
    score(stub, tmp_path / "store")
    plan = json.loads((tmp_path / "store" / "scoring.json").read_text())
    (tmp_path / "store" / "scoring.json").write_text(checked_json(plan | {"version": 99}))
    with pytest.raises(FormatError, match="version 99"):
        score(stub, tmp_path / "store")


def test_a_damaged_part_is_found(tmp_path: Path) -> None:
    """Prevents a wrong score from a disk that lies."""
    calls = 0

    def teacher(pairs: list[tuple[str, str]]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return stub(pairs)

    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        score(teacher, output, shard_queries=4, name="stub")
    part = sorted(output.glob("parts/*.parquet"))[1]
    whole = bytearray(part.read_bytes())
    place = bytes(whole).index(np.float32(stub(TEXTS)[sum(map(len, list(CANDIDATES.values())[:4]))]).tobytes())
    whole[place] ^= 1
    part.write_bytes(whole)
    with pytest.raises(FormatError, match=r"000001.parquet: .*damaged.*Delete the file"):
        score(stub, output, name="stub")
    part.unlink()
    np.testing.assert_allclose(score(stub, output, name="stub"), stub(TEXTS), rtol=1e-6)
