"""Linear layers with float8 weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_transformer import LiveBytes, sqnr_db

from kandinsky5.model.fp8 import Fp8Linear, float8_scale, to_float8

FAST = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def layer(in_features=48, out_features=32, *, per_output=False, bias=True) -> Fp8Linear:
    torch.manual_seed(3)
    made = Fp8Linear(in_features, out_features, bias, per_output=per_output)
    weight = torch.randn(out_features, in_features)
    largest = weight.abs().amax(dim=1, keepdim=True) if per_output else weight.abs().amax()
    made.weight_scale.copy_(float8_scale(largest))
    made.weight.copy_(to_float8(weight, made.weight_scale))
    if made.bias is not None:
        made.bias.copy_(torch.randn(out_features))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_fast_path_it_is_a_linear_layer_of_the_dequantised_weights(
    dtype, per_output, bias
):
    made = layer(in_features=33, out_features=7, per_output=per_output, bias=bias)
    x = torch.randn(2, 5, 33).to(dtype)
    weight = (made.weight.float() * made.weight_scale).to(dtype)
    out = made(x)
    assert out.dtype == dtype
    assert torch.equal(out, F.linear(x, weight, made.bias.to(dtype) if bias else None))


@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_product_of_float8_numbers_is_near_the_exact_one(per_output, dtype):
    made = layer(per_output=per_output)
    x = torch.randn(2, 5, 48) * torch.logspace(-3, 3, 5)[:, None]
    true = made(x)
    out = made._scaled_product(x.to(dtype))
    assert (out.shape, out.dtype) == (true.shape, dtype)
    for token in range(5):  # each by its own scale, the smallest as exactly as the largest
        bias_free = true[:, token] - made.bias, out[:, token].float() - made.bias
        if token >= 2:  # below, the bias leaves a 16-bit number no room for the rest
            assert sqnr_db(*bias_free) > 25
    assert torch.equal(made._scaled_product(x.to(dtype) * 0), made.bias.to(dtype).expand(2, 5, -1))


@pytest.mark.parametrize("per_output", [False, True])
def test_scaling_the_product_takes_no_second_one(per_output):
    made, x = layer(16, 512, per_output=per_output, bias=False), torch.randn(512, 16).bfloat16()
    made._scaled_product(x)  # what is kept for the first time is not its own
    with LiveBytes() as live:
        out = made._scaled_product(x)
    assert out.nbytes < live.peak < 1.5 * out.nbytes


def test_some_of_the_outputs_share_the_memory_of_all():
    for per_output in (False, True):
        made = layer(per_output=per_output)
        x = torch.randn(3, 48)
        part = made.rows_of(slice(8, 24))
        assert torch.allclose(part(x), made(x)[:, 8:24], atol=1e-5)
        assert part.weight.data_ptr() == made.weight[8:].data_ptr()
        assert made.weight.shape == (32, 48)


def test_the_largest_number_becomes_448_and_zeros_stay_zeros():
    weight = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    scale = float8_scale(weight.abs().amax())
    assert to_float8(weight, scale).float()[0, 1] == -448
    zeros = torch.zeros(2, 2)
    assert float8_scale(zeros.amax()) == 1
    assert torch.equal(to_float8(zeros, float8_scale(zeros.amax())).float(), zeros)


@pytest.mark.gpu
@pytest.mark.skipif(not FAST, reason="needs a card with float8 tensor cores")
@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize("per_output", [False, True])
def test_a_card_with_float8_gives_the_same_numbers(tokens, per_output):
    made = layer(128, 64, per_output=per_output).cuda()
    x = torch.randn(tokens, 128, device="cuda").bfloat16()
    assert made._has_fast_path(x)
    assert sqnr_db(made(x.float()), made(x).float()) > 25
