from __future__ import annotations

import pytest

from kandinsky5.presets import MODES, PRESETS
from kandinsky5.ui import choices


def test_presets_of_a_mode_begin_with_the_built_in_then_those_that_are_here():
    listed = choices.preset_choices("t2v", lambda preset: preset.name == "pro-t2v-5s-sd")
    assert [name for _, name in listed[:2]] == ["demo-t2v", "pro-t2v-5s-sd"]
    assert all(label.endswith("weights not here yet") for label, _ in listed[2:])
    assert not any(label.endswith("weights not here yet") for label, _ in listed[:2])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_presets_and_only_its_own(mode):
    names = [name for _, name in choices.preset_choices(mode, lambda preset: False)]
    assert names
    assert {PRESETS[name].mode for name in names} == {mode}


def test_weights_count_as_here_as_a_file_or_as_a_diffusers_folder(tmp_path):
    is_here = choices.weights_in(lambda: (tmp_path,))
    lite, pro = PRESETS["lite-t2v-5s-sft"], PRESETS["pro-t2v-5s-sd"]
    assert not is_here(lite)
    (tmp_path / lite.weights_file).touch()
    folder = tmp_path / "Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers" / "transformer"
    folder.mkdir(parents=True)
    assert is_here(lite)
    assert not is_here(pro), "a folder without weights"
    (folder / "diffusion_pytorch_model.safetensors").touch()
    assert is_here(pro)
    assert not is_here(PRESETS["image-t2i"])


def test_sizes_read_back_as_they_are_named():
    preset = PRESETS["lite-t2v-5s-sft"]
    for name in choices.size_choices(preset)[:-1]:
        assert choices.size_name(preset, *choices.size_of(name, None, None)) == name
    assert choices.size_of(choices.CUSTOM_SIZE, 640, 384) == (640, 384)
    assert choices.size_name(preset, 640, 384) == choices.CUSTOM_SIZE
