"""Corpus embeddings on disk: what the model gives, once, whatever happens meanwhile, and never another model's."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.encoders import CORPUS, KINDS, QUERIES, make_encoder

from st_m3se.core.errors import FormatError
from st_m3se.core.files import sealed_bytes
from st_m3se.data.texts import Texts
from st_m3se.retrieval import embeddings as package
from st_m3se.retrieval.embeddings import CorpusEmbeddings, embed_corpus, embed_queries
from st_m3se.retrieval.fingerprint import model_fingerprint
from st_m3se.retrieval.models import embed_documents
from st_m3se.retrieval.search import search

TEXTS = list(CORPUS.values())


@pytest.fixture
def corpus() -> Texts:
    return Texts.open(CORPUS)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five documents in a file, and ten at once: 33 documents make seven files."""
    monkeypatch.setattr(package, "SHARD", dict.fromkeys(KINDS, 5))
    monkeypatch.setattr(package, "CHUNK", dict.fromkeys(KINDS, 10))


def count_encoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that go through ``encode_document`` from now on."""
    encoded: list[str] = []
    encode = model.encode_document

    def counting(texts: list[str], **options: Any) -> Any:
        encoded.extend(texts)
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode_document", counting)
    return encoded


def embed(model: Any, corpus: Texts, folder: Path, **options: Any) -> CorpusEmbeddings:
    return embed_corpus(model, corpus, folder, show_progress_bar=False, **options)


def as_dense(kind: str, embeddings: Any) -> Any:
    """Something that can be compared: a dense matrix, or a list of them."""
    if kind == "sparse":
        return embeddings.to_dense()
    return embeddings if kind == "dense" else list(embeddings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_shards")
def test_what_comes_back_is_what_the_model_gives(
    kind: str, checkpoint: Path, corpus: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the corpus, in chunks of any form that search takes; and the second time without encoding."""
    model = make_encoder(kind, checkpoint)
    encoded = count_encoded(model, monkeypatch)
    found = embed(model, corpus, tmp_path)
    assert (found.kind, len(found), found.dtype) == (kind, len(CORPUS), "float32")
    assert found.seconds > 0
    assert sorted(encoded) == sorted(TEXTS)
    chunks = list(found)
    assert len(chunks) == 4
    expected = as_dense(
        kind, model.encode_document(TEXTS, **({} if kind == "multi-vector" else {"convert_to_tensor": True}))
    )
    if kind == "multi-vector":
        flat = [each for chunk in chunks for each in chunk]
        assert [len(each) for each in flat] == [len(each) for each in expected]
        assert len({len(each) for each in flat}) > 3
        for mine, other in zip(flat, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    else:
        whole = torch.cat([as_dense(kind, chunk) for chunk in chunks])
        assert whole.dtype == torch.float32
        assert whole.shape[1] == found.dimension
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    encoded.clear()
    again = embed(model, corpus, tmp_path)
    assert encoded == []
    assert again.fingerprint == found.fingerprint
    assert again.seconds == found.seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_shards")
def test_searching_the_disk_is_searching_with_the_model(
    kind: str, checkpoint: Path, corpus: Texts, tmp_path: Path
) -> None:
    model = make_encoder(kind, checkpoint)
    queries = embed_queries(model, list(QUERIES.values()))
    rows, scores = search(queries, embed(model, corpus, tmp_path), 8, similarity=model.similarity_fn_name)
    with torch.inference_mode():
        whole = model.similarity(queries, embed_documents(model, TEXTS))
    expected = whole.topk(8, dim=1).values
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.gather(1, torch.from_numpy(rows).long()).numpy(), scores, rtol=1e-4, atol=1e-5)
    assert len(np.unique(rows)) > 8, "every query finds the same documents: the comparison would say little"


def changed_weight(model: Any) -> None:
    """One number of one weight, by its last bit."""
    weight = dict(model.named_parameters())["0.model.embeddings.word_embeddings.weight"]
    with torch.no_grad():
        weight[7, 5] = torch.nextafter(weight[7, 5], torch.tensor(10.0))


def changed_pooling(model: Any) -> None:
    model[1] = type(model[1])(model[1].embedding_dimension, "cls")


def changed_tokenizer(model: Any) -> None:
    model.tokenizer.add_tokens(["zzz"])


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight's last bit": changed_weight,
    "half precision": lambda model: model.half(),
    "pooling": changed_pooling,
    "maximum length": lambda model: setattr(model, "max_seq_length", 8),
    "prompts": lambda model: model.prompts.update(document="text: "),
    "default prompt": lambda model: (model.prompts.update(x="text: "), setattr(model, "default_prompt_name", "x")),
    "truncation": lambda model: setattr(model, "truncate_dim", 8),
    "a setting of the transformer": lambda model: setattr(model[0].model.config, "layer_norm_eps", 1e-3),
    "tokenizer": changed_tokenizer,
    "the side that is cut": lambda model: setattr(model.tokenizer, "truncation_side", "left"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_never_finds_the_embeddings_of_another(change: str, checkpoint: Path) -> None:
    """Prevents figures of one model under the name of another."""
    model = make_encoder("dense", checkpoint)
    before = model_fingerprint(model)
    assert model_fingerprint(make_encoder("dense", checkpoint)) == before
    CHANGES[change](model)
    assert model_fingerprint(model) != before


def test_a_model_is_the_same_wherever_it_was_loaded_from(checkpoint: Path, tmp_path: Path) -> None:
    """Prevents a corpus from being encoded again because a folder was moved."""
    from sentence_transformers import SentenceTransformer

    model = make_encoder("dense", checkpoint, prompts={"query": "find: ", "document": ""})
    for name in ("one", "two"):
        model.save_pretrained(str(tmp_path / name))
    fingerprints = {
        model_fingerprint(SentenceTransformer(str(tmp_path / name), device="cpu")) for name in ("one", "two")
    }
    assert fingerprints == {model_fingerprint(model)}


def test_an_adapter_counts(checkpoint: Path) -> None:
    """With its weights, and switched off."""
    from peft import LoraConfig

    model = make_encoder("dense", checkpoint)
    plain = model_fingerprint(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    with_adapter = model_fingerprint(model)
    model.disable_adapters()
    assert len({plain, with_adapter, model_fingerprint(model)}) == 3


def test_options_and_corpus_have_caches_of_their_own(checkpoint: Path, corpus: Texts, tmp_path: Path) -> None:
    model = make_encoder("dense", checkpoint, prompts={"title": "title: "})
    changed = {**CORPUS, "empty": "no longer"}
    renamed = {("other" if key == "empty" else key): text for key, text in CORPUS.items()}
    found = [
        embed(model, corpus, tmp_path),
        embed(model, corpus, tmp_path, prompt="text: "),
        embed(model, corpus, tmp_path, prompt_name="title"),
        embed(model, corpus, tmp_path, truncate_dim=8),
        embed(model, corpus, tmp_path, dtype="float16"),
        embed(model, Texts.open(changed), tmp_path),
        embed(model, Texts.open(renamed), tmp_path),
        embed(model, Texts.open(dict(reversed(CORPUS.items()))), tmp_path),
    ]
    assert len({each.path for each in found}) == len(found)
    assert [each.dimension for each in found[:4]] == [32, 32, 32, 8]
    # What cannot change them makes no new one.
    assert embed(model, corpus, tmp_path, batch_size=3).path == found[0].path
    expected = model.encode_document(TEXTS, prompt="text: ", convert_to_tensor=True)
    torch.testing.assert_close(torch.cat(list(found[1])), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_a_rounding_and_half_the_disk(checkpoint: Path, corpus: Texts, tmp_path: Path) -> None:
    model = make_encoder("dense", checkpoint)
    whole, half = embed(model, corpus, tmp_path), embed(model, corpus, tmp_path, dtype="float16")
    exact, rounded = torch.cat(list(whole)), torch.cat(list(half))
    assert torch.equal(exact.half().float(), rounded)
    assert not torch.equal(exact, rounded)
    queries = embed_queries(model, list(QUERIES.values()))
    assert 0 < (model.similarity(queries, exact) - model.similarity(queries, rounded)).abs().max() < 0.0005
    sizes = [sum(sealed_bytes(file) for file in each.path.glob("*.npy")) - 128 for each in (whole, half)]
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.usefixtures("small_shards")
def test_rows_are_looked_up_in_the_map(checkpoint: Path, corpus: Texts, tmp_path: Path) -> None:
    found = embed(make_encoder("dense", checkpoint), corpus, tmp_path)
    rows = np.array([32, 0, 7, 7, 4, 5])
    assert np.array_equal(found.rows(rows), torch.cat(list(found)).numpy()[rows])
    with pytest.raises(ValueError, match="rows are looked up among dense ones"):
        embed(make_encoder("multi-vector", checkpoint), corpus, tmp_path).rows(rows)


@pytest.mark.usefixtures("small_shards")
def test_a_run_goes_on_after_its_last_whole_shard(
    checkpoint: Path, corpus: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the third shard, and leftovers of a kill: only what is missing is encoded, and all is as unbroken."""
    model = make_encoder("dense", checkpoint)
    encode = model.encode_document

    def break_off(texts: list[str], **options: Any) -> Any:
        if TEXTS[10] in texts:
            raise RuntimeError("out of memory")
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode_document", break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed(model, corpus, tmp_path)
    monkeypatch.setattr(model, "encode_document", encode)
    (folder,) = tmp_path.iterdir()
    (folder / ".000002.npy.abc.tmp").mkdir()
    (folder / ".000002.npy.abc.tmp" / "000002.npy").write_bytes(b"half a shard")
    with pytest.raises(FormatError, match=r"5 of 7 shards are not there yet\. Run the same embed_corpus again"):
        CorpusEmbeddings(folder)
    encoded = count_encoded(model, monkeypatch)
    found = embed(model, corpus, tmp_path)
    assert sorted(encoded) == sorted(TEXTS[10:])
    assert not list(folder.glob(".*.tmp"))
    unbroken = embed(model, corpus, tmp_path / "unbroken")
    assert torch.equal(torch.cat(list(found)), torch.cat(list(unbroken)))


@pytest.mark.usefixtures("small_shards")
def test_two_at_once_encode_the_corpus_once(
    checkpoint: Path, corpus: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes second waits, and finds the work done."""
    models = [make_encoder("dense", checkpoint) for _ in range(2)]
    encoded = [count_encoded(model, monkeypatch) for model in models]
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda model: embed(model, corpus, tmp_path), models)
    assert one.path == other.path
    assert sorted([*encoded[0], *encoded[1]]) == sorted(TEXTS)
    assert [] in encoded


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from evaluation.encoders import CORPUS, KINDS, make_encoder
from st_m3se.retrieval import embeddings
from st_m3se.data.texts import Texts
embeddings.SHARD = dict.fromkeys(KINDS, 5)
model = make_encoder("dense", Path(sys.argv[1]))
encode = model.encode_document
def slowly(texts, **options):
    time.sleep(0.3)
    return encode(texts, **options)
model.encode_document = slowly
embeddings.embed_corpus(model, Texts.open(CORPUS), sys.argv[2], show_progress_bar=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.usefixtures("small_shards")
def test_a_killed_process_leaves_whole_shards(
    checkpoint: Path, corpus: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path), tests],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(done := list(tmp_path.rglob("*.npy"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    model = make_encoder("dense", checkpoint)
    encoded = count_encoded(model, monkeypatch)
    done = list(tmp_path.rglob("*.npy"))
    found = embed(model, corpus, tmp_path)
    assert 2 <= len(done) < 7
    assert sorted(encoded) == sorted(TEXTS[5 * len(done) :])
    expected = model.encode_document(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(torch.cat(list(found)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_named_and_encoded_anew(
    kind: str,
    checkpoint: Path,
    corpus: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Cut off, emptied, exchanged, or one bit: never wrong numbers, and no more work than the shard's."""
    model = make_encoder(kind, checkpoint)
    found = embed(model, corpus, tmp_path)
    shard = next(found.path.glob("000001.np*"))
    content = shard.read_bytes()
    middle = len(content) // 2
    other = next(found.path.glob("000002.np*")).read_bytes()  # as many documents
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    encoded = count_encoded(model, monkeypatch)
    for damaged in (content[:-9], b"", b"text", other, flipped):
        shard.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"000001\.np.*damaged.*Run the same embed_corpus"):
            list(CorpusEmbeddings(found.path))
        caplog.clear()
        encoded.clear()
        embed(model, corpus, tmp_path)
        assert "shard 1 of the embeddings" in caplog.text
        assert encoded == TEXTS[5:10]
        assert len(shard.read_bytes()) == len(content)
        list(CorpusEmbeddings(found.path))
    encoded.clear()
    plan = found.path / "embeddings.json"
    for wrong in ("", "[]", plan.read_text().replace('"documents": 33', '"documents": 32')):
        plan.write_text(wrong)
        assert len(embed(model, corpus, tmp_path)) == 33
    assert encoded == 3 * TEXTS[30:], "the shard that tells the dimension"


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not describe embeddings"):
        CorpusEmbeddings(tmp_path)


def test_what_cannot_be_embedded_is_refused(checkpoint: Path, corpus: Texts, tmp_path: Path) -> None:
    model = make_encoder("dense", checkpoint)
    with pytest.raises(TypeError, match=r"got Linear\. A CrossEncoder has no embeddings"):
        embed(torch.nn.Linear(1, 1), corpus, tmp_path)
    with pytest.raises(ValueError, match='dtype must be "float32" or "float16"'):
        embed(model, corpus, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="truncate_dim=8 is for dense embeddings"):
        embed(make_encoder("sparse", checkpoint), corpus, tmp_path, truncate_dim=8)
    with pytest.raises(ValueError, match="the model has no prompt 'lost'"):
        embed(model, corpus, tmp_path, prompt_name="lost")
    large = copy.deepcopy(model)
    with torch.no_grad():
        large[0].model.encoder.layer[1].output.LayerNorm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r'not finite in float16.*dtype="float32"'):
        embed(large, corpus, tmp_path / "large", dtype="float16")
    assert not list((tmp_path / "large").rglob("*.npy"))
    embed(large, corpus, tmp_path / "large")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"not finite in float32.*load it in float32"):
        embed(model, corpus, tmp_path)
