"""A small decoder for previews: latents to pixels, one frame for each latent frame.

Its tensors are named and shaped as those of the published TAEHV files (tiny autoencoders for video
latents), so that a file of theirs loads as it is; widths are read from the file. As their previews do, this
one leaves out the growth in time, and the last enlargements where pictures would become larger than anybody
looks at. Frames are decoded one by one, each seeing the one before it: memory does not grow with the length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint

LEVELS = 3
"""Each doubles height and width."""
_MEMORIES = 3
"""Memory blocks in a level."""
_PREFIX = "decoder."
_LEVEL_ROWS = _MEMORIES + 3
_WEIGHT = re.compile(r"(?:encoder|decoder)\.\d+\..*weight|(?:encoder|decoder)\.\d+\..*bias")


def _convolution(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class MemoryBlock(nn.Module):
    """Residual block that sees a frame and the one before it, both [1, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(2 * width, width),
            nn.ReLU(),
            _convolution(width, width),
            nn.ReLU(),
            _convolution(width, width),
        )

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class TimeProjection(nn.Module):
    """What is left of a growth in time when one frame stays one: the rows for the last of its frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y


class TinyDecoder(nn.Module):
    """Latents [T, H, W, C] → frames [T, 8H, 8W, 3] in 0 … 1.

    Args:
        channels: of the latent.
        widths: channels of the three levels and of the last layer.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.channels, self.widths = channels, widths
        rows: list[nn.Module] = [nn.Identity(), _convolution(channels, widths[0]), nn.ReLU()]
        for width, following in pairwise(widths):
            rows += [MemoryBlock(width) for _ in range(_MEMORIES)]
            rows += [nn.Identity(), TimeProjection(width)]
            rows.append(_convolution(width, following, bias=False))
        rows += [nn.ReLU(), _convolution(widths[-1], 3)]
        # Named as in the files: what has no weights holds its number.
        self.decoder = nn.ModuleList(rows)

    def forward(self, latents: torch.Tensor, levels: int = LEVELS) -> torch.Tensor:
        """Decode frame after frame.

        Args:
            latents: scaled, as the transformer sees them, [T, H, W, C].
            levels: how many of the three enlargements to make, 0 … 3; the work falls with them.

        Returns:
            float32 [T, 2**levels·H, 2**levels·W, 3] in 0 … 1.
        """
        frames: list[torch.Tensor] = []
        before: dict[int, torch.Tensor] = {}
        for frame in latents.to(next(self.parameters()).dtype).permute(0, 3, 1, 2).split(1):
            picture, before = self._frame(frame, before, levels)
            frames.append(picture.float().clamp(0.0, 1.0))
        return torch.cat(frames).permute(0, 2, 3, 1)

    def _frame(
        self, x: torch.Tensor, before: Mapping[int, torch.Tensor], levels: int
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(picture, what each memory block saw)."""
        seen = {}
        x = torch.tanh(x / 3) * 3  # the published range of latents, gently kept
        for number, row in enumerate(self.decoder):
            level, within = divmod(number - 3, _LEVEL_ROWS)
            if isinstance(row, MemoryBlock):
                seen[number] = x
                x = row(x, before.get(number, torch.zeros_like(x)))
            elif isinstance(row, nn.Identity):
                if within == _MEMORIES and 0 <= level < levels:
                    x = F.interpolate(x, scale_factor=2)
            else:
                x = row(x)
        return x, seen


def work_macs(
    widths: tuple[int, int, int, int], frames: int, height: int, width: int, levels: int
) -> int:
    """Multiplications of decoding a latent [frames, height, width], for deciding whether it is worth it."""
    total, pixels = 0, frames * height * width
    for level, (here, following) in enumerate(pairwise(widths)):
        total += _MEMORIES * 4 * 9 * here * here * pixels
        pixels *= 4 if level < levels else 1
        total += (here * here + 9 * here * following) * pixels
    return total + 27 * widths[-1] * pixels


def load_tiny_decoder(path: Path, *, channels: int, device: torch.device) -> TinyDecoder:
    """Read a decoder from a safetensors file in TAEHV's layout; an encoder beside it is left alone.

    Args:
        path: the file.
        channels: of the latents it is for.
        device: where the weights go; they keep the dtype they have there, float32 on a CPU.

    Raises:
        CheckpointError: not such a file, or for other latents; the first thing that is wrong is named.
    """
    with Checkpoint(path) as file:
        widths = _widths_of(path, file.shapes, channels)
        with torch.device("meta"):
            model = TinyDecoder(channels, widths)
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        for name, wanted in model.state_dict().items():
            tensor = file.read(name)
            if tensor.shape != wanted.shape:  # a growth in time: one group of rows for each frame
                tensor = tensor[-wanted.shape[0] :]
            module, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, parameter)
    return model.eval()


def _widths_of(
    path: Path, shapes: Mapping[str, tuple[int, ...]], channels: int
) -> tuple[int, int, int, int]:
    """The widths, when every tensor of the decoder is there and fits them."""
    strangers = [name for name in shapes if not _WEIGHT.fullmatch(name)]
    first = shapes.get(f"{_PREFIX}1.weight", ())
    if strangers or len(first) != 4:
        raise CheckpointError(path, "not a tiny decoder (TAEHV): other tensor names")
    if first[1] != channels:
        raise CheckpointError(path, f"a tiny decoder for {first[1]} channels, not {channels}")
    rows = [1, *(3 + _LEVEL_ROWS * (level + 1) - 1 for level in range(LEVELS))]
    found = [shapes.get(f"{_PREFIX}{row}.weight", (0,))[0] for row in rows]
    if not all(0 < width <= 4096 for width in found):
        raise CheckpointError(path, "not a whole tiny decoder: a level is missing")
    widths = (found[0], found[1], found[2], found[3])
    with torch.device("meta"):
        expected = {
            name: tuple(t.shape) for name, t in TinyDecoder(channels, widths).state_dict().items()
        }
    unexpected = [n for n in shapes if n.startswith(_PREFIX) and n not in expected]
    wrong = [n for n, shape in expected.items() if not _fits(shapes.get(n, ()), shape)]
    if wrong or unexpected:
        name = (wrong or unexpected)[0]
        raise CheckpointError(
            path, f"not a tiny decoder that K1 knows: {name} is {list(shapes.get(name, ()))}"
        )
    return widths


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a time projection with rows for two or four frames."""
    grown = wanted[2:] == (1, 1) and found[1:] == wanted[1:]
    return found == wanted or (grown and found[0] in (2 * wanted[0], 4 * wanted[0]))
