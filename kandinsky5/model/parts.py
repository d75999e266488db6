"""The parts of a model beside its transformer: where they are published, and which files each consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import lacking_weights, read_json
from kandinsky5.presets import Preset

QWEN_REPOSITORY = "Qwen/Qwen2.5-VL-7B-Instruct"
_CLIP = "openai/clip-vit-large-patch14"
_VAE_OF = {
    "hunyuan": ("hunyuanvideo-community/HunyuanVideo", "AutoencoderKLHunyuanVideo", 0.476986),
    "flux": ("black-forest-labs/FLUX.1-dev", "AutoencoderKL", 0.3611),
}
"""Repository, diffusers' name of the class, scaling factor, by the names that presets use."""


@dataclass(frozen=True)
class Part:
    """A part of a model beside the transformer.

    Attributes:
        title: for messages.
        folders: names inside a model folder, in the order looked at.
        repository: the repository on the hub that also has it; empty for the VAE, whose depends on its kind.
        inner: its folder in that repository.
        proofs: for each file it needs, the names of which one must be there.
        has_weights: whether it needs weights, whole, as well.
    """

    title: str
    folders: tuple[str, ...]
    repository: str
    inner: str
    proofs: tuple[tuple[str, ...], ...]
    has_weights: bool

    def lacks(self, folder: Path) -> Path | None:
        """The first file that is not there, or None for a folder that has all it needs."""
        for names in self.proofs:
            if not any((folder / name).is_file() for name in names):
                return folder / names[0]
        return lacking_weights(folder) if self.has_weights else None


_CONFIG = (("config.json",),)
_TOKENIZER = (("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt"))
PARTS = {
    "vae": Part("VAE", ("vae",), "", "vae", _CONFIG, True),
    "text_encoder": Part("text encoder", ("text_encoder",), QWEN_REPOSITORY, "", _CONFIG, True),
    "tokenizer": Part(
        "tokenizer", ("tokenizer", "text_encoder"), QWEN_REPOSITORY, "", _TOKENIZER, False
    ),
    "text_encoder_2": Part(
        "CLIP text encoder", ("text_encoder_2", "text_encoder2"), _CLIP, "", _CONFIG, True
    ),
    "tokenizer_2": Part(
        "CLIP tokenizer",
        ("tokenizer_2", "text_encoder_2", "text_encoder2"),
        _CLIP,
        "",
        _TOKENIZER,
        False,
    ),
}
"""By the names of :class:`kandinsky5.model.files.ModelFiles`."""


def repository_of(name: str, preset: Preset) -> str:
    """The repository on the hub whose copy of a part serves the preset."""
    return PARTS[name].repository or _VAE_OF[preset.vae][0]


def is_vae_of(preset: Preset, folder: Path) -> bool:
    """Whether a folder's config.json is of the preset's kind of VAE, as far as it says anything."""
    _, class_name, factor = _VAE_OF[preset.vae]
    try:
        stated = read_json(folder / "config.json")
    except CheckpointError:
        return False
    found = (stated.get("_class_name", class_name), stated.get("scaling_factor", factor))
    return found == (class_name, factor)


def repositories_of(preset: Preset) -> dict[str, str]:
    """Where on the hub each part is fetched from; of two places the one that is not gated."""
    found = {name: repository_of(name, preset) for name in PARTS}
    if preset.vae == "flux":
        found["vae"] = preset.diffusers_repository
    return found
