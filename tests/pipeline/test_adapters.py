"""LoRAs as a job uses them: found and told of, on streamed weights, changed without reading the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from int8 import Int8Linear
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.lora import attach, combined, layer_sizes
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.adapters import ChosenLora, chosen_loras, with_triggers
from kandinsky5.pipeline.transformer import Placement, TransformerTenant
from kandinsky5.request import GenerationRequest, LoraChoice
from tests.support import loras, tiny_transformer
from tests.support.tiny_transformer import CONFIG

CPU = torch.device("cpu")


def chosen(path: Path, *strengths: float) -> tuple[ChosenLora, ...]:
    request = GenerationRequest(
        prompt="x", loras=tuple(LoraChoice(str(path), strength) for strength in strengths)
    )
    return chosen_loras(request, CONFIG, ())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    with torch.device("meta"):
        sizes = layer_sizes(DiffusionTransformer3D(CONFIG))
    path = tmp_path / "style.safetensors"
    return loras.save_kohya(path, loras.random_pairs(sizes), alpha=3.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_transformer.save(tmp_path / "base.safetensors", tiny_transformer.weights())


def conditioning() -> list[Conditioning]:
    generator = torch.Generator().manual_seed(1)
    return [
        Conditioning(
            torch.randn(4, CONFIG.in_text_dim, generator=generator),
            torch.randn(CONFIG.in_text_dim2, generator=generator),
        )
    ]


def velocity(tenant: TransformerTenant) -> torch.Tensor:
    """As a job goes about it: prepare, enter, evaluate, leave."""
    waiting = tenant.prepare(conditioning(), [0.5])
    running = tenant.enter()
    x = torch.randn((2, 4, 4, 33), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        positions = running.positions(x, rope_scale=(1.0, 1.0, 1.0))
        (made,) = running.evaluate(x, waiting.branches(0, (False,)), positions)
    tenant.leave()
    return made


def whole_model(base: Path, pairs: tuple[ChosenLora, ...], weights: str) -> torch.Tensor:
    """The same with everything in memory."""
    with TransformerReader(base, weights=weights) as reader:
        model = reader.model
        tensors = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in model.state_dict().items()}
        reader.read_into(tensors)
        model.load_state_dict(tensors, assign=True)
    attach(model, combined([(lora.file, lora.strength) for lora in pairs], torch.float32))
    x = torch.randn((2, 4, 4, 33), generator=torch.Generator().manual_seed(2))
    (text,) = conditioning()
    with torch.inference_mode():
        return model(x, text.text, text.pooled, 0.5)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("stays", [True, False])
def test_loras_run_beside_streamed_and_resident_blocks_and_are_switched(
    base, lora, weights, stays
) -> None:
    placement = Placement(
        resident=None if stays else 0, slots=1, source="ram" if stays else "disk", stays=stays
    )
    reader = TransformerReader(base, weights=weights)
    tenant = TransformerTenant(reader, device=CPU, placement=placement)
    plain = velocity(tenant)
    blocks = tenant.model.visual_transformer_blocks
    before = {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()}
    reads = []
    read_into = reader.read_into
    reader.read_into = lambda targets: (reads.extend(targets), read_into(targets))[1]  # type: ignore[method-assign,func-returns-value]
    for pairs in (chosen(lora, 1.0), chosen(lora, -0.5, 0.25), ()):
        tenant.adapters.choose(pairs, torch.float32)
        made = velocity(tenant)
        assert torch.equal(made, whole_model(base, pairs, weights))
        assert torch.equal(made, plain) == (not pairs)
    if stays:  # what is needed once a schedule is read for every job, by design
        of_blocks = [name for name in reads if name.startswith("visual_transformer_blocks")]
        assert all("modulation" in name for name in of_blocks)
        after = {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()}
        assert after == before
    if weights == "int8":
        block = tenant.model.visual_transformer_blocks[0]
        assert isinstance(block.get_submodule("self_attention.to_query"), Int8Linear)
    tenant.close()


def test_nothing_is_left_on_the_device_when_a_job_lets_go(base, lora) -> None:
    tenant = TransformerTenant(TransformerReader(base), device=CPU, placement=Placement(slots=1))
    tenant.adapters.choose(chosen(lora, 1.0), torch.float32)
    names = list(tenant.model.state_dict())
    velocity(tenant)
    assert list(tenant.model.state_dict()) == names
    assert not [m for m in tenant.model.modules() if hasattr(m, "adapter")]
    tenant.close()


def test_how_many_tensors_match_is_told_with_the_trigger(tmp_path) -> None:
    layer = "visual_transformer_blocks.0.cross_attention.to_key"
    pairs = loras.random_pairs({layer: (64, 64), "blocks.0.attn": (8, 8)})
    path = loras.save_peft(tmp_path / "ink.safetensors", pairs, alpha=3, trigger="ink drawing, ")
    (found,) = chosen(path, 0.8)
    assert "ink.safetensors: 2 of 4 tensors match" in found.notice
    assert "ink drawing," in found.notice
    assert found.nbytes(torch.bfloat16) == 2 * (3 * 64 + 64 * 3)
    assert with_triggers("a cat", [found]) == "ink drawing, a cat"
    assert with_triggers("a cat, ink drawing, at night", [found]) == "a cat, ink drawing, at night"
    (off,) = chosen(path, 0.0)
    assert with_triggers("a cat", [off]) == "a cat" and off.nbytes(torch.bfloat16) == 0


def test_a_lora_is_found_by_name_in_the_folders_for_models(tmp_path, lora) -> None:
    folder = tmp_path / "comfy" / "models"
    (folder / "loras").mkdir(parents=True)
    lora.rename(folder / "loras" / "named.safetensors")
    request = GenerationRequest(prompt="x", loras=(LoraChoice("named.safetensors"),))
    (found,) = chosen_loras(request, CONFIG, [folder])
    assert found.file.path == folder / "loras" / "named.safetensors"


def test_what_is_no_lora_of_this_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="nothing is at"):
        chosen(tmp_path / "none.safetensors", 1.0)
    with pytest.raises(UserError, match="not a folder"):
        chosen(tmp_path, 1.0)
    other = loras.random_pairs({"double_blocks.0.img_attn.qkv": (64, 64)})
    path = loras.save_kohya(tmp_path / "flux.safetensors", other, alpha=1.0)
    with pytest.raises(CheckpointError, match="flux.safetensors"):
        chosen(path, 1.0)


def test_the_notice_says_what_kind_of_part_does_not_act(tmp_path, lora) -> None:
    layer = "visual_transformer_blocks.0.self_attention.to_query"
    added = {f"diffusion_model.{layer}.diff_b": torch.zeros(64)}
    save_file({**load_file(lora), **added}, lora)
    (said,) = chosen(lora, 1.0)
    assert f"not {next(iter(added))}; left out" in said.notice
    assert said.notice.endswith("does not run them: 1 diff_b (biases))")
