"""Streamed text encoders say what resident ones say."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky5.memory.text_stages import EncoderUse
from kandinsky5.model.files import ModelFiles
from kandinsky5.pipeline.encoders import text_tenant
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.templates import PROMPT_TEMPLATES

CPU = torch.device("cpu")


def demo_files(folder: Path = DEMO_FOLDER) -> ModelFiles:
    return ModelFiles(
        transformer=folder / "transformer",
        vae=folder / "vae",
        text_encoder=folder / "text_encoder",
        tokenizer=folder / "tokenizer",
        text_encoder_2=folder / "text_encoder_2",
        tokenizer_2=folder / "tokenizer_2",
    )


def encoded(tenant) -> torch.Tensor:
    encoders = tenant.enter()
    conditioning = encoders.encode(
        "a red circle moves right", "a red circle", PROMPT_TEMPLATES["demo"], max_tokens=64
    )
    tenant.leave()
    return torch.cat([conditioning.text.flatten(), conditioning.pooled])


def use_of(source: str) -> EncoderUse:
    """One slot: the demo has two layers, and two slots would hold them all."""
    return EncoderUse("fp32", source, slots=1, ring=1)


def tenant(source: str, home: str):
    return text_tenant(demo_files(), use_of(source), device=CPU, dtype=torch.float32, home=home)


@pytest.mark.parametrize(
    ("source", "home"), [("disk", "disk"), ("pinned", "ram"), ("resident", "disk")]
)
def test_every_way_gives_the_same_numbers_time_after_time(source: str, home: str) -> None:
    wanted = encoded(tenant("resident", "device"))
    other = tenant(source, home)
    assert torch.equal(encoded(other), wanted)
    assert torch.equal(encoded(other), wanted)
    other.close()
    assert other.host_bytes == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("k1-weights")]


@pytest.mark.parametrize(("source", "home"), [("disk", "disk"), ("pinned", "ram")])
def test_a_streamed_encoder_sees_what_a_resident_one_sees(source: str, home: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)

    def seen(source: str, home: str) -> torch.Tensor:
        where = {"device": CPU, "dtype": torch.float32, "sees": True}
        made = text_tenant(demo_files(), use_of(source), home=home, **where)
        encoders, template = made.enter(), PROMPT_TEMPLATES["image_edit"]
        texts = [
            encoders.encode("a red circle", "", template, max_tokens=64, picture=shown).text
            for shown in (picture, 255 - picture)
        ]
        made.leave()
        made.close()
        return torch.stack(texts)

    wanted = seen("resident", "device")
    assert not torch.equal(wanted[0], wanted[1])
    assert torch.equal(seen(source, home), wanted)


def test_only_pinned_layers_wait_in_main_memory() -> None:
    pinned, disk = tenant("pinned", "ram"), tenant("disk", "disk")
    encoded(pinned)
    encoded(disk)
    assert pinned.host_bytes > 0
    assert disk.host_bytes == 0
    pinned.close()
    disk.close()
