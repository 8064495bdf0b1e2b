"""Linear layers in 8-bit integers, for teachers on a CPU.

As torchao's ``Int8DynamicActivationInt8WeightConfig`` has it, by the same kernel of PyTorch: weights have a scale for
each output, quantised once, and activations one for each token, quantised as they come, so that a pair's score does
not depend on the pairs beside it. Per-tensor scales of a batch, as onnxruntime's dynamic quantisation has them, moved a
12-layer MiniLM's scores by up to 0.7. torchao itself, without compiling the model, was no faster than float32: its
quantisation makes many passes over the memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["QUANTISATION", "Int8Linear", "quantised"]

QUANTISATION = (
    "linear layers of the trunk in int8 (symmetric; weights per output, activations per token as they come), "
    "attention, norms, embeddings and head in float32"
)
"""What was done, for the manifest."""


class Int8Linear(nn.Module):
    """A linear layer whose product is one of integers.

    Args:
        linear: The layer in floating point.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale, weight = _rounded(linear.weight.detach().float())
        self.register_buffer("weight", weight.t())
        self.register_buffer("scale", scale.flatten())
        self.bias = linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Float32 ``[..., in]`` to ``[..., out]``."""
        scale, rows = _rounded(tokens.flatten(0, -2))
        out = torch._int_mm(rows, self.weight).float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return torch.unflatten(out, 0, tokens.shape[:-1])


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row, ``[rows, 1]``, and the row in steps of it: int8 from -127 to 127."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127)
    return scale, (rows / scale).round_().to(torch.int8)


def quantised(model: Any) -> Any:
    """A float32 copy of a model of sentence-transformers with the linear layers of its repeated blocks in int8.

    Raises:
        ValueError: If it has none, has adapters, or is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(f'dtype="int8" is for CPUs, and the model is on {model.device}: bfloat16 is the GPU\'s way.')
    if getattr(model.transformers_model, "peft_config", None):
        raise ValueError('dtype="int8" needs plain linear layers, and the model has adapters: merge them first.')
    model = copy.deepcopy(model).float()
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    parents = {id(parent): parent for block in blocks for parent in block.modules()}.values()
    found = [
        (parent, name, child)
        for parent in parents
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child) is nn.Linear
    ]
    if not found:
        raise ValueError('dtype="int8" needs linear layers in repeated blocks, and the model has none: use bfloat16.')
    for parent, name, linear in found:
        setattr(parent, name, Int8Linear(linear))
    return model
