"""diffusers' four Kandinsky 5 pipelines as oracles: kandinskylab's schedule and templates, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import MODES

from kandinsky5.pipeline.denoise import schedule
from kandinsky5.presets import PRESETS
from kandinsky5.templates import PROMPT_TEMPLATES

SEEN = "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
"""What kandinskylab puts behind an editing prompt."""


class Float32Torch:
    """torch in whose eyes bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds rotated queries and keys to bfloat16 whatever the model's dtype: a float32 run of it
    compares float32 arithmetic only when that one cast is taken out."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    monkeypatch.setattr(module, "torch", Float32Torch())


def published_schedule(shift: float) -> Any:
    """A scheduler of diffusers on kandinskylab's times.

    diffusers spaces its steps between 1 and 1/1000; the published code goes from 1 to 0.
    """
    diffusers = pytest.importorskip("diffusers")

    class PublishedSchedule(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.sigmas = schedule(num_inference_steps, shift)
            self.timesteps = self.sigmas[:-1] * 1000
            self.num_inference_steps = num_inference_steps
            self._step_index = self._begin_index = None

    return PublishedSchedule()


def published_normalisation(latents: torch.Tensor) -> torch.Tensor:
    """Frame by frame as kandinskylab has it (diffusers takes the four frames' statistics together).

    Args:
        latents: [1, T, H, W, C].
    """
    result = latents.numpy().copy()
    reference = result[:, 4:9]
    for frame in result[0, :4]:
        mean, std = frame.mean(), frame.std(ddof=1)
        new_mean = min(max(reference.mean(), mean - 0.05), mean + 0.1)
        new_std = min(max(reference.std(ddof=1), std - 0.1), std + 0.25)
        frame[...] = (frame - mean) / std * new_std + new_mean
    return torch.from_numpy(result)


class Processor:
    """What Qwen's processor of the library does, which would ask for torchvision (for videos)."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self._tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self._patches = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
        self.image_token_id = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, text: list[str], images: Any = None, **_: Any) -> Any:
        from transformers import BatchFeature

        if images is None:
            return BatchFeature(dict(self._tokenizer(text, return_tensors="pt")))
        seen = self._patches(images=images, return_tensors="pt")
        cells = int(seen["image_grid_thw"].prod()) // 4
        text = [one.replace("<|image_pad|>", "<|image_pad|>" * cells) for one in text]
        inputs = dict(self._tokenizer(text, return_tensors="pt"))
        kinds = (inputs["input_ids"] == self.image_token_id).int()
        return BatchFeature({**inputs, "mm_token_type_ids": kinds, **seen})


def pipeline_of(mode: str, folder: Path, size: tuple[int, int], shift: float) -> Any:
    """A mode's pipeline around the components of a ``-Diffusers`` folder.

    Args:
        size: (width, height) in pixels, the only one it knows.
    """
    import diffusers
    import transformers

    preset = PRESETS[MODES[mode].preset]
    vae = diffusers.AutoencoderKLHunyuanVideo if preset.is_video else diffusers.AutoencoderKL
    pipeline = getattr(diffusers, MODES[mode].pipeline)(
        transformer=diffusers.Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer"),
        vae=vae.from_pretrained(folder / "vae"),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ),
        tokenizer=None,
        text_encoder_2=transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder_2", dtype=torch.float32
        ),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=published_schedule(shift),
    )
    pipeline.tokenizer = Processor(folder / "tokenizer")
    template = PROMPT_TEMPLATES[preset.template]
    pipeline.prompt_template = template.text + (SEEN if mode == "i2i" else "")
    pipeline.prompt_template_encode_start_idx = template.crop_start
    if preset.is_video:
        pipeline._get_scale_factor = lambda height, width: preset.rope_scale
        pipeline.normalize_first_frame = published_normalisation
    else:
        pipeline.resolutions = [size]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
