"""Plans of image jobs: what the 2-D VAE takes, and when it is cut into tiles."""

from __future__ import annotations

import pytest

from kandinsky5.memory.budget import Budget
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.plan import make_plan
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle


def plan(preset: str, width: int, height: int, vram: float | None, ram: float = 64):
    request = GenerationRequest(
        preset=preset,
        prompt="a",
        image="a picture" if PRESETS[preset].takes_image else None,
        width=width,
        height=height,
    )
    return make_plan(PlanRequest.of(settle(request)[0]), Budget.of_gb(vram, ram))


@pytest.mark.parametrize("preset", ["image-t2i", "image-i2i"])
@pytest.mark.parametrize(("vram", "ram"), [(24, 64), (8, 32), (None, 32)])
def test_published_sizes_are_decoded_in_one_piece(preset, vram, ram) -> None:
    for width, height in PRESETS[preset].sizes_px:
        made = plan(preset, width, height, vram, ram)
        assert made.fits, made.problems
        assert made.decode_tiles.tiles == 1


def test_pictures_above_a_megapixel_are_decoded_in_tiles_on_any_machine() -> None:
    made = plan("image-t2i", 2048, 2048, 80)
    assert made.decode_tiles.tiles > 1
    height, width = made.decode_tiles.largest_tile
    assert 64 * height * width <= 1024 * 1024
    assert made.fits


def test_the_editing_encoder_has_its_vision_tower_on_the_device() -> None:
    text, edit = (plan(preset, 1024, 1024, 24) for preset in ("image-t2i", "image-i2i"))
    peaks = [
        next(s for s in made.stages if s.name == "encode text").peak_vram_bytes
        for made in (text, edit)
    ]
    assert peaks[1] - peaks[0] >= 1.3e9
    assert text.encode_tiles is None and edit.encode_tiles is not None
