"""The step cache in the loop, against a loop written out; guidance that holds for a part of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.errors import UserError
from kandinsky5.magcache import SkipRule, Skips, skips_of
from kandinsky5.model.attention import NablaParams
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig, Residual
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.cache import MagCache, check_tensors, needed, skip_plan
from kandinsky5.pipeline.cache_ratios import RatioMeter
from kandinsky5.pipeline.denoise import Guidance, StepState, denoise, draw_noise, guided, schedule
from kandinsky5.pipeline.transformer import Placement, TransformerTenant
from kandinsky5.request import GenerationRequest
from tests.support import tiny_transformer
from tests.support.tiny_transformer import LiveBytes

CONFIG = DiTConfig(**{**vars(tiny_transformer.CONFIG), "visual_cond": False})
CPU = torch.device("cpu")
STEPS = 8
RULE = SkipRule(threshold=9.0, retention=0.25, max_skips=2)


def plan(*, uneven: bool = True, branches: Sequence[int] = (2,) * STEPS) -> Skips:
    """Two steps run, then of three two are skipped; uneven: not always the same of both branches."""
    cond = [1.0] * STEPS
    uncond = [1.0, 1.0, 1.0, 99.0, 1.0, 1.0, 1.0, 1.0] if uneven else cond
    flat = [ratio for pair in zip(cond, uncond, strict=True) for ratio in pair]
    return skips_of(flat[2:], branches, RULE)


@pytest.fixture(scope="module")
def transformer() -> DiffusionTransformer3D:
    model = DiffusionTransformer3D(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(tiny_transformer.weights(CONFIG))
    return model


def conditioning(seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(tokens, CONFIG.in_text_dim, generator=generator)
    return Conditioning(text, torch.randn(CONFIG.in_text_dim2, generator=generator))


GUIDANCE = Guidance(conditioning(1, 5), conditioning(2, 3), 3.0)
NOISE = draw_noise((2, 4, 4, 16), torch.Generator().manual_seed(3))
TIMES = schedule(STEPS, 5.0)


def run(model: Any, skips: Skips | None, **options: Any) -> tuple[torch.Tensor, list[StepState]]:
    states: list[StepState] = []
    cache = (
        None if skips is None else MagCache(skips, device=CPU, tensors=options.pop("kept", None))
    )
    given = {"noise": NOISE, "guidance": GUIDANCE, "times": TIMES, "cache": cache, **options}
    result = denoise(model, on_step=states.append, **given)
    return result, states


@torch.inference_mode()
def written_out(model: DiffusionTransformer3D, skips: Skips) -> torch.Tensor:
    """The same loop without the seam: whole evaluations between hooks around the blocks."""
    seen: dict[str, torch.Tensor] = {}
    blocks = model.visual_transformer_blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0].clone())),
        blocks[-1].register_forward_hook(lambda _, args, out: seen.update(last=out.clone())),
    ]
    latent, held = NOISE.clone(), {}
    for step, (time, after) in enumerate(zip(TIMES[:-1].tolist(), TIMES[1:].tolist(), strict=True)):
        (rows,) = model.prepare(GUIDANCE.conditionings, [time])
        velocities = []
        for branch, skip in enumerate(skips[step]):
            (velocity,) = model.evaluate(latent, [rows[branch]], model.positions(latent))
            if skip:
                stream = seen["first"] + held[branch]
                velocity = model.out_layer(stream, rows[branch].out, (2, 2, 2))
            else:
                held[branch] = seen["last"] - seen["first"]
            velocities.append(velocity)
        latent = latent + (after - time) * guided(velocities, 3.0)
    for handle in handles:
        handle.remove()
    return latent


@pytest.mark.parametrize("uneven", [False, True])
def test_a_cached_run_equals_the_loop_written_out(transformer, uneven) -> None:
    skips = plan(uneven=uneven)
    kinds = {sum(step) for step in skips}
    assert kinds == ({0, 1, 2} if uneven else {0, 2})
    cached, states = run(transformer, skips)
    assert torch.equal(cached, written_out(transformer, skips))
    assert not torch.equal(cached, run(transformer, None)[0])
    assert [s.evaluations_skipped for s in states] == [sum(step) for step in skips]
    assert all(s.evaluations_run + s.evaluations_skipped == 2 for s in states)


def test_a_cache_that_skips_nothing_changes_nothing(transformer) -> None:
    never = skips_of([1.0] * 98, [2] * STEPS, SkipRule(threshold=0.0))
    assert torch.equal(run(transformer, never)[0], run(transformer, None)[0])


def test_no_block_is_called_when_all_branches_are_skipped_and_one_when_one_is(transformer) -> None:
    skips, calls = plan(), []
    handle = transformer.visual_transformer_blocks[0].register_forward_pre_hook(
        lambda module, args: calls.append(1)
    )
    counts = []
    denoise(
        transformer,
        NOISE,
        GUIDANCE,
        TIMES,
        cache=MagCache(skips, device=CPU),
        on_step=lambda state: counts.append(len(calls)),
    )
    handle.remove()
    each = [now - before for before, now in zip([0, *counts], counts, strict=False)]
    assert each == [2 - sum(step) for step in skips]


@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_cached_run_goes_on_as_if_it_had_never_stopped(transformer, done) -> None:
    skips = plan()
    whole, states = run(transformer, skips)
    cache = MagCache(skips, device=CPU)

    def stop(state: StepState) -> bool:
        return state.step == done

    seen: list[StepState] = []
    with pytest.raises(Exception, match="stopped"):
        denoise(
            transformer,
            NOISE,
            GUIDANCE,
            TIMES,
            cache=cache,
            on_step=seen.append,
            should_stop=lambda: bool(seen) and stop(seen[-1]),
        )
    kept = {name: tensor.clone() for name, tensor in cache.tensors(done).items()}
    assert set(kept) == set(needed(skips, done).values())
    resumed, _ = run(transformer, skips, noise=states[done - 1].latent, start_step=done, kept=kept)
    assert torch.equal(resumed, whole)


def test_residuals_that_do_not_belong_to_the_step_are_refused() -> None:
    skips = plan(uneven=False)
    step = next(index for index, both in enumerate(skips) if all(both))
    good = {"residual.0": torch.zeros(8, 64), "residual.1": torch.zeros(8, 64)}
    check_tensors(skips, step, good, (8, 64))
    check_tensors(skips, 0, {}, (8, 64))
    for bad in ({}, {"residual.0": good["residual.0"]}, {**good, "residual.1": torch.zeros(9, 64)}):
        with pytest.raises(UserError, match=r"residual\.1"):
            check_tensors(skips, step, bad, (8, 64))


def test_inside_the_blocks_the_cache_takes_no_memory(transformer) -> None:
    """The peak of a run with residuals is that of one without."""
    noise = draw_noise((4, 16, 16, 16), torch.Generator().manual_seed(3))
    peaks = []
    transformer.chunks = ActivationChunks(tokens=32)
    for skips in (None, plan()):
        prepared = [transformer.prepare(GUIDANCE.conditionings, [t]) for t in TIMES[:-1].tolist()]

        class Prepared:
            def branches(self, step, skips, rows=prepared):
                return rows[step][0][: len(skips)]

        with LiveBytes() as live:
            run(transformer, skips, noise=noise, conditioning=Prepared())
        peaks.append(live.peak)
    transformer.chunks = ActivationChunks()
    plain, cached = peaks
    assert cached <= plain


@pytest.fixture
def tenant(tmp_path: Path):
    path = tiny_transformer.save(tmp_path / "tiny.safetensors", tiny_transformer.weights(CONFIG))
    placement = Placement(resident=0, slots=1, source="disk")
    made = TransformerTenant(TransformerReader(path), device=CPU, placement=placement)
    yield made
    made.close()


def test_a_skipped_step_streams_nothing_and_fetches_no_modulation(tenant, transformer) -> None:
    skips = plan(uneven=False)
    waiting = tenant.prepare(GUIDANCE.conditionings, TIMES[:-1].tolist())
    running = tenant.enter()
    seen = []

    def step_done(state: StepState) -> None:
        seen.append(running.traffic.loads)

    result = denoise(
        running,
        NOISE,
        GUIDANCE,
        TIMES,
        conditioning=waiting,
        cache=MagCache(skips, device=CPU),
        on_step=step_done,
    )
    tenant.leave()
    assert torch.equal(result, run(transformer, skips)[0])
    each = [now - before for before, now in pairwise(seen)]
    streamed = [not all(both) for both in skips[1:]]
    assert [loads > 0 for loads in each] == streamed and not all(streamed)
    (lent, _) = waiting.branches(STEPS - 1, (True, True))
    assert lent.visual == () and lent.text.numel() == 0


def test_guidance_holds_inside_its_interval_alone(transformer) -> None:
    half = Guidance(GUIDANCE.positive, GUIDANCE.negative, 3.0, interval=(0.25, 0.75))
    assert half.branches(STEPS) == [1, 1, 2, 2, 2, 2, 1, 1]
    result, states = run(transformer, None, guidance=half)
    assert [s.evaluations_run for s in states] == [1, 1, 2, 2, 2, 2, 1, 1]
    alone = Guidance(GUIDANCE.positive)
    first, _ = run(transformer, None, guidance=alone, times=TIMES[:3])
    assert torch.equal(states[1].latent, first)
    assert not torch.equal(result, run(transformer, None)[0])


@pytest.mark.parametrize(
    ("interval", "guided_steps"), [((0.0, 0.9), 45), ((0.5, 0.5), 0), ((0.8, 0.2), 0), ((0, 1), 50)]
)
def test_shares_become_whole_steps(interval, guided_steps) -> None:
    guidance = Guidance(GUIDANCE.positive, GUIDANCE.negative, 3.0, interval=interval)
    assert sum(count == 2 for count in guidance.branches(50)) == guided_steps
    assert Guidance(GUIDANCE.positive).branches(3) == [1, 1, 1]


def test_cache_and_interval_together_follow_the_branches_there_are(transformer) -> None:
    part = Guidance(GUIDANCE.positive, GUIDANCE.negative, 3.0, interval=(0.0, 0.5))
    skips = plan(uneven=False, branches=part.branches(STEPS))
    _, states = run(transformer, skips, guidance=part)
    total = sum(s.evaluations_run + s.evaluations_skipped for s in states)
    assert total == 4 * 2 + 4


def test_a_preset_without_ratios_is_refused_by_name() -> None:
    request = GenerationRequest(preset="lite-t2v-5s-distilled", prompt="x", cache="magcache")
    with pytest.raises(UserError, match="lite-t2v-5s-distilled"):
        skip_plan(request, [1] * 16)
    assert skip_plan(GenerationRequest(prompt="x"), [2] * 24) is None


def test_the_meter_measures_what_the_blocks_add(transformer) -> None:
    meter = RatioMeter([2] * STEPS)
    with_meter, _ = run(transformer, None, cache=meter)
    assert torch.equal(with_meter, run(transformer, None)[0])
    ratios = meter.ratios()
    assert [len(step) for step in ratios] == [2] * (STEPS - 1)
    expected = {}
    with torch.inference_mode():
        for step in (0, 1):
            _, states = run(transformer, None)
            x = NOISE if step == 0 else states[0].latent
            (rows,) = transformer.prepare(GUIDANCE.conditionings, [TIMES[step].item()])
            kept = [Residual(), Residual()]
            transformer.evaluate(x, rows, transformer.positions(x), residuals=kept)
            expected[step] = [slot.value.norm(dim=-1) for slot in kept]  # type: ignore[union-attr]
    for branch in (0, 1):
        ratio = (expected[1][branch] / expected[0][branch]).mean().item()
        assert ratios[0][branch] == pytest.approx(ratio, rel=1e-6)


def test_a_sparse_step_is_skipped_in_the_order_of_its_tokens(transformer) -> None:
    sparse = NablaParams(P=0.9, wT=1, wH=1, wW=1)
    latent = draw_noise((1, 16, 32, 16), torch.Generator().manual_seed(4))
    with torch.inference_mode():
        positions = transformer.positions(latent, sparse=sparse)
        x = positions.order.arranged(latent)
        (rows,) = transformer.prepare([GUIDANCE.positive], [0.5])
        kept = Residual()
        (ran,) = transformer.evaluate(x, rows, positions, residuals=[kept])
        (again,) = transformer.evaluate(x, rows, positions, residuals=[kept])
    assert torch.allclose(again, ran, rtol=1e-5, atol=1e-6)
