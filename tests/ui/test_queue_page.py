"""“Queue & history” in a real browser."""

from __future__ import annotations

import pytest

from kandinsky5.request import GenerationRequest

pytestmark = pytest.mark.browser

FOCUSED = "() => [document.activeElement.dataset.act, document.activeElement.dataset.job]"
FIRST = "name => document.querySelector('#k1-waits li .k1-what')?.textContent === name"
LOADED = "() => document.querySelector('#k1-past video')?.readyState >= 1"
PLAYS = "() => document.querySelector('.k1-viewer video')?.readyState >= 2"


@pytest.fixture
def busy(quiet_studio):
    """A job that runs and two that wait, by the names of their prompts."""
    client = quiet_studio.client
    client.hold()
    names = ("the first", "the second", "the third")
    ids = {name: client.submit(GenerationRequest(prompt=name, seed=5)) for name in names}
    client.wait(lambda: client.queue()[0].state == "running")
    return ids


def opened(open_page, studio, **options):
    page = open_page(studio.url, **options)
    page.get_by_role("tab", name="Queue & history").click()
    page.wait_for_selector("#k1-queue")
    return page


def test_two_tabs_see_one_queue_that_is_sorted_by_keyboard_changed_and_paused(
    quiet_studio, open_page, busy
):
    client = quiet_studio.client
    first, second = (opened(open_page, quiet_studio) for _ in range(2))
    first.wait_for_function(FIRST, arg="the second")
    first.focus(f"#k1-waits [data-act=up][data-job='{busy['the third']}']")
    first.keyboard.press("Enter")
    for page in (first, second):
        page.wait_for_function(FIRST, arg="the third")
    assert first.evaluate(FOCUSED) == ["down", busy["the third"]]  # it can go up no further

    second.click(f"#k1-waits [data-act=edit][data-job='{busy['the second']}']")
    second.wait_for_selector("#k1-editing:has-text('no. 2 of the queue')")
    second.wait_for_selector("#k1-generate", state="hidden")
    assert second.input_value("#k1-f-prompt textarea") == "the second"
    second.fill("#k1-f-prompt textarea", "another second")
    second.keyboard.press("Control+Enter")
    first.wait_for_selector("#k1-waits :text('another second')")
    second.wait_for_selector("#k1-generate")
    second.wait_for_selector("#k1-editing .k1-editing", state="hidden")
    assert [job.id for job in client.queue()][2] == busy["the second"]

    second.get_by_role("tab", name="Queue & history").click()
    first.click("#k1-pause")
    second.wait_for_selector("#k1-pause:has-text('Go on')")
    second.click("#k1-queue-stop")
    second.click("#k1-ask button[value=discard]")
    first.wait_for_selector("#k1-past [data-state=stopped]")
    first.get_by_role("tab", name="Create").click()
    first.wait_for_selector("#k1-progress .k1-paused")
    assert [job.state for job in client.queue()] == ["queued", "queued"]
    first.click("#k1-progress [data-go]")
    second.wait_for_selector("#k1-now [data-state=running]:has-text('the third')")


def test_a_result_is_seen_large_and_deleted_only_after_a_question(quiet_studio, open_page):
    client, hostile = quiet_studio.client, "<img src=x onerror='window.hurt = 1'> ${7} 🎨"
    made = client.submit(GenerationRequest(prompt=hostile + " word" * 40))
    client.wait(lambda: client.status(made).state == "done")
    page = opened(open_page, quiet_studio, viewport={"width": 400, "height": 850})
    page.wait_for_function(LOADED)
    page.focus("#k1-past .k1-thumb")
    page.keyboard.press("Enter")
    page.wait_for_function(PLAYS)
    page.keyboard.press("Escape")
    page.wait_for_selector(".k1-viewer", state="detached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    path = client.folders.out_dir / f"{made}.mp4"
    for answer in ("keep", "delete"):
        page.click("#k1-past [data-act=delete]")
        page.wait_for_selector(f".k1-ask :text('{path.name}')")
        assert path.exists() and page.inner_text(".k1-ask b").startswith(f"Delete “{hostile}")
        page.click(f".k1-ask button[value={answer}]")
    page.wait_for_selector("#k1-history :text('Nothing yet')")
    assert not path.exists()
    own = (quiet_studio.url, "data:", "blob:")
    assert [url for url in page.requested if not url.startswith(own)] == []
    assert page.evaluate("window.hurt") is None
