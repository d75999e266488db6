"""The demo's text parts: made from a seed alone, small, and good enough to tell scenes apart."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kandinsky5.demo.scenes import describe, random_scene
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.templates import PROMPT_TEMPLATES

TOOL = Path(__file__).resolve().parents[2] / "tools" / "demo_text.py"
NAMES = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
DEMO = PROMPT_TEMPLATES["demo"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_text", TOOL)
    assert spec and spec.loader
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def build(tool: ModuleType, folder: Path, seed: int = 3) -> Path:
    rng = random.Random(0)
    tool.build(folder, (describe(random_scene(rng), rng) for _ in range(1000)), seed)
    return folder


@pytest.fixture(scope="module")
def parts(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tool, tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def encoders(parts: Path) -> TextEncoders:
    files = SimpleNamespace(**{name: parts / name for name in NAMES})
    return TextEncoders.load(files, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]


def encode(encoders: TextEncoders, prompt: str) -> Conditioning:
    return encoders.encode(prompt, prompt, template=DEMO, max_tokens=64)


def test_a_seed_gives_the_same_bytes_each_time(
    tool: ModuleType, parts: Path, tmp_path: Path
) -> None:
    again, other = build(tool, tmp_path / "again"), build(tool, tmp_path / "other", seed=4)
    files = sorted(path.relative_to(parts) for path in parts.rglob("*") if path.is_file())
    assert len(files) == 10
    assert all((parts / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert sum((parts / file).stat().st_size for file in files) <= 5_000_000
    weights = "text_encoder/model.safetensors"
    assert (parts / weights).read_bytes() != (other / weights).read_bytes()


@pytest.mark.parametrize(
    "text", ["Zwölf Boxkämpfer", "Кот 🎸 \u200d\u202e", "a\n\tb  c", "\x01\x7f~|<>", "漢字"]
)
def test_any_text_can_be_read(encoders: TextEncoders, text: str) -> None:
    qwen, clip = encoders._qwen_tokenizer, encoders._clip_tokenizer
    ids = encoders.qwen_ids(text, DEMO, max_tokens=64)
    assert qwen.decode(ids[1:-1]) == text
    letters = "".join(text.lower().split())
    assert "".join(clip.decode(clip(text)["input_ids"][1:-1]).split()) == letters


def test_the_words_of_scenes_are_single_tokens(encoders: TextEncoders) -> None:
    rng = random.Random(9)
    for _ in range(200):
        caption = describe(random_scene(rng), rng).lower()
        words = caption.replace(",", " ,").replace(".", " .").split()
        count = encoders.token_count(caption, DEMO, max_tokens=64)
        assert count.tokens == count.kept == len(words)
        assert sum(encoders.clip_ids(caption)["attention_mask"]) == len(words) + 2


def test_a_word_can_be_told_from_its_own_vector(encoders: TextEncoders) -> None:
    red, blue = (encode(encoders, f"a {colour} circle moves right") for colour in ("red", "blue"))
    alike = torch.cosine_similarity(red.text, blue.text, dim=-1)
    assert alike[0] > 0.999 and alike[1] < 0.6
    assert alike[2:].max() < 0.999, "what follows knows of it too"


def test_the_pooled_vector_tells_scenes_apart(encoders: TextEncoders) -> None:
    """A linear read-out learnt on 600 captions names colour and direction of 200 others."""
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(800)]
    pooled = torch.stack([encode(encoders, describe(scene, rng)).pooled for scene in scenes])
    inputs = torch.cat([pooled, torch.ones(800, 1)], dim=1)
    for field in ("colour", "direction"):
        names = sorted({getattr(scene, field) for scene in scenes})
        truth = torch.tensor([names.index(getattr(scene, field)) for scene in scenes])
        targets = torch.nn.functional.one_hot(truth).float()
        readout = torch.linalg.lstsq(inputs[:600], targets[:600]).solution
        right = (inputs[600:] @ readout).argmax(dim=1) == truth[600:]
        assert right.float().mean() > 0.9
