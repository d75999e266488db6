"""A transformer small enough for every test, and its weights as other programs store them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from int8 import COMMUNITY
from int8.reference import quantize
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.fp8 import float8_scale, to_float8
from kandinsky5.model.weights import is_quantised_layer

Tensors = dict[str, torch.Tensor]

CONFIG = DiTConfig(
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=32,
    model_dim=64,
    ff_dim=96,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
)
LAYER = "visual_transformer_blocks.1.cross_attention.to_key"
"""One of those that are quantised."""


def weights(config: DiTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(5)
    model = DiffusionTransformer3D(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}


def run(model: torch.nn.Module) -> torch.Tensor:
    """One evaluation of fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 33), (5, 24), (12,))]
    with torch.no_grad():
        return model(*inputs, 0.5).float()


def sqnr_db(true: torch.Tensor, found: torch.Tensor) -> float:
    return float(20 * torch.log10(true.norm() / (true - found).norm()))


def community_int8(layer: str, weight: torch.Tensor) -> Tensors:
    q, scales = quantize(weight, COMMUNITY)
    return {f"{layer}.weight_int8": q, f"{layer}.weight_scales": scales}


def community_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    scale = float8_scale(weight.abs().amax())
    return {f"{layer}.weight_fp8": to_float8(weight, scale), f"{layer}.weight_scale": scale}


def comfy_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    scale = float8_scale(weight.abs().amax())
    return {
        f"{layer}.weight": to_float8(weight, scale),
        f"{layer}.weight_scale": scale.reshape(1),
        f"{layer}.input_scale": torch.tensor(0.3),
    }


def comfy_fp8_by_output(layer: str, weight: torch.Tensor) -> Tensors:
    scales = float8_scale(weight.abs().amax(dim=1, keepdim=True))
    return {
        f"{layer}.weight": to_float8(weight, scales),
        f"{layer}.weight_scale": scales,
        f"{layer}.comfy_quant": torch.tensor(list(b"{}"), dtype=torch.uint8),
    }


def older_comfy_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    scale = float8_scale(weight.abs().amax())
    return {f"{layer}.weight": to_float8(weight, scale), f"{layer}.scale_weight": scale}


def unscaled_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    return {f"{layer}.weight": weight.to(torch.float8_e4m3fn)}


def stored(how: Callable[[str, torch.Tensor], Tensors], tensors: Tensors) -> Tensors:
    """The tensors with every layer of the table stored another way."""
    changed: Tensors = {}
    for name, tensor in tensors.items():
        if is_quantised_layer(name):
            changed |= how(name.removesuffix(".weight"), tensor)
        else:
            changed[name] = tensor
    return changed


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once among those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
