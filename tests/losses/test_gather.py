"""Documents of several processes: the same loss and gradients as one process with all the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_m3se import DistillationCollator, M3SELoss, SoftmaxCrossEntropyLoss
from st_m3se.losses.gather import text_keys, unlisted_texts

# Of unlike sizes between the two halves; "a tower in tokyo" stands in both, "rome" twice over. The fifth row asks for
# "italy" again: what is relevant to it in one process is so in the other; "lima" is known to be, by its id.
ROWS = [
    {
        "query": "tall tower",
        "documents": ["the tower of paris", "a tower in tokyo", "rome", "lima"],
        "scores": [9.0, 2.0, -3.0, -6.0],
        "document_ids": ["p", "t", "r", "another id of lima"],
    },
    {
        "query": "italy",
        "documents": ["rome", "milan is a city in the north"],
        "scores": [7.0, 4.0],
        "document_ids": ["r", "m"],
        "relevant_ids": ["r", "l"],
    },
    {"query": "japan", "documents": ["a tower in tokyo", "osaka"], "scores": [6.0, 5.0]},
    {
        "query": "peru",
        "documents": ["lima", "alpacas live in peru and chile", "rome"],
        "scores": [8.0, 1.0, -5.0],
        "document_ids": ["l", "a", "r"],
    },
    {"query": "italy", "documents": ["it is the boot of europe", "osaka"], "scores": [5.0, -4.0]},
    {"query": "chile", "documents": ["santiago", "a tower in tokyo"], "scores": [6.0, -4.0]},
]
LOSSES = [
    pytest.param(lambda model, **options: M3SELoss(model, scale=5.0, **options), id="m3se"),
    pytest.param(lambda model, **options: SoftmaxCrossEntropyLoss(model, scale=5.0, **options), id="softmax"),
]


def loss_and_gradient(loss: torch.nn.Module, rows: list[dict]) -> tuple[Tensor, Tensor]:
    batch = DistillationCollator(preprocess_fn=loss.model.preprocess)(rows)
    features = [
        {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
        for prefix in ("query_", "document_")
    ]
    value = loss(features, batch["label"])
    value.backward()
    gradients = [parameter.grad.flatten() for parameter in loss.model.parameters() if parameter.grad is not None]
    return value.detach(), torch.cat(gradients)


CASES = [(None, False), (12, True), (12, False)]
"""Tokens of a cached mini-batch, and whether the loss is softmax cross-entropy."""


def gathered(folder: str, tokens: int | None, softmax: bool, rank: int) -> tuple[Tensor, Tensor]:
    """What both processes together make of their halves of the rows, averaged as DistributedDataParallel does."""
    model = SentenceTransformer(f"{folder}/model", device="cpu").eval()
    make = LOSSES[int(softmax)].values[0]
    loss = make(model, in_batch_negatives=True, gather_across_devices=True, mini_batch_num_tokens=tokens)
    value, gradient = loss_and_gradient(loss, ROWS[3 * rank : 3 * rank + 3])
    dist.all_reduce(gradient)
    dist.all_reduce(value)
    return value / 2, gradient / 2


def one_process(rank: int, folder: str) -> None:
    """All cases in one launch, whose imports are most of the time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = [gathered(folder, *case, rank) for case in CASES]
    if rank == 0:
        torch.save(found, f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(model: SentenceTransformer, tmp_path: Path) -> None:
    """Without the gather's gradient, or with a text of the own list counted as negative, this differs quietly."""
    model.eval()
    model.save_pretrained(str(tmp_path / "model"))
    mp.spawn(one_process, args=(str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "result.pt")
    for (value, gradient), (_, softmax) in zip(found, CASES, strict=True):
        make = LOSSES[int(softmax)].values[0]
        model.zero_grad()
        expected_value, expected_gradient = loss_and_gradient(make(model, in_batch_negatives=True), ROWS)
        assert not torch.isclose(loss_and_gradient(make(model), ROWS)[0], expected_value)  # the negatives count
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_keys_see_tokens_and_not_padding() -> None:
    """Two processes pad to different widths; a key that saw the padding would call equal texts different."""
    narrow = {"input_ids": torch.tensor([[5, 6, 0], [6, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    wide = {"input_ids": torch.tensor([[0, 0, 5, 6, 9]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 0]])}
    first, second = text_keys(narrow).tolist()
    assert text_keys(wide).tolist() == [first]
    assert first != second


def test_a_query_meets_each_foreign_text_once() -> None:
    """Texts 0, 1, 2, 1 again, and padding: the query's own texts stay out, and copies count once."""
    numbers = torch.tensor([0, 1, 2, 1, -1])
    index, mask = torch.tensor([[0, 0], [3, 2]]), torch.tensor([[True, False], [True, False]])
    assert unlisted_texts(numbers, index, mask).tolist() == [
        [False, True, True, False, False],
        [True, False, True, False, False],
    ]


def test_gathering_needs_in_batch_negatives(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="in_batch_negatives=True"):
        M3SELoss(model, gather_across_devices=True)
