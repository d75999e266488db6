"""The layer: the state it keeps, the numbers it gives, what it shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8 import COMMUNITY, DEFAULT, Int8Linear, Int8Scheme, linear, ops


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(features: int = 300, out: int = 20, bias: bool = True, **more) -> Int8Linear:
    torch.manual_seed(features + out)
    return Int8Linear.from_linear(nn.Linear(features, out, bias=bias), **more)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As the unfused model does it."""
    normed = F.layer_norm(x.float(), (x.shape[-1],))
    return (normed * (scale + 1.0) + shift).to(x.dtype)


@pytest.fixture
def quantisations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time an input was quantised."""
    return counted(monkeypatch, linear.quantize_rows, "quantize_rows")


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each matmul that was launched."""
    return counted(monkeypatch, linear.matmul_rows, "matmul_rows")


def counted(monkeypatch: pytest.MonkeyPatch, function: Callable, name: str) -> list[int]:
    calls: list[int] = []

    def counting(*given, **more):
        calls.append(1)
        return function(*given, **more)

    monkeypatch.setattr(linear, name, counting)
    return calls


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_comes_close_to_the_layer_it_was_made_from(bias: bool, scheme: Int8Scheme) -> None:
    float_layer = nn.Linear(1500, 64, bias=bias)
    x = normal(30, 1500)
    exact, found = float_layer(x), Int8Linear.from_linear(float_layer, scheme)(x)
    assert 10 * torch.log10(exact.square().sum() / (found - exact).square().sum()) >= 38
    assert not found.requires_grad


def test_its_state_has_the_names_and_types_of_the_files() -> None:
    state = layer(1500, 64).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((64, 1500), torch.int8),
        "weight_scales": ((64, 2), torch.float32),
        "bias": ((64,), torch.float32),
    }
    assert "bias" not in layer(bias=False).state_dict()


def test_an_empty_layer_takes_the_state_of_another() -> None:
    full, empty = layer(), Int8Linear(300, 20)
    empty.load_state_dict(full.state_dict())
    x = normal(2, 300)
    assert torch.equal(empty(x), full(x))


def test_a_layer_on_the_meta_device_has_shapes_alone() -> None:
    on_meta = Int8Linear(300, 20, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())
    assert on_meta(torch.empty(2, 300, device="meta")).shape == (2, 20)
    assert on_meta.bias is not None and on_meta.bias.dtype == torch.bfloat16


def test_casting_the_model_leaves_integers_and_scales_as_they_are() -> None:
    one = layer()
    scales = one.weight_scales.clone()
    one.to(torch.bfloat16)
    assert one.bias is not None and one.bias.dtype == torch.bfloat16
    assert one.weight.dtype == torch.int8
    assert torch.equal(one.weight_scales, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    assert layer()(normal(2, 3, 300).to(dtype)).dtype == dtype


def test_layers_together_give_what_each_gives_alone(
    quantisations: list[int], matmuls: list[int]
) -> None:
    layers = [layer(300, out) for out in (20, 20, 20, 31)] + [layer(300, 20, bias=False)]
    x = normal(2, 5, 300)
    found = Int8Linear.together(x, layers)
    assert (len(quantisations), len(matmuls)) == (1, 3)
    for one, out in zip(layers, found, strict=True):
        assert torch.equal(out, one(x))


def test_layers_of_different_schemes_do_not_share_an_input() -> None:
    with pytest.raises(ValueError, match="cannot share"):
        Int8Linear.together(normal(2, 300), [layer(), layer(scheme=COMMUNITY)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_norm_is_the_norm_and_then_the_layers(
    dtype: torch.dtype, quantisations: list[int]
) -> None:
    layers = [layer(300, 20), layer(300, 7)]
    x = (normal(9, 300) * 3 + 1).to(dtype)
    shift, scale = normal(1, 300, seed=1), normal(1, 300, seed=2)
    found = layers[0].after_norm(x, shift, scale, layers)
    assert len(quantisations) == 1
    for one, out in zip(layers, found, strict=True):
        assert torch.equal(out, one(modulated_norm(x, shift, scale)))


def test_after_norm_without_layers_is_the_layer_itself() -> None:
    one, x, shift, scale = layer(), normal(4, 300), normal(300, seed=1), normal(300, seed=2)
    (found,) = one.after_norm(x, shift, scale)
    assert torch.equal(found, one(modulated_norm(x, shift, scale)))


def test_a_batch_may_have_modulation_vectors_of_its_own() -> None:
    one, x = layer(), normal(2, 4, 300)
    shift, scale = normal(2, 1, 300, seed=1), normal(2, 1, 300, seed=2)
    (found,) = one.after_norm(x, shift, scale)
    assert torch.equal(found, one(modulated_norm(x, shift, scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_gelu_is_the_exact_gelu_and_then_the_layer(dtype: torch.dtype) -> None:
    one, x = layer(), normal(9, 300).to(dtype)
    assert torch.equal(one.after_gelu(x), one(F.gelu(x)))


def test_a_weight_of_another_size_is_refused() -> None:
    one = layer()
    one.weight = one.weight[:, :100]
    with pytest.raises(ValueError, match=r"\[out, 300\]"):
        one(normal(2, 300))


def test_a_layer_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Int8Linear(0, 8)


def test_prologues_are_known_by_one_name_each() -> None:
    assert len({ops.PLAIN, ops.NORM, ops.GELU}) == 3
