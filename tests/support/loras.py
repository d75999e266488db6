"""LoRAs for tests, in the ways in which other programs write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer → down [r, inputs], up [outputs, r]."""


def random_pairs(
    sizes: Mapping[str, tuple[int, int]], rank: int = 3, seed: int = 0, std: float = 0.1
) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    return {
        layer: (drawn(rank, inputs), drawn(outputs, rank))
        for layer, (outputs, inputs) in sizes.items()
    }


def save_peft(path: Path, pairs: Pairs, *, alpha: float, trigger: str = "") -> Path:
    """As PEFT names them, with the adapter's name, and its config beside the file."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"base_model.model.{layer}.lora_A.default.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.default.weight"] = up
    save_file(tensors, path, {"trigger": trigger} if trigger else None)
    rank = next(iter(pairs.values()))[0].shape[0]
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_query"]}
    path.with_name("adapter_config.json").write_text(json.dumps(config))
    return path


def save_diffusers(path: Path, pairs: Pairs, *, alpha: float | None = None) -> Path:
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = down
        tensors[f"transformer.{layer}.lora_B.weight"] = up
    metadata = {"format": "pt"}
    if alpha is not None:
        rank = next(iter(pairs.values()))[0].shape[0]
        stated = {"transformer.r": rank, "transformer.lora_alpha": alpha}
        metadata["lora_adapter_metadata"] = json.dumps(stated)
    save_file(tensors, path, metadata)
    return path


def save_kohya(path: Path, pairs: Pairs, *, alpha: float) -> Path:
    tensors = {}
    for layer, (down, up) in pairs.items():
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path
