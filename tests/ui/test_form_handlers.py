"""Controls that change other controls, and what is said of the form as it stands."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from kandinsky5.request import GenerationRequest
from kandinsky5.ui import choices, form
from kandinsky5.ui.fields import BY_NAME, LORA_ROWS
from kandinsky5.ui.form_handlers import OUTLOOK_FIELDS, FormHandlers
from kandinsky5.ui.planning import Planner
from kandinsky5.ui.settings import Settings


@pytest.fixture
def form_handlers(client):
    return FormHandlers(client, lambda preset: False, Planner())


def outlook(of_form: FormHandlers, **changes: Any) -> dict[str, Any]:
    """What is said, by name."""
    filled = {**form.values_of(GenerationRequest(prompt="a red circle")), **changes}
    said = of_form.outlook(*(filled[name] for name in OUTLOOK_FIELDS))
    names = ("plan", "preset", "dit", "model_dir", "loras", *range(1, LORA_ROWS + 1), "timer")
    return dict(zip(names, said, strict=True))


def skipped(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


def test_settings_of_the_shown_result_come_back_with_the_seed_that_was_drawn(form_handlers, client):
    job_id = client.submit(GenerationRequest(prompt="a tale", steps=9, width=96, height=96))
    client.release()
    client.wait(lambda: client.status(job_id).state == "done")
    updates = dict(zip(BY_NAME, form_handlers.use_settings(None, {"result": job_id}), strict=True))
    got = {name: update.get("value") for name, update in updates.items()}
    assert (got["prompt"], got["steps"], got["seed"]) == ("a tale", 9, "1234567")
    assert (got["size"], got["width"]) == (choices.CUSTOM_SIZE, 96)


def test_a_kept_form_fills_every_control_but_the_picture(form_handlers):
    kept = {"preset": "demo-i2v", "prompt": "it moves", "steps": 9}
    updates = dict(
        zip(
            BY_NAME, form_handlers.restored(json.dumps({"version": 1, "values": kept})), strict=True
        )
    )
    assert (updates["prompt"]["value"], updates["steps"]["value"]) == ("it moves", 9)
    assert updates["image"] == gr.update(visible=True)
    assert updates["preset"]["choices"] == form_handlers.presets("i2v")


def test_a_new_form_takes_live_preview_and_crf_from_the_settings(client):
    settings = Settings(crf=30, preview=False)
    of_form = FormHandlers(client, lambda preset: False, settings=lambda: settings)
    updates = dict(zip(BY_NAME, of_form.restored(""), strict=True))
    assert updates["preview"] == gr.update(value=False)
    assert updates["crf"] == gr.update(placeholder="30")
    assert all(
        skipped(change) for name, change in updates.items() if name not in ("preview", "crf")
    )
    # of a result made with another CRF the number is shown, of one made with this one it is not
    made = GenerationRequest(prompt="x", crf=16)
    filled = dict(zip(BY_NAME, of_form.filled_with(made, None), strict=True))
    assert (filled["crf"]["value"], filled["crf"]["placeholder"]) == ("16", "30")
    made = GenerationRequest(prompt="x", crf=30)
    assert dict(zip(BY_NAME, of_form.filled_with(made, None), strict=True))["crf"]["value"] == ""


def test_choosing_a_mode_loads_its_first_preset_and_shows_the_image(form_handlers):
    updates = dict(
        zip(
            BY_NAME, form_handlers.mode_chosen("i2v", "demo-t2v", "auto", "none", True), strict=True
        )
    )
    assert updates["preset"]["value"] == "demo-i2v"
    assert updates["image"]["visible"] is True
    assert updates["size"]["value"] == choices.FROM_IMAGE
    assert "value" not in updates["prompt"]


def test_choosing_a_preset_loads_its_defaults(form_handlers):
    updates = dict(
        zip(
            BY_NAME,
            form_handlers.preset_chosen("lite-t2v-5s-distilled", "auto", "none", True),
            strict=True,
        )
    )
    got = {name: updates[name]["value"] for name in ("steps", "guidance", "shift", "width")}
    assert got == {"steps": 16, "guidance": 1.0, "shift": 5.0, "width": 768}


def test_the_plan_follows_the_form_and_names_a_value_that_cannot_be(form_handlers):
    page = outlook(form_handlers)["plan"]
    assert 'data-fits="yes"' in page
    assert "112 tokens" in page
    page = outlook(form_handlers, ram="<0>")["plan"]
    assert "RAM budget, GB: got “&lt;0&gt;”" in page


def test_controls_of_an_engine_show_with_it(form_handlers):
    shown = dict(
        zip(BY_NAME, form_handlers.steered("demo-t2v", "nabla", "magcache", True), strict=True)
    )
    assert shown["nabla_p"]["visible"] and shown["cache_threshold"]["visible"]
    assert "value" not in shown["nabla_p"]


def test_a_presets_own_nabla_values_stand_in_the_empty_controls(form_handlers):
    updates = form_handlers.preset_chosen("pro-t2v-10s-hd", "auto", "none", True)
    found = dict(zip(BY_NAME, updates, strict=True))["nabla_p"]
    assert (found["visible"], found["placeholder"]) == (True, "0.7")


def test_an_expanded_prompt_of_a_result_can_be_used_again(form_handlers, client):
    job_id = client.submit(GenerationRequest(prompt="a fox", preset="lite-t2v-5s-sft"))
    client.release()
    client.wait(lambda: client.status(job_id).state == "done")
    made = {**client.status(job_id).result, "expanded_prompt": "A red fox runs."}
    client._set(job_id, result=made)
    updates = dict(zip(BY_NAME, form_handlers.use_settings(job_id, {}), strict=True))
    assert updates["expanded_prompt"] == gr.update(value="A red fox runs.", visible=True)
    assert (updates["prompt"]["value"], updates["expand"]["value"]) == ("a fox", True)


def test_a_file_is_looked_at_until_the_worker_has_said_what_it_is(form_handlers, client, tmp_path):
    file = tmp_path / "my <model>.safetensors"
    file.touch()
    said = outlook(form_handlers, dit=f" '{file}' ")
    assert "looking at it" in said["dit"]
    assert said["timer"].active
    assert client.asked[-1].dit == str(file)
    pro = {"name": "my <model>.safetensors", "model": "pro", "quantization": "int8-community"}
    pro |= {
        "task_hint": "t2v or i2v",
        "parameters": 19_311_325_248,
        "weights": "int8",
        "notices": [],
    }
    client.told = {"dit": pro}
    said = outlook(form_handlers, dit=str(file))
    assert "my &lt;model&gt;.safetensors: Pro 19B, int8 community" in said["dit"]
    assert "Text → video or Image → video" in said["dit"]
    assert not said["timer"].active


def test_what_is_not_there_is_said_without_asking_the_worker(form_handlers, client):
    said = outlook(form_handlers, dit="/nowhere/model.safetensors")
    assert 'data-state="refused"' in said["dit"]
    assert "nothing is there" in said["dit"]
    assert client.asked == []


def test_a_changed_file_is_looked_at_again(form_handlers, client, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    outlook(form_handlers, dit=str(file))
    file.write_bytes(b"12")
    outlook(form_handlers, dit=str(file))
    assert len(set(client.asked)) == 2


def test_loras_are_told_in_a_line_each_and_a_row_is_left_to_fill(form_handlers, client, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    good = {"name": "a", "variant": "kohya", "tensors": 12, "matched": 10, "unmatched": "odd.alpha"}
    client.told = {
        "loras": [{**good, "trigger": "in <oil>"}, {"problem": "a LoRA of another model"}]
    }
    said = outlook(form_handlers, lora_1=str(tmp_path / "a"), lora_2=str(tmp_path / "b"))
    assert "LoRA (kohya), 10 of 12 tensors match, not odd.alpha" in said["loras"]
    assert "its trigger goes before the prompt: in &lt;oil&gt;" in said["loras"]
    assert 'data-state="refused">LoRA 2: a LoRA of another model' in said["loras"]
    assert [said[number]["visible"] for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_lora_without_a_known_model_is_at_least_known_to_be_one(form_handlers, client, tmp_path):
    (tmp_path / "a").touch()
    told = {"name": "a", "variant": "peft", "tensors": 8, "matched": None}
    client.told = {"loras": [told]}
    said = outlook(form_handlers, preset="lite-t2v-5s-sft", lora_1=str(tmp_path / "a"))
    assert "LoRA (peft), 8 tensors" in said["loras"]


def test_a_preset_whose_files_are_not_here_says_which_and_how_to_get_them(form_handlers, client):
    client.told = {"missing": ["transformer", "VAE"]}
    said = outlook(form_handlers, preset="lite-t2v-5s-sft")
    assert "Its weights are not here yet" in said["preset"]
    assert "python k1.py download lite-t2v-5s-sft" in said["preset"]
    client.told = {"missing": ["VAE", "CLIP"]}
    said = outlook(form_handlers, preset="lite-t2v-5s-sft")["preset"]
    assert "Of it VAE, CLIP are not here yet" in said
    assert outlook(form_handlers)["preset"] == ""


def test_the_last_jobs_seed_is_used_again_also_while_it_runs(form_handlers, client):
    assert skipped(form_handlers.last_seed())
    first = client.submit(GenerationRequest(prompt="a", seed=7))
    assert form_handlers.last_seed() == "7"
    client.release()
    client.wait(lambda: client.status(first).state == "done")
    assert form_handlers.last_seed() == "7"
    client.hold()
    drawn = client.submit(GenerationRequest(prompt="b"))
    client.release()
    client.wait(lambda: client.status(drawn).state == "done")
    assert form_handlers.last_seed() == "1234567"


def test_a_chosen_a_typed_and_a_scaled_size_keep_buttons_numbers_and_slider_together(form_handlers):
    rest = ("auto", None, None)
    sd = "lite-t2v-5s-sft"
    assert form_handlers.size_chosen("512 × 512", sd, 768, 512, *rest) == (512, 512, 82)
    assert form_handlers.size_chosen(choices.CUSTOM_SIZE, sd, 768, 512, *rest) == (768, 512, 100)
    assert form_handlers.side_typed(sd, 512, 768, *rest) == ("512 × 768", 100)
    assert form_handlers.side_typed(sd, 500, 768, *rest)[0] == choices.CUSTOM_SIZE
    kept, *made = form_handlers.scaled(50, None, sd, 768, 512, *rest)
    assert made == [384, 256, choices.CUSTOM_SIZE]
    assert form_handlers.scaled(100, kept, sd, 384, 256, *rest)[1:] == (768, 512, "768 × 512")
    assert form_handlers.swapped(sd, 768, 512, *rest) == (512, 768, "512 × 768")


def test_what_is_snapped_is_said_and_the_crop_follows_the_size(form_handlers, tmp_path):
    picture = str(tmp_path / "wide.png")
    Image.new("RGB", (320, 160), "red").save(picture)
    assert form_handlers.sized("lite-t2v-5s-sft", 768, 512, "auto", picture, None) == ("", "")
    line, crop = form_handlers.sized("lite-i2v-5s", 641, 512, "auto", picture, None)
    assert "Width 641 set to 640: sides are multiples of 16" in line
    assert "640 × 512 of 320 × 160" in crop
    line, crop = form_handlers.sized("lite-i2v-5s", None, None, "auto", picture, None)
    assert "880 × 448, as the image asks for" in line and "880 × 448" in crop
    line, crop = form_handlers.sized("lite-i2v-5s", None, None, "auto", None, None)
    assert "follows from the image" in line and crop == ""
    line, crop = form_handlers.sized("lite-i2v-5s", 30, 512, "auto", picture, None)
    assert "Width: got “30”" in line and crop == ""


def test_a_filled_form_sets_the_slider_too(form_handlers):
    updates = form_handlers.preset_chosen("image-t2i", "auto", "none", True)
    assert dict(zip(BY_NAME, updates, strict=True))["scale"]["value"] == 100
    kept = {"preset": "lite-t2v-5s-sft", "width": 384, "height": 256}
    updates = form_handlers.restored(json.dumps({"version": 1, "values": kept}))
    assert dict(zip(BY_NAME, updates, strict=True))["scale"]["value"] == 50
