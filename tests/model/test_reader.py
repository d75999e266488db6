"""Weights of every kind of file come into tensors that somebody else owns."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from open_files import open_files
from tiny_transformer import (
    CONFIG,
    LAYER,
    LiveBytes,
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

from int8 import Int8Linear, Int8Scheme
from kandinsky5.conversion.convert import convert
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.fp8 import Fp8Linear
from kandinsky5.model.loading import check_transformer, load_transformer
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.weights import is_quantised_layer

CPU = torch.device("cpu")
KINDS = {
    "int8-community": (community_int8, Int8Linear),
    "fp8-community": (community_fp8, Fp8Linear),
    "fp8-scaled": (comfy_fp8, Fp8Linear),
    "fp8-scaled by output": (comfy_fp8_by_output, Fp8Linear),
    "fp8-scaled, older": (older_comfy_fp8, Fp8Linear),
    "fp8-unscaled": (unscaled_fp8, Fp8Linear),
}


@pytest.fixture
def plain(tmp_path):
    return save(tmp_path / "dit.safetensors", weights())


def allocated(reader: TransformerReader) -> dict[str, torch.Tensor]:
    state = reader.model.state_dict()
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in state.items()}


def read(path, **options) -> dict[str, torch.Tensor]:
    with TransformerReader(path, **options) as reader:
        targets = allocated(reader)
        reader.read_into(targets)
        return targets


def assert_same(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def reference(path) -> torch.Tensor:
    """One evaluation with the dequantised weights in float32."""
    return run(load_transformer(path, device=CPU, weights="bf16", dtype=torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_as_it_is_stored_with_its_own_numbers(tmp_path, kind):
    store, layer = KINDS[kind]
    path = save(tmp_path / "dit.safetensors", stored(store, weights()))
    model = load_transformer(path, device=CPU)
    made = {name for name, part in model.named_modules() if isinstance(part, layer)}
    assert made == {n.removesuffix(".weight") for n in weights() if is_quantised_layer(n)}
    if layer is Int8Linear:
        assert model.get_submodule(LAYER).scheme == Int8Scheme(group=128, rotate=False)
    # fp8 on a CPU is exact; int8 quantises its input as well
    assert sqnr_db(reference(path), run(model)) > (28 if layer is Int8Linear else 90)
    assert check_transformer(path) == CONFIG


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_weights_are_near_the_original(tmp_path, kind):
    path = save(tmp_path / "dit.safetensors", stored(KINDS[kind][0], weights()))
    found = read(path, weights="bf16", dtype=torch.float32)
    for name, tensor in weights().items():
        if is_quantised_layer(name):
            assert sqnr_db(tensor, found[name]) > (38 if "int8" in kind else 28), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights_format", ["auto", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8-unscaled"])
def test_scales_that_are_no_numbers_are_found_when_they_are_read(
    tmp_path, kind, weights_format, broken
):
    tensors = stored(KINDS[kind][0], weights())
    (scales,) = (
        n for n in tensors if n.startswith(f"{LAYER}.") and "scale" in n and "input" not in n
    )
    tensors[scales].view(-1)[-1] = broken
    path = save(tmp_path / "dit.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        read(path, weights=weights_format)
    said = caught.value.reason
    assert said == f"'{scales}' has scales that are NaN or infinite: damaged, download it again"


def test_a_fp8_file_under_a_prefix_with_a_marker_is_read(tmp_path):
    tensors = stored(older_comfy_fp8, weights())
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    marked = prefixed | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    path = save(tmp_path / "prefixed.safetensors", marked)
    assert_same(read(path), read(save(tmp_path / "dit.safetensors", tensors)))


def test_a_file_cast_to_fp8_throughout_keeps_layers_and_casts_the_rest(tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}
    path = save(tmp_path / "dit.safetensors", tensors)
    found = read(path)
    assert found[f"{LAYER}.weight"].dtype == torch.float8_e4m3fn
    assert found["out_layer.out_layer.weight"].dtype == torch.bfloat16
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float())


def test_layers_that_a_quantised_file_leaves_alone_stay_linear(tmp_path):
    tensors = stored(community_int8, weights())
    del tensors[f"{LAYER}.weight_int8"], tensors[f"{LAYER}.weight_scales"]
    tensors[f"{LAYER}.weight"] = weights()[f"{LAYER}.weight"]
    path = save(tmp_path / "dit.safetensors", tensors)
    model = load_transformer(path, device=CPU)
    assert type(model.get_submodule(LAYER)) is torch.nn.Linear
    assert sqnr_db(reference(path), run(model)) > 28


def test_quantised_at_load_it_has_the_bytes_of_the_converted_file(plain, tmp_path):
    convert(plain, tmp_path / "int8.safetensors", "int8")
    with (
        TransformerReader(plain) as before,
        TransformerReader(tmp_path / "int8.safetensors") as after,
    ):
        assert (before.stored_as, after.stored_as) == ("fp32", "int8")
    assert_same(read(plain, weights="int8"), read(tmp_path / "int8.safetensors"))


@pytest.mark.parametrize(("weights_format", "least_db"), [("int8", 32), ("fp8", 26)])
def test_a_model_quantised_at_load_computes_nearly_the_same(plain, weights_format, least_db):
    model = load_transformer(plain, device=CPU, weights=weights_format)
    assert sqnr_db(reference(plain), run(model)) > least_db


@pytest.mark.parametrize("weights_format", ["auto", "bf16", "int8", "fp8"])
def test_the_empty_model_says_what_will_be_read(plain, weights_format):
    with TransformerReader(plain, weights=weights_format, dtype=torch.bfloat16) as reader:
        empty = reader.model.state_dict()
        together = [name for names in reader.names_read_together() for name in names]
        assert not reader.model.training
    assert all(tensor.is_meta for tensor in empty.values())
    assert sorted(together) == sorted(empty)
    loaded = load_transformer(plain, device=CPU, weights=weights_format, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert (tensor.dtype, tensor.shape) == (empty[name].dtype, empty[name].shape), name
    assert empty["visual_transformer_blocks.0.visual_modulation.out_layer.weight"].dtype == (
        torch.float32
    )


def test_bytes_go_straight_into_the_views_of_a_slab(tmp_path):
    path = save(tmp_path / "dit.safetensors", weights(dtype=torch.bfloat16))
    with TransformerReader(path) as reader:
        block = {
            name: tensor
            for name, tensor in reader.model.state_dict().items()
            if name.startswith("visual_transformer_blocks.1.")
        }
        slab = torch.zeros(
            sum(-(-t.nbytes // 256) * 256 for t in block.values()), dtype=torch.uint8
        )
        views, place = {}, 0
        for name, tensor in block.items():
            raw = slab[place : place + tensor.nbytes]
            views[name] = raw.view(tensor.dtype).view(tensor.shape)
            place += -(-tensor.nbytes // 256) * 256
        with LiveBytes() as live:
            reader.read_into(views)
    assert live.peak <= slab.nbytes  # the slab itself, seen through its views
    for name, tensor in weights(dtype=torch.bfloat16).items():
        if name in views:
            assert torch.equal(views[name], tensor), name


def test_targets_of_another_dtype_or_layout_are_filled_too(plain):
    name = f"{LAYER}.weight"
    targets = {name: torch.empty(64, 64, dtype=torch.bfloat16).t()}
    strided = {name: torch.empty(64, 128)[:, ::2]}
    with TransformerReader(plain) as reader:
        for given in (targets, strided):
            reader.read_into(given)
    assert torch.equal(targets[name], weights()[name].bfloat16())
    assert torch.equal(strided[name], weights()[name])


def test_weight_or_scales_alone_can_be_asked_for(plain):
    whole = read(plain, weights="int8")
    names = f"{LAYER}.weight", f"{LAYER}.weight_scales"
    with TransformerReader(plain, weights="int8") as reader:
        for name in names:
            target = torch.empty_like(whole[name])
            reader.read_into({name: target})
            assert torch.equal(target, whole[name])


def test_large_weights_are_worked_on_a_few_rows_at_a_time(plain, monkeypatch):
    whole = {
        kind: read(plain, weights=kind, dtype=torch.bfloat16) for kind in ("bf16", "int8", "fp8")
    }
    monkeypatch.setattr("kandinsky5.model.recipes.CHUNK_VALUES", 200)
    for kind, true in whole.items():
        assert_same(read(plain, weights=kind, dtype=torch.bfloat16), true)


@pytest.mark.parametrize("weights_format", ["int8", "fp8"])
def test_quantising_at_load_never_holds_the_model_twice(plain, weights_format, monkeypatch):
    monkeypatch.setattr("kandinsky5.model.recipes.CHUNK_VALUES", 512)
    with LiveBytes() as live:
        model = load_transformer(plain, device=CPU, weights=weights_format)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert total < 0.6 * plain.stat().st_size
    assert live.peak <= total + 100_000  # rotation works on copies of a few rows


def test_threads_may_read_at_the_same_time(plain):
    with TransformerReader(plain, weights="int8") as reader, ThreadPoolExecutor(4) as pool:
        targets = [allocated(reader) for _ in range(8)]
        list(pool.map(reader.read_into, targets))
    for found in targets:
        assert_same(found, targets[0])


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def write_into(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (shrink, "became shorter while it was read"),
        (os.remove, "vanished while it was read"),
        (replace, "was replaced by another file while it was read"),
        (write_into, "was changed while it was read"),
    ],
    ids=["shrunk", "removed", "replaced", "changed"],
)
def test_a_file_that_does_not_stay_as_it_was_is_an_error(plain, harm, says):
    with TransformerReader(plain) as reader:
        targets = allocated(reader)
        reader.read_into({LAYER + ".bias": targets[LAYER + ".bias"]})
        harm(plain)
        with pytest.raises(CheckpointError, match=says):
            reader.read_into(targets)


def test_numbers_that_are_not_finite_are_not_quantised(tmp_path):
    tensors = weights()
    tensors[f"{LAYER}.weight"][3, 5] = float("inf")
    path = save(tmp_path / "dit.safetensors", tensors)
    for kind in ("int8", "fp8"):
        with pytest.raises(
            CheckpointError, match=rf"'{LAYER}\.weight' has NaN or infinite numbers"
        ):
            read(path, weights=kind)


def test_names_and_formats_that_there_are_not_are_refused(plain):
    with TransformerReader(plain) as reader, pytest.raises(KeyError):
        reader.read_into({"nothing.weight": torch.empty(1)})
    with pytest.raises(UserError, match="one of auto, bf16, int8, fp8"):
        TransformerReader(plain, weights="int4")


def test_the_file_is_closed_whatever_happens(plain, tmp_path):
    with TransformerReader(plain):
        assert open_files(tmp_path) == [str(plain)]
    assert open_files(tmp_path) == []
    bad = save(tmp_path / "bad.safetensors", weights() | {"x.weight_scale": torch.ones(())})
    with pytest.raises(CheckpointError):
        TransformerReader(bad)
    assert open_files(tmp_path) == []


def test_shards_are_read_as_one(plain, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(weights())}
    for shard in names:
        save(folder / shard, {n: t for n, t in weights().items() if where[n] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same(read(folder, weights="int8"), read(plain, weights="int8"))


def test_an_attention_engine_reaches_every_layer(plain):
    def engine(query, key, value):
        return value

    with TransformerReader(plain, attention=engine) as reader:
        engines = {m.engine for m in reader.model.modules() if hasattr(m, "engine")}
    assert engines == {engine}
    assert isinstance(reader.model, DiffusionTransformer3D)
