"""The counts under the prompts are what the encoder reads, and what is marked is what it does not."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.model.text import TextEncoders
from kandinsky5.model.text_loading import load_clip_tokenizer, load_qwen_tokenizer
from kandinsky5.presets import DEMO_FOLDER, PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import PROMPT_TEMPLATES
from kandinsky5.ui import form, prompt_tokens
from kandinsky5.ui.prompt_tokens import BOXES, TOKEN_FIELDS, PromptTokens, Tokenizers

COUNT = re.compile(r"(\d+) of (\d+) tokens")
MARKED = re.compile(r"<mark>(.*)</mark>", re.DOTALL)
LITE = "lite-t2v-5s-sft"
SENTENCE = "A red fox runs over fresh snow at dawn; "
PROMPTS = [SENTENCE, SENTENCE * 60, "漢字が雪を" * 150, "word " * 10_000]


def encoders_of(qwen: Path, clip: Path) -> TextEncoders:
    """Tokenizers as a job has them, without the encoders."""
    return TextEncoders(None, load_qwen_tokenizer(qwen), None, load_clip_tokenizer(clip))


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models with the real tokenizers in it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = shared / "tokenizers"
    (folder / "Qwen2.5-VL-7B-Instruct").symlink_to(tokenizers / "qwen")
    (folder / "clip-vit-large-patch14").symlink_to(tokenizers / "clip")
    return folder


@pytest.fixture(scope="module")
def real(models: Path) -> Tokenizers:
    return Tokenizers(lambda: (models,))


@pytest.fixture(scope="module")
def published(models: Path) -> TextEncoders:
    return encoders_of(models / "Qwen2.5-VL-7B-Instruct", models / "clip-vit-large-patch14")


@pytest.fixture
def client(fake_client: Any, tmp_path: Path) -> Any:
    return fake_client.FakeClient(tmp_path / "outputs")


def lines(client: Any, tokenizers: Tokenizers, **changes: Any) -> dict[str, str]:
    """The line under each box."""
    filled = {**form.values_of(GenerationRequest(prompt="a red circle")), **changes}
    told = PromptTokens(client, tokenizers).told(*(filled[name] for name in TOKEN_FIELDS))
    return dict(zip(BOXES, told, strict=True))


def counted(line: str) -> tuple[int, int]:
    found = COUNT.search(line)
    assert found, line
    return int(found[1]), int(found[2])


def check_against_the_encoder(
    line: str, prompt: str, encoders: TextEncoders, preset_name: str
) -> None:
    """Compare a line with the ids that a job would encode."""
    preset = PRESETS[preset_name]
    template = PROMPT_TEMPLATES[preset.template]
    ids = encoders.qwen_ids(prompt, template, preset.text_tokens)
    kept = encoders._qwen_tokenizer.decode(ids[template.crop_start :], skip_special_tokens=True)
    tokens, room = counted(line)
    assert room == preset.text_tokens
    assert tokens == len(encoders._qwen_tokenizer(prompt)["input_ids"])
    marked = MARKED.search(line)
    assert (marked is None) == (tokens <= room) == (kept == prompt)
    if marked is not None:
        begins = html.unescape(marked[1]).rstrip("…")
        assert begins and prompt.startswith(kept.rstrip("\ufffd") + begins)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("preset", [LITE, "pro-t2v-5s-sd", "image-t2i"])
def test_the_count_is_what_the_published_encoder_keeps(client, real, published, preset, prompt):
    line = lines(client, real, preset=preset, prompt=prompt, expand=False)["prompt"]
    check_against_the_encoder(line, prompt, published, preset)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_the_demo_is_counted_with_its_own_tokenizer(client, prompt):
    own = encoders_of(DEMO_FOLDER / "tokenizer", DEMO_FOLDER / "tokenizer_2")
    line = lines(client, Tokenizers(), prompt=prompt)["prompt"]
    check_against_the_encoder(line, prompt, own, "demo-t2v")


def test_clip_counts_its_marks_and_marks_what_it_does_not_read(client, real, published):
    prompt = " ".join(f"word{number}" for number in range(100))
    line = lines(client, real, preset=LITE, clip_prompt=prompt)["clip_prompt"]
    tokenizer = published._clip_tokenizer
    assert counted(line) == (len(tokenizer(prompt)["input_ids"]), 77)
    read = tokenizer.decode(published.clip_ids(prompt)["input_ids"], skip_special_tokens=True)
    marked = html.unescape(MARKED.search(line)[1]).rstrip("…")  # type: ignore[index]
    assert (read + marked).replace(" ", "")[:500] == prompt.replace(" ", "")[:500]
    short = lines(client, real, preset=LITE, clip_prompt="a fox")["clip_prompt"]
    assert counted(short) == (4, 77) and "<mark>" not in short


def test_without_a_tokenizer_nothing_is_guessed(client):
    said = lines(client, Tokenizers(), preset=LITE, prompt=SENTENCE * 60)["prompt"]
    assert prompt_tokens.NOT_HERE in html.unescape(said)
    assert not COUNT.search(said)


def test_a_broken_tokenizer_is_named(client, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    said = lines(client, Tokenizers(), preset=LITE, model_dir=f" '{tmp_path}' ")["prompt"]
    assert "not counted" in said and str(tmp_path) in said


def test_a_tokenizer_is_read_once(client, monkeypatch):
    reads: list[Path] = []

    def reading(folder: Path) -> Any:
        reads.append(folder)
        return lambda text: [(0, 1)] * len(text.split())

    monkeypatch.setitem(prompt_tokens.READERS, "tokenizer", reading)
    tokenizers = Tokenizers()
    for _ in range(3):
        lines(client, tokenizers)
    assert reads == [DEMO_FOLDER / "tokenizer"]


def test_what_is_read_in_the_prompts_place_is_counted_there(client, real):
    said = lines(client, real, preset=LITE, expand=True, expanded_prompt="A red fox, in detail.")
    assert prompt_tokens.REPLACED in said["prompt"]
    assert counted(said["expanded_prompt"]) == (7, 256)
    unticked = lines(client, real, preset=LITE, expand=False, expanded_prompt="A red fox.")
    assert unticked["expanded_prompt"] == "" and counted(unticked["prompt"])[1] == 256


def test_a_negative_prompt_that_takes_no_part_says_so(client):
    assert counted(lines(client, Tokenizers(), negative_prompt="blurry")["negative_prompt"])
    said = lines(client, Tokenizers(), negative_prompt="blurry", guidance=1)["negative_prompt"]
    assert prompt_tokens.NO_GUIDANCE in said
    assert lines(client, Tokenizers())["negative_prompt"] == ""


def test_of_a_job_per_line_the_longest_line_counts(client):
    prompt = "a red circle\n\n  a blue square moves slowly to the left \na dot"
    said = lines(client, Tokenizers(), prompt=prompt, per_line=True)["prompt"]
    assert "Longest of 3 lines" in said
    alone = lines(client, Tokenizers(), prompt="a blue square moves slowly to the left")["prompt"]
    assert counted(said) == counted(alone)


def test_the_trigger_of_a_lora_counts_with_the_prompt(client, tmp_path):
    (tmp_path / "oil.safetensors").touch()
    told = {"name": "oil", "variant": "peft", "tensors": 8, "matched": 8, "unmatched": None}
    client.told = {"loras": [{**told, "trigger": "in thick red oil"}]}
    row = {"lora_1": str(tmp_path / "oil.safetensors")}
    plain, with_trigger, off = (
        counted(lines(client, Tokenizers(), **changes)["prompt"])[0]
        for changes in ({}, row, {**row, "lora_1_strength": "0"})
    )
    both = counted(lines(client, Tokenizers(), prompt="in thick red oil a red circle")["prompt"])[0]
    assert plain == off < with_trigger == both
    there = "a red circle in thick red oil"
    assert (
        counted(lines(client, Tokenizers(), prompt=there)["prompt"])
        == counted(lines(client, Tokenizers(), prompt=there, **row)["prompt"])
    )  # fmt: skip


def test_what_is_cut_is_shown_as_text(client):
    prompt = "a red circle " * 40 + "<script>alert(1)</script> {{7}} ${8}"
    line = lines(client, Tokenizers(), prompt=prompt)["prompt"]
    assert "&lt;script&gt;" in line and "<script>" not in line
