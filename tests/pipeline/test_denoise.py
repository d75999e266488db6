"""The sampling loop against diffusers' pipelines, and its own rules."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers_oracle import compute_in_float32, published_normalisation, published_schedule

from kandinsky5.errors import NotFinite, Stopped
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig, StepConditioning
from kandinsky5.model.positions import VisualPositions
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.denoise import (
    Guidance,
    PreparedSchedule,
    StepState,
    denoise,
    draw_noise,
    guided,
    schedule,
)
from kandinsky5.pipeline.model_inputs import FirstFrame, inputs_for, normalise_first_frames

CONFIG = DiTConfig(
    in_visual_dim=16,
    out_visual_dim=16,
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=32,
    model_dim=64,
    ff_dim=128,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
    visual_cond=True,
)
DIFFUSERS_ROPE_SCALE = (1, 3.16, 3.16)
"""What diffusers takes for sizes that are neither 480p nor anything it knows."""


@pytest.fixture(autouse=True)
def oracle_in_float32(monkeypatch) -> None:
    compute_in_float32(monkeypatch)


@pytest.fixture
def transformer() -> DiffusionTransformer3D:
    torch.manual_seed(7)
    model = DiffusionTransformer3D(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.requires_grad_(False)


class Spy:
    """A transformer that notes what it is asked: inputs and branches of every evaluation."""

    config = CONFIG

    def __init__(self, transformer: DiffusionTransformer3D) -> None:
        self.transformer = transformer
        self.prepared: list[Sequence[float]] = []
        self.seen: list[tuple[torch.Tensor, list[StepConditioning]]] = []

    def prepare(self, conditionings, times) -> list[list[StepConditioning]]:
        self.prepared.append(times)
        return self.transformer.prepare(conditionings, times)

    def positions(self, latent, **options: Any) -> VisualPositions:
        return self.transformer.positions(latent, **options)

    def evaluate(self, x, branches, positions, **options: Any) -> list[torch.Tensor]:
        self.seen.append((x.clone(), list(branches)))
        return self.transformer.evaluate(x, branches, positions, **options)


def conditioning(seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        text=torch.randn(tokens, CONFIG.in_text_dim, generator=generator),
        pooled=torch.randn(CONFIG.in_text_dim2, generator=generator),
    )


def diffusers_pipeline(transformer: DiffusionTransformer3D, name: str, shift: float):
    """The named pipeline of diffusers around the same weights, on kandinskylab's schedule."""
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.Kandinsky5Transformer3DModel(
        **{
            key: getattr(CONFIG, key)
            for key in CONFIG.__dataclass_fields__
            if key != "instruct_type"
        }
    ).eval()
    reference.load_state_dict(transformer.state_dict())
    vae = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    pipeline = getattr(diffusers, name)(
        transformer=reference,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=published_schedule(shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published_run(pipeline, latents, positive, negative, steps, scale, frames, **extra):
    def lengths(c: Conditioning) -> torch.Tensor:
        return torch.tensor([0, c.text.shape[0]], dtype=torch.int32)

    return pipeline(
        prompt_embeds_qwen=positive.text[None],
        prompt_embeds_clip=positive.pooled[None],
        prompt_cu_seqlens=lengths(positive),
        negative_prompt_embeds_qwen=negative.text[None],
        negative_prompt_embeds_clip=negative.pooled[None],
        negative_prompt_cu_seqlens=lengths(negative),
        height=latents.shape[2] * 8,
        width=latents.shape[3] * 8,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=latents,
        output_type="latent",
        return_dict=False,
        **extra,
    )[0][0]


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_text_to_video_equals_diffusers_after_four_steps(transformer, scale) -> None:
    noise = draw_noise((7, 8, 12, 16), torch.Generator().manual_seed(1))
    positive, negative = conditioning(2, 9), conditioning(3, 4)
    with torch.no_grad():
        expected = published_run(
            diffusers_pipeline(transformer, "Kandinsky5T2VPipeline", 10.0),
            inputs_for(CONFIG, None).of(noise)[None],
            positive,
            negative,
            steps=4,
            scale=scale,
            frames=25,
        )
    ours = denoise(
        transformer,
        noise,
        Guidance(positive, negative if scale != 1.0 else None, scale),
        schedule(4, 10.0),
        rope_scale=DIFFUSERS_ROPE_SCALE,
    )
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def test_image_to_video_equals_diffusers_after_four_steps(transformer) -> None:
    generator = torch.Generator().manual_seed(4)
    noise = draw_noise((11, 8, 8, 16), generator)
    picture = draw_noise((1, 8, 8, 16), generator) * 0.7 + 0.2
    positive, negative = conditioning(5, 11), conditioning(6, 3)
    latents = noise.clone()
    latents[:1] = picture
    pipeline = diffusers_pipeline(transformer, "Kandinsky5I2VPipeline", 10.0)
    pipeline.normalize_first_frame = published_normalisation
    with torch.no_grad():
        expected = published_run(
            pipeline,
            inputs_for(CONFIG, picture).of(latents)[None],
            positive,
            negative,
            steps=4,
            scale=3.0,
            frames=41,
            image=torch.zeros(1, 3, 64, 64),
        )
    ours = denoise(
        transformer,
        noise,
        Guidance(positive, negative, 3.0),
        schedule(4, 10.0),
        rope_scale=DIFFUSERS_ROPE_SCALE,
        inputs=FirstFrame(picture),
    )
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 10.0), (16, 5.0), (50, 3.0)])
def test_schedule_goes_from_one_to_zero_and_follows_the_shift(steps, shift) -> None:
    times = schedule(steps, shift)
    assert times.shape == (steps + 1,)
    assert times[0] == 1.0
    assert times[-1] == 0.0
    for i, t in enumerate(times.tolist()):
        u = 1 - i / steps
        assert math.isclose(t, shift * u / (1 + (shift - 1) * u), abs_tol=1e-6)


def test_model_input_of_a_video_model_is_latent_zeros_mask() -> None:
    latent = torch.randn(3, 4, 4, 16)
    plain = inputs_for(CONFIG, None).of(latent)
    assert plain.shape == (3, 4, 4, 33)
    assert torch.equal(plain[..., :16], latent)
    assert not plain[..., 16:].any()
    given = inputs_for(CONFIG, latent[:1]).of(latent)
    assert not given[..., 16:32].any()
    assert given[0, ..., 32].eq(1).all()
    assert not given[1:, ..., 32].any()


def test_first_frames_move_no_further_than_published() -> None:
    torch.manual_seed(0)
    latent = torch.randn(9, 6, 6, 16)
    latent[4:] = latent[4:] * 3 + 2
    moved = normalise_first_frames(latent)
    for before, after in zip(latent[:4], moved[:4], strict=True):
        assert after.mean() - before.mean() == pytest.approx(0.10, abs=1e-4)
        assert after.std() - before.std() == pytest.approx(0.25, abs=1e-4)
    assert torch.equal(moved[4:], latent[4:])


def test_a_video_too_short_to_compare_stays_as_it_is() -> None:
    latent = torch.randn(4, 6, 6, 16)
    assert torch.equal(normalise_first_frames(latent), latent)


def test_given_first_frame_stands_in_every_input_and_in_the_result(transformer) -> None:
    noise = torch.randn(3, 4, 4, 16)
    picture = torch.randn(1, 4, 4, 16)
    spy = Spy(transformer)
    result = denoise(
        spy, noise, Guidance(conditioning(1, 3)), schedule(3, 2.0), inputs=FirstFrame(picture)
    )
    assert len(spy.seen) == 3
    assert all(torch.equal(x[0, ..., :16], picture[0]) for x, _ in spy.seen)
    assert torch.equal(result[:1], picture)


def test_stop_is_obeyed_before_the_next_step(transformer) -> None:
    states = []
    with pytest.raises(Stopped):
        denoise(
            transformer,
            torch.randn(2, 4, 4, 16),
            Guidance(conditioning(1, 3)),
            schedule(10, 1.0),
            on_step=states.append,
            should_stop=lambda: len(states) == 3,
        )
    assert [state.step for state in states] == [1, 2, 3]


def test_the_same_noise_gives_the_same_bytes_twice(transformer) -> None:
    runs = [
        denoise(
            transformer,
            draw_noise((3, 4, 4, 16), torch.Generator().manual_seed(9)),
            Guidance(conditioning(1, 5), conditioning(2, 2), 4.0),
            schedule(3, 10.0),
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def run_of(transformer, **options: Any) -> tuple[torch.Tensor, list[StepState]]:
    """A guided run of five steps with a given first frame, and its states."""
    generator = torch.Generator().manual_seed(11)
    given = {
        "noise": draw_noise((6, 4, 4, 16), generator),
        "inputs": FirstFrame(draw_noise((1, 4, 4, 16), generator)),
        "guidance": Guidance(conditioning(1, 5), conditioning(2, 2), 4.0),
        "times": schedule(5, 10.0),
        **options,
    }
    states: list[StepState] = []

    def on_step(state: StepState) -> None:
        states.append(dataclasses.replace(state, latent=state.latent.clone()))

    result = denoise(transformer, on_step=on_step, **given)
    return result, states


def test_a_step_is_one_evaluation_of_both_branches_prepared_before_the_first(transformer) -> None:
    spy = Spy(transformer)
    run_of(spy)
    assert spy.prepared == [schedule(5, 10.0)[:-1].tolist()]
    assert [len(branches) for _, branches in spy.seen] == [2] * 5


def test_a_guided_step_equals_two_forwards(transformer) -> None:
    positive, negative = conditioning(1, 5), conditioning(2, 2)
    _, states = run_of(transformer, inputs=None)
    before, after = states[1], states[2]
    with torch.inference_mode():
        x = inputs_for(CONFIG, None).of(before.latent)
        velocities = [transformer(x, c.text, c.pooled, after.time) for c in (positive, negative)]
    expected = velocities[1] + 4.0 * (velocities[0] - velocities[1])
    assert torch.equal(after.velocity, expected)


@pytest.mark.parametrize("done", [1, 3, 5])
def test_a_run_goes_on_from_a_latent_as_if_it_had_never_stopped(transformer, done) -> None:
    whole, states = run_of(transformer)
    kept = states[done - 1].latent.clone()
    spy = Spy(transformer)
    resumed, later = run_of(spy, noise=kept, start_step=done)
    assert torch.equal(resumed, whole)
    assert [state.step for state in later] == list(range(done + 1, 6))
    assert [state.time for state in later] == [state.time for state in states[done:]]
    assert spy.prepared == [schedule(5, 10.0)[done:-1].tolist()]


@pytest.mark.parametrize("start_step", [-1, 6])
def test_a_start_outside_the_schedule_is_refused(transformer, start_step) -> None:
    with pytest.raises(ValueError, match="start_step"):
        run_of(transformer, start_step=start_step)


def test_conditionings_may_come_from_a_schedule_of_ones_own(transformer) -> None:
    whole, _ = run_of(transformer)
    asked = []

    class Lazy:
        def branches(self, step: int, skips: Sequence[bool]) -> Sequence[StepConditioning]:
            asked.append(step)
            moment = schedule(5, 10.0)[step].item()
            return transformer.prepare([conditioning(1, 5), conditioning(2, 2)], [moment])[0]

    spy = Spy(transformer)
    result, _ = run_of(spy, conditioning=Lazy())
    assert torch.equal(result, whole)
    assert asked == [0, 1, 2, 3, 4] and spy.prepared == []


def test_a_prepared_schedule_counts_from_its_first_step() -> None:
    first, second = (StepConditioning(torch.zeros(n), (), torch.zeros(n)) for n in (1, 2))
    prepared = PreparedSchedule([[first, second], [second]], start_step=3)
    assert prepared.branches(3, (False, True)) == [first, second]
    assert prepared.branches(3, (False,)) == [first]
    assert prepared.branches(4, (False,)) == [second]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_gives_no_numbers_stops_the_run_at_once(transformer, bad) -> None:
    class Breaks(Spy):
        def evaluate(self, *args: Any, **options: Any) -> list[torch.Tensor]:
            velocities = super().evaluate(*args, **options)
            if len(self.seen) == 3:
                velocities[1][-1, -1, -1, -1] = bad
            return velocities

    spy = Breaks(transformer)
    with pytest.raises(NotFinite, match="step 3 of 5.*sdpa") as caught:
        run_of(spy)
    assert len(spy.seen) == 3
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.step, copy.total, str(copy)) == (3, 5, str(caught.value))
    kept = NotFinite(3, 5, "states/step-00002.safetensors")
    assert str(pickle.loads(pickle.dumps(kept))) == str(kept)


def test_guidance_goes_past_the_prompt_away_from_the_negative() -> None:
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(guided([positive], 7.0), positive)
    assert torch.equal(guided([positive, negative], 3.0), torch.tensor([3.0, -2.0]))
    assert guided([positive.bfloat16(), negative.bfloat16()], 3.0).dtype == torch.float32
