"""A prompt with a picture becomes what the whole Qwen2.5-VL of the library makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.errors import CheckpointError
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.model.text_picture import Sight
from kandinsky5.templates import PROMPT_TEMPLATES

CPU = torch.device("cpu")
EDIT = PROMPT_TEMPLATES["image_edit"]
PROMPT = "a red circle moves right"
SIZES = [(56, 56), (64, 100), (112, 84)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoders(parts: Path, sight: bool = True) -> TextEncoders:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    files = SimpleNamespace(**{name: parts / name for name in names})
    eyes = Sight.load(files.text_encoder, device=CPU, dtype=torch.float32) if sight else None
    return TextEncoders.load(files, device=CPU, dtype=torch.float32, sight=eyes)


def encoded(made: TextEncoders, prompt: str, seen: np.ndarray, max_tokens: int) -> Conditioning:
    return made.encode(prompt, prompt, EDIT, max_tokens, picture=seen)


def library_run(parts: Path, prompt: str, seen: np.ndarray) -> torch.Tensor:
    """The library's own processor's work done in the open, then its whole model."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        parts / "text_encoder", dtype=torch.float32
    )
    inputs = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)(
        images=Image.fromarray(seen), return_tensors="pt"
    )
    cells = int(inputs["image_grid_thw"].prod()) // 4
    text = f"{EDIT.text.format(prompt)}<|vision_start|>{'<|image_pad|>' * cells}"
    text += "<|vision_end|><|im_end|>"
    ids = Qwen2Tokenizer.from_pretrained(parts / "tokenizer")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            output_hidden_states=True,
        ).hidden_states[-1]
    return states[0, EDIT.crop_start :]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["prompt", "empty"])
def test_embeddings_equal_the_whole_model(
    text_parts: Path, prompt: str, height: int, width: int
) -> None:
    seen = picture(height, width)
    ours = encoded(encoders(text_parts), prompt, seen, 900)
    assert ours.text.dtype == torch.float32
    assert relative_error(ours.text, library_run(text_parts, prompt, seen)) <= 1e-5


def test_the_picture_matters_and_clip_does_not_see_it(text_parts: Path) -> None:
    made = encoders(text_parts)
    one, other = (encoded(made, PROMPT, picture(56, 56, seed), 900) for seed in (0, 1))
    assert relative_error(one.text, other.text) > 1e-3
    torch.testing.assert_close(one.pooled, other.pooled, rtol=0, atol=0)


def test_a_long_prompt_is_cut_before_the_picture_which_stays_whole(text_parts: Path) -> None:
    made = encoded(encoders(text_parts), "red " * 600, picture(56, 84), 40)
    assert made.text.shape[0] == 40 + 2 * 3 + 3


def test_a_text_only_prompt_after_a_picture_is_what_it_was_before(text_parts: Path) -> None:
    made = encoders(text_parts)
    template = PROMPT_TEMPLATES["image"]
    before = made.encode(PROMPT, PROMPT, template, 64).text
    encoded(made, PROMPT, picture(56, 56), 900)
    torch.testing.assert_close(made.encode(PROMPT, PROMPT, template, 64).text, before)


def test_without_sight_a_picture_is_refused(text_parts: Path) -> None:
    with pytest.raises(ValueError, match="sight"):
        encoded(encoders(text_parts, sight=False), PROMPT, picture(56, 56), 64)


def test_the_tower_is_moved_with_the_encoders(text_parts: Path) -> None:
    assert len(encoders(text_parts).modules) == 3
    assert len(encoders(text_parts, sight=False).modules) == 2


def test_an_encoder_without_a_vision_tower_is_refused(text_parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "blind"
    shutil.copytree(text_parts / "text_encoder", folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = {n: t for n, t in load_file(weights).items() if "visual" not in n}
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="weights missing"):
        Sight.load(folder, device=CPU, dtype=torch.float32)


def test_a_broken_preprocessor_config_is_named(text_parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(text_parts / "text_encoder", folder)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        Sight.load(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_a_mark_of_pictures_in_a_prompt_is_left_out(text_parts: Path, mark: str) -> None:
    made, seen = encoders(text_parts), picture(56, 56)
    marked = encoded(made, f"{PROMPT}{mark}", seen, 900)
    plain = encoded(made, PROMPT, seen, 900)
    torch.testing.assert_close(marked.text, plain.text, rtol=0, atol=0)
