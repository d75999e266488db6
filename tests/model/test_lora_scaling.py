"""Alpha and rank by PEFT's patterns: each layer's own, against numbers worked out without patterns."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kandinsky5.errors import CheckpointError
from kandinsky5.model.lora import layer_sizes
from kandinsky5.model.lora_file import LoraFile, open_lora
from tests.model.test_lora import beside, merged, model, refused, worst
from tests.support import loras
from tests.support.tiny_transformer import run

ALPHA, RANK = 6.0, 3
LAYERS = (
    "visual_transformer_blocks.0.self_attention.to_query",
    "visual_transformer_blocks.0.cross_attention.to_query",
    "visual_transformer_blocks.1.feed_forward.in_layer",
    "text_transformer_blocks.0.self_attention.out_layer",
)
QUERY, CROSS, FORWARD, TEXT = LAYERS


def pairs_of(ranks: dict[str, int]) -> loras.Pairs:
    sizes = layer_sizes(model())
    made: loras.Pairs = {}
    for seed, layer in enumerate(LAYERS):
        made |= loras.random_pairs({layer: sizes[layer]}, ranks.get(layer, RANK), seed)
    return made


def written(folder: Path, pairs: loras.Pairs, **config: Any) -> Path:
    """As PEFT writes a LoRA, with these entries in its configuration."""
    path = loras.save_peft(folder / "lora.safetensors", pairs, alpha=ALPHA)
    beside_it = path.with_name("adapter_config.json")
    values = {**json.loads(beside_it.read_text()), "r": RANK, **config}
    beside_it.write_text(json.dumps(values))
    return path


def scales(path: Path, pairs: loras.Pairs) -> dict[str, float]:
    """What each layer's product comes out multiplied by."""
    opened: LoraFile = open_lora(path, layer_sizes(model()))
    return {layer: round(float((up / pairs[layer][1]).mean()), 4) for layer, _, up in opened.read()}


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ({"to_query": 12}, {QUERY, CROSS}),
        ({"self_attention.to_query": 12}, {QUERY}),
        ({QUERY: 12}, {QUERY}),
        ({"query": 12}, set()),  # a name begins at a dot
        ({"to_query.*": 12}, {QUERY, CROSS}),
        ({r".*\.(to_query|in_layer)": 12}, {QUERY, CROSS, FORWARD}),
        ({r"visual_transformer_blocks\.\d+\..*": 12}, {QUERY, CROSS, FORWARD}),
        ({"visual_transformer_blocks": 12}, set()),  # to the end of a name
        ({"^visual_transformer_blocks.0.self_attention.to_query": 12}, {QUERY}),
        ({"^self_attention.to_query": 12}, set()),
        ({"nowhere": 12}, set()),
        ({}, set()),
    ],
    # A set is told by its size: its order differs from process to process, and so would the names.
    ids=lambda value: str(len(value) if isinstance(value, set) else value),
)
def test_a_key_fits_names_as_peft_fits_them(tmp_path, pattern, fits) -> None:
    pairs = pairs_of({})
    found = scales(written(tmp_path, pairs, alpha_pattern=pattern), pairs)
    assert found == {layer: (12 if layer in fits else ALPHA) / RANK for layer in LAYERS}


def test_of_several_keys_that_fit_the_first_counts(tmp_path) -> None:
    pairs = pairs_of({})
    both = {"self_attention.to_query": 9, "to_query": 12}
    found = scales(written(tmp_path, pairs, alpha_pattern=both), pairs)
    assert (found[QUERY], found[CROSS]) == (3.0, 4.0)
    turned = dict(reversed(both.items()))
    found = scales(written(tmp_path, pairs, alpha_pattern=turned), pairs)
    assert (found[QUERY], found[CROSS]) == (4.0, 4.0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_layers_with_ranks_and_alphas_of_their_own_equal_merged_weights(
    tmp_path, use_rslora
) -> None:
    """The deltas are worked out by hand, in float64, from the four layers' own numbers."""
    ranks = {QUERY: 5, CROSS: 5, FORWARD: 2, TEXT: RANK}
    alphas = {QUERY: 10.0, CROSS: ALPHA, FORWARD: 8.0, TEXT: ALPHA}
    pairs = pairs_of(ranks)
    path = written(
        tmp_path,
        pairs,
        use_rslora=use_rslora,
        rank_pattern={"to_query": 5, "in_layer": 2},
        alpha_pattern={"self_attention.to_query": 10, r"visual_\w+_blocks\.1\..*": 8},
    )
    expected = model()
    for layer, (down, up) in pairs.items():
        divisor = math.sqrt(ranks[layer]) if use_rslora else ranks[layer]
        delta = alphas[layer] / divisor * (up.double() @ down.double())
        expected.get_submodule(layer).weight += delta.float()  # type: ignore[operator]
    assert worst(run(beside((path, 1.0))), run(expected)) <= 1e-5
    assert worst(run(merged(pairs, ALPHA / RANK)), run(expected)) > 1e-3


def test_diffusers_writes_them_into_the_header(tmp_path) -> None:
    pairs, path = pairs_of({}), tmp_path / "lora.safetensors"
    loras.save_diffusers(path, pairs)
    stated = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"to_query": 12}}
    config = {f"transformer.{key}": value for key, value in stated.items()}
    tensors = {
        f"transformer.{layer}.lora_{role}.weight": tensor
        for layer, pair in pairs.items()
        for role, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    found = scales(path, pairs)
    assert (found[QUERY], found[TEXT]) == (4.0, 2.0)


def test_names_inside_what_was_trained_fit_too(tmp_path) -> None:
    """The transformer as a part of a larger module, and a key from that module's beginning."""
    pairs = pairs_of({})
    path = written(tmp_path, {f"transformer.{k}": v for k, v in pairs.items()})
    config = path.with_name("adapter_config.json")
    values = {**json.loads(config.read_text()), "alpha_pattern": {f"^transformer.{QUERY}": 12}}
    config.write_text(json.dumps(values))
    found = scales(path, pairs)
    assert (found[QUERY], found[CROSS]) == (4.0, 2.0)


def test_an_alpha_among_the_tensors_counts_before_any_pattern(tmp_path) -> None:
    pairs = pairs_of({})
    path = loras.save_kohya(tmp_path / "lora.safetensors", pairs, alpha=9)
    stated = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"to_query": 12}}
    path.with_name("adapter_config.json").write_text(json.dumps(stated))
    assert set(scales(path, pairs).values()) == {3.0}


def test_a_rank_that_the_tensors_do_not_have_is_refused(tmp_path) -> None:
    path = written(tmp_path, pairs_of({}), rank_pattern={"to_query": 8})
    assert re.search("has rank 3, .* rank_pattern says 8", refused(path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"alpha_pattern": {"to_(query": 2}}, "no regular expression"),
        ({"alpha_pattern": {"(.*)*x": 2}}, "too involved"),
        ({"alpha_pattern": {"(a|a)(a|a)(a|a)(a|a)x": 2}}, "too involved"),
        ({"rank_pattern": {"a?" * 30: 2}}, "too involved"),
        ({"alpha_pattern": {"a" * 400: 2}}, "too involved"),
        ({"alpha_pattern": {"to_query": "8"}}, "no number for 'to_query'"),
        ({"alpha_pattern": {"to_query": True}}, "no number"),
        ({"rank_pattern": {"to_query": [True, False]}}, "no number"),
        ({"alpha_pattern": ["to_query"]}, "no table"),
    ],
    ids=str,
)
def test_patterns_that_cannot_be_followed_are_refused_in_one_line(tmp_path, config, says) -> None:
    said = refused(written(tmp_path, pairs_of({}), **config))
    assert says in said and "\n" not in said


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_a_dora_is_refused_whatever_its_configuration_says(tmp_path, name) -> None:
    pairs = pairs_of({})
    path = written(tmp_path, pairs, use_dora=True)
    assert scales(path, pairs)[QUERY] == ALPHA / RANK  # said, but nothing of one is there
    magnitude = {f"base_model.model.{QUERY}.{name}": torch.ones(64)}
    save_file({"a.lora_A.weight": torch.zeros(1), **magnitude}, path)
    with pytest.raises(CheckpointError, match="a DoRA, which this program does not run"):
        open_lora(path, layer_sizes(model()))
