"""Linear layers with float8 weights: the card's own float8 product where it has one, else dequantised."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
"""Largest value of float8_e4m3fn."""
MIN_CAPABILITY = (8, 9)
"""First NVIDIA architecture (Ada) with float8 tensor cores."""
MIN_LARGEST = 1e-12
"""A token below this everywhere counts as zeros: its scale must have a reciprocal."""
ALIGNMENT = 16
"""``torch._scaled_mm`` takes input and output widths that are multiples of this."""

_distrusted: set[int] = set()
"""Indices of cards whose float8 product gave wrong numbers in this process."""


class Fp8Linear(nn.Module):
    """``nn.Linear`` whose weight is float8 times a scale.

    State: ``weight`` float8 [out, in]; ``weight_scale`` float32, [] or one per output [out, 1]; ``bias``.
    A weight is its float8 number times the scale. On a card with float8 tensor cores the input is
    quantised too, each token by its own largest value; float32 inputs never are.

    Args:
        in_features, out_features: widths.
        bias: whether there is one.
        per_output: whether each output has its own scale.
        dtype: of the weight, ``float8_e4m3fn`` or ``float8_e5m2``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        per_output: bool = False,
        dtype: torch.dtype = FLOAT8,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        scales = (out_features, 1) if per_output else ()
        self.weight = _constant(torch.zeros(out_features, in_features).to(dtype))
        self.weight_scale = _constant(torch.ones(scales))
        self.register_parameter("bias", _constant(torch.zeros(out_features)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in a floating dtype → [..., out] in the same."""
        if self._has_fast_path(x):
            return self._scaled_product(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights, [out, in]: float8 numbers times scales, rounded once to ``dtype``."""
        return self.weight.to(dtype).mul_(self.weight_scale)

    def rows_of(self, rows: slice) -> Fp8Linear:
        """The layer cut down to some of its outputs, sharing its memory."""
        part = copy.copy(self)
        part._parameters = dict(self._parameters)
        part._parameters["weight"] = _constant(self.weight[rows])
        if self.weight_scale.dim():
            part._parameters["weight_scale"] = _constant(self.weight_scale[rows])
        if self.bias is not None:
            part._parameters["bias"] = _constant(self.bias[rows])
        part.out_features = part.weight.shape[0]
        return part

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _has_fast_path(self, x: torch.Tensor) -> bool:
        return (
            x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and x.numel() > 0
            and self.in_features % ALIGNMENT == 0
            and self.out_features % ALIGNMENT == 0
            and has_product(x.device)
        )

    def _scaled_product(self, x: torch.Tensor) -> torch.Tensor:
        """The product of float8 numbers without scales, then the scales and the bias.

        Scaling afterwards works on every card that has the product at all; scales per row inside it do not.
        bfloat16 holds any sum of float8 products, float16 would not. All in place: at full size one float32
        copy of a feed-forward's middle would be gigabytes.
        """
        tokens = x.reshape(-1, self.in_features)
        largest = torch.linalg.vector_norm(tokens, float("inf"), dim=-1, keepdim=True)
        token_scales = largest.float().clamp_min(MIN_LARGEST) / FLOAT8_MAX
        scaled = torch.mul(tokens, token_scales.reciprocal(), out=torch.empty_like(tokens))
        one = torch.ones((), device=x.device)
        out = torch._scaled_mm(
            scaled.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8),
            self.weight.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
        )
        if (
            self.weight_scale.dim()
        ):  # scales of tokens times those of outputs would be as large as out
            out *= token_scales
            out *= self.weight_scale.reshape(1, -1)
        else:
            out *= token_scales * self.weight_scale
        out = out.to(x.dtype)
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, x.shape[:-1])


def has_product(device: torch.device) -> bool:
    """Whether the device has a float8 product that is to be used."""
    if device.type != "cuda" or (device.index or 0) in _distrusted:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def distrust_product(device: torch.device) -> None:
    """Have all layers on a card dequantise from now on."""
    _distrusted.add(device.index or 0)


def float8_scale(largest: torch.Tensor) -> torch.Tensor:
    """The scale at which a weight's largest magnitude becomes 448: float32 []; 1 for a weight of zeros."""
    largest = largest.float()
    return torch.where(largest > 0, largest / FLOAT8_MAX, 1.0)


def to_float8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest float8_e4m3fn numbers to weight/scale, any shape; the weight must be finite."""
    return (weight.float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
