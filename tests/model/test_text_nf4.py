"""The text encoder in NF4 computes with the weights that NF4 keeps, and takes the memory it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kandinsky5.family import QWEN_7B
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.source import PinnedSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.model import text_nf4
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.text_loading import EncoderReader, load_qwen
from kandinsky5.model.text_nf4 import (
    HOST_CHUNK,
    Nf4Linear,
    Nf4Reader,
    nf4_problem,
    open_qwen,
    quantised,
    with_nf4_layers,
)

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 40).unsqueeze(0)
LOWER = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
UPPER = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
LEVELS = torch.tensor((*LOWER, *UPPER))
"""Of NF4, to four digits (Dettmers et al., arXiv 2305.14314, appendix E)."""
HIDDEN, LAYERS = 128, 4


@pytest.fixture(scope="module")
def library() -> None:
    pytest.importorskip("bitsandbytes")


def config(**changes: Any) -> Any:
    from transformers import Qwen2_5_VLTextConfig

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {**sizes, **heads, **special, "rope_parameters": rope, **changes}
    return Qwen2_5_VLTextConfig(**values)


def tiny_qwen(**changes: Any) -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    torch.manual_seed(0)
    model = Qwen2_5_VLTextModel(config(**changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin as zeros
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder in bfloat16."""
    path = tmp_path_factory.mktemp("qwen")
    tiny_qwen().bfloat16().save_pretrained(path)
    return path


def hidden(model: Any, device: torch.device = CPU) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS.to(device)).last_hidden_state.float().cpu()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def by_the_paper(layer: Nf4Linear) -> torch.Tensor:
    """The weight as two levels a byte, the first in the upper half, times the block's magnitude."""
    halves = torch.stack([layer.weight >> 4, layer.weight & 15], dim=-1).flatten(1).cpu()
    magnitudes = layer.absmax.cpu().repeat_interleave(64, dim=1)
    return LEVELS[halves.long()] * magnitudes


def with_weights_of(model: Any, folder: Path) -> Any:
    """The model with plain layers that have what the NF4 layers of ``model`` keep."""
    plain = load_qwen(folder, device=CPU, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Nf4Linear):
            plain.get_submodule(name).weight.data = by_the_paper(layer)
    return plain


def nf4_model(folder: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    with Nf4Reader(folder, dtype=dtype, quantise_on=device) as reader:
        return reader.load(device)


def test_it_computes_what_its_dequantised_weights_compute(library: None, folder: Path) -> None:
    found = nf4_model(folder)
    assert relative(hidden(found), hidden(with_weights_of(found, folder))) <= 1e-3


def test_hidden_states_point_where_those_of_full_precision_do(library: None, folder: Path) -> None:
    full = hidden(load_qwen(folder, device=CPU, dtype=torch.float32))
    found = hidden(nf4_model(folder))
    alike = nn.functional.cosine_similarity(found[0], full[0], dim=-1)
    assert alike.mean() >= 0.97
    assert not torch.equal(found, full)


def test_layers_matrices_are_quantised_and_nothing_else(library: None, folder: Path) -> None:
    plain = load_qwen(folder, device=CPU, dtype=torch.float32)
    found = nf4_model(folder)
    kinds = {name for name, layer in found.named_modules() if isinstance(layer, Nf4Linear)}
    assert kinds == {n for n, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    assert len(kinds) == 7 * LAYERS
    assert not any(name.startswith("embed") for name in kinds)
    others = dict(plain.state_dict())
    for name, tensor in found.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path in kinds and leaf != "bias":
            assert tensor.dtype == (torch.uint8 if leaf == "weight" else torch.float32)
        else:
            assert torch.equal(tensor, others[name])


def test_a_layer_of_no_whole_blocks_stays_as_it_is() -> None:
    model = tiny_qwen(intermediate_size=200)
    names = with_nf4_layers(model)
    assert isinstance(model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(model.layers[0].mlp.up_proj, Nf4Linear)
    assert len(names) == 6 * LAYERS
    with pytest.raises(ValueError, match="multiple of 64"):
        Nf4Linear(200, 64, bias=False, dtype=torch.float32)


def test_in_parts_a_weight_is_quantised_as_in_one(library: None, monkeypatch: Any) -> None:
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = quantised(weight)
    monkeypatch.setattr(text_nf4, "HOST_CHUNK", 1024)
    for part, one in zip(quantised(weight), whole, strict=True):
        assert torch.equal(part, one)
    assert whole[0].shape == (96, 160) and whole[1].shape == (96, 5)
    assert torch.equal(whole[1], weight.float().view(96, 5, 64).abs().amax(-1))
    assert HOST_CHUNK % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_floating_dtype_is_quantised(library: None, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).half()
    packed, absmax = quantised(weight.to(dtype))
    assert torch.equal(packed, quantised(weight)[0])
    assert torch.equal(absmax, quantised(weight)[1])


def streamed(reader: EncoderReader, device: torch.device) -> torch.Tensor:
    """Hidden states of a model whose layers go through two slots."""
    model = reader.model
    layouts = [BlockLayout.of(layer) for layer in model.layers]

    def fill(index: int, slab: torch.Tensor) -> None:
        views = layouts[index].views(slab)
        reader.read_into({f"layers.{index}.{name}": view for name, view in views.items()})

    source = PinnedSource(layouts, fill)
    rest = load_rest(reader)
    for name, tensor in rest.items():
        text_nf4.put_tensor(model, name, tensor.to(device))
    model.rotary_emb.to(device)
    with Streamer(model.layers, source, device=device) as streamer:
        found = [hidden(model, device) for _ in range(2)]
        assert streamer.traffic().loads >= 2 * LAYERS
    source.close()
    assert torch.equal(found[0], found[1])
    return found[0]


def load_rest(reader: EncoderReader) -> dict[str, torch.Tensor]:
    state = reader.model.state_dict()
    outside = {n: t for n, t in state.items() if not n.startswith("layers.")}
    filled = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in outside.items()}
    reader.read_into(filled)
    return filled


def test_streamed_it_gives_the_same_bits_as_resident(library: None, folder: Path) -> None:
    wanted = hidden(nf4_model(folder))
    with Nf4Reader(folder, dtype=torch.float32, quantise_on=CPU) as reader:
        assert torch.equal(streamed(reader, CPU), wanted)


def test_a_stored_weight_is_read_once_for_its_two_tensors(library: None, folder: Path) -> None:
    with Nf4Reader(folder, dtype=torch.float32, quantise_on=CPU) as reader:
        read: list[str] = []
        plain = reader._checkpoint.read
        reader._checkpoint.read = lambda name: read.append(name) or plain(name)  # type: ignore[method-assign]
        reader.load(CPU)
        assert len(read) == len(set(read)) == len(reader._checkpoint.tensors)
        read.clear()
        layout = BlockLayout.of(reader.model.layers[1])
        views = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8))
        reader.read_into({f"layers.1.{name}": view for name, view in views.items()})
        assert len(read) == len(set(read)) == 7 + 3 + 2


class RealBytes(LiveBytes):
    """Tensors of the meta device take none."""

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._add(storage)


def test_the_model_is_never_held_in_full_precision(library: None, tmp_path: Path) -> None:
    """Counted: beside what stays there is one stored tensor and what quantising a part of it takes."""
    model = tiny_qwen(hidden_size=256, intermediate_size=1024, num_hidden_layers=6).bfloat16()
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path)
    del model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_nf4, "HOST_CHUNK", 2**14)
        reader = Nf4Reader(tmp_path, dtype=torch.bfloat16, quantise_on=CPU)
        with reader, RealBytes(nn.Identity()) as live:
            loaded = reader.load(CPU)
    kept = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert kept < 0.4 * stored
    assert live.now_bytes >= kept
    assert live.peak_bytes <= kept + 2 * largest < 0.6 * stored


def test_the_plans_bytes_of_a_layer_are_those_of_the_real_shape() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    real = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    sections = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(config(**real, **heads, rope_parameters=sections))
    model = model.bfloat16()
    with_nf4_layers(model)
    found = sum(tensor.nbytes for tensor in model.layers[0].state_dict().values())
    assert found == QWEN_7B.layer_bytes("nf4") == 131_111_936
    plain = sum(p.numel() for p in model.layers[0].parameters())
    assert QWEN_7B.layer_bytes("nf4", 4) == found + 2 * plain


def test_any_other_format_is_read_as_before(folder: Path) -> None:
    with open_qwen(folder, dtype=torch.float32, weights="bf16", device=CPU) as reader:
        assert type(reader) is EncoderReader
        assert torch.equal(
            hidden(reader.load(CPU)), hidden(load_qwen(folder, device=CPU, dtype=torch.float32))
        )


# Whether it may be used


@pytest.fixture
def untested() -> Any:
    """Nothing is known of the library yet, and nothing is remembered."""
    kept = (nf4_problem, text_nf4._library, text_nf4._levels)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_the_library_passes_its_self_test_here(library: None) -> None:
    assert nf4_problem(CPU) is None


def test_without_the_library_what_to_install_is_said(untested: None, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert nf4_problem(CPU) == "bitsandbytes is not installed (pip install bitsandbytes)"


def test_a_library_that_cannot_be_imported_is_said_with_the_reason(
    untested: None, monkeypatch: Any
) -> None:
    def fail() -> None:
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(text_nf4, "_library", fail)
    problem = nf4_problem.__wrapped__(CPU)
    assert problem == "bitsandbytes cannot be imported (libcudart.so.13: cannot open)"


@pytest.mark.parametrize("wrong", ["product", "levels", "nan", "raises"])
def test_wrong_numbers_are_found_out(library: None, monkeypatch: Any, wrong: str) -> None:
    forward, plain = Nf4Linear.forward, quantised

    def broken(self: Nf4Linear, x: torch.Tensor) -> torch.Tensor:
        if wrong == "raises":
            raise RuntimeError("no kernel image is available")
        out = forward(self, x)
        return out * float("nan") if wrong == "nan" else 1.02 * out

    def coarse(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed, absmax = plain(weight)
        return packed, 1.1 * absmax

    if wrong == "levels":
        monkeypatch.setattr(text_nf4, "quantised", coarse)
    else:
        monkeypatch.setattr(Nf4Linear, "forward", broken)
    problem = nf4_problem.__wrapped__(CPU)
    said = "does not work on cpu (no kernel image" if wrong == "raises" else "wrong numbers on cpu"
    assert problem is not None and said in problem


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "CUDA error: out of memory"])
def test_memory_that_runs_out_is_no_verdict(library: None, untested: None, said: str) -> None:
    error = torch.OutOfMemoryError(said) if "Tried" in said else RuntimeError(said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_nf4, "quantised", lambda weight: (_ for _ in ()).throw(error))
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            nf4_problem(CPU)
    assert nf4_problem(CPU) is None  # the next call tries again


# On a GPU

GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_it_computes_what_its_dequantised_weights_compute(
    library: None, folder: Path, dtype: torch.dtype, most: float
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert nf4_problem(GPU) is None
    found = nf4_model(folder, GPU, dtype)
    reference = with_weights_of(found, folder)
    assert relative(hidden(found, GPU), hidden(reference)) <= most


@pytest.mark.gpu
def test_on_a_gpu_streamed_it_gives_the_same_bits_as_resident(library: None, folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    wanted = hidden(nf4_model(folder, GPU, torch.bfloat16), GPU)
    with Nf4Reader(folder, dtype=torch.bfloat16, quantise_on=GPU) as reader:
        assert torch.equal(streamed(reader, GPU), wanted)
