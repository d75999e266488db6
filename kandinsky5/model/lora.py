"""LoRAs beside a transformer's layers: nothing is merged, so a base may be quantised, streamed, shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.model.layers import rows_of, together
from kandinsky5.model.lora_file import LoraFile


@dataclass(frozen=True)
class Adapter:
    """What is added to one layer: up·(down·x), all LoRAs and strengths together.

    Attributes:
        down: [R, inputs], R the sum of the ranks.
        up: [outputs, R].
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


def combined(
    loras: Sequence[tuple[LoraFile, float]],
    dtype: torch.dtype,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> dict[str, Adapter]:
    """The adapters of several LoRAs with their strengths; those of strength 0 take no part.

    Args:
        loras: matched against the same model.
        dtype: of the result.
        keep: applied to each tensor, e.g. to have it on the device.
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for file, strength in loras:
        if strength == 0:
            continue
        for layer, down, up in file.read():
            parts.setdefault(layer, []).append((down.to(dtype), (up * strength).to(dtype)))
    return {
        layer: Adapter(
            keep(torch.cat([down for down, _ in found])),
            keep(torch.cat([up for _, up in found], dim=1)),
        )
        for layer, found in parts.items()
    }


class LoraLayer(nn.Module):
    """A linear layer with an adapter beside it; the layer keeps its tensors and their names.

    It looks its tensors up in the very dictionaries of the inner layer, and the adapter is none of its
    parameters: a streamer, a layout or a state dict sees what it saw before.

    Args:
        inner: any layer that ``LinearFactory`` makes.
        adapter: None adds nothing.
    """

    inner: nn.Module

    def __init__(self, inner: nn.Module, adapter: Adapter | None) -> None:
        super().__init__()
        self._parameters = inner._parameters
        self._buffers = inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self.__dict__["inner"] = inner  # not among the submodules
        self.adapter = adapter
        self.training = inner.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] → [..., outputs]."""
        return self._added(x, self.inner(x))

    @staticmethod
    def together(x: torch.Tensor, layers: Sequence[LoraLayer]) -> tuple[torch.Tensor, ...]:
        """Every layer for the same x: one call of the inner layers, then what each adapter adds."""
        outs = together(x, [layer.inner for layer in layers])
        return tuple(layer._added(x, out) for layer, out in zip(layers, outs, strict=True))

    def rows_of(self, rows: slice) -> LoraLayer:
        """The layer cut down to some of its outputs."""
        cut = self.adapter and Adapter(self.adapter.down, self.adapter.up[rows])
        return LoraLayer(rows_of(self.inner, rows), cut)

    def weights_float32(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in float32, the adapter added to a copy; for layers computed in float32."""
        inner: Any = self.inner
        weight = inner.weight.float()
        if self.adapter is not None:
            weight = weight + self.adapter.up.float() @ self.adapter.down.float()
        return weight, None if inner.bias is None else inner.bias.float()

    def _added(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.adapter is None:
            return out
        down, up = self.adapter.down.to(x.dtype), self.adapter.up.to(x.dtype)
        hidden = F.linear(x, down).reshape(-1, down.shape[0])
        rows = out.reshape(-1, up.shape[0])
        return torch.addmm(rows, hidden, up.t()).reshape(out.shape)


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name → (outputs, inputs) of every linear layer, quantised ones too; adapters are looked through."""
    sizes = {}
    for name, module in model.named_modules():
        layer: Any = module.inner if isinstance(module, LoraLayer) else module
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            sizes[name] = (layer.out_features, layer.in_features)
    return sizes


def attach(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters beside the layers of these names; what was attached before is detached.

    Their neighbours get a wrapper without an adapter: layers that share an input are computed together
    when they are of one kind.
    """
    detach(model)
    if not adapters:
        return
    parents = {name.rpartition(".")[0] for name in adapters}
    for name in layer_sizes(model):
        if name.rpartition(".")[0] in parents:
            wrapped = LoraLayer(model.get_submodule(name), adapters.get(name))
            model.set_submodule(name, wrapped, strict=True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; the layers are the same objects as before."""
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in wrapped:
        model.set_submodule(name, layer.inner, strict=True)
