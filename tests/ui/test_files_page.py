"""Files, engines and the expanded prompt in a real browser."""

from __future__ import annotations

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky5.output.metadata import JSON_CHUNK, describe, to_json
from kandinsky5.request import GenerationRequest

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
BOX = "#k1-f-expanded_prompt textarea"
LINE = "#k1-expand-line"
LITE = "Lite 2B · text → video · 5 s · best quality"
HAS_TEXT = "text => document.querySelector('#k1-f-expanded_prompt textarea')?.value === text"


def opened(open_page, url: str, preset: str = LITE):
    page = open_page(url)
    page.wait_for_function("() => window.k1 && window.k1.isRemembering()")
    page.click("#k1-f-preset input")
    page.get_by_role("option").filter(has_text=preset).first.click()
    page.wait_for_selector("#k1-expand-now:not([disabled])")
    return page


def field(name: str) -> str:
    return f"#k1-f-{name} input, #k1-f-{name} textarea"


def test_an_expanded_prompt_streams_in_is_edited_and_then_used(quiet_studio, open_page) -> None:
    client = quiet_studio.client
    client.hold()
    page = opened(open_page, quiet_studio.url)
    page.fill(PROMPT, "a fox")
    page.click("#k1-expand-now")
    client.allow(2)
    page.wait_for_function(HAS_TEXT, arg="a fox,")
    assert page.is_disabled(BOX)
    page.reload()
    page.wait_for_function(HAS_TEXT, arg="a fox,")
    client.release()
    page.wait_for_function(HAS_TEXT, arg="a fox, in detail, on a table")
    page.wait_for_selector(f"{LINE}:has-text('used in the prompt')")
    page.wait_for_selector(f"{BOX}:not([disabled])")
    page.fill(PROMPT, "a wolf")
    page.wait_for_selector(f"{LINE}:has-text('another prompt')")
    page.fill(BOX, "A grey wolf.")
    page.click("#k1-generate")
    client.wait(lambda: client.history())
    (job,) = client.history()
    used = [job.request[name] for name in ("prompt", "expand", "expanded_prompt")]
    assert used == ["a wolf", False, "A grey wolf."]


def test_a_pasted_file_is_told_or_refused_and_the_next_lora_gets_a_row(
    quiet_studio, open_page, tmp_path
) -> None:
    client = quiet_studio.client
    files = [tmp_path / name for name in ("dit", "a", "b")]
    for file in files:
        file.touch()
    lora = {"name": "a", "variant": "kohya", "tensors": 2, "matched": 2, "unmatched": None}
    wrong = {"problem": "a LoRA of another model: <b>Wan</b>"}
    client.told = {
        "dit": {"problem": "not Kandinsky 5 (looks like Flux)"},
        "loras": [{**lora, "trigger": "in oil"}, wrong],
    }
    page = opened(open_page, quiet_studio.url)
    page.fill(PROMPT, "a fox")
    page.click("#k1-files .label-wrap")
    page.fill(field("dit"), f'"{files[0]}"')
    page.wait_for_selector("#k1-said-dit :text('looks like Flux')")
    page.click("#k1-generate")
    page.wait_for_selector("#k1-f-dit .k1-at-field:text('looks like Flux')")
    page.fill(field("dit"), "")
    page.wait_for_selector("#k1-said-dit .k1-file", state="detached")
    assert not page.is_visible("#k1-f-lora_2")
    page.fill(field("lora_1"), str(files[1]))
    page.wait_for_selector("#k1-said-loras :text('2 of 2 tensors match')")
    page.fill(field("lora_2"), str(files[2]))
    page.wait_for_selector("#k1-said-loras :text('<b>Wan</b>')")
    page.click("#k1-generate")
    page.wait_for_selector("#k1-f-lora_2 .k1-at-field:text('another model')")
    assert client.queue() == client.history() == ()
    page.fill(field("lora_2"), "")
    page.fill(field("lora_1_strength"), "0.5")
    page.click("#k1-generate")
    client.wait(lambda: client.history())
    assert list(client.history()[0].request["loras"]) == [{"path": str(files[1]), "strength": 0.5}]
    client.told = None


def test_what_belongs_to_an_engine_shows_with_it(quiet_studio, open_page) -> None:
    page = opened(open_page, quiet_studio.url, "Pro 19B · text → video · 5 s · HD")
    page.click("#k1-files .label-wrap")
    page.wait_for_selector("#k1-f-nabla_p")
    assert page.get_attribute(field("nabla_p"), "placeholder") == "0.8"
    for name, value, shown, other in (
        ("attention", "PyTorch (sdpa)", "nabla_p", "hidden"),
        ("cache", "MagCache", "cache_threshold", "visible"),
    ):
        page.click(f"#k1-f-{name} input")
        page.get_by_role("option").filter(has_text=value).click()
        page.wait_for_selector(f"#k1-f-{shown}", state=other)


def test_a_dropped_result_tells_its_settings_and_fills_the_form(
    quiet_studio, open_page, tmp_path
) -> None:
    made = describe(
        GenerationRequest(prompt="a <b>fox</b>", seed=7, steps=9),
        checkpoint=None,
        seed=7,
        seconds={},
        peak_vram_bytes=0,
        peak_rss_bytes=0,
    )
    chunk = PngInfo()
    chunk.add_text(JSON_CHUNK, to_json(made))
    Image.new("RGB", (64, 64)).save(tmp_path / "made.png", pnginfo=chunk)
    page = open_page(quiet_studio.url)
    page.wait_for_function("() => window.k1 && window.k1.isRemembering()")
    page.get_by_role("tab", name="Video info").click()
    page.set_input_files("#k1-info-file input[type=file]", tmp_path / "made.png")
    page.wait_for_selector("#k1-info-told dd:text('a <b>fox</b>')")
    page.click("#k1-info-send")
    page.wait_for_selector(PROMPT)
    page.wait_for_function("() => document.querySelector('#k1-f-prompt textarea').value")
    assert page.input_value(PROMPT) == "a <b>fox</b>"
    assert page.input_value("#k1-f-steps input") == "9"
    page.get_by_role("tab", name="System").click()
    page.wait_for_selector("#k1-system-checks :text('gave no report')")
