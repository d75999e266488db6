"""The rolling decode: exact but for the norms' statistics, and these near enough that nobody sees."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kandinsky5.demo.scenes import random_scene, render
from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.vae import VideoVAE
from kandinsky5.model.vae_frames import FrameNorm, Moments
from kandinsky5.model.vae_rolling import RollingVAEDecoder
from tests.model.test_vae import TINY, changed, relative_error, tiny
from vae_tiling import Places, TilePlan, plan_tiles, samples, tiled_decode
from vae_tiling.decode import as_floats
from vae_tiling.samples import LONGEST_RUN
from vae_tiling.statistics import STAY, taken

DEMO_VAE = Path(__file__).resolve().parents[2] / "kandinsky5/demo/model/vae"


def latent_of(cells: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, *cells, generator=torch.Generator().manual_seed(seed))


def statistics_of(vae: VideoVAE, latent: torch.Tensor) -> dict[int, Moments]:
    """What each GroupNorm of the untiled decode goes by."""
    seen: dict[int, Moments] = {}

    def look(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        groups = args[0].reshape(norm.num_groups, -1)
        variance, mean = torch.var_mean(groups, 1, correction=0)
        seen[id(norm)] = mean, variance

    norms = [module for module in vae.decoder.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.inference_mode():
        vae.decode(latent)
    for hook in hooks:
        hook.remove()
    return seen


def norms_of(decoder: RollingVAEDecoder) -> list[FrameNorm]:
    resnets = [resnet for _, level in decoder._levels for resnet in level]
    return [norm for r in resnets for norm in (r.norm1, r.norm2)] + [decoder._norm_out]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cells", [(1, 3, 2), (2, 2, 3), (4, 3, 4)], ids=str)
def test_with_the_untiled_statistics_it_is_the_untiled_decode(
    layers: int, cells: tuple[int, int, int]
) -> None:
    vae, latent = tiny(changed(TINY, layers_per_block=layers)), latent_of(cells)
    statistics = statistics_of(vae, latent)
    decoder = RollingVAEDecoder(vae)
    features = decoder.narrow(latent)
    for norm in norms_of(decoder):
        norm.fix(statistics[id(norm._norm)])
    tile = decoder.start()
    frames = torch.cat([tile.push(features[:, :, t : t + 1]) for t in range(cells[0])], dim=2)
    with torch.inference_mode():
        expected = vae.decode(latent)
    assert relative_error(frames, expected) <= 3e-5  # float32, through norms of very few numbers


@pytest.mark.parametrize("cells", [(1, 4, 4), (1, 2, 5)], ids=str)
def test_a_single_frame_is_decoded_exactly(cells: tuple[int, int, int]) -> None:
    vae, latent = tiny(), latent_of(cells)
    plan = plan_tiles(1, 8 * cells[1], 8 * cells[2])
    (frame,) = tiled_decode(RollingVAEDecoder(vae), latent, plan, convert=as_floats)
    with torch.inference_mode():
        expected = as_floats(vae.decode(latent))
    assert relative_error(frame, expected) <= 1e-5


def test_the_narrow_stage_is_exact() -> None:
    vae, latent = tiny(), latent_of((5, 3, 4))
    with torch.inference_mode():
        x = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(latent)))
        for resnet in vae.decoder.up_blocks[0].resnets:
            x = resnet(x)
    features = RollingVAEDecoder(vae).narrow(latent)
    assert relative_error(features, x) <= 1e-5


def test_a_tile_remembers_two_frames_of_each_convolution_however_long_it_runs() -> None:
    vae = tiny()
    decoder = RollingVAEDecoder(vae)
    features = decoder.narrow(latent_of((6, 2, 2)))
    decoder.calibrate(taken(features, plan_tiles(21, 16, 16)), STAY)
    tile = decoder.start()
    carried = []
    for frame in range(6):
        tile.push(features[:, :, frame : frame + 1])
        kept = {f.data_ptr(): f.numel() for frames in tile.past.values() for f in frames}
        carried.append(sum(kept.values()))
    assert carried[0] < carried[1] == carried[2] == carried[5]


def test_nothing_is_pushed_before_the_statistics_are_fixed() -> None:
    decoder = RollingVAEDecoder(tiny())
    features = decoder.narrow(latent_of((2, 2, 2)))
    with pytest.raises(AssertionError, match="statistics"):
        decoder.start().push(features[:, :, :1])


def test_bfloat16_is_as_near_as_the_untiled_decode_in_bfloat16() -> None:
    exact, rounded = tiny(), tiny().to(torch.bfloat16)
    latent, plan = latent_of((3, 4, 4)), plan_tiles(9, 32, 32)
    with torch.inference_mode():
        expected = as_floats(exact.decode(latent))
        untiled = as_floats(rounded.decode(latent.bfloat16()))
    near = torch.cat(list(tiled_decode(RollingVAEDecoder(exact), latent, plan, convert=as_floats)))
    rolled = torch.cat(
        list(tiled_decode(RollingVAEDecoder(rounded), latent.bfloat16(), plan, convert=as_floats))
    )
    assert (rolled - near).norm() <= 1.5 * (untiled - expected).norm()


# Against the untiled decode, with the demo's VAE


@pytest.fixture(scope="module")
def demo_vae() -> VideoVAE:
    return load_video_vae(DEMO_VAE, device=torch.device("cpu"), dtype=torch.float32)


def scene(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Frames uint8 of one scene, cut to height × width."""
    side = max(height, width)
    drawn = render(random_scene(random.Random(seed)), frames, side)
    top = (side - height) // 2
    return drawn[:, top : top + height, :width]


def encoded(vae: VideoVAE, frames: np.ndarray) -> torch.Tensor:
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode():
        return vae.encode(video)[0]


def rolled_and_untiled(
    vae: VideoVAE, latent: torch.Tensor, plan: TilePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.cat(list(tiled_decode(RollingVAEDecoder(vae), latent, plan, convert=as_floats)))
    with torch.inference_mode():
        return frames, as_floats(vae.decode(latent))


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item()
    return 10 * float(np.log10(4 / error))


SIDE_PX = 48


def shown(seed: int) -> np.ndarray:
    """A second of a scene."""
    return scene(25, SIDE_PX, SIDE_PX, seed)


def plain(level: int) -> np.ndarray:
    return np.full((25, SIDE_PX, SIDE_PX, 3), level, np.uint8)


def cut(at: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one[:at], other[at:]])


def lit(frames: np.ndarray) -> np.ndarray:
    frames[12:14] = 255
    return frames


def faded(like: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    share = np.linspace(0, 1, len(like))[:, None, None, None]
    return (one * (1 - share) + other * share).astype(np.uint8)


ONE_SECOND: dict[str, Callable[[], np.ndarray]] = {
    "a moving shape": lambda: shown(1),
    "cut at a third": lambda: cut(8, shown(5), shown(8)),
    "cut in the middle": lambda: cut(13, shown(5), shown(8)),
    "cut at two thirds": lambda: cut(16, shown(8), shown(5)),
    "black to white": lambda: cut(12, plain(0), plain(255)),
    "white to black": lambda: cut(12, plain(255), plain(0)),
    "a scene to white": lambda: cut(17, shown(2), plain(255)),
    "a shape that jumps": lambda: shown(2)[[index % 9 for index in range(25)]],
    "a flash on one scene": lambda: lit(shown(1)),
    "a flash on another": lambda: lit(shown(8)),
    "a fade from black": lambda: faded(shown(9), plain(0), shown(9)),
    "a fade to black": lambda: faded(shown(9), shown(9), plain(0)),
    "a crossfade": lambda: faded(shown(9), shown(5), shown(9)),
}


@pytest.mark.parametrize("name", ONE_SECOND)
def test_a_second_with_cuts_of_any_kind_is_near_its_untiled_decode(
    demo_vae: VideoVAE, name: str
) -> None:
    """In one tile, and longer than what is looked at as a whole."""
    assert LONGEST_RUN < 25
    latent = encoded(demo_vae, ONE_SECOND[name]())
    plan = plan_tiles(25, SIDE_PX, SIDE_PX)
    assert psnr_db(*rolled_and_untiled(demo_vae, latent, plan)) >= 40


def test_what_is_looked_at_as_a_whole_is_exact(demo_vae: VideoVAE) -> None:
    latent = encoded(demo_vae, cut(11, shown(5), shown(8))[:21])
    plan = plan_tiles(21, SIDE_PX, SIDE_PX)
    assert psnr_db(*rolled_and_untiled(demo_vae, latent, plan)) >= 100


@pytest.mark.parametrize("name", ["cut at a third", "a fade from black", "a flash on another"])
def test_four_tiles_have_the_statistics_of_one(demo_vae: VideoVAE, name: str) -> None:
    latent = encoded(demo_vae, ONE_SECOND[name]())
    plan = plan_tiles(25, SIDE_PX, SIDE_PX, tile_height=32, tile_width=32, overlap=16)
    assert plan.tiles == 4
    assert psnr_db(*rolled_and_untiled(demo_vae, latent, plan)) >= 40


def test_a_fade_of_two_seconds_is_near_its_untiled_decode(demo_vae: VideoVAE) -> None:
    """Longer than there are stills and changes to look at: what lies between them is interpolated."""
    frames = scene(49, SIDE_PX, SIDE_PX, 9)
    latent = encoded(demo_vae, faded(frames, np.zeros_like(frames), frames))
    plan = plan_tiles(49, SIDE_PX, SIDE_PX)
    assert psnr_db(*rolled_and_untiled(demo_vae, latent, plan)) >= 40


@pytest.mark.parametrize("frames", [5, 13], ids=["as a run", "in samples"])
def test_samples_that_wait_in_main_memory_in_parts_tell_the_same(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part sees beyond its edges what a layer sees, so nothing depends on how they are cut."""
    monkeypatch.setattr(samples, "LONGEST_RUN", 5)
    decoder = RollingVAEDecoder(tiny())
    features = decoder.narrow(latent_of(((frames + 3) // 4, 9, 6)))
    whole = taken(features, plan_tiles(frames, 72, 48))
    assert (whole.run is not None) == (frames == 5)
    moved: list[str] = []
    places = Places(
        park=lambda tensor: moved.append("parked") or tensor.clone(),
        fetch=lambda tensor: moved.append("fetched") or tensor,
    )
    found = []
    for window in (None, (4, 4)):
        decoder.calibrate(dataclasses.replace(whole, window=window), places)
        found.append([norm._moments for norm in norms_of(decoder)])
        assert bool(moved) == (window is not None)
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        assert relative_error(other[0], one[0]) <= 1e-5 and relative_error(other[1], one[1]) <= 1e-5


def wide(frames: int, seed: int) -> np.ndarray:
    return scene(frames, SIDE_PX, 96, seed)


SEAMED: dict[str, Callable[[], np.ndarray]] = {
    "a moving shape": lambda: wide(9, 2),
    "a cut": lambda: cut(5, wide(9, 5), wide(9, 8)),
    "a cut in a second": lambda: cut(8, wide(25, 5), wide(25, 8)),
}


@pytest.mark.parametrize("name", SEAMED)
def test_tiles_are_near_the_untiled_decode_and_leave_no_seam(demo_vae: VideoVAE, name: str) -> None:
    shown = SEAMED[name]()
    latent = encoded(demo_vae, shown)
    plan = plan_tiles(len(shown), SIDE_PX, 96, tile_width=64, overlap=32)
    tiled, untiled = rolled_and_untiled(demo_vae, latent, plan)
    assert psnr_db(tiled, untiled) >= 40
    steps = [frames.diff(dim=2).abs().mean(dim=(0, 1, 3)) for frames in (tiled, untiled)]
    seam = torch.zeros(len(steps[0]), dtype=torch.bool)
    for column in plan.columns[1:]:
        seam[8 * column.start - 1 : 8 * (column.start + column.lead)] = True
    at_seams, elsewhere = (
        (steps[0][where].mean() / steps[1][where].mean()).item() for where in (seam, ~seam)
    )
    assert at_seams <= 1.02 * elsewhere
