"""The form's counts, sizes, crop and batches in a real browser."""

from __future__ import annotations

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
WIDTH, HEIGHT = "#k1-f-width input", "#k1-f-height input"
SLIDER = "#k1-f-scale input[type=range]"


def wait_for_value(page, selector: str, value: str) -> None:
    page.wait_for_function(
        "([selector, value]) => document.querySelector(selector).value === value",
        arg=[selector, value],
    )


def test_a_long_prompt_is_counted_and_marked_while_it_is_typed(quiet_studio, open_page):
    page = open_page(quiet_studio.url, viewport={"width": 400, "height": 850})
    page.fill(PROMPT, "a red circle")
    page.wait_for_selector("#k1-tokens-prompt :text('3 of 64 tokens')")
    page.fill(PROMPT, "red " * 70 + "w" * 300)
    page.wait_for_selector("#k1-tokens-prompt [data-over]")
    assert page.inner_text("#k1-tokens-prompt mark").startswith(" red red")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_sizes_go_together_by_keyboard_and_say_what_is_snapped(quiet_studio, open_page):
    page = open_page(quiet_studio.url)
    page.wait_for_function("() => window.k1.isRemembering()")
    page.fill(WIDTH, "130")
    page.wait_for_selector("#k1-size-line :text('Width 130 set to 128')")
    page.wait_for_selector("#k1-f-size label.selected:has-text('Custom')")
    page.focus("#k1-swap")
    page.keyboard.press("Enter")
    wait_for_value(page, HEIGHT, "128")
    wait_for_value(page, WIDTH, "64")
    page.focus(SLIDER)
    page.keyboard.press("End")
    wait_for_value(page, HEIGHT, "192")
    page.focus("#k1-f-size label.selected input")
    page.keyboard.press("ArrowUp")
    wait_for_value(page, HEIGHT, "64")
    wait_for_value(page, SLIDER, "100")


def test_the_crop_and_a_batch_are_shown_before_they_are_used(quiet_studio, open_page, tmp_path):
    client = quiet_studio.client
    client.hold()
    Image.new("RGB", (200, 100), "red").save(tmp_path / "wide.png")
    page = open_page(quiet_studio.url)
    page.click("#k1-f-mode label:has-text('Image → video')")
    page.wait_for_selector("#k1-f-image")
    page.set_input_files("#k1-f-image input[type=file]", tmp_path / "wide.png")
    page.wait_for_selector("#k1-crop :text('64 × 64 of 200 × 100, 50 % cut off left and right')")
    page.fill(WIDTH, "128")
    page.wait_for_selector("#k1-crop :text('128 × 64 of 200 × 100, nothing of note cut off')")
    page.fill(PROMPT, "it moves\nit stands")
    page.click("#k1-several .label-wrap")
    page.fill("#k1-f-count input", "2")
    page.check("#k1-f-per_line input")
    page.wait_for_selector("#k1-batch :text('4 jobs: 2 prompts')")
    page.wait_for_selector("#k1-generate:text('Generate 4 jobs')")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#k1-progress [data-active]")
    client.wait(lambda: len(client.queue()) == 4)
    prompts = [job.request["prompt"] for job in client.queue()]
    assert prompts == ["it moves", "it moves", "it stands", "it stands"]
    page.focus("#k1-f-size input")
    page.keyboard.press("Escape")
    page.wait_for_selector("#k1-ask[open]")
    page.keyboard.press("Escape")
    page.click("#k1-last-seed")
    newest = max(client.queue(), key=lambda job: job.created_at)
    wait_for_value(page, "#k1-f-seed :is(input, textarea)", str(newest.request["seed"]))
