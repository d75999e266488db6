"""LoRAs as a job uses them: found, matched against its transformer, put beside its layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kandinsky5.errors import UserError
from kandinsky5.memory.whole import to_device
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.files import typed_path
from kandinsky5.model.lora import attach, combined, detach, layer_sizes
from kandinsky5.model.lora_file import LoraFile, open_lora
from kandinsky5.request import GenerationRequest

LORA_FOLDER = "loras"
"""Folder in which other programs keep LoRAs, beside the one of transformers."""


@dataclass(frozen=True)
class ChosenLora:
    """One LoRA of a job, matched against its transformer, and how strongly it acts."""

    file: LoraFile
    strength: float

    @property
    def notice(self) -> str:
        """What the user should know of it."""
        file = self.file
        said = f"LoRA {file.path.name}: {file.matched} of {file.total} tensors match"
        if file.shortfall:
            said += f" (not {file.shortfall})"
        if file.trigger:
            said += f"; its trigger goes before the prompt: {file.trigger.strip()[:80]}"
        return said

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of device memory while the transformer computes."""
        return self.file.parameters * dtype.itemsize if self.strength else 0


def chosen_loras(
    request: GenerationRequest, config: DiTConfig, models_dirs: Sequence[Path]
) -> tuple[ChosenLora, ...]:
    """The request's LoRAs, their headers read.

    Raises:
        UserError: one is not there, or is a folder.
        CheckpointError: one cannot be used with this transformer.
    """
    if not request.loras:
        return ()
    with torch.device("meta"):
        layers = layer_sizes(DiffusionTransformer3D(config))
    return tuple(
        ChosenLora(open_lora(lora_path(choice.path, models_dirs), layers), choice.strength)
        for choice in request.loras
    )


def with_triggers(prompt: str, loras: Sequence[ChosenLora]) -> str:
    """The prompt as these LoRAs were trained to read it: behind their triggers, unless it has them."""
    for lora in reversed(loras):
        trigger = lora.file.trigger
        if lora.strength and trigger.strip() and trigger.strip() not in prompt:
            prompt = f"{trigger}{'' if trigger[-1].isspace() else ' '}{prompt}"
    return prompt


class Adapters:
    """The LoRAs beside one transformer's layers; its own weights stay where and as they are.

    Args:
        model: whose layers they are put beside.
        device: where their weights are while they are attached; they are small.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._chosen: tuple[ChosenLora, ...] = ()
        self._dtype = torch.float32
        self._are_attached = True

    def choose(self, loras: Sequence[ChosenLora], dtype: torch.dtype) -> None:
        """From now on these, in this dtype."""
        if (tuple(loras), dtype) != (self._chosen, self._dtype):
            self.detach()
            self._chosen, self._dtype = tuple(loras), dtype

    def attach(self) -> None:
        """Read them, unless they are there.

        Raises:
            CheckpointError: a file is another one by now.
        """
        if self._are_attached:
            return
        pairs = [(lora.file, lora.strength) for lora in self._chosen]
        attach(
            self._model,
            combined(pairs, self._dtype, keep=lambda tensor: to_device(tensor, self._device)),
        )
        self._are_attached = True

    def detach(self) -> None:
        """Leave the layers as they were; the adapters' memory is given back."""
        detach(self._model)
        self._are_attached = False


def lora_path(text: str, models_dirs: Sequence[Path]) -> Path:
    """The file a person named: a path, or a name in one of the folders for models.

    Raises:
        UserError: it is not there, or is a folder.
    """
    name = text.strip()
    for folder in models_dirs:
        for place in (folder / LORA_FOLDER / name, folder / name):
            if name and os.path.isfile(place):  # unlike Path's it only answers, whatever the name
                return place
    path = typed_path("loras", text)
    if path.is_dir():
        raise UserError("loras", text, "a .safetensors file, not a folder")
    return path
