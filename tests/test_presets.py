"""The table of presets against the published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import GenerationRequest, settle

AREA_OF_RESOLUTION = {512: 512 * 768, 1024: 1024 * 1024}
DEFAULT_SHIFT = {"hunyuan": 10.0, "flux": 3.0}
PUBLISHED = 17
UPSTREAM_SLIPS = {"lite-t2v-10s-nocfg": "kandinsky5lite_t2v_nocfg_10s.safetensors"}
"""Published configurations that name another row's file, and the right one."""


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, dict[str, Any]]:
    return json.loads((shared / "data" / "presets.json").read_text(encoding="utf-8"))


def test_every_published_configuration_is_a_preset(published: dict[str, dict[str, Any]]) -> None:
    assert len(published) == PUBLISHED
    assert set(published) <= set(PRESETS)


def test_presets_carry_the_published_figures(published: dict[str, dict[str, Any]]) -> None:
    for name, row in published.items():
        preset = PRESETS[name]
        shift = row["scheduler_scale_in_config"] or DEFAULT_SHIFT[row["vae"]]
        nabla = row["nabla"]
        ours = (
            preset.weights_file,
            preset.steps,
            preset.guidance,
            preset.shift,
            preset.area_px,
            list(preset.rope_scale),
            preset.vae,
            preset.text_tokens,
            preset.clip_tokens,
        )
        theirs = (
            UPSTREAM_SLIPS.get(name, row["weights_file"]),
            row["steps"],
            row["guidance"],
            shift,
            AREA_OF_RESOLUTION[row["resolution"]],
            row["rope_scale"],
            row["vae"],
            row["qwen_max_tokens"],
            row["clip_max_tokens"],
        )
        assert ours == theirs, name
        assert (preset.nabla is None) == (row["attention"] == "full"), name
        if preset.nabla is not None:
            windows = (preset.nabla.P, preset.nabla.wT, preset.nabla.wH, preset.nabla.wW)
            assert windows == (nabla["P"], nabla["wT"], nabla["wH"], nabla["wW"]), name


def test_a_name_says_mode_and_length() -> None:
    for name, preset in PRESETS.items():
        assert name == preset.name
        assert preset.mode in name.split("-")
        if preset.is_video and not preset.is_builtin:
            assert f"{preset.seconds:g}s" in name.split("-")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_trained_sizes_need_no_snapping(preset: Preset) -> None:
    image = "picture.png" if preset.takes_image else None
    for width, height in preset.sizes_px:
        request = GenerationRequest(
            preset=preset.name, prompt="x", image=image, width=width, height=height
        )
        if preset.nabla is None or preset.area_px == 1024 * 1024:
            assert settle(request)[1] == ()


def test_the_demo_comes_first_and_needs_no_files_from_outside() -> None:
    demos = [preset for preset in PRESETS.values() if preset.is_builtin]
    assert [preset.name for preset in demos] == ["demo-t2v", "demo-i2v"] == list(PRESETS)[:2]
    assert not any(preset.weights_file or preset.repository for preset in demos)


def test_each_published_model_has_a_repository_in_diffusers_layout() -> None:
    """Names as the hub has them; of the image models the tuned one has ``sft`` in this layout alone."""
    names = {name: preset.diffusers_repository for name, preset in PRESETS.items()}
    assert names["lite-t2v-5s-sft"].endswith("/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers")
    assert names["pro-i2v-5s-hd"].endswith("/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers")
    assert names["image-t2i"].endswith("/Kandinsky-5.0-T2I-Lite-sft-Diffusers")
    assert names["image-i2i-pretrain"].endswith("/Kandinsky-5.0-I2I-Lite-pretrain-Diffusers")


def test_everything_else_says_where_its_weights_are_published() -> None:
    for preset in PRESETS.values():
        if not preset.is_builtin:
            assert preset.repository.startswith("kandinskylab/Kandinsky-5.0-")
            assert preset.weights_file.endswith(".safetensors")
