"""Linear layers in 8-bit integers, for teachers on a CPU.

Weights have a scale for each output, quantised once, and activations a scale and a middle for each token, quantised as
they come, so that a pair's score does not depend on the pairs beside it. The middle matters: what a GELU puts out lies
almost wholly above zero, and steps on both sides of zero would waste one bit of eight. Of a 12-layer MiniLM it took a
third of the error away. The product is PyTorch's own kernel for integers, as in torchao's
``Int8DynamicActivationInt8WeightConfig``; torchao itself, without compiling the model, was no faster than float32: its
quantisation makes many passes over the memory. Per-tensor scales of a batch, as onnxruntime's dynamic quantisation has
them, moved that MiniLM's scores by up to 0.7.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["QUANTISATION", "Int8Linear", "quantised"]

QUANTISATION = (
    "linear layers of the trunk in int8 (weights symmetric, per output; activations asymmetric, per token as they "
    "come), attention, norms, embeddings and head in float32"
)
"""What was done, for the manifest."""


class Int8Linear(nn.Module):
    """A linear layer whose product is one of integers.

    Args:
        linear: The layer in floating point.
    """

    weight: Tensor
    scale: Tensor
    total: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows = linear.weight.detach().float()
        scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127)
        weight = (rows / scale).round_().to(torch.int8)
        self.register_buffer("weight", weight.t())
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("total", weight.sum(1).float())  # what a token's middle is multiplied with
        self.register_buffer(
            "bias", scale.new_zeros(len(rows)) if linear.bias is None else linear.bias.detach().float()
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Float32 ``[..., in]`` to ``[..., out]``."""
        rows = tokens.flatten(0, -2)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        middle = (low + high).mul_(0.5)
        # A row whose numbers hardly differ gets no finer steps than float32 can tell apart.
        step = torch.maximum((high - low).div_(254), torch.maximum(high, -low).mul_(1e-6)).clamp_min_(1e-12)
        steps = (rows * (1 / step)).sub_(middle / step).round_().to(torch.int8)
        out = torch._int_mm(steps, self.weight).float().mul_(step).addcmul_(middle, self.total)
        return torch.unflatten(out.mul_(self.scale).add_(self.bias), 0, tokens.shape[:-1])


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
