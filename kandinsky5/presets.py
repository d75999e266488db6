"""The published configurations of Kandinsky 5, and the built-in demo, as rows of one frozen table.

Figures: kandinskylab's configuration files (github kandinskylab/kandinsky-5, MIT). Where a configuration
names no schedule shift the published pipeline's own default stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DEMO_FOLDER = Path(__file__).resolve().parent / "demo" / "model"
"""The built-in model, in the layout of a ``-Diffusers`` folder."""

FRAMES_PER_SECOND = 24
TEMPORAL_COMPRESSION = 4
SPATIAL_COMPRESSION = 8
PATCH_PX = 16
"""Side of a token in pixels: the VAE's 8 times the patch's 2."""
MAX_SIDE_PX = 2048
MAX_VIDEO_S = 21.0
"""Rotary tables hold 128 positions an axis: 128·16 px a side, (128−1)/6 s, rounded down to whole seconds."""


NABLA_MULTIPLE_PX = 128
"""Sides with NABLA attention: tiles of 8×8 tokens of 16 pixels."""


@dataclass(frozen=True)
class NablaSettings:
    """NABLA attention as a preset uses it: share of probability kept, windows in blocks."""

    P: float = 0.9
    wT: int = 11
    wH: int = 3
    wW: int = 3


@dataclass(frozen=True)
class Preset:
    """One published configuration.

    Attributes:
        name: as typed on the command line.
        title: as shown to a person.
        mode: ``t2v``, ``i2v``, ``t2i`` or ``i2i``.
        model: family member, ``lite``, ``pro``, ``image`` or ``demo``.
        weights_file: file name of the single-file checkpoint; empty for the demo.
        repository: its repository on the hub; empty for the demo.
        steps, guidance, shift: sampling defaults.
        sizes_px: trained sizes (width, height), the default first.
        multiple_px: both sides are multiples of this.
        area_px: pixels an input image is resized to.
        seconds: default length; 0 for images.
        rope_scale: divisors of the rotary angles (time, height, width).
        nabla: sparse attention, or None for full attention.
        template: name in :data:`kandinsky5.templates.PROMPT_TEMPLATES`.
        text_tokens: most tokens of a prompt (after the template) the model was trained with.
        vae: ``hunyuan`` (video) or ``flux`` (image).
    """

    name: str
    title: str
    mode: str
    model: str
    weights_file: str
    repository: str
    steps: int = 50
    guidance: float = 5.0
    shift: float = 10.0
    sizes_px: tuple[tuple[int, int], ...] = ((768, 512), (512, 768), (512, 512))
    multiple_px: int = 16
    area_px: int = 512 * 768
    seconds: float = 5.0
    rope_scale: tuple[float, float, float] = (1.0, 2.0, 2.0)
    nabla: NablaSettings | None = None
    template: str = "video"
    text_tokens: int = 256
    clip_tokens: int = 77
    vae: str = "hunyuan"

    @property
    def is_video(self) -> bool:
        return self.mode in ("t2v", "i2v")

    @property
    def takes_image(self) -> bool:
        return self.mode in ("i2v", "i2i")

    @property
    def is_builtin(self) -> bool:
        return self.model == "demo"

    @property
    def diffusers_repository(self) -> str:
        """The repository that holds the same weights in diffusers' layout."""
        if self.model == "image":
            stage = "" if self.repository.endswith("-pretrain") else "-sft"
            return f"{self.repository}{stage}-Diffusers"
        return f"{self.repository}-Diffusers" if self.repository else ""


_SIZES_1024 = (
    (1024, 1024),
    (1280, 768),
    (768, 1280),
    (1152, 896),
    (896, 1152),
    (1408, 640),
    (640, 1408),
)
_HD: dict[str, Any] = {
    "sizes_px": _SIZES_1024,
    "multiple_px": 128,
    "area_px": 1024 * 1024,
    "rope_scale": (1.0, 3.16, 3.16),
}


def _lite_t2v(seconds: int, variant: str, title: str) -> Preset:
    file_variant = {"distilled": "distilled16steps"}.get(variant, variant)
    return Preset(
        name=f"lite-t2v-{seconds}s-{variant}",
        title=f"Lite 2B · text → video · {seconds} s · {title}",
        mode="t2v",
        model="lite",
        weights_file=f"kandinsky5lite_t2v_{file_variant}_{seconds}s.safetensors",
        repository=f"kandinskylab/Kandinsky-5.0-T2V-Lite-{file_variant}-{seconds}s",
        steps=16 if variant == "distilled" else 50,
        guidance=1.0 if variant in ("nocfg", "distilled") else 5.0,
        shift=5.0 if (variant, seconds) == ("distilled", 5) else 10.0,
        seconds=float(seconds),
        multiple_px=16 if seconds == 5 else 128,
        nabla=None if seconds == 5 else NablaSettings(P=0.9),
    )


def _pro_t2v(seconds: int, variant: str) -> Preset:
    return Preset(
        name=f"pro-t2v-{seconds}s-sd",
        title=f"Pro 19B · text → video · {seconds} s · SD",
        mode="t2v",
        model="pro",
        weights_file=f"kandinsky5pro_t2v_{variant}_{seconds}s.safetensors",
        repository=f"kandinskylab/Kandinsky-5.0-T2V-Pro-{variant}-{seconds}s",
        seconds=float(seconds),
        multiple_px=16 if seconds == 5 else 128,
        nabla=None if seconds == 5 else NablaSettings(P=0.9),
    )


def _rows() -> list[Preset]:
    demo = Preset(
        name="demo-t2v",
        title="Built-in demo · text → video",
        mode="t2v",
        model="demo",
        weights_file="",
        repository="",
        steps=24,
        guidance=1.5,
        shift=7.0,
        sizes_px=((64, 64),),
        multiple_px=64,
        area_px=64 * 64,
        seconds=1.0,
        rope_scale=(1.0, 1.0, 1.0),
        template="demo",
        text_tokens=64,
    )
    rows = [
        demo,
        replace(
            demo, name="demo-i2v", title="Built-in demo · image → video", mode="i2v", shift=5.0
        ),
    ]

    variants = {
        "sft": "best quality",
        "nocfg": "no guidance",
        "distilled": "16 steps",
        "pretrain": "pretrain",
    }
    rows += [_lite_t2v(s, variant, title) for s in (5, 10) for variant, title in variants.items()]
    rows.append(
        Preset(
            name="lite-i2v-5s",
            title="Lite 2B · image → video · 5 s",
            mode="i2v",
            model="lite",
            weights_file="kandinsky5lite_i2v_5s.safetensors",
            repository="kandinskylab/Kandinsky-5.0-I2V-Lite-5s",
        )
    )

    for seconds, p_hd in ((5, 0.8), (10, 0.7)):
        sd = _pro_t2v(seconds, "sft")
        hd = replace(
            sd,
            name=f"pro-t2v-{seconds}s-hd",
            title=f"Pro 19B · text → video · {seconds} s · HD",
            nabla=NablaSettings(P=p_hd),
            **_HD,
        )
        for row in (sd, hd):
            pretrain = replace(
                row,
                name=f"{row.name}-pretrain",
                title=f"{row.title} · pretrain",
                weights_file=row.weights_file.replace("_sft_", "_pretrain_"),
                repository=row.repository.replace("-sft-", "-pretrain-"),
            )
            rows += [row, pretrain]
    pro_i2v = Preset(
        name="pro-i2v-5s-sd",
        title="Pro 19B · image → video · 5 s · SD",
        mode="i2v",
        model="pro",
        weights_file="kandinsky5pro_i2v_sft_5s.safetensors",
        repository="kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s",
    )
    rows.append(pro_i2v)
    rows.append(
        replace(
            pro_i2v,
            name="pro-i2v-5s-hd",
            title="Pro 19B · image → video · 5 s · HD",
            nabla=NablaSettings(P=0.8),
            shift=5.0,
            **_HD,
        )
    )

    image = Preset(
        name="image-t2i",
        title="Image 6B · text → image",
        mode="t2i",
        model="image",
        weights_file="kandinsky5lite_t2i.safetensors",
        repository="kandinskylab/Kandinsky-5.0-T2I-Lite",
        guidance=3.5,
        shift=3.0,
        sizes_px=_SIZES_1024,
        area_px=1024 * 1024,
        seconds=0.0,
        rope_scale=(1.0, 1.0, 1.0),
        template="image",
        text_tokens=512,
        vae="flux",
    )
    edit = replace(
        image,
        name="image-i2i",
        title="Image 6B · edit an image",
        mode="i2i",
        weights_file="kandinsky5lite_i2i.safetensors",
        repository="kandinskylab/Kandinsky-5.0-I2I-Lite",
        template="image_edit",
    )
    for row in (image, edit):
        pretrain = replace(
            row,
            name=f"{row.name}-pretrain",
            title=f"{row.title} · pretrain",
            weights_file=row.weights_file.replace(".safetensors", "_pretrain.safetensors"),
            repository=f"{row.repository}-pretrain",
        )
        rows += [row, pretrain]
    return rows


PRESETS: dict[str, Preset] = {row.name: row for row in _rows()}
"""Every preset by its name, the demo first."""

MODES = {
    "t2v": "Text → video",
    "i2v": "Image → video",
    "t2i": "Text → image",
    "i2i": "Edit image",
}
