"""What the model files named in the form are: asked of the worker, which reads their headers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import UserError
from kandinsky5.family import TransformerShape
from kandinsky5.ui.fields import BY_NAME, LORA_FIELDS
from kandinsky5.ui.typed import existing_path, lora_name, lora_of
from kandinsky5.worker.client import FileNames

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

LORA_NAMES = tuple(path.name for path, _ in LORA_FIELDS)
STRENGTH_NAMES = tuple(strength.name for _, strength in LORA_FIELDS)
FILE_FIELDS = ("preset", "dit", "model_dir", *LORA_NAMES)
"""Fields that name model files, and the preset that these shall serve."""
LOOK_AGAIN_S = 20
Said = dict[str, Any]


@dataclass(frozen=True)
class FilesTold:
    """What is known of the files by now.

    Attributes:
        said: by field, what :func:`kandinsky5.pipeline.named_files.describe_files` says of the file named
            there, or {problem} where there is none.
        pending: the worker still looks; ask again.
        text_encoder: what the worker says of the text encoder that goes with them; None for the preset's.
        lora_parameters: numbers in all LoRAs that act.
    """

    said: Mapping[str, Said] = field(default_factory=dict)
    pending: bool = False
    text_encoder: Said | None = None
    lora_parameters: int = 0

    @property
    def problem(self) -> tuple[str, str] | None:
        """(field, what is wrong) of the first file that cannot be used."""
        for name, said in self.said.items():
            if "problem" in said:
                return name, str(said["problem"])
        return None

    @property
    def transformer(self) -> tuple[TransformerShape, str] | None:
        """Dimensions and format of the transformer of one's own, as a plan takes them."""
        for name in ("dit", "model_dir"):
            if config := self.said.get(name, {}).get("config"):
                return TransformerShape.of_config(config), str(self.said[name]["weights"])
        return None


def files_told(client: WorkerClient, values: Mapping[str, Any]) -> FilesTold:
    """What is known of the files by now; what is not is asked. Nothing is opened here.

    Args:
        values: of :data:`FILE_FIELDS`, and of :data:`STRENGTH_NAMES` where they matter.
    """
    said: dict[str, Said] = {}
    paths: dict[str, str] = {}
    for name in FILE_FIELDS[1:]:
        field = BY_NAME[name]
        read = lora_name if field.kind == "lora" else existing_path
        try:
            if path := read(field, values[name]):
                paths[name] = path
        except UserError as error:
            said[name] = {"problem": error.allowed}
    if not paths:
        return FilesTold(said)
    loras = tuple(name for name in LORA_NAMES if name in paths)
    names = FileNames(
        preset=values["preset"],
        dit=paths.get("dit"),
        model_dir=paths.get("model_dir"),
        loras=tuple(paths[name] for name in loras),
        stamps=tuple(_stamp(path) for path in paths.values()),
    )
    told = client.describe(names)
    if told is None:
        return FilesTold(said, pending=True)
    if "problem" in told:
        return FilesTold({**said, next(iter(paths)): told})
    answers = {"dit": told["dit"], "model_dir": told["model_dir"]}
    answers |= dict(zip(loras, told["loras"], strict=True))
    found = {**said, **{name: answer for name, answer in answers.items() if answer is not None}}
    return FilesTold(
        {name: found[name] for name in FILE_FIELDS if name in found},
        text_encoder=told.get("text_encoder"),
        lora_parameters=sum(
            found[name].get("parameters", 0) for name in loras if _acts(values, name)
        ),
    )


def _acts(values: Mapping[str, Any], name: str) -> bool:
    """Whether a LoRA's strength is anything but 0, as far as it can be read."""
    path, strength = next(row for row in LORA_FIELDS if row[0].name == name)
    try:
        choice = lora_of(path, strength, values[name], values.get(strength.name))
    except UserError:
        return True
    return choice is not None and choice.strength != 0


def missing_parts(client: WorkerClient, preset: str) -> tuple[str, ...] | None:
    """Parts of a preset's model that are not on this machine; None while the worker still looks.

    What was not there may have been fetched since: an answer counts for :data:`LOOK_AGAIN_S`.
    """
    moment = int(time.time() // LOOK_AGAIN_S)
    told = client.describe(FileNames(preset, stamps=((moment, 0),)))
    return None if told is None else tuple(told.get("missing", ()))


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
