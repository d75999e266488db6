"""Attention with one wide head: whatever computes it, the same numbers in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kandinsky5.model import vae_attention
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.image_vae import PixelAttention
from kandinsky5.model.vae import PrefixAttention
from kandinsky5.model.vae_attention import SCORES_AT_ONCE, attended_in_parts


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("scores_at_once", [1, 7, 100, 10**6])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 1), (1, 6, 41), (3, 17, 5)], ids=str)
def test_parts_give_what_the_whole_gives(
    batch: int, queries: int, keys: int, scores_at_once: int
) -> None:
    query, key, value = (random(batch, 1, n, 24) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    out = attended_in_parts(query, key, value, scores_at_once)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_bfloat16_are_computed_in_float32() -> None:
    query, key, value = (random(1, 1, n, 64, dtype=torch.bfloat16) for n in (9, 50, 50))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    out = attended_in_parts(query, key, value, 100)
    assert out.dtype == torch.bfloat16
    assert (
        torch.equal(out, exact.bfloat16()) or (out - exact).abs().max() <= 2**-7 * exact.abs().max()
    )


@pytest.mark.parametrize(
    ("area", "frames"), [(64 * 96, 31), (128 * 128, 61)], ids=["512x768x121", "1024x1024x241"]
)
def test_parts_hold_few_scores_of_the_longest_video(area: int, frames: int) -> None:
    """The last frame sees all others; its scores alone would be 4.7 and 65 GB in float32."""
    query, key, value = (
        torch.empty(1, 1, n, 512, dtype=torch.bfloat16, device="meta")
        for n in (area, area * frames, area * frames)
    )
    with LiveBytes(torch.nn.Identity()) as live:
        attended_in_parts(query, key, value)
    given_bytes = sum(tensor.nbytes for tensor in (query, key, value))
    result_bytes = query.nbytes
    assert live.peak_bytes <= given_bytes + result_bytes + 4 * 4 * SCORES_AT_ONCE


def test_parts_hold_their_scores_once() -> None:
    query, key = random(1, 1, 300, 16), random(1, 1, 5000, 16)
    with LiveBytes(torch.nn.Identity()) as live:
        attended_in_parts(query, key, key, 2**16)
    assert 0.9 <= (live.peak_bytes - query.nbytes - key.nbytes) / (4 * 2**16) <= 1.5


@pytest.mark.parametrize(
    ("layer", "shape"), [(PrefixAttention, (1, 8, 3, 4, 5)), (PixelAttention, (1, 8, 4, 5))]
)
def test_both_vaes_go_in_parts_where_no_kernel_is_fused(
    monkeypatch: pytest.MonkeyPatch, layer: type[torch.nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    attention, x = layer(8, 4), random(*shape)
    with torch.inference_mode():
        fused = attention(x)
        monkeypatch.setattr(vae_attention, "has_fused_kernel", lambda *tensors: False)
        torch.testing.assert_close(attention(x), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_has_a_fused_kernel_for_heads_of_512(dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 1, n, 512, device="cuda", dtype=dtype) for n in (4096, 65_536))
    assert vae_attention.has_fused_kernel(query, key, key)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = vae_attention.attended(query, key, key)
    assert torch.cuda.max_memory_allocated() - before <= 4 * out.nbytes + 2**26
    exact = attended_in_parts(query, key, key)
    assert (out - exact).norm() <= 2e-2 * exact.norm()
