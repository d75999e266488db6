"""One small made-up file for each row of formats.md, and as large ones that are wrong: each is named."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sparse_files import Described, grown_to, shapes_of, write_sparse
from tiny_transformer import (
    CONFIG,
    Tensors,
    comfy_fp8,
    comfy_fp8_by_output,
    community_fp8,
    community_int8,
    older_comfy_fp8,
    run,
    save,
    sqnr_db,
    stored,
    unscaled_fp8,
    weights,
)

from kandinsky5.cli import main
from kandinsky5.conversion.convert import convert
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.inspect import inspect_file
from kandinsky5.model.loading import find_model_files, load_transformer
from kandinsky5.model.lora import layer_sizes
from kandinsky5.model.lora_file import open_lora
from kandinsky5.model.weights import is_quantised_layer
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.request import GenerationRequest
from tests.support import loras

CPU = torch.device("cpu")
FORTY_GB = 40 * 10**9
SMALL_READ = 65_536
"""What may be read of a refused file beside its header."""


# One of each kind that is accepted


def plain(dtype: torch.dtype) -> Callable[[Path], Path]:
    return lambda folder: save(folder / "dit.safetensors", weights(dtype=dtype))


def quantised(how: Callable[[str, torch.Tensor], Tensors], **more: torch.Tensor) -> Any:
    return lambda folder: save(folder / "dit.safetensors", stored(how, weights()) | more)


def prefixed(prefix: str) -> Callable[[Path], Path]:
    named = {prefix + name: tensor for name, tensor in weights().items()}
    return lambda folder: save(folder / "dit.safetensors", named)


def sharded(folder: Path) -> Path:
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(weights())}
    for shard in shards:
        save(folder / shard, {n: t for n, t in weights().items() if where[n] == shard})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index


def diffusers_folder(folder: Path) -> Path:
    (folder / "transformer").mkdir()
    save(folder / "transformer" / "diffusion_pytorch_model.safetensors", weights())
    config = {"_class_name": "Kandinsky5Transformer3DModel", **dataclasses.asdict(CONFIG)}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text("{}")
    return folder


def own_int8(folder: Path) -> Path:
    convert(plain(torch.float32)(folder), folder / "int8.safetensors", "int8")
    return folder / "int8.safetensors"


def mixed(folder: Path) -> Path:
    """bfloat16 where layers are quantised, float32 everywhere else."""
    tensors = {n: t.bfloat16() if is_quantised_layer(n) else t for n, t in weights().items()}
    return save(folder / "dit.safetensors", tensors)


MARKER = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
TRANSFORMERS: dict[str, tuple[Callable[[Path], Path], str, float]] = {
    "bf16": (plain(torch.bfloat16), "bf16", 40),
    "fp16": (plain(torch.float16), "fp16", 50),
    "fp32": (plain(torch.float32), "fp32", math.inf),
    "shards with an index": (sharded, "fp32", math.inf),
    "prefix model.diffusion_model.": (prefixed("model.diffusion_model."), "fp32", math.inf),
    "prefix diffusion_model.": (prefixed("diffusion_model."), "fp32", math.inf),
    "-Diffusers folder": (diffusers_folder, "fp32", math.inf),
    "its transformer folder": (lambda f: diffusers_folder(f) / "transformer", "fp32", math.inf),
    "int8, own": (own_int8, "int8", 20),
    "int8, community": (quantised(community_int8), "int8-community", 20),
    "fp8, community": (quantised(community_fp8), "fp8-community", 15),
    "fp8 scaled": (quantised(comfy_fp8), "fp8-scaled", 15),
    "fp8 scaled by output": (quantised(comfy_fp8_by_output), "fp8-scaled", 15),
    "fp8 scaled, older": (quantised(older_comfy_fp8, **MARKER), "fp8-scaled", 15),
    "fp8 unscaled": (quantised(unscaled_fp8), "fp8-unscaled", 15),
    "mixed": (mixed, "mixed", 40),
}
"""Row → (what writes it, its quantisation, least likeness of its result to the original's in dB)."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    path = plain(torch.float32)(tmp_path_factory.mktemp("exact"))
    return run(load_transformer(path, device=CPU))


@pytest.mark.parametrize("row", TRANSFORMERS)
def test_every_kind_of_transformer_is_named_and_runs(tmp_path, exact, row) -> None:
    write, quantization, least_db = TRANSFORMERS[row]
    path = write(tmp_path)
    report = inspect_file(path)
    assert (report.kind, report.model, report.quantization) == ("dit", "custom", quantization)
    assert report.problems == ()
    assert report.parameters == sum(tensor.numel() for tensor in weights().values())
    model = load_transformer(path, device=CPU)
    assert model.config == CONFIG
    found = run(model)
    assert torch.equal(found, exact) if least_db == math.inf else sqnr_db(exact, found) > least_db


def peft(folder: Path, pairs: loras.Pairs) -> Path:
    return loras.save_peft(folder / "lora.safetensors", pairs, alpha=6.0, trigger="k5 style")


def peft_of_diffusers(folder: Path, pairs: loras.Pairs) -> Path:
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"transformer.{layer}.lora_A.default.weight"] = down
        tensors[f"transformer.{layer}.lora_B.default.weight"] = up
    save_file(tensors, folder / "lora.safetensors", {"trigger": "k5 style"})
    return folder / "lora.safetensors"


LORAS = {
    "PEFT": (peft, "peft", "k5 style"),
    "PEFT under transformer.": (peft_of_diffusers, "peft", "k5 style"),
    "diffusers": (
        lambda folder, pairs: loras.save_diffusers(folder / "lora.safetensors", pairs),
        "diffusers",
        "",
    ),
    "kohya": (
        lambda folder, pairs: loras.save_kohya(folder / "lora.safetensors", pairs, alpha=6.0),
        "kohya",
        "",
    ),
}


@pytest.fixture(scope="module")
def sizes() -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        return layer_sizes(DiffusionTransformer3D(CONFIG))


@pytest.mark.parametrize("row", LORAS)
def test_every_kind_of_lora_is_named_and_matched_whole(tmp_path, sizes, row) -> None:
    write, variant, trigger = LORAS[row]
    path = write(tmp_path, loras.random_pairs(sizes))
    report = inspect_file(path)
    assert (report.kind, report.variant, report.problems) == ("lora", variant, ())
    opened = open_lora(path, sizes)
    assert (opened.matched, opened.unmatched, opened.trigger) == (opened.total, (), trigger)
    assert set(opened.parts) == set(sizes)


# Files that are wrong, as large as a model


def beginning(content: bytes, name: str = "model.safetensors") -> Callable[[Path], Path]:
    """Another kind of file that goes on for 40 GB."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return grown_to(folder / name, FORTY_GB)

    return write


def foreign(*names: str) -> Callable[[Path], Path]:
    """A sound file of another model."""
    described: Described = {name: ("U8", (FORTY_GB // len(names),)) for name in names}
    return lambda folder: write_sparse(folder / "model.safetensors", described)


def image_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind)
    return buffer.getvalue()


def pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(9)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def described(config: DiTConfig = CONFIG) -> Described:
    return {n: ("BF16", s) for n, s in shapes_of(DiffusionTransformer3D, config).items()}


def truncated(folder: Path) -> Path:
    whole: Described = {"visual_embeddings.in_layer.weight": ("U8", (2 * FORTY_GB,))}
    return grown_to(write_sparse(folder / "model.safetensors", whole), FORTY_GB)


def with_a_stranger(folder: Path) -> Path:
    tensors = described() | {"extra.weight": ("U8", (FORTY_GB,))}
    del tensors["out_layer.out_layer.bias"]
    return write_sparse(folder / "model.safetensors", tensors)


def newer_int8(folder: Path) -> Path:
    tensors = {n: ("I8" if is_quantised_layer(n) else d, s) for n, (d, s) in described().items()}
    marks = {"k1_format": "k1-int8", "k1_version": "7"}
    return write_sparse(folder / "model.safetensors", tensors, marks)


def image_model(folder: Path) -> Path:
    config = DiTConfig(
        model_dim=2560,
        ff_dim=10240,
        num_visual_blocks=50,
        axes_dims=(32, 48, 48),
        visual_cond=False,
    )
    return write_sparse(folder / "kandinsky5lite_t2i.safetensors", described(config))


def index_that_leads_out(folder: Path) -> Path:
    foreign("w")(folder)
    (folder / "inside").mkdir()
    index = folder / "inside" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../model.safetensors"}}')
    return index


def lora_of_wan(folder: Path) -> Path:
    names = [f"lora_unet_blocks_0_self_attn_q.lora_{part}.weight" for part in ("down", "up")]
    return write_sparse(
        folder / "lora.safetensors", {name: ("BF16", (16, FORTY_GB // 64)) for name in names}
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4015405696\n"
WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, r"header says \d+ bytes, the file has \d+: download it again"),
    "LFS pointer": (beginning(POINTER), "Git-LFS pointer"),
    "HTML page": (beginning(b"<!doctype html><html>Sign in"), "web page"),
    "GGUF": (beginning(b"GGUF\x03\0\0\0"), "GGUF"),
    "picture": (beginning(image_of("PNG")), r"an image \(PNG\), not a checkpoint"),
    "photo": (beginning(image_of("JPEG")), r"an image \(JPEG\), not a checkpoint"),
    "zipped pickle": (beginning(pickled(True)), "a pickle can run code; use .safetensors"),
    "older pickle": (beginning(pickled(False)), "a pickle can run code; use .safetensors"),
    "pickle by name": (beginning(bytes(9), "model.ckpt"), "a pickle can run code"),
    "archive": (beginning(b"\x1f\x8b\x08"), "archive"),
    "10 GB header": (beginning(struct.pack("<Q", 10**10) + b"{"), "header of 10000000000 bytes"),
    "noise": (beginning(b"\x07" * 600), "not a .safetensors file"),
    "Wan": (foreign("patch_embedding.weight", "blocks.0.q"), "not Kandinsky 5.*Wan"),
    "Flux": (foreign("double_blocks.0.q", "img_in.weight"), "not Kandinsky 5.*Flux"),
    "SDXL": (foreign("model.diffusion_model.input_blocks.0.0.weight"), "not Kandinsky 5.*SDXL"),
    "half a model": (with_a_stranger, "1 tensors missing.*out_layer.*1 unexpected.*extra.weight"),
    "int8 of a newer K1": (newer_int8, "version '7'.*update K1"),
    "index that leads out": (index_that_leads_out, "must lie in the index's own folder"),
    "image model": (image_model, "makes images.*choose image-t2i"),
    "LoRA of Wan": (lora_of_wan, "not Kandinsky 5.*a LoRA, which goes beside a model"),
}
NAMED_AS_WHAT_THEY_ARE = {"image model": "dit", "LoRA of Wan": "lora"}
"""Sound files, only not what is asked for: ``inspect`` has nothing against them."""


def least_read(work: Callable[[], object]) -> int:
    """Bytes that this process reads for it: the least of two times, for the first one imports modules and
    other threads may read as well."""

    def so_far() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    taken = []
    for _ in range(2):
        started = so_far()
        work()
        taken.append(so_far() - started)
    return min(taken)


def header_bytes(path: Path) -> int:
    """Of the header a sound file has; 0 where what stands there cannot be one."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    return length if length < 10**8 else 0


def refusal(path: Path) -> str:
    """Why a job does not take the file for its transformer; one line."""
    request = GenerationRequest(
        preset="lite-t2v-5s-sft", prompt="x", dit=str(path), model_dir=str(DEMO_FOLDER)
    )
    with pytest.raises((CheckpointError, UserError)) as caught:
        find_model_files(request)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("row", WRONG)
def test_a_wrong_file_of_40_gb_is_named_by_its_first_bytes(tmp_path, row) -> None:
    """What is read is counted, not timed: a header and a little more, whatever the size."""
    write, named = WRONG[row]
    path = write(tmp_path)
    taken = least_read(lambda: (refusal(path), inspect_file(path)))
    # the header is read by each of the checks of one refusal and once by inspect
    assert taken <= 5 * header_bytes(path) + SMALL_READ
    said, report = refusal(path), inspect_file(path)
    assert re.search(named, said), said
    assert str(path) in said or str(path.parent) in said
    if row in NAMED_AS_WHAT_THEY_ARE:
        assert (report.kind, report.problems) == (NAMED_AS_WHAT_THEY_ARE[row], ())
    else:
        assert re.search(named, report.problems[0]), report.problems[0]


def test_another_models_file_is_told_by_the_first_names(tmp_path) -> None:
    said = refusal(foreign("patch_embedding.weight", "blocks.0.q")(tmp_path))
    assert "first missing tensor 'time_embeddings.in_layer.weight'" in said
    assert "first unexpected 'patch_embedding.weight'" in said


def test_a_lora_of_another_model_is_refused_in_one_line(tmp_path, sizes) -> None:
    path = lora_of_wan(tmp_path)

    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_lora(path, sizes)
        return str(caught.value)

    assert "a LoRA of another model" in refused() and "0 of its 2" in refused()
    assert "\n" not in refused()
    assert least_read(refused) <= SMALL_READ


@pytest.mark.parametrize(
    ("row", "option"),
    [
        ("Wan", "--dit"),
        ("zipped pickle", "--dit"),
        ("truncated", "--dit"),
        ("LoRA of Wan", "--lora"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, capfd, row, option) -> None:
    write, named = WRONG[row]
    path = write(tmp_path)
    if option == "--lora":
        named = "a LoRA of another model"
    words = ["generate", "--preset", "demo-t2v", "--prompt", "x", option, str(path)]
    assert main([*words, "--state-dir", str(tmp_path / "state")]) == CheckpointError.exit_code
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(named, line), line
