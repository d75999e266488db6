"""What the arithmetic promises, in plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from int8 import COMMUNITY, DEFAULT, Int8Scheme, dequantize
from int8.reference import group_products, product_in_float32, quantize, rotate, rotate_back
from int8.reference import rotation_signs as signs
from int8.scheme import GROUPS, SCHEME_VERSION


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 63, 127, 128, 300, 1024])
def test_rotating_back_gives_the_input(features: int) -> None:
    x = normal(5, features)
    torch.testing.assert_close(rotate_back(rotate(x)), x, rtol=0, atol=1e-5)


def test_the_rotation_is_signs_and_a_normalised_hadamard_matrix() -> None:
    rows = torch.arange(128)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in rows] for i in rows])
    matrix = torch.where(parity == 0, 1.0, -1.0) / math.sqrt(128)
    expected = torch.tensor(signs())[:, None] * matrix
    torch.testing.assert_close(rotate(torch.eye(128)), expected, rtol=1e-6, atol=0)


def test_the_signs_are_pi() -> None:
    """A file written today is read by this rule for ever."""
    first = "".join("1" if sign < 0 else "0" for sign in signs()[:16])
    assert int(first, 2) == 0x243F
    assert sum(signs()) == 128 - 2 * (0x243F6A8885A308D313198A2E03707344).bit_count()


def test_a_tail_shorter_than_a_block_is_not_rotated() -> None:
    x = normal(2, 200)
    assert torch.equal(rotate(x)[:, 128:], x[:, 128:])
    assert not torch.isclose(rotate(x)[:, :128], x[:, :128]).all()


def test_rotating_leaves_the_callers_tensor_alone() -> None:
    x = normal(1, 128)
    before = x.clone()
    rotate(x)
    rotate_back(x)
    quantize(x)
    assert torch.equal(x, before)


def test_integers_are_rounded_to_even_and_the_largest_is_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 3.4]])
    q, scales = quantize(x, COMMUNITY)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -127, 3]]
    assert scales.item() == 1


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY, Int8Scheme(256)], ids=str)
@pytest.mark.parametrize("features", [1, 127, 128, 1000, 1025, 2200])
def test_a_group_is_off_by_half_a_step_at_most(features: int, scheme: Int8Scheme) -> None:
    x = normal(3, features)
    q, scales = quantize(x, scheme)
    assert scales.shape == (3, math.ceil(features / scheme.group))
    steps = scales.repeat_interleave(scheme.group, dim=1)[:, :features]
    assert ((rotate(x, scheme) - q * steps).abs() <= steps * 0.50001).all()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-31])
def test_a_group_of_nothing_has_scale_zero(value: float) -> None:
    q, scales = quantize(torch.full((2, 256), value))
    assert not q.any()
    assert not scales.any()
    assert dequantize(q, scales).isfinite().all()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = normal(400, 1000)
    whole = quantize(x)
    for row in (0, 131, 399):
        alone = quantize(x[row : row + 1])
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])


def test_float32_holds_the_largest_sum_of_a_group_exactly() -> None:
    x = torch.full((2, max(GROUPS)), 127, dtype=torch.int8)
    x[1] = -127
    assert product_in_float32(x, x).tolist() == [[16516096, -16516096], [-16516096, 16516096]]


def test_group_products_are_integer_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (7, 1500), generator=generator, dtype=torch.int8)
    w = torch.randint(-127, 128, (5, 1500), generator=generator, dtype=torch.int8)
    parts = group_products(x, w)
    assert parts.dtype == torch.int32
    assert torch.equal(parts[0].long(), x[:, :1024].long() @ w[:, :1024].long().t())
    assert torch.equal(parts.sum(0), x.long() @ w.long().t())


def test_dequantising_is_close_to_the_weight() -> None:
    weight = normal(64, 2048)
    error = dequantize(*quantize(weight)) - weight
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) > 41


def test_a_scheme_is_read_from_what_it_wrote() -> None:
    for scheme in (DEFAULT, COMMUNITY):
        assert Int8Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"version": SCHEME_VERSION + 1, "group": 1024, "rotate": True}, "version 2.*update"),
        ({"group": 1024, "rotate": True}, "version None"),
        ({"version": 1, "group": 100, "rotate": True}, "group of 100.*allowed"),
        ({"version": 1, "group": "1024", "rotate": True}, "damaged"),
        ({"version": 1, "group": 1024, "rotate": 1}, "damaged"),
    ],
)
def test_a_scheme_that_cannot_be_read_is_refused_in_one_line(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        Int8Scheme.from_dict(values)
    assert "\n" not in str(refusal.value)
