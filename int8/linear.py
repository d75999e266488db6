"""A linear layer with int8 weights that quantises its input on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from int8.ops import (
    GELU,
    NORM,
    before_quantising,
    check_weight,
    matmul_rows,
    quantize_rows,
    quantize_weight,
)
from int8.scheme import DEFAULT, Int8Scheme


class Int8Linear(nn.Module):
    """y = x·Wᵀ + b with W in int8; state-dict names ``weight``, ``weight_scales`` and ``bias``.

    A new layer holds zeros; fill its buffers from a file or use ``from_linear``. It has no gradients.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        scheme: how the weights are quantised; the input is quantised alike.
        device, dtype: as for ``nn.Linear``; dtype is that of the bias alone.
    """

    weight: torch.Tensor
    weight_scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Int8Scheme = DEFAULT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"int8 layer of {in_features} → {out_features} features; at least 1 each"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        weight = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        scales = torch.zeros(
            (out_features, scheme.groups(in_features)), device=device, dtype=torch.float32
        )
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scales", scales)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", zeros)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Int8Scheme = DEFAULT) -> Int8Linear:
        """The same layer with its weights quantised, on the same device; the bias is kept as it is.

        Raises:
            ValueError: the weights hold infinities or NaN.
        """
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, scheme=scheme, device="meta")
        layer.weight, layer.weight_scales = quantize_weight(linear.weight, scheme)
        layer.bias = linear.bias.detach().clone() if has_bias else None
        return layer

    @staticmethod
    def together(x: torch.Tensor, layers: Sequence[Int8Linear]) -> tuple[torch.Tensor, ...]:
        """Every layer applied to the same x [..., K]: quantised once, one matmul where the sizes agree.

        Numbers are those of calling each layer.
        """
        return _apply_all(x, layers, _quantize_plain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features] in x's dtype."""
        return _apply_all(x, [self], _quantize_plain)[0]

    def after_norm(
        self,
        x: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        layers: Sequence[Int8Linear] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """``layers`` (by default this one) applied to LayerNorm(x)·(1+scale)+shift.

        Args:
            x: [..., K]; normalised in float32 with eps 1e-5 and no affine part, then rounded to x's dtype.
            shift, scale: float32 of K values, the same for every token.
            layers: layers that share the input.

        Returns:
            One tensor [..., out_features] for each layer.

        Raises:
            ValueError: shift or scale has not K values.
        """

        def quantize(x: torch.Tensor, scheme: Int8Scheme) -> tuple[torch.Tensor, torch.Tensor]:
            return quantize_rows(x, scheme, prologue=NORM, shift=shift, scale=scale)

        if shift.numel() != x.shape[-1]:  # a batch with vectors of its own: nothing to fuse
            return _apply_all(
                before_quantising(x, NORM, shift, scale), layers or [self], _quantize_plain
            )
        return _apply_all(x, layers or [self], quantize)

    def after_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """This layer applied to the exact GELU of x [..., K], rounded to x's dtype."""
        return _apply_all(x, [self], _quantize_gelu)[0]

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None},"
            f" group={self.scheme.group}, rotate={self.scheme.rotate}"
        )

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Int8Linear:
        """``module.to(dtype)`` moves and casts the bias; scales stay float32."""
        scales = self.weight_scales
        super()._apply(fn, recurse)
        if self.weight_scales.dtype != torch.float32:
            self.weight_scales = scales.to(self.weight_scales.device)
        return self


def _quantize_plain(x: torch.Tensor, scheme: Int8Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(x, scheme)


def _quantize_gelu(x: torch.Tensor, scheme: Int8Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(x, scheme, prologue=GELU)


def _apply_all(
    x: torch.Tensor,
    layers: Sequence[Int8Linear],
    quantize: Callable[[torch.Tensor, Int8Scheme], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, ...]:
    scheme = layers[0].scheme
    for layer in layers:
        if layer.scheme != scheme:
            raise ValueError(f"int8 layers of {layer.scheme} and {scheme} cannot share an input")
        check_weight(layer.weight, layer.weight_scales, x.shape[-1], scheme)
    quantized = quantize(x, scheme)
    outs: list[torch.Tensor] = []
    for run in _alike(layers):
        outs += matmul_rows(
            quantized,
            [layer.weight for layer in run],
            [layer.weight_scales for layer in run],
            [layer.bias for layer in run if layer.bias is not None],
            scheme,
            x.dtype,
        )
    return tuple(out.reshape(*x.shape[:-1], out.shape[1]) for out in outs)


def _alike(layers: Sequence[Int8Linear]) -> list[list[Int8Linear]]:
    """Neighbours of one size, all with a bias or all without, which one matmul can serve."""
    runs: list[list[Int8Linear]] = []
    for layer in layers:
        kind = (layer.weight.shape[0], layer.bias is None)
        if runs and (runs[-1][0].weight.shape[0], runs[-1][0].bias is None) == kind:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
