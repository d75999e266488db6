"""Models come out of files whole, once, and only if they are what they must be."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_transformer import CONFIG, LiveBytes, weights

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.loading import (
    check_transformer,
    find_model_files,
    load_transformer,
    load_video_vae,
)
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest

CPU = torch.device("cpu")
VAE_CONFIG = VideoVAEConfig(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
)
FORTY_GB = 40 * 10**9


def transformer() -> DiffusionTransformer3D:
    model = DiffusionTransformer3D(CONFIG)
    model.load_state_dict(weights())
    return model.requires_grad_(False)


def save_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_vae(folder: Path, **changes: object) -> Path:
    torch.manual_seed(6)
    config = dataclasses.asdict(VAE_CONFIG) | {"_class_name": "AutoencoderKLHunyuanVideo"} | changes
    return save_folder(folder, dict(VideoVAE(VAE_CONFIG).state_dict()), config)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A valid file of these tensors whose data takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def test_loaded_weights_equal_those_saved_and_compute_the_same(tmp_path):
    original = transformer()
    save_file(original.state_dict(), tmp_path / "dit.safetensors")
    loaded = load_transformer(tmp_path / "dit.safetensors", device=CPU)
    assert loaded.config == CONFIG
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator) for s in ((2, 4, 4, 33), (5, 24), (12,))]
    assert torch.equal(loaded(*inputs, 0.5), original(*inputs, 0.5))


def test_a_prefixed_file_and_shards_load_the_same(tmp_path):
    tensors = weights()
    prefixed = tmp_path / "prefixed.safetensors"
    save_file({f"model.diffusion_model.{n}": t for n, t in tensors.items()}, prefixed)
    shards = {
        n: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors"
        for i, n in enumerate(tensors)
    }
    folder = tmp_path / "transformer"
    folder.mkdir()
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    for path in (prefixed, folder, index):
        state = load_transformer(path, device=CPU).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_dimensions_come_from_config_json_or_the_header(tmp_path):
    axes = (16, 8, 8)
    folder = save_folder(tmp_path / "transformer", weights(), {"axes_dims": axes})
    assert load_transformer(folder, device=CPU).config.axes_dims == axes
    file = tmp_path / "own.safetensors"
    save_file(weights(), file, metadata={"config": json.dumps({"axes_dims": axes})})
    assert load_transformer(file, device=CPU).config.axes_dims == axes


def test_one_copy_of_the_weights_is_in_memory_at_a_time(tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights().items()}, path)
    with LiveBytes() as live:
        model = load_transformer(path, device=CPU)
    assert live.now >= 0.95 * path.stat().st_size
    assert live.peak <= 1.2 * path.stat().st_size
    del model
    assert live.now == 0


def test_a_conversion_holds_one_tensor_twice_not_the_model(tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights().items()}, path)
    with LiveBytes() as live:
        model = load_transformer(path, device=CPU, dtype=torch.float32)
    total = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert live.peak <= total + largest


def test_float32_stays_where_it_matters_when_the_rest_becomes_bf16(tmp_path):
    save_file(weights(), tmp_path / "dit.safetensors")
    model = load_transformer(tmp_path / "dit.safetensors", device=CPU, dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("time_embeddings.") or "modulation." in name or "norm." in name
    }
    assert kept == expected
    assert {p.dtype for n, p in model.named_parameters() if n not in kept} == {torch.bfloat16}


def test_a_mixed_file_keeps_its_dtypes_and_runs(tmp_path):
    mixed = {
        name: tensor if "modulation." in name or "time_emb" in name else tensor.bfloat16()
        for name, tensor in weights().items()
    }
    save_file(mixed, tmp_path / "dit.safetensors")
    model = load_transformer(tmp_path / "dit.safetensors", device=CPU)
    for name, tensor in mixed.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert model.state_dict()[name].dtype == tensor.dtype
    out = model(torch.zeros(1, 4, 4, 33), torch.zeros(3, 24), torch.zeros(12), 0.5)
    assert out.dtype == torch.bfloat16


def test_a_mixed_file_becomes_float32_throughout_when_asked(tmp_path):
    mixed = {
        name: tensor if i % 2 else tensor.half()
        for i, (name, tensor) in enumerate(weights().items())
    }
    save_file(mixed, tmp_path / "dit.safetensors")
    model = load_transformer(tmp_path / "dit.safetensors", device=CPU, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in mixed.items():
        assert torch.equal(model.state_dict()[name], tensor.float())


def test_a_file_cut_short_between_check_and_reading_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "dit.safetensors"
    save_file(weights(), path)
    order = Checkpoint.names_in_file_order

    def cut_first(checkpoint: Checkpoint):
        os.truncate(path, path.stat().st_size // 2)
        return order(checkpoint)

    monkeypatch.setattr(Checkpoint, "names_in_file_order", cut_first)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        load_transformer(path, device=CPU)


def test_another_model_of_40_gb_is_refused_without_reading_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    shapes = {f"blocks.{i}.self_attn.q.weight": (200_000, 100_000) for i in range(1)}
    path = write_sparse(tmp_path / "wan.safetensors", shapes)
    assert path.stat().st_size >= FORTY_GB
    with pytest.raises(CheckpointError) as caught:
        load_transformer(path, device=CPU)
    assert "not Kandinsky 5" in caught.value.reason
    assert "'blocks.0.self_attn.q.weight'" in caught.value.reason


def test_integer_weights_are_refused(tmp_path):
    tensors = weights() | {"out_layer.out_layer.bias": torch.zeros(64, dtype=torch.int32)}
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"out_layer\.out_layer\.bias has dtype I32"):
        load_transformer(tmp_path / "dit.safetensors", device=CPU)


def test_a_vae_loads_with_its_dimensions_and_computes_the_same(tmp_path):
    folder = save_vae(tmp_path / "vae", scaling_factor=0.7)
    torch.manual_seed(6)
    original = VideoVAE(VAE_CONFIG).eval()
    loaded = load_video_vae(folder, device=CPU)
    assert loaded.config == dataclasses.replace(VAE_CONFIG, scaling_factor=0.7)
    z = torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z), original.decode(z))
    assert {
        p.dtype for p in load_video_vae(folder, device=CPU, dtype=torch.bfloat16).parameters()
    } == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "'AutoencoderKLWan'"),
        ({"block_out_channels": [8, 8, 16]}, "dimensions"),
        ({"block_out_channels": "many"}, "dimensions"),
        ({"latent_channels": -1}, "dimensions"),
        ({"layers_per_block": 10**9}, "dimensions"),
        ({"norm_num_groups": 3}, "not in 3 equal groups"),
        ({"scaling_factor": "x"}, "scaling_factor"),
        ({"latent_channels": 8}, "not a whole AutoencoderKLHunyuanVideo model"),
    ],
    ids=str,
)
def test_another_vae_or_a_config_that_does_not_fit_is_refused(tmp_path, changes, named):
    with pytest.raises(CheckpointError) as caught:
        load_video_vae(save_vae(tmp_path / "vae", **changes), device=CPU)
    assert named in caught.value.reason


def test_a_vae_without_its_config_is_refused(tmp_path):
    folder = save_vae(tmp_path / "vae")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_video_vae(folder, device=CPU)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A whole tiny model in the layout of a -Diffusers folder."""
    root = tmp_path / "Tiny-Diffusers"
    save_folder(root / "transformer", weights(), {})
    save_vae(root / "vae")
    save_folder(root / "text_encoder", {"w": torch.zeros(1)}, {"hidden_size": 24})
    save_folder(
        root / "text_encoder_2", {"w": torch.zeros(1)}, {"text_config": {"hidden_size": 12}}
    )
    for tokenizer in ("tokenizer", "tokenizer_2"):
        (root / tokenizer).mkdir()
        (root / tokenizer / "tokenizer.json").write_text("{}")
    (root / "model_index.json").write_text("{}")
    return root


def request(model_dir: Path, **changes: object) -> GenerationRequest:
    return GenerationRequest(prompt="x", model_dir=str(model_dir), **changes)


def test_a_whole_model_is_found_and_passes(model_dir):
    files = find_model_files(request(model_dir))
    assert files.transformer == model_dir / "transformer" / "diffusion_pytorch_model.safetensors"
    assert files.vae == model_dir / "vae"


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_a_damaged_part_is_found_before_anything_is_loaded(model_dir, part):
    file = model_dir / part / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError) as caught:
        find_model_files(request(model_dir))
    assert caught.value.path == str(file)
    assert "download it again" in caught.value.reason


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_of_another_width_is_refused(model_dir, part):
    (model_dir / part / "config.json").write_text('{"hidden_size": 7}')
    with pytest.raises(CheckpointError, match=f"{part}: gives 7 text channels"):
        find_model_files(request(model_dir))


def test_a_vae_of_other_latents_is_refused(model_dir):
    config = dataclasses.replace(VAE_CONFIG, latent_channels=4)
    save_folder(model_dir / "vae", dict(VideoVAE(config).state_dict()), dataclasses.asdict(config))
    with pytest.raises(CheckpointError, match="gives 4 latent channels, the transformer takes 16"):
        find_model_files(request(model_dir))


def test_a_wrong_transformer_is_refused_before_missing_parts_are_named(model_dir, tmp_path):
    (model_dir / "vae" / "config.json").unlink()
    wrong = tmp_path / "sdxl.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, wrong)
    with pytest.raises(CheckpointError, match="not Kandinsky 5"):
        find_model_files(request(model_dir, dit=str(wrong)))


def test_a_transformer_that_is_not_there_is_an_error_of_the_field(model_dir):
    with pytest.raises(UserError) as caught:
        find_model_files(request(model_dir, dit="/nowhere/x.safetensors"))
    assert caught.value.field == "dit"


def test_a_file_that_is_by_its_name_for_another_task_is_a_notice(model_dir, tmp_path):
    named = tmp_path / "kandinsky5lite_i2v_5s.safetensors"
    save_file(weights(), named)
    files = find_model_files(request(model_dir, preset="lite-t2v-5s-sft", dit=str(named)))
    assert files.transformer == named
    (notice,) = files.notices
    assert named.name in notice and "i2v" in notice and "lite-t2v-5s-sft" in notice
    plain = find_model_files(request(model_dir, preset="lite-t2v-5s-sft"))
    assert plain.notices == ()


IMAGE = DiTConfig(
    model_dim=2560,
    ff_dim=10240,
    num_visual_blocks=50,
    axes_dims=(32, 48, 48),
    visual_cond=False,
)


@pytest.mark.parametrize(
    ("config", "preset", "advice"),
    [(IMAGE, "lite-t2v-5s-sft", "image-t2i"), (DiTConfig(), "image-t2i", "t2v or i2v preset")],
    ids=["image model for video", "video model for images"],
)
def test_a_model_for_the_other_medium_says_which_mode_fits(tmp_path, config, preset, advice):
    with torch.device("meta"):
        model = DiffusionTransformer3D(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    path = write_sparse(tmp_path / "dit.safetensors", shapes)
    assert check_transformer(path) == config
    with pytest.raises(CheckpointError, match=advice):
        check_transformer(path, PRESETS[preset])


def test_another_model_s_file_is_opened_once_to_be_refused(tmp_path, monkeypatch):
    path = write_sparse(tmp_path / "wan.safetensors", {"patch_embedding.weight": (8, 16, 1, 2, 2)})
    opened = []
    begin = SafetensorsFile.__init__

    def counting(self, path):
        opened.append(path)
        begin(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", counting)
    with pytest.raises(CheckpointError, match="not Kandinsky 5"):
        find_model_files(GenerationRequest(prompt="x", preset="lite-t2v-5s-sft", dit=str(path)))
    assert opened == [path]
