"""Comments of the early community program's mp4 files (github maybleMyers/kandinsky5), read as requests.

Facts about its JSON: one flat object with ``model_type`` "Kandinsky 5.0"; a choice that was left alone is
null; the configuration is named by the label of its menu.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest

_MODEL_TYPE = "Kandinsky 5.0"
_PRESET_OF_LABEL = {
    "5s Lite (T2V)": "lite-t2v-5s-sft",
    "10s Lite (T2V)": "lite-t2v-10s-sft",
    "5s Lite (I2V)": "lite-i2v-5s",
    "5s Pro 20B (T2V)": "pro-t2v-5s-sd",
    "5s Pro 20B HD (T2V)": "pro-t2v-5s-hd",
    "10s Pro 20B (T2V)": "pro-t2v-10s-sd",
    "10s Pro 20B HD (T2V)": "pro-t2v-10s-hd",
    "5s Pro 20B (I2V)": "pro-i2v-5s-sd",
    "5s Pro 20B HD (I2V)": "pro-i2v-5s-hd",
}
_NAME_HERE = {
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "video_duration": "seconds",
    "sample_steps": "steps",
    "guidance_weight": "guidance",
    "scheduler_scale": "shift",
    "seed": "seed",
}


def is_community(metadata: Mapping[str, Any]) -> bool:
    """Whether this is a comment of that program."""
    return metadata.get("model_type") == _MODEL_TYPE


def request_of_community(metadata: Mapping[str, Any]) -> GenerationRequest:
    """The request nearest to what that program did.

    Its settings for memory (block swap, tiles, dtypes per part) are left to the planner here. It did not
    record whether the prompt was expanded; the prompt is taken as final.

    Raises:
        UserError: a value outside of what this program can do.
    """
    label = metadata.get("model_config")
    fallback = "lite-i2v-5s" if metadata.get("mode") == "i2v" else "lite-t2v-5s-sft"
    preset = PRESETS[_PRESET_OF_LABEL.get(label, fallback) if isinstance(label, str) else fallback]
    values: dict[str, Any] = {
        "preset": preset.name,
        "prompt": metadata.get("prompt"),
        "expand": False,
        "weights": "int8" if metadata.get("use_int8") is True else "auto",
        "cache": "magcache" if metadata.get("use_magcache") is True else "none",
        "attention": "nabla" if metadata.get("attention_type") == "nabla" else "auto",
        "dit": _file_name(metadata.get("dit_checkpoint_path")),
    }
    if preset.takes_image:
        values["image"] = _file_name(metadata.get("image_path"))
    for theirs, ours in _NAME_HERE.items():
        if metadata.get(theirs) is not None:
            values[ours] = metadata[theirs]
    return GenerationRequest.from_dict(values)


def _file_name(path: Any) -> str | None:
    if path is not None and not isinstance(path, str):
        raise UserError("file", path, "a path is text")
    return PureWindowsPath(path).name if path else None
