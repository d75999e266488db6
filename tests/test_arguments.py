"""What is typed becomes a request: every option, the defaults, and job files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kandinsky5.arguments import REQUEST_OPTIONS, build_parser, request_of
from kandinsky5.errors import UserError
from kandinsky5.request import GenerationRequest, LoraChoice

PROMPT = "a red circle moves right"


def typed(*argv: str) -> GenerationRequest:
    return request_of(build_parser().parse_args(["generate", *argv]))


def test_every_option_reaches_its_field() -> None:
    given = {
        "preset": "lite-i2v-5s",
        "prompt": PROMPT,
        "negative_prompt": "blur",
        "clip_prompt": "circle",
        "image": "a.png",
        "seed": 7,
        "width": 768,
        "height": 512,
        "seconds": 2.5,
        "steps": 12,
        "guidance": 3.5,
        "shift": 4.0,
        "expanded_prompt": "a red circle rolls",
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "dit": "dit.safetensors",
        "model_dir": "models",
        "weights": "int8",
        "text_weights": "nf4",
        "vram": 12.0,
        "ram": 32.0,
        "attention": "sage",
        "nabla_p": 0.8,
        "nabla_wt": 5,
        "nabla_wh": 3,
        "nabla_ww": 7,
        "cache": "magcache",
        "cache_threshold": 0.2,
        "cache_retention": 0.3,
        "vae_tiling": "published",
        "vae_tile": 256,
        "source": "disk",
        "resident_blocks": 3,
        "slots": 4,
        "chunk_tokens": 512,
        "chunk_heads": 2,
        "init_latents": "noise.safetensors",
        "save_latents": "end.safetensors",
        "out": "o.mp4",
        "device": "cuda:1",
        "dtype": "fp32",
        "crf": 20,
    }
    flags = [word for o in REQUEST_OPTIONS for word in (o.flag, str(given[o.field]))]
    request = typed(
        *flags, "--lora", "a.safetensors", "--lora", "b:1.safetensors:-0.5", "--no-expand"
    )
    loras = (LoraChoice("a.safetensors"), LoraChoice("b:1.safetensors", -0.5))
    assert request == GenerationRequest(**given, loras=loras, expand=False)


def test_every_field_of_the_request_has_an_option() -> None:
    fields = set(GenerationRequest.__dataclass_fields__)
    assert {option.field for option in REQUEST_OPTIONS} == fields - {"loras", "expand", "preview"}


def test_nothing_typed_means_the_defaults() -> None:
    assert typed("--prompt", PROMPT) == GenerationRequest(prompt=PROMPT)


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("style.safetensors", LoraChoice("style.safetensors")),
        ("style.safetensors:0.8", LoraChoice("style.safetensors", 0.8)),
        ("a:b/style.safetensors", LoraChoice("a:b/style.safetensors")),
    ],
)
def test_a_strength_follows_the_last_colon(text: str, lora: LoraChoice) -> None:
    assert typed("--prompt", PROMPT, "--lora", text).loras == (lora,)


@pytest.mark.parametrize("text", ["style.safetensors:much", "style.safetensors:nan", "s:99"])
def test_a_strength_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="strength"):
        typed("--prompt", PROMPT, "--lora", text)


def test_a_job_file_is_taken_and_options_win(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"prompt": PROMPT, "seed": 3, "steps": 9, "expand": False}))
    expected = GenerationRequest(prompt=PROMPT, seed=4, steps=9, expand=False)
    assert typed("--request", str(job), "--seed", "4") == expected


def test_what_to_dict_wrote_is_a_job_file(tmp_path: Path) -> None:
    request = GenerationRequest(prompt="🟥", loras=(LoraChoice("a", 0.5),), seed=1)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(request.to_dict()))
    assert typed("--request", str(job)) == request
