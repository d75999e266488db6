"""The image models against diffusers' two image pipelines, on tiny random components it saved itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_model import ENCODERS, I2I, T2I, VAE, picture

from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.loading import load_transformer
from kandinsky5.model.text import Conditioning
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.denoise import Guidance, denoise, draw_noise, schedule
from kandinsky5.pipeline.model_inputs import config_for, inputs_for
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import DEMO_FOLDER, PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import PROMPT_TEMPLATES

CPU = torch.device("cpu")
STEPS, SHIFT, SCALE = 4, 3.0, 3.5
WIDTH, HEIGHT = 96, 64
SEEN = "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
PROMPTS = ("a red circle on a dark background", "blurry")


@pytest.fixture(autouse=True)
def oracle_in_float32(monkeypatch) -> None:
    """diffusers rounds rotated queries and keys to bfloat16 whatever the model's dtype; not here."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")

    class Float32Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(module, "torch", Float32Torch())


@pytest.fixture(scope="module", params=["image-t2i", "image-i2i"])
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """A preset, and a folder with its components as ``save_pretrained`` writes them."""
    diffusers = pytest.importorskip("diffusers")
    config = T2I if request.param == "image-t2i" else I2I
    folder = tmp_path_factory.mktemp(request.param)
    names = ("visual_cond", "instruct_type")
    dims = {n: v for n, v in vars(config).items() if n not in names}
    torch.manual_seed(5)
    transformer = diffusers.Kandinsky5Transformer3DModel(
        **dims, visual_cond=config.input_channels > 16
    )
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    transformer.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKL(
        **vars(VAE),
        shift_factor=0.1159,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.save_pretrained(folder / "vae")
    for name in ENCODERS:
        shutil.copytree(DEMO_FOLDER / name, folder / name)
    return request.param, folder


def oracle(preset: str, folder: Path):
    """diffusers' pipeline around what was saved, on kandinskylab's schedule and with its templates."""
    import diffusers
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PublishedSchedule(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.sigmas = schedule(num_inference_steps, SHIFT)
            self.timesteps = self.sigmas[:-1] * 1000
            self.num_inference_steps = num_inference_steps
            self._step_index = self._begin_index = None

    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    pixels = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)

    class Processor:
        """What the library's processor does, which would ask for torchvision (for videos)."""

        image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

        def __call__(self, text, images=None, **_):
            seen = {} if images is None else pixels(images=images, return_tensors="pt")
            if images is not None:
                cells = int(seen["image_grid_thw"].prod()) // 4
                text = [t.replace("<|image_pad|>", "<|image_pad|>" * cells) for t in text]
            inputs = dict(tokenizer(text, return_tensors="pt"))
            if images is not None:
                kinds = (inputs["input_ids"] == self.image_token_id).int()
                inputs |= {"mm_token_type_ids": kinds, **seen}
            return transformers.BatchFeature(inputs)

    kind = {"image-t2i": "Kandinsky5T2IPipeline", "image-i2i": "Kandinsky5I2IPipeline"}[preset]
    pipeline = getattr(diffusers, kind)(
        transformer=diffusers.Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ),
        tokenizer=None,
        text_encoder_2=transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder_2", dtype=torch.float32
        ),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=PublishedSchedule(),
    )
    pipeline.tokenizer = Processor()
    template = PROMPT_TEMPLATES[PRESETS[preset].template]
    pipeline.prompt_template = template.text + (SEEN if preset == "image-i2i" else "")
    pipeline.prompt_template_encode_start_idx = template.crop_start
    pipeline.resolutions = [(WIDTH, HEIGHT)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_oracle(pipeline, **arguments) -> torch.Tensor:
    """Final latents [1, H, W, 16]."""
    with torch.no_grad():
        return pipeline(
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="latent",
            return_dict=False,
            **arguments,
        )[0][0][..., :16].reshape(1, HEIGHT // 8, WIDTH // 8, 16)


def conditioning(config: DiTConfig, seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(tokens, config.in_text_dim, generator=generator),
        torch.randn(config.in_text_dim2, generator=generator),
    )


def embeddings(name: str, c: Conditioning) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, len(c.text)], dtype=torch.int32)
    return {
        f"{name}_embeds_qwen": c.text[None],
        f"{name}_embeds_clip": c.pooled[None],
        f"{name}_cu_seqlens": lengths,
    }


def test_given_noise_and_embeddings_the_latents_are_equal_after_four_steps(saved) -> None:
    preset, folder = saved
    transformer = load_transformer(folder / "transformer", device=CPU)
    config = config_for(transformer.config, PRESETS[preset])
    generator = torch.Generator().manual_seed(1)
    noise = draw_noise((1, HEIGHT // 8, WIDTH // 8, 16), generator)
    beside = draw_noise(tuple(noise.shape), generator) if preset == "image-i2i" else None
    inputs = inputs_for(config, beside)
    positive, negative = conditioning(config, 2, 9), conditioning(config, 3, 4)
    given = {"image": picture(WIDTH, HEIGHT)} if preset == "image-i2i" else {}
    expected = run_oracle(
        oracle(preset, folder),
        latents=inputs.of(noise)[None],
        **embeddings("prompt", positive),
        **embeddings("negative_prompt", negative),
        **given,
    )
    ours = denoise(
        transformer,
        noise,
        Guidance(positive, negative, SCALE),
        schedule(STEPS, SHIFT),
        inputs=inputs,
    )
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def test_from_the_prompt_latents_and_picture_are_equal(saved, tmp_path, monkeypatch) -> None:
    preset, folder = saved
    pillow = Image.Image.resize
    # kandinskylab halves the picture for Qwen bilinearly, diffusers as Pillow does by default
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, resample=None, *a, **k: pillow(
            self, size, Image.Resampling.BILINEAR if resample is None else resample, *a, **k
        ),
    )
    given = {}
    if preset == "image-i2i":
        given = {"image": picture(WIDTH, HEIGHT)}
        given["image"].save(tmp_path / "in.png")
    pipeline = oracle(preset, folder)
    expected = run_oracle(
        pipeline,
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        generator=torch.Generator().manual_seed(11),
        **given,
    )
    request = GenerationRequest(
        preset=preset,
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        image=str(tmp_path / "in.png") if given else None,
        seed=11,
        width=WIDTH,
        height=HEIGHT,
        steps=STEPS,
        shift=SHIFT,
        guidance=SCALE,
        model_dir=str(folder),
        save_latents=str(tmp_path / "latents.safetensors"),
        expand=False,
        device="cpu",
        dtype="fp32",
    )
    Pipeline().run(request, out=tmp_path / "out.png")
    ours, _ = load_latents(tmp_path / "latents.safetensors")
    assert (ours - expected).abs().max() <= 1e-3 * max(1.0, expected.abs().max().item())
    with torch.no_grad():
        z = expected.permute(0, 3, 1, 2) / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(z).sample[0].permute(1, 2, 0)
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(int)
    painted = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert np.abs(painted - levels).max() <= 1
