"""The demo's text encoder with more layers than it has: deep enough to be streamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from kandinsky5.presets import DEMO_FOLDER


def write_deep_encoder(folder: Path, layers: int) -> Path:
    """Write it with so many layers, the demo's two in turn; gives the new folder."""
    shutil.copytree(DEMO_FOLDER / "text_encoder", folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for index in range(2, layers):
        start = f"model.layers.{index % 2}."
        for name in [name for name in tensors if name.startswith(start)]:
            own = f"model.layers.{index}.{name.removeprefix(start)}"
            tensors[own] = tensors[name].clone()
    values = json.loads(config.read_text(encoding="utf-8"))
    values["text_config"]["num_hidden_layers"] = layers
    save_file(tensors, file)
    config.write_text(json.dumps(values), encoding="utf-8")
    return folder
