"""The live preview in a real browser."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

PREVIEW = "() => document.querySelector('#k1-preview img')?.naturalWidth === 72"
AT_STEP = "step => document.querySelector('#k1-preview output').textContent === `step ${step} of 5`"
PLAYING = """() => { const v = document.querySelector('#k1-player video');
return v && v.readyState >= 2 && v.offsetParent; }"""
WATCH = """() => { window.first = document.querySelector('#k1-preview img'); window.changes = 0;
new MutationObserver(found => window.changes += found.length)
.observe(document.querySelector('#k1-preview'), {childList: true, subtree: true}); }"""
CLOCK_TICKED = "text => document.querySelector('#k1-progress').textContent.includes(text)"


def test_the_picture_emerges_stays_still_between_steps_and_can_be_gone_back_in(
    quiet_studio, open_page
) -> None:
    client = quiet_studio.client
    client.hold()
    page = open_page(quiet_studio.url)
    page.fill("#k1-f-prompt textarea", "a red circle moves right")
    page.click("#k1-generate")
    client.allow(2)
    page.wait_for_function(PREVIEW)
    page.wait_for_function(AT_STEP, arg=2)
    assert not page.is_visible("#k1-player")

    page.evaluate(WATCH)
    client._set(client.queue()[0].id, eta_s=77.0)
    page.wait_for_function(CLOCK_TICKED, arg="1 min 17 s")
    assert page.evaluate("window.changes") == 0

    client.allow(1)
    page.wait_for_function(AT_STEP, arg=3)
    page.focus("#k1-step")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(AT_STEP, arg=2)
    client.allow(1)
    page.wait_for_function("() => document.querySelector('#k1-step').max === '3'")
    assert page.inner_text("#k1-preview output") == "step 2 of 5"

    client.release()
    page.wait_for_function(PLAYING)
    assert not page.is_visible("#k1-preview")
    pictures = [url for url in page.requested if "/k1/preview/" in url]
    assert len(pictures) == len(set(pictures))


def test_a_stopped_job_goes_on_with_one_click_and_can_be_dropped(quiet_studio, open_page) -> None:
    client = quiet_studio.client
    client.hold()
    page = open_page(quiet_studio.url)
    page.fill("#k1-f-prompt textarea", "a red circle moves right")
    page.click("#k1-generate")
    client.allow(2)
    page.wait_for_function(AT_STEP, arg=2)
    page.click("#k1-stop")
    page.click("#k1-ask button[value=save]")
    page.wait_for_selector(".k1-resume:text('Resume from step 2')")
    assert page.is_visible("#k1-preview img")
    page.click(".k1-resume")
    page.wait_for_selector("#k1-progress [data-active]")
    page.keyboard.press("Escape")
    page.click("#k1-ask button[value=discard]")
    page.wait_for_selector("#k1-progress [data-state=stopped]")
    client.wait(lambda: client.history()[0].state == "stopped")
    assert client.queue() == ()
