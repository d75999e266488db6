"""What a dropped result says of itself, and the form filled with it."""

from __future__ import annotations

import json

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky5.output.metadata import JSON_CHUNK, describe, to_json
from kandinsky5.request import GenerationRequest, LoraChoice
from kandinsky5.ui.fields import BY_NAME
from kandinsky5.ui.form_handlers import FormHandlers
from kandinsky5.ui.video_info import EMPTY, looked_into

REQUEST = GenerationRequest(
    preset="image-t2i",
    prompt="a <b>fox</b>",
    seed=7,
    width=64,
    height=64,
    steps=9,
    dit="/home/eva/models/mine.safetensors",
    loras=(LoraChoice("/home/eva/oil.safetensors", 0.5),),
    cache="magcache",
)


def told(request: GenerationRequest) -> str:
    expanded = "A red fox runs."
    facts = {"seconds": {"denoise": 2.0}, "peak_vram_bytes": 0, "peak_rss_bytes": 5 * 10**8}
    return to_json(describe(request, checkpoint=None, seed=7, expanded_prompt=expanded, **facts))


def png(path, text: str) -> str:
    chunk = PngInfo()
    chunk.add_text(JSON_CHUNK, text)
    Image.new("RGB", (64, 48)).save(path, pnginfo=chunk)
    return str(path)


def test_a_picture_tells_how_it_was_made(tmp_path):
    page, sent, button = looked_into(png(tmp_path / "a.png", told(REQUEST)))
    assert "a &lt;b&gt;fox&lt;/b&gt;" in page
    for said in (
        "A red fox runs.",
        "64 × 48",
        "oil.safetensors × 0.5",
        "magcache",
        "2.0 s",
        "500 MB",
    ):
        assert said in page, said
    assert "/home/eva" not in page
    assert button["visible"] is True
    assert (sent.request.seed, sent.expanded_prompt) == (7, "A red fox runs.")


def test_a_video_tells_its_length(tmp_path):
    path = tmp_path / "a.mp4"
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (32, 32),
        fps=24,
        codec="libx264",
        output_params=["-metadata", f"comment={told(REQUEST)}"],
    )
    writer.send(None)
    for _ in range(12):
        writer.send(np.zeros((32, 32, 3), np.uint8).tobytes())
    writer.close()
    page, sent, _ = looked_into(str(path))
    assert "0.5 s, 24 frames a second" in page
    assert sent.request.steps == 9


def test_a_result_of_the_early_program_fills_the_form_too(tmp_path):
    theirs = {"model_type": "Kandinsky 5.0", "prompt": "a ship", "seed": 3, "sample_steps": 20}
    page, sent, _ = looked_into(png(tmp_path / "a.png", json.dumps(theirs)))
    assert "the early community program" in page
    assert (sent.request.prompt, sent.request.steps, sent.expanded_prompt) == ("a ship", 20, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no video", "a.png"), (b"", "a.png"), (None, "no K1 parameters")],
)
def test_a_file_that_tells_nothing_is_refused_in_a_line(tmp_path, content, said):
    path = tmp_path / "a.png"
    if content is None:
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(content)
    page, sent, button = looked_into(str(path))
    assert said in page
    assert str(tmp_path) not in page
    assert (sent, button["visible"]) == (None, False)


def test_edited_parameters_are_refused_with_the_reason(tmp_path):
    edited = json.loads(told(REQUEST))
    edited["request"]["steps"] = "<many>"
    page, sent, _ = looked_into(png(tmp_path / "a.png", json.dumps(edited)))
    assert "1 to 1000" in page
    assert sent is None


def test_values_that_no_run_can_have_do_not_break_the_page(tmp_path):
    odd = {"seconds": {"denoise": "long"}, "checkpoint": [], "peak_vram_bytes": "much", "k1": {}}
    page, sent, _ = looked_into(
        png(tmp_path / "a.png", json.dumps(json.loads(told(REQUEST)) | odd))
    )
    assert sent is not None
    assert "much" not in page


def test_without_a_file_it_says_what_to_drop():
    assert looked_into(None)[0] == EMPTY


def test_what_is_sent_fills_the_form(tmp_path, fake_client):
    _, sent, _ = looked_into(png(tmp_path / "a.png", told(REQUEST)))
    of_form = FormHandlers(fake_client.FakeClient(tmp_path), lambda preset: False)
    updates = of_form.filled_with(sent.request, sent.expanded_prompt)
    values = {name: update.get("value") for name, update in zip(BY_NAME, updates, strict=True)}
    assert (values["prompt"], values["seed"], values["steps"]) == ("a <b>fox</b>", "7", 9)
    assert (values["expanded_prompt"], values["cache"]) == ("A red fox runs.", "magcache")
    assert (values["lora_1"], values["lora_1_strength"]) == ("oil.safetensors", "0.5")
    assert values["dit"] == "mine.safetensors"
