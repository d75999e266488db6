"""LoRAs beside layers equal merged weights, whatever the file and the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from int8 import Int8Linear
from kandinsky5.errors import CheckpointError
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.lora import Adapter, LoraLayer, attach, combined, detach, layer_sizes
from kandinsky5.model.lora_file import open_lora
from kandinsky5.model.weights import is_quantised_layer
from tests.support import loras, tiny_transformer
from tests.support.sparse_files import write_sparse
from tests.support.tiny_transformer import CONFIG, run

ALPHA = 6.0
RANK = 3
SAVE: dict[str, Callable[..., Path]] = {
    "peft": loras.save_peft,
    "diffusers": loras.save_diffusers,
    "kohya": loras.save_kohya,
}
BLOCK = "visual_transformer_blocks.1"


def model() -> DiffusionTransformer3D:
    made = DiffusionTransformer3D(CONFIG).eval().requires_grad_(False)
    made.load_state_dict(tiny_transformer.weights())
    return made


def merged(pairs: loras.Pairs, scale: float, base: DiffusionTransformer3D | None = None):
    made = base or model()
    for layer, (down, up) in pairs.items():
        made.get_submodule(layer).weight += scale * (up @ down)  # type: ignore[operator]
    return made


def beside(*files: tuple[Path, float], base: DiffusionTransformer3D | None = None):
    made = base or model()
    opened = [(open_lora(path, layer_sizes(made)), strength) for path, strength in files]
    attach(made, combined(opened, torch.float32))
    return made


def everywhere(seed: int = 0) -> loras.Pairs:
    return loras.random_pairs(layer_sizes(model()), RANK, seed)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", SAVE)
def test_every_family_on_every_linear_layer_equals_merged_weights(tmp_path, family) -> None:
    pairs = everywhere()
    path = SAVE[family](tmp_path / "lora.safetensors", pairs, alpha=ALPHA)
    opened = open_lora(path, layer_sizes(model()))
    assert (opened.matched, opened.unmatched) == (opened.total, ())
    assert set(opened.parts) == set(pairs)
    expected = run(merged(pairs, ALPHA / RANK))
    assert worst(run(beside((path, 1.0))), expected) <= 1e-5
    assert worst(run(model()), expected) > 1e-2


def test_without_an_alpha_anywhere_it_is_the_rank(tmp_path) -> None:
    pairs = everywhere()
    path = loras.save_diffusers(tmp_path / "lora.safetensors", pairs)
    assert worst(run(beside((path, 1.0))), run(merged(pairs, 1.0))) <= 1e-5


def test_rank_stabilised_loras_divide_by_the_root(tmp_path) -> None:
    pairs = everywhere()
    path = loras.save_diffusers(tmp_path / "lora.safetensors", pairs)
    path.with_suffix(".json").write_text('{"r": 3, "lora_alpha": 2, "use_rslora": true}')
    assert worst(run(beside((path, 1.0))), run(merged(pairs, 2 / 3**0.5))) <= 1e-5


def test_several_act_together_with_their_strengths_negative_ones_too(tmp_path) -> None:
    first = {k: v for k, v in everywhere(1).items() if "attention" in k}
    second = loras.random_pairs({k: s for k, s in layer_sizes(model()).items()}, 5, 2)
    a = loras.save_kohya(tmp_path / "a.safetensors", first, alpha=ALPHA)
    b = loras.save_diffusers(tmp_path / "b.safetensors", second)
    expected = run(merged(second, -0.7, merged(first, 0.4 * ALPHA / RANK)))
    assert worst(run(beside((a, 0.4), (b, -0.7))), expected) <= 1e-5


def test_strength_zero_and_detaching_give_the_base_to_the_bit(tmp_path) -> None:
    path = loras.save_kohya(tmp_path / "lora.safetensors", everywhere(), alpha=ALPHA)
    plain = run(model())
    assert torch.equal(run(beside((path, 0.0))), plain)
    made = model()
    layers, names = dict(made.named_modules()), list(made.state_dict())
    beside((path, 1.0), base=made)
    assert not torch.equal(run(made), plain)
    assert list(made.state_dict()) == names
    detach(made)
    assert torch.equal(run(made), plain)
    assert all(module is layers[name] for name, module in made.named_modules())


def test_another_one_takes_the_place_of_the_one_before(tmp_path) -> None:
    a = loras.save_kohya(tmp_path / "a.safetensors", everywhere(1), alpha=ALPHA)
    b = loras.save_kohya(tmp_path / "b.safetensors", everywhere(2), alpha=ALPHA)
    made = beside((a, 1.0))
    assert torch.equal(run(beside((b, 1.0), base=made)), run(beside((b, 1.0))))


@pytest.mark.parametrize("chunks", [ActivationChunks(tokens=3), ActivationChunks(heads=1)])
def test_chunks_of_tokens_and_heads_change_nothing(tmp_path, chunks) -> None:
    made = beside((loras.save_kohya(tmp_path / "l.safetensors", everywhere(), alpha=1.0), 1.0))
    whole = run(made)
    made.chunks = chunks
    assert worst(run(made), whole) <= 1e-5


def int8_model() -> DiffusionTransformer3D:
    made = model()
    for name in list(made.state_dict()):
        if is_quantised_layer(name):
            layer = name.removesuffix(".weight")
            quantised = Int8Linear.from_linear(made.get_submodule(layer))  # type: ignore[arg-type]
            made.set_submodule(layer, quantised)
    return made


def test_on_an_int8_layer_it_is_the_base_plus_the_delta(tmp_path) -> None:
    path = loras.save_kohya(tmp_path / "lora.safetensors", everywhere(), alpha=ALPHA)
    base = int8_model()
    layer = f"{BLOCK}.feed_forward.in_layer"
    x = torch.randn(7, 64)
    plain = base.get_submodule(layer)(x)
    weights = base.get_submodule(layer).weight.clone()  # type: ignore[operator]
    beside((path, 0.5), base=base)
    down, up = everywhere()[layer]
    expected = plain + 0.5 * ALPHA / RANK * (x @ down.T @ up.T)
    assert torch.allclose(base.get_submodule(layer)(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.get_submodule(layer).weight, weights)


def test_an_int8_base_stays_within_its_own_error(tmp_path) -> None:
    pairs = everywhere()
    path = loras.save_kohya(tmp_path / "lora.safetensors", pairs, alpha=ALPHA)
    exact, base_exact = run(merged(pairs, ALPHA / RANK)), run(model())
    own_db = tiny_transformer.sqnr_db(base_exact, run(int8_model()))
    found_db = tiny_transformer.sqnr_db(exact, run(beside((path, 1.0), base=int8_model())))
    assert found_db >= own_db - 3.0


def test_layers_that_share_an_input_are_still_quantised_once(monkeypatch, tmp_path) -> None:
    """A LoRA on the queries alone must not cost keys and values their common call."""
    name = f"{BLOCK}.self_attention.to_query"
    pairs = loras.random_pairs({name: (64, 64)})
    base = int8_model()
    beside((loras.save_kohya(tmp_path / "l.safetensors", pairs, alpha=1.0), 1.0), base=base)
    calls = []
    apply_all = Int8Linear.together

    def counting(x, layers):
        calls.append(len(layers))
        return apply_all(x, layers)

    monkeypatch.setattr(Int8Linear, "together", staticmethod(counting))
    run(base)
    assert calls.count(3) == 1  # of this block; the other block's layers go the fused way


def test_wrapped_and_plain_neighbours_are_both_right() -> None:
    """Mixed kinds are computed one by one: no layer's method is asked to do another's work."""
    made = model()
    name = f"{BLOCK}.self_attention.to_value"
    down, up = torch.randn(2, 64) * 0.1, torch.randn(64, 2) * 0.1
    made.set_submodule(name, LoraLayer(made.get_submodule(name), Adapter(down, up)))
    assert worst(run(made), run(merged({name: (down, up)}, 1.0))) <= 1e-5


def test_unmatched_tensors_are_counted_and_named(tmp_path) -> None:
    pairs = loras.random_pairs({f"{BLOCK}.cross_attention.to_key": (64, 64), "other.layer": (8, 8)})
    opened = open_lora(
        loras.save_kohya(tmp_path / "l.safetensors", pairs, alpha=1.0), layer_sizes(model())
    )
    assert (opened.matched, opened.total) == (3, 6)
    assert len(opened.unmatched) == 3
    assert all(name.startswith("lora_unet_other_layer") for name in opened.unmatched)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_lora(path, layer_sizes(model()))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_lora_of_another_model_is_refused(tmp_path) -> None:
    wan = {"blocks.0.self_attn.q": (64, 64)}
    path = loras.save_kohya(tmp_path / "wan.safetensors", loras.random_pairs(wan), alpha=1.0)
    assert "0 of its 3 tensors match" in refused(path)
    pro = {f"{BLOCK}.cross_attention.to_key": (4096, 4096)}
    path = loras.save_diffusers(tmp_path / "pro.safetensors", loras.random_pairs(pro))
    assert "another model" in refused(path) and "4096" in refused(path)


def test_broken_files_are_refused_with_the_reason(tmp_path) -> None:
    layer = f"{BLOCK}.cross_attention.to_key"
    half = tmp_path / "half.safetensors"
    save_file({f"transformer.{layer}.lora_A.weight": torch.zeros(3, 64)}, half)
    assert "has no up part" in refused(half)
    dora = tmp_path / "dora.safetensors"
    save_file({f"transformer.{layer}.lora_magnitude_vector": torch.zeros(64)}, dora)
    assert "DoRA" in refused(dora)
    pickle = tmp_path / "lora.pt"
    pickle.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "pickle" in refused(pickle)
    numbers = tmp_path / "nan.safetensors"
    loras.save_diffusers(numbers, {layer: (torch.full((3, 64), torch.nan), torch.zeros(64, 3))})
    opened = open_lora(numbers, layer_sizes(model()))
    with pytest.raises(CheckpointError, match="NaN"):
        combined([(opened, 1.0)], torch.float32)


def test_a_file_that_changed_since_it_was_looked_at_is_refused(tmp_path) -> None:
    path = tmp_path / "l.safetensors"
    loras.save_kohya(path, everywhere(), alpha=1.0)
    opened = open_lora(path, layer_sizes(model()))
    loras.save_diffusers(path, everywhere())
    with pytest.raises(CheckpointError, match="changed"):
        combined([(opened, 1.0)], torch.float32)


def test_the_trigger_is_read_from_the_header(tmp_path) -> None:
    path = tmp_path / "l.safetensors"
    loras.save_peft(path, everywhere(), alpha=1.0, trigger="in the style of K, ")
    assert open_lora(path, layer_sizes(model())).trigger == "in the style of K, "


@pytest.mark.parametrize("adapter", ["style", "my-adapter_2"])
def test_a_peft_adapter_of_any_name_acts(tmp_path, adapter) -> None:
    path = loras.save_peft(tmp_path / "l.safetensors", everywhere(), alpha=ALPHA)
    renamed(path, lambda name: name.replace(".default.", f".{adapter}."))
    opened = open_lora(path, layer_sizes(model()))
    assert (opened.matched, opened.shortfall) == (opened.total, "")
    assert worst(run(beside((path, 1.0))), run(merged(everywhere(), ALPHA / RANK))) <= 1e-5


@pytest.mark.parametrize("inner", ["model_diffusion_model_", "diffusion_model_", "transformer_"])
def test_kohya_s_names_may_have_the_model_s_prefix_within(tmp_path, inner) -> None:
    path = loras.save_kohya(tmp_path / "l.safetensors", everywhere(), alpha=ALPHA)
    renamed(path, lambda name: name.replace("lora_unet_", f"lora_unet_{inner}"))
    opened = open_lora(path, layer_sizes(model()))
    assert opened.matched == opened.total and set(opened.parts) == set(everywhere())


def test_of_two_adapters_in_a_file_one_acts_and_never_halves_of_both(tmp_path) -> None:
    layer = f"{BLOCK}.cross_attention.to_key"
    names = [f"{layer}.lora_{part}.weight" for part in ("B.b", "A.a", "A.b", "B.a")]
    shapes = {"A": (3, 64), "B": (64, 3)}
    tensors = {name: ("F32", shapes[name.split("lora_")[1][0]]) for name in names}
    path = write_sparse(tmp_path / "two.safetensors", tensors)  # in this very order
    opened = open_lora(path, layer_sizes(model()))
    kept = {name.split(".")[-2] for name in opened.parts[layer].values()}
    assert len(kept) == 1 and (opened.matched, opened.total) == (2, 4)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("hada_w1_b", "LoHa"),
        ("diff", "diff (whole weights)"),
        ("diff_b", "diff_b (biases)"),
        ("lora_B.bias", "bias"),
        ("oft_blocks", "OFT"),
    ],
)
def test_what_is_not_run_is_named_and_refused_where_nothing_else_is_there(
    tmp_path, ending, kind
) -> None:
    pair = f"{BLOCK}.cross_attention.to_key"
    other = f"diffusion_model.{BLOCK}.cross_attention.to_query"
    path = loras.save_diffusers(tmp_path / "l.safetensors", loras.random_pairs({pair: (64, 64)}))
    added = {f"{other}.{ending}": torch.zeros(4), f"{other}.alpha": torch.tensor(1.0)}
    save_file({**load_file(path), **added}, path)
    opened = open_lora(path, layer_sizes(model()))
    assert (opened.matched, opened.total, set(opened.parts)) == (2, 4, {pair})
    assert dict(opened.left_out) == {kind: 2}
    assert f"left out, as this program does not run them: 2 {kind}" in opened.shortfall
    save_file(added, path)
    assert f"nothing but {kind}, which this program does not run" in refused(path)


def renamed(path: Path, rename: Callable[[str], str]) -> None:
    """The same tensors under other names."""
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
