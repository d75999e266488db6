"""The studio in a real browser."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from kandinsky5.request import GenerationRequest

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
SEED = "#k1-f-seed input, #k1-f-seed textarea"
STEPS = "#k1-f-steps input[type=number]"
PROMPT_IS_FILLED = "() => document.querySelector('#k1-f-prompt textarea')?.value"
PICTURE_READY = "() => document.querySelector('#k1-f-image img')?.naturalWidth === 64"
SEED_IS_NUMBER = (
    "() => /^[0-9]+$/.test("
    "document.querySelector('#k1-f-seed').querySelector('input, textarea').value)"
)
PLAYING = (
    "() => { const v = document.querySelector('#k1-player video'); return v && v.readyState >= 2; }"
)


def start(page, prompt):
    page.fill(PROMPT, prompt)
    page.click("#k1-generate")


def test_a_prompt_becomes_a_video_that_plays_and_seeks(quiet_studio, open_page):
    page = open_page(quiet_studio.url)
    start(page, "a red circle moves right")
    page.wait_for_function(PLAYING)
    state = page.eval_on_selector(
        "#k1-player video", "v => ({duration: v.duration, loop: v.loop, width: v.videoWidth})"
    )
    assert state["duration"] == pytest.approx(25 / 24, abs=0.1)
    assert (state["loop"], state["width"]) == (True, 64)
    page.eval_on_selector(
        "#k1-player video",
        "v => new Promise(done => { v.pause(); v.onseeked = done; v.currentTime = 0.8; })",
    )
    assert page.eval_on_selector("#k1-player video", "v => v.currentTime") == pytest.approx(
        0.8, abs=0.1
    )
    assert page.locator("#k1-gallery .k1-tile").count() == 1
    assert "1234567" in page.inner_text("#k1-player")


def test_the_page_asks_no_other_host_for_anything(quiet_studio, open_page):
    page = open_page(quiet_studio.url)
    start(page, "a red circle moves right")
    page.wait_for_function(PLAYING)
    own = (quiet_studio.url, "data:", "blob:")
    assert [url for url in page.requested if not url.startswith(own)] == []
    # nor does it name any font, script or style of another host that a faster machine would fetch
    source = page.content()
    assert not re.search(
        r'<(?:script|link|img|iframe)[^>]+(?:src|href)="https?://(?!127\.0\.0\.1)', source
    )


def test_a_reload_finds_the_running_job_and_can_stop_it(quiet_studio, open_page):
    quiet_studio.client.hold()
    page = open_page(quiet_studio.url)
    start(page, "a long tale")
    page.wait_for_selector("#k1-progress [data-active]")
    quiet_studio.client.allow(2)
    page.wait_for_selector("#k1-progress :text('step 2 of 5')")
    page.reload()
    page.wait_for_selector("#k1-progress :text('step 2 of 5')")
    assert page.title().startswith("40 %")
    page.click("#k1-stop")
    page.click("#k1-ask button[value=save]")
    page.wait_for_selector("#k1-progress [data-state=stopped], #k1-progress [data-state=idle]")
    assert quiet_studio.client.queue() == ()


def test_a_reload_keeps_what_was_typed(quiet_studio, open_page):
    page = open_page(quiet_studio.url)
    page.wait_for_function("() => window.k1.isRemembering()")
    page.click("#k1-f-mode label:has-text('Image → video')")
    page.wait_for_selector("#k1-f-image")
    page.fill(PROMPT, 'it "moves" 🎨 <b>')
    page.fill(SEED, "77")
    page.fill(STEPS, "0")
    page.reload()
    page.wait_for_function(PROMPT_IS_FILLED)
    page.wait_for_selector("#k1-f-image")
    assert page.input_value(PROMPT) == 'it "moves" 🎨 <b>'
    assert (page.input_value(SEED), page.input_value(STEPS)) == ("77", "0")
    other_tab = page.context.new_page()
    other_tab.goto(quiet_studio.url)
    other_tab.wait_for_function(PROMPT_IS_FILLED)


@pytest.mark.parametrize(
    "broken", ["{", '{"version": 0}', '{"version": 1, "values": {"preset": 7}}']
)
def test_a_broken_memory_leaves_a_working_page(quiet_studio, open_page, broken):
    page = open_page(quiet_studio.url)
    page.wait_for_function("() => window.k1.isRemembering()")
    page.evaluate("text => { sessionStorage['k1-form'] = localStorage['k1-form'] = text; }", broken)
    page.reload()
    page.wait_for_function("() => window.k1?.isRemembering()")
    start(page, "a red circle")
    page.wait_for_function(PLAYING)


def test_two_tabs_make_two_jobs_and_a_double_click_one(quiet_studio, open_page):
    quiet_studio.client.hold()
    first, second = open_page(quiet_studio.url), open_page(quiet_studio.url)
    first.fill(PROMPT, "of the first tab")
    first.dblclick("#k1-generate")
    first.wait_for_selector("#k1-progress [data-state=running]")
    second.wait_for_selector("#k1-progress [data-state=running]")
    start(second, "of the second tab")
    second.wait_for_selector("#k1-progress [data-state=queued] :text('1 ahead of it')")
    first.wait_for_selector(".k1-queue :text('of the second tab')")
    assert len(quiet_studio.client.queue()) == 2
    first.click(".k1-queue [data-stop]")
    second.wait_for_selector("#k1-progress [data-state=running] :text('of the first tab')")
    second.click("#k1-stop")
    second.click("#k1-ask button[value=discard]")
    first.wait_for_selector("#k1-progress [data-state=stopped]")


def test_what_people_type_is_shown_as_text(quiet_studio, open_page):
    hostile = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
    hostile += " ${window.hurt = 3} {{7}} 🎨"
    page = open_page(quiet_studio.url)
    start(page, hostile)
    page.wait_for_function(PLAYING)
    assert page.inner_text(".k1-prompt") == hostile
    assert page.get_attribute("#k1-gallery .k1-tile", "title") == hostile
    assert page.evaluate("window.hurt") is None


def test_bad_values_are_said_at_their_fields_and_nothing_starts(quiet_studio, open_page):
    page = open_page(quiet_studio.url)
    page.click("#k1-generate")
    page.wait_for_selector("#k1-f-prompt .k1-at-field")
    assert page.inner_text("#k1-problem") == "Prompt: describe what should be made."
    page.fill(PROMPT, "a red circle")
    page.fill(SEED, "-5")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#k1-f-seed .k1-at-field")
    assert page.locator("#k1-f-prompt .k1-at-field").count() == 0
    assert "0 to 9223372036854775807" in page.inner_text("#k1-f-seed .k1-at-field")
    assert quiet_studio.client.queue() == ()
    assert quiet_studio.client.history() == ()
    page.click("#k1-dice")
    page.wait_for_function(SEED_IS_NUMBER)
    page.click("#k1-generate")
    page.wait_for_function(PLAYING)
    assert page.locator(".k1-problem, .k1-at-field").count() == 0


def test_by_keyboard_alone_it_starts_and_asks_before_it_stops(quiet_studio, open_page):
    quiet_studio.client.hold()
    page = open_page(quiet_studio.url)
    page.wait_for_function("() => document.activeElement.matches('#k1-f-prompt textarea')")
    page.keyboard.type("typed at once")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#k1-progress [data-active]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#k1-ask[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#k1-ask", state="hidden")
    assert len(quiet_studio.client.queue()) == 1
    page.keyboard.press("Escape")
    assert not page.is_visible("#k1-ask button[value=decode]")  # nothing is there yet
    page.click("#k1-ask button[value=save]")
    page.wait_for_selector("#k1-progress [data-state=stopped]")
    assert quiet_studio.client.queue() == ()


def test_an_image_is_asked_for_and_used_and_a_broken_one_refused(quiet_studio, open_page, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    page = open_page(quiet_studio.url)
    assert not page.is_visible("#k1-f-image")
    page.click("#k1-f-mode label:has-text('Image → video')")
    page.wait_for_selector("#k1-f-image")
    start(page, "it moves")
    page.wait_for_selector("#k1-problem :text('needs an input image')")
    page.set_input_files("#k1-f-image input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("#k1-f-image .k1-at-field:text('not a readable image')")
    page.wait_for_selector("#k1-f-image input[type=file]", state="attached")
    page.set_input_files("#k1-f-image input[type=file]", tmp_path / "good.png")
    page.wait_for_function(PICTURE_READY)
    page.click("#k1-generate")
    page.wait_for_function(PLAYING)
    (job,) = quiet_studio.client.history()
    assert job.request["preset"] == "demo-i2v"
    with Image.open(job.request["image"]) as used:
        assert used.size == (64, 64)


def test_settings_of_an_older_result_come_back(quiet_studio, open_page):
    client = quiet_studio.client
    for prompt, steps in (("the older", 7), ("the newer", 9)):
        job_id = client.submit(GenerationRequest(prompt=prompt, steps=steps, seed=steps))
        client.wait(lambda job_id=job_id: client.status(job_id).state == "done")
    page = open_page(quiet_studio.url)
    page.click("#k1-gallery .k1-tile[title='the older']")
    page.wait_for_selector("#k1-player .k1-prompt:text('the older')")
    page.click("#k1-use")
    page.wait_for_function(
        "() => document.querySelector('#k1-f-prompt textarea').value === 'the older'"
    )
    assert page.input_value(SEED) == "7"
    assert page.input_value("#k1-f-steps input") == "7"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_scrolling_sideways(quiet_studio, open_page, scheme):
    page = open_page(quiet_studio.url, viewport={"width": 400, "height": 850}, color_scheme=scheme)
    start(page, "word " * 40 + "w" * 120)
    page.wait_for_function(PLAYING)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.is_visible("#k1-generate")
