"""How the VAE decodes is the user's choice, obeyed exactly or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from demo_runs import quick

from kandinsky5.arguments import build_parser
from kandinsky5.errors import UserError
from kandinsky5.model.vae import VideoVAE
from kandinsky5.pipeline import codec
from kandinsky5.pipeline.planning import plan_of
from kandinsky5.request import GenerationRequest, settle
from vae_tiling import PublishedTiles, TilePlan

CPU = torch.device("cpu")


def tiles_for(**values: object) -> TilePlan:
    size = {"width": 256, "height": 320, "seconds": 1.0, "vae_tiling": "auto"}
    request, _ = settle(quick(**{**size, **values}))
    return plan_of(request, None, "bf16", device=CPU, dtype=torch.float32).decode_tiles


def test_a_small_clip_is_decoded_all_at_once_and_a_long_one_frame_by_frame() -> None:
    assert tiles_for(width=64, height=64).at_once
    assert not tiles_for(width=1024, height=1024, seconds=5.0).at_once


def test_each_way_can_be_chosen() -> None:
    rolling, whole, published = (
        tiles_for(vae_tiling=way) for way in ("rolling", "whole", "published")
    )
    assert not rolling.at_once and rolling.published is None
    assert whole.at_once and whole.tiles == 1
    assert published.published == PublishedTiles()


def test_a_tile_has_exactly_the_side_asked_for() -> None:
    rolling = tiles_for(vae_tiling="rolling", vae_tile=208)
    assert [8 * cells for cells in rolling.largest_tile] == [208, 208]
    published = tiles_for(vae_tiling="published", vae_tile=128).published
    assert published is not None
    assert (published.height_px, published.stride_width_px) == (128, 96)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vae_tile": 100}, "a multiple of 16 px"),
        ({"vae_tile": 48}, "a number from 64 to 2048"),
        ({"vae_tiling": "mosaic"}, "one of auto, rolling, whole, published"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_its_field(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        quick(**values)
    assert refused.value.field == next(iter(values))


def test_all_at_once_is_refused_with_the_reason_where_memory_is_too_little() -> None:
    with pytest.raises(UserError, match="GB of RAM") as refused:
        tiles_for(width=1024, height=1024, seconds=5.0, vae_tiling="whole", ram=16.0)
    assert refused.value.field == "vae_tiling"


def test_choices_are_on_the_command_line_and_in_the_file_of_a_request() -> None:
    given = ["generate", "--prompt", "x", "--vae-tiling", "published", "--vae-tile", "128"]
    options = vars(build_parser().parse_args(given))
    assert options["vae_tiling"] == "published" and str(options["vae_tile"]) == "128"
    request = quick(vae_tiling="whole", vae_tile=256)
    assert GenerationRequest.from_dict(request.to_dict()) == request


def test_the_decoder_follows_the_plan() -> None:
    vae = VideoVAE.__new__(VideoVAE)
    torch.nn.Module.__init__(vae)
    for way in ("whole", "published"):
        assert codec._decoder_of(vae, tiles_for(vae_tiling=way)) == vae.decode
