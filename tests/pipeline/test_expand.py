"""The text encoder rewrites a prompt: seeded, streamed, bounded, and nothing of no use is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5.errors import Stopped, UserError
from kandinsky5.events import PromptExpanded, StageStarted, StateSaved
from kandinsky5.memory.text_stages import EXPANSION_TOKENS, EncoderUse
from kandinsky5.model.text_generation import OutputLayer, Writer, can_write, drawn
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.output.metadata import read_metadata, request_of
from kandinsky5.output.tensor_store import TensorStore
from kandinsky5.pipeline.accept import NO_OUTPUT_LAYER, accept
from kandinsky5.pipeline.embedding_cache import EmbeddingCache
from kandinsky5.pipeline.encoders import text_tenant, voice_tenant
from kandinsky5.pipeline.expand import expand_prompt, fault_of, tidied
from kandinsky5.pipeline.job import Listeners, PaintingJob
from kandinsky5.pipeline.models import Models
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.prompting import encode_text, expand_text
from kandinsky5.presets import DEMO_FOLDER, PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import EXPANSION_INSTRUCTIONS
from tests.pipeline.test_encoders import demo_files
from tests.support.demo_runs import quick
from tests.support.tiny_image_model import T2I, diffusers_layout

CPU = torch.device("cpu")
USES = (EncoderUse("fp32", "resident"), EncoderUse("fp32", "disk", slots=1, ring=1))
PICTURE = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)


class Speaker:
    """Stands for the text encoder: says the words it was given."""

    def __init__(self, *words: str) -> None:
        self.words, self.asked = words, {}

    def answer(self, instruction, prompt, **options):
        self.asked = {"instruction": instruction, "prompt": prompt, **options}
        said = ""
        for word in self.words:
            said += word
            yield said


def rewritten(writer, events=None, *, stop=lambda: False, picture=None, **values):
    request = quick(prompt="a red circle", **values)
    preset = PRESETS[request.preset]
    heard = [] if events is None else events
    return expand_prompt(writer, request, preset, picture, emit=heard.append, should_stop=stop)


@pytest.fixture(scope="module")
def layer() -> OutputLayer:
    """The demo was never taught to write, and repeats its last token; this one says anything."""
    generator = torch.Generator().manual_seed(0)
    return OutputLayer(0.2 * torch.randn(896, 128, generator=generator))


@pytest.fixture(scope="module")
def writers(layer) -> Iterator[dict[str, Writer]]:
    """The demo's text encoder, whole and streamed, both with eyes."""
    where = {"device": CPU, "dtype": torch.float32}
    needed = voice_tenant(demo_files(), sees=True, **where)
    made = {use.source: text_tenant(demo_files(), use, home="disk", **where) for use in USES}
    sight = needed.enter().sight
    yield {source: tenant.enter().writer(layer, sight) for source, tenant in made.items()}
    for tenant in (*made.values(), needed):
        tenant.close()


def words_of(writer: Writer, seed: int, *, picture=None, limit: int = 8) -> list[str]:
    return list(
        writer.answer(
            "Write.",
            "a red circle",
            generator=torch.Generator().manual_seed(seed),
            max_new_tokens=limit,
            max_prompt_tokens=8,
            picture=picture,
        )
    )


def test_one_seed_gives_one_text_and_another_seed_another(writers) -> None:
    writer = writers["resident"]
    assert words_of(writer, 1) == words_of(writer, 1)
    assert words_of(writer, 1) != words_of(writer, 2)


def test_a_streamed_encoder_writes_what_a_resident_one_writes(writers) -> None:
    assert words_of(writers["disk"], 1) == words_of(writers["resident"], 1)


def test_what_is_seen_changes_what_is_written(writers) -> None:
    writer = writers["resident"]
    seen = words_of(writer, 1, picture=PICTURE)
    assert seen == words_of(writer, 1, picture=PICTURE)
    assert seen != words_of(writer, 1, picture=255 - PICTURE)
    assert seen != words_of(writer, 1)


def test_the_end_of_a_long_prompt_is_not_read(writers) -> None:
    def said(prompt: str) -> list[str]:
        generator = torch.Generator().manual_seed(1)
        limits = {"max_new_tokens": 6, "max_prompt_tokens": 8}
        return list(writers["resident"].answer("Write.", prompt, generator=generator, **limits))

    begun = "red circle " * 8
    assert said(begun + "blue") == said(begun + "green square")
    assert said("blue " + begun) != said(begun)


@pytest.mark.parametrize("picture", [None, PICTURE])
def test_keys_and_values_kept_give_the_numbers_of_reading_it_all_again(
    writers, layer, picture
) -> None:
    """The reference reads question and answer as one text, with no cache."""
    writer, taken, answer = writers["resident"], [], []
    head = writer._ids("a red circle")
    hook = layer.register_forward_hook(lambda _, hidden, logits: taken.append(logits))
    for token in writer._tokens(head, picture, torch.Generator().manual_seed(3)):
        answer.append(token)
        if len(answer) == 6:
            break
    hook.remove()
    tail = [*writer._ids("\n<|im_start|>assistant\n"), *answer[:-1]]
    if picture is None:
        ids = torch.tensor([[*head, *writer._ids("<|im_end|>"), *tail]])
        with torch.inference_mode():
            read = writer._qwen(input_ids=ids, use_cache=False)
    else:
        read, _ = writer._sight.read(writer._qwen, writer._tokenizer, head, picture, then=tail)
    with torch.inference_mode():
        wanted = layer(read.last_hidden_state[0, -len(answer) :])
    torch.testing.assert_close(torch.stack(taken), wanted, rtol=1e-4, atol=1e-4)


def test_at_most_256_tokens_are_written(writers) -> None:
    asked = Speaker("fine words")
    rewritten(asked)
    assert asked.asked["max_new_tokens"] == EXPANSION_TOKENS == 256
    assert len(words_of(writers["resident"], 1, limit=5)) == 5


@pytest.mark.parametrize("mode", ["t2v", "i2v", "t2i", "i2i"])
def test_every_mode_has_an_instruction_of_its_own(mode) -> None:
    assert len(EXPANSION_INSTRUCTIONS[mode].split()) > 40
    assert len(set(EXPANSION_INSTRUCTIONS.values())) == 4
    assert {preset.mode for preset in PRESETS.values()} <= set(EXPANSION_INSTRUCTIONS)


def test_the_text_is_told_as_it_grows_and_then_once_more_as_it_is_used() -> None:
    events: list[object] = []
    found = rewritten(Speaker("A red", " circle rolls", " slowly. "), events)
    assert events == [
        PromptExpanded("A red"),
        PromptExpanded("A red circle rolls"),
        PromptExpanded("A red circle rolls slowly. "),
        PromptExpanded("A red circle rolls slowly.", done=True),
    ]
    assert (found.text, found.fault) == ("A red circle rolls slowly.", "")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ([], "blank"),
        (["  \n "], "blank"),
        (['""'], "blank"),
        (["12 345 ... !!"], "no words"),
        (["red "] * 60, "repeated"),
        (["go go go go go"], "repeated"),
        (["a" * 40], "repeated"),
        (["红色的圆圈在移动，" * 30], "repeated"),
        ([str(n) + "x" for n in range(2000)], "characters long"),
    ],
)
def test_an_answer_of_no_use_leaves_the_users_prompt(answer, fault) -> None:
    events: list[object] = []
    found = rewritten(Speaker(*answer), events)
    assert found.text == "a red circle"
    assert fault in found.notice
    assert events[-1] == PromptExpanded("a red circle", done=True)


def test_prose_is_no_fault() -> None:
    for text in EXPANSION_INSTRUCTIONS.values():
        assert fault_of(text) == ""
    assert fault_of("A red circle moves right.") == ""
    assert fault_of("一个红色的圆圈在白色的桌面上慢慢向右滚动，镜头静止。") == ""


def test_what_is_not_part_of_a_prompt_is_taken_off() -> None:
    assert tidied('"A circle.\nIt rolls.\x00"') == "A circle. It rolls."
    assert tidied("A circle rolls. Then it", cut_short=True) == "A circle rolls."
    assert tidied("A circle rolls and", cut_short=True) == "A circle rolls and"
    assert tidied("A circle rolls. Then it") == "A circle rolls. Then it"


def test_writing_stops_when_it_is_asked_to() -> None:
    events: list[object] = []
    with pytest.raises(Stopped):
        rewritten(Speaker("a", "b", "c"), events, stop=lambda: len(events) > 1)
    assert len(events) == 2


def test_logits_that_are_no_numbers_end_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    assert drawn(torch.full((9,), float("nan")), [], generator) is None
    assert drawn(torch.tensor([0.0, 50.0, 0.0]), [1], generator) == 1


def encoder_with(tmp_path: Path, *, tied: bool, layer: bool) -> Path:
    folder = tmp_path / "encoder"
    shutil.copytree(DEMO_FOLDER / "text_encoder", folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    if layer:
        tensors = load_file(folder / "model.safetensors")
        table = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
        save_file({**tensors, "lm_head.weight": -table}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tied", "layer", "writes"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_an_output_layer_is_its_own_or_tied_or_missing(tmp_path, tied, layer, writes) -> None:
    folder = encoder_with(tmp_path, tied=tied, layer=layer)
    assert can_write(folder) == writes
    if writes:
        found = OutputLayer.load(folder, device=CPU, dtype=torch.bfloat16)
        assert (found is not None) == layer
        if found is not None:
            assert found.weight.shape == (896, 128)
            assert found(torch.zeros(128)).dtype == torch.float32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny image model that nothing is built in of."""
    return diffusers_layout(tmp_path_factory.mktemp("model"), T2I)


def request_for(model: Path, **values: object) -> GenerationRequest:
    fixed = {"preset": "image-t2i", "prompt": "a red circle", "device": "cpu", "dtype": "fp32"}
    small = {"width": 64, "height": 64, "steps": 1, "guidance": 1.0, "seed": 1}
    return GenerationRequest(**{**fixed, **small, "model_dir": str(model), **values})


def job_of(request: GenerationRequest, out: Path) -> tuple[PaintingJob, list[object]]:
    events: list[object] = []
    to = Listeners(events.append, lambda: False)
    return accept(request, to, out=out, models_dirs=()), events


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the text encoder says, one answer after another; those left have not been asked for."""
    waiting = ["A red circle rolls over a table.", "A red circle hangs in the air."]
    monkeypatch.setattr(
        Writer, "answer", lambda self, *_, **__: iter([waiting.pop(0)] if waiting else [])
    )
    return waiting


def test_a_result_tells_the_expanded_prompt_and_keeps_the_users(model, tmp_path, answers) -> None:
    events: list[object] = []
    request, out = request_for(model), tmp_path / "a.png"
    result = Pipeline().run(request, out=out, emit=events.append)
    made = read_metadata(out)
    assert made["expanded_prompt"] == "A red circle rolls over a table."
    assert request_of(made).prompt == "a red circle"
    stages = [event.stage for event in events if isinstance(event, StageStarted)]
    assert stages.index("expand") < stages.index("encode text")
    assert "expand" in result.seconds
    assert not [line for line in result.notices if "as it is" in line]


def test_what_was_written_is_what_is_encoded(model, tmp_path, answers) -> None:
    cache = EmbeddingCache(None)
    job, _ = job_of(request_for(model), tmp_path / "a.png")
    expand_text(job, Models(), cache)
    found = encode_text(job, Models(), cache).positive
    said = {"prompt": "A red circle rolls over a table.", "expand": False}
    plain, _ = job_of(request_for(model, **said), tmp_path / "b.png")
    wanted = encode_text(plain, Models(), cache).positive
    assert torch.equal(found.text, wanted.text)
    assert torch.equal(found.pooled, wanted.pooled)


def test_a_prompt_is_rewritten_alone_and_nothing_is_made(model, tmp_path, answers) -> None:
    events: list[object] = []
    request = request_for(model, expand=False, expanded_prompt="what was written before")
    found = Pipeline().expand(request, out=tmp_path / "a.png", emit=events.append)
    assert found.text == "A red circle rolls over a table."
    assert found.to_dict()["expanded_prompt"] == found.text
    assert [event for event in events if isinstance(event, PromptExpanded)][-1].done
    assert list(tmp_path.iterdir()) == []


def test_the_demo_which_cannot_write_refuses_to_rewrite_alone(tmp_path) -> None:
    with pytest.raises(UserError, match="text encoder writes"):
        Pipeline().expand(quick(), out=tmp_path / "a.mp4")


def test_a_prompt_that_came_rewritten_is_encoded_as_it_came(model, tmp_path, answers) -> None:
    edited = "A red circle, edited by hand."
    job, _ = job_of(request_for(model, expanded_prompt=edited), tmp_path / "a.png")
    expand_text(job, Models(), EmbeddingCache(None))
    assert (job.expanded_prompt, len(answers)) == (edited, 2)
    found = encode_text(job, Models(), EmbeddingCache(None)).positive
    plain, _ = job_of(request_for(model, prompt=edited, expand=False), tmp_path / "b.png")
    assert torch.equal(found.text, encode_text(plain, Models(), EmbeddingCache(None)).positive.text)


def test_nothing_is_expanded_where_nobody_asked(model, tmp_path, answers) -> None:
    for request in (request_for(model, expand=False), quick()):
        job, _ = job_of(request, tmp_path / f"a{'.mp4' if request.seconds else '.png'}")
        expand_text(job, Models(), EmbeddingCache(None))
        assert job.expanded_prompt is None
    assert len(answers) == 2


def test_an_answer_of_no_use_is_said_and_the_prompt_used(model, tmp_path, answers) -> None:
    answers[0] = "..."
    job, _ = job_of(request_for(model), tmp_path / "a.png")
    expand_text(job, Models(), EmbeddingCache(None))
    assert job.expanded_prompt is None
    assert any("had no words" in line for line in job.notices)


def test_an_encoder_without_output_layer_is_said_and_the_prompt_used(
    model, tmp_path, answers
) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(model, mute)
    shutil.rmtree(mute / "text_encoder")
    encoder_with(tmp_path, tied=False, layer=False).rename(mute / "text_encoder")
    job, _ = job_of(request_for(mute), tmp_path / "a.png")
    expand_text(job, Models(), EmbeddingCache(None))
    assert job.expanded_prompt is None
    assert NO_OUTPUT_LAYER in job.notices
    assert len(answers) == 2


def test_a_repeated_expansion_is_taken_from_the_cache(model, tmp_path, answers) -> None:
    cache = EmbeddingCache(TensorStore(tmp_path / "kept"))
    said = []
    for seed in (1, 1, 2):
        job, events = job_of(request_for(model, seed=seed), tmp_path / "a.png")
        expand_text(job, Models(), cache)
        said.append(job.expanded_prompt)
        assert [e for e in events if isinstance(e, PromptExpanded)][-1].text == said[-1]
    assert said[0] == said[1] != said[2]
    assert answers == []


def test_a_saved_run_keeps_its_expanded_prompt_and_expands_nothing(
    model, tmp_path, answers
) -> None:
    states, out = StateKeeper(tmp_path / "states"), tmp_path / "a.png"
    states.ask_to_save_on_stop()
    events: list[object] = []

    def begun() -> bool:
        return StageStarted("denoise") in events

    with pytest.raises(Stopped):
        Pipeline().run(
            request_for(model), out=out, emit=events.append, should_stop=begun, states=states
        )
    (saved,) = [event for event in events if isinstance(event, StateSaved)]
    Pipeline().resume(Path(saved.path), out=out)
    assert read_metadata(out)["expanded_prompt"] == "A red circle rolls over a table."
    assert len(answers) == 1
