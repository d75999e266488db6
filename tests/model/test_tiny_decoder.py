"""The previews' small decoder: TAEHV's names and shapes, frame by frame the same as all at once."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from kandinsky5.errors import CheckpointError
from kandinsky5.model.tiny_decoder import TinyDecoder, load_tiny_decoder, work_macs

CPU = torch.device("cpu")
WIDTHS = (8, 6, 4, 4)
PUBLISHED = {
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.3.conv.0.weight": (256, 512, 3, 3),
    "decoder.5.conv.4.bias": (256,),
    "decoder.7.conv.weight": (256, 256, 1, 1),
    "decoder.8.weight": (128, 256, 3, 3),
    "decoder.13.conv.weight": (128, 128, 1, 1),
    "decoder.14.weight": (64, 128, 3, 3),
    "decoder.17.conv.2.weight": (64, 64, 3, 3),
    "decoder.19.conv.weight": (64, 64, 1, 1),
    "decoder.20.weight": (64, 64, 3, 3),
    "decoder.22.weight": (3, 64, 3, 3),
    "decoder.22.bias": (3,),
}
"""Of the published file for HunyuanVideo, its growths in time taken as one frame."""


@pytest.fixture
def model() -> TinyDecoder:
    torch.manual_seed(0)
    made = TinyDecoder(16, WIDTHS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


def written(path, model: TinyDecoder, **changes: torch.Tensor | None):
    """The model as a file, with tensors (dots as double underscores) changed, added or left out."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    safetensors.torch.save_file(tensors, path)
    return path


def all_at_once(state: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """The same network written down plainly, all frames together."""

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = state[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, state.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv(3 * torch.tanh(latents.permute(0, 3, 1, 2) / 3), "1").relu()
    for first in (3, 9, 15):
        for row in range(first, first + 3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = conv(torch.cat([x, before], 1), f"{row}.conv.0").relu()
            y = conv(conv(y, f"{row}.conv.2").relu(), f"{row}.conv.4")
            x = (x + y).relu()
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(conv(x, f"{first + 4}.conv"), str(first + 5))
    return conv(x.relu(), "22").clamp(0, 1).permute(0, 2, 3, 1)


def test_its_tensors_are_named_and_shaped_as_published():
    with torch.device("meta"):
        shapes = {
            n: tuple(t.shape) for n, t in TinyDecoder(16, (256, 128, 64, 64)).state_dict().items()
        }
    assert {name: shapes.get(name) for name in PUBLISHED} == PUBLISHED
    assert len(shapes) == 2 + 3 * (3 * 6 + 2) + 2


@torch.inference_mode()
def test_frame_by_frame_is_the_same_as_all_at_once(model):
    latents = torch.randn(5, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    pictures = model(latents)
    assert pictures.shape == (5, 24, 32, 3)
    expected = all_at_once(model.state_dict(), latents)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.05


@torch.inference_mode()
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_enlargements_can_be_left_out(model, levels):
    assert model(torch.zeros(2, 3, 4, 16), levels).shape == (2, 3 * 2**levels, 4 * 2**levels, 3)


@torch.inference_mode()
def test_a_file_comes_back_and_its_growth_in_time_is_its_last_frame(tmp_path, model):
    latents = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    plain = load_tiny_decoder(written(tmp_path / "a.safetensors", model), channels=16, device=CPU)
    assert torch.equal(plain(latents), model(latents))
    last = model.state_dict()["decoder.13.conv.weight"]
    grown = written(
        tmp_path / "b.safetensors",
        model,
        decoder__13__conv__weight=torch.cat([torch.full_like(last, 9.0), last]),
        encoder__0__weight=torch.zeros(4, 3, 3, 3),
    )
    assert torch.equal(load_tiny_decoder(grown, channels=16, device=CPU)(latents), model(latents))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder__22__bias": None}, r"decoder\.22\.bias"),
        ({"decoder__8__weight": torch.zeros(6, 9, 3, 3)}, r"decoder\.8\.weight is \[6, 9, 3, 3\]"),
        ({"decoder__13__conv__weight": torch.zeros(18, 6, 1, 1)}, r"decoder\.13\.conv\.weight"),
        ({"decoder__4__skip__weight": torch.zeros(8, 8, 1, 1)}, "skip"),
        ({"decoder__14__weight": None}, "a level is missing"),
        ({"blocks__0__weight": torch.zeros(2)}, "other tensor names"),
        ({"decoder__1__weight": torch.zeros(8, 48, 3, 3)}, "for 48 channels, not 16"),
        ({"decoder__22__weight": torch.zeros(12, 4, 3, 3)}, r"decoder\.22\.weight is \[12"),
    ],
)
def test_what_is_no_such_decoder_is_refused(tmp_path, model, changes, reason):
    path = written(tmp_path / "a.safetensors", model, **changes)
    with pytest.raises(CheckpointError, match=reason):
        load_tiny_decoder(path, channels=16, device=CPU)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "taehv.safetensors"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="pickle"):
        load_tiny_decoder(path, channels=16, device=CPU)


@pytest.mark.parametrize("levels", [0, 3])
def test_the_work_is_that_of_the_convolutions(levels):
    counted = 0

    def count(module, inputs, output) -> None:
        nonlocal counted
        weight = module.weight
        counted += math.prod(weight.shape) * output.shape[-1] * output.shape[-2]

    with torch.device("meta"):
        model = TinyDecoder(16, WIDTHS)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module is not model.decoder[1]:
                module.register_forward_hook(count)
        model(torch.zeros(3, 4, 5, 16), levels)
    assert work_macs(WIDTHS, 3, 4, 5, levels) == counted
