"""Settings and the user's presets in a real browser, and in two tabs of it."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
STEPS = "#k1-f-steps input[type=number]"
NAME = "#k1-own-name :is(input, textarea)"
REMEMBERING = "() => window.k1?.isRemembering()"
IS_DARK = "() => document.body.classList.contains('dark')"
IS_LIGHT = "() => !document.body.classList.contains('dark')"
KEPT = "() => (sessionStorage['k1-form'] || '') + (localStorage['k1-form'] || '')"


def studio_in(folder, serve, fake_client):
    """A studio whose folder of results is left to the settings."""
    from kandinsky5.ui.options import StudioOptions

    options = StudioOptions(state_dir=folder / "state")
    return serve(fake_client.FakeClient(folder / "outputs"), options)


@pytest.fixture(scope="module")
def own_studio(serve, fake_client, tmp_path_factory):
    return studio_in(tmp_path_factory.mktemp("own"), serve, fake_client)


def second_tab(page):
    tab = page.context.new_page()
    tab.goto(page.url)
    tab.wait_for_function(REMEMBERING)
    return tab


def open_settings(page):
    page.get_by_role("tab", name="System").click()
    page.wait_for_selector("#k1-settings-save")


def save_settings(page):
    page.click("#k1-settings-save")
    page.wait_for_selector("#k1-settings-line :text('Saved')")


def open_presets(page):
    page.wait_for_function(REMEMBERING)
    page.click("#k1-own .label-wrap")
    page.wait_for_selector(NAME)


def choose(page, name):
    page.click("#k1-own-chosen input")
    page.click(f"#k1-own-chosen [role=option]:has-text('{name}')")


def test_a_preset_is_saved_loaded_and_deleted_in_two_tabs(own_studio, open_page):
    first = open_page(own_studio.url)
    open_presets(first)
    first.fill(PROMPT, "a red circle")
    first.fill(STEPS, "9")
    first.fill(NAME, "Circles")
    first.press(NAME, "Enter")
    first.wait_for_selector("#k1-own-line :text('Saved “Circles”')")
    first.fill(PROMPT, "something else")
    first.fill(STEPS, "30")
    first.click("#k1-own-load")
    first.wait_for_selector("#k1-own-line :text('Loaded')")
    assert (first.input_value(PROMPT), first.input_value(STEPS)) == ("a red circle", "9")

    second = second_tab(first)
    open_presets(second)
    choose(second, "Circles")
    second.click("#k1-own-delete")
    second.wait_for_selector("#k1-own-line :text('Delete “Circles” for good?')")
    second.click("#k1-own-no")
    second.wait_for_selector("#k1-own-yes", state="detached")
    second.click("#k1-own-delete")
    second.click("#k1-own-yes")
    second.wait_for_selector("#k1-own-line :text('Deleted')")
    first.click("#k1-own-load")
    first.wait_for_selector("#k1-own-line :text('no longer there')")


def test_a_preset_leaves_as_a_file_and_comes_back(own_studio, open_page, tmp_path):
    page = open_page(own_studio.url, accept_downloads=True)
    open_presets(page)
    page.fill(PROMPT, "a red circle")
    page.fill(NAME, "Squares & more")
    page.click("#k1-own-save")
    page.wait_for_selector("#k1-own-line :text('Saved')")
    with page.expect_download() as downloading:
        page.click("#k1-own-export")
    assert downloading.value.suggested_filename == "k1-preset-Squares-more.json"
    file = tmp_path / "mine.json"
    downloading.value.save_as(file)
    assert json.loads(file.read_text())["presets"][0]["request"]["prompt"] == "a red circle"
    page.set_input_files("#k1-own input[type=file]", file)
    page.wait_for_selector("#k1-own-line :text('Imported “Squares & more (2)”')")
    assert "(2)" in page.inner_text("#k1-own .label-wrap")


def test_theme_and_memory_follow_the_settings_in_every_tab(serve, fake_client, open_page, tmp_path):
    page = open_page(studio_in(tmp_path, serve, fake_client).url, color_scheme="light")
    page.wait_for_function(REMEMBERING)
    page.fill(PROMPT, "a secret")
    page.wait_for_function("() => localStorage['k1-form']?.includes('a secret')")
    other = second_tab(page)
    other.wait_for_function(IS_LIGHT)
    open_settings(page)
    page.click("#k1-s-theme label:has-text('Dark')")
    page.click("#k1-s-remember_form input")
    save_settings(page)
    for tab in (page, other):
        tab.wait_for_function(IS_DARK)
        assert tab.evaluate(KEPT) == ""
    other.fill(PROMPT, "another secret")
    other.reload()
    other.wait_for_selector("#k1-f-prompt textarea")
    other.wait_for_function(IS_DARK)
    other.wait_for_function("() => window.k1?.isStarted()")
    assert other.input_value(PROMPT) == ""
    assert other.evaluate(KEPT) == ""


def test_crf_and_folders_count_from_the_next_job_on(own_studio, open_page, tmp_path):
    client = own_studio.client
    (tmp_path / "models").mkdir()
    page = open_page(own_studio.url)
    open_settings(page)
    page.fill("#k1-s-models_dirs textarea", str(tmp_path / "models"))
    page.wait_for_selector("#k1-settings-models-said [data-state=doubtful]")
    page.fill("#k1-s-out_dir :is(input, textarea)", str(tmp_path / "elsewhere"))
    page.fill("#k1-s-crf :is(input, textarea)", "99")
    page.click("#k1-settings-save")
    page.wait_for_selector("#k1-settings-line :text('Not saved')")
    page.fill("#k1-s-crf :is(input, textarea)", "20")
    save_settings(page)
    page.get_by_role("tab", name="Create").click()
    page.fill(PROMPT, "a red circle")
    page.click("#k1-generate")
    page.wait_for_function("() => document.querySelector('#k1-player video')?.readyState >= 2")
    (job,) = client.history()
    assert job.request["crf"] == 20
    assert job.output.startswith(str(tmp_path / "elsewhere"))
    assert client.folders.models_dirs == (tmp_path / "models",)
