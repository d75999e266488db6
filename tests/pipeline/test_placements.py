"""Wherever the demo's weights are while it computes, its final latent is the same."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.denoise import Guidance, denoise, draw_noise, schedule
from kandinsky5.pipeline.transformer import Placement, TransformerTenant
from kandinsky5.presets import DEMO_FOLDER

CPU = torch.device("cpu")
STEPS = 3
WHOLE = Placement()


def final_latent(placement: Placement, weights: str = "auto") -> torch.Tensor:
    """Of a guided run, made twice in a row as two jobs would: the second finds what the first left."""
    reader = TransformerReader(DEMO_FOLDER / "transformer", weights=weights, dtype=torch.float32)
    config = reader.model.config
    generator = torch.Generator().manual_seed(4)
    prompts = [
        Conditioning(
            torch.randn(length, config.in_text_dim, generator=generator),
            torch.randn(config.in_text_dim2, generator=generator),
        )
        for length in (9, 3)
    ]
    guidance, times = Guidance(*prompts, 3.0), schedule(STEPS, 5.0)
    noise = draw_noise((3, 8, 8, config.in_visual_dim), generator)
    tenant = TransformerTenant(reader, device=CPU, placement=placement)
    latents = []
    for _ in range(2):
        prepared = tenant.prepare(guidance.conditionings, times[:-1].tolist())
        latents.append(denoise(tenant.enter(), noise, guidance, times, conditioning=prepared))
        tenant.leave()
    tenant.close()
    assert torch.equal(*latents) and latents[0].isfinite().all()
    return latents[0]


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize(
    "placement",
    [
        Placement(resident=0, slots=2, source="disk"),
        Placement(resident=2, slots=3, source="disk", ring=1),
        Placement(resident=0, slots=1, source="disk", stays=True),
        Placement(resident=3, source="ram", kept=True, stays=True),
    ],
    ids=str,
)
def test_streamed_and_resident_weights_give_the_same_latent_to_the_bit(
    placement: Placement, weights: str
) -> None:
    assert torch.equal(final_latent(placement, weights), final_latent(WHOLE, weights))


@pytest.mark.parametrize("chunks", [ActivationChunks(16, None), ActivationChunks(16, 1)], ids=str)
def test_chunks_change_the_order_of_sums_at_most(chunks: ActivationChunks) -> None:
    whole = final_latent(WHOLE)
    found = final_latent(Placement(resident=0, slots=2, source="disk", chunks=chunks))
    assert (found - whole).norm() <= 1e-6 * whole.norm()
