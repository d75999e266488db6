"""Make the demo model's text parts: small tokenizers and tiny frozen random encoders.

    python tools/demo_text.py --out DIR

Nothing here is trained but the tokenizers. Random encoders tell words apart, and that is all the demo's
transformer needs: it learns what the vectors mean. Everything follows from the captions and the seed,
byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kandinsky5.demo.scenes import describe, random_scene

QWEN_MERGES = 900
CLIP_MERGES = 660
CAPTIONS = 20_000

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CLIP_GAINS = {"v_proj": 3.0, "out_proj": 3.0, "mlp": 0.5, "position_embedding": 0.02}
"""With these a linear read-out of the pooled vector names colour, shape and direction of 99 captions in
100, of 85 with all ones: the end token listens to the words more than to itself and to their places."""
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"

COMMON_WORDS = """
the of and to in is that it was for on are with as at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other
about out many then them these so some her would make like him into time has look two more write
go see number no way could people my than first water been call who its now find long down day did
get come made may part video image picture scene camera shows slow slowly fast quickly small large
big tiny bright black orange pink grey brown shape shapes background foreground wall floor sky
light dark clean smooth sharp blurry still static noise artifacts bad low quality ugly rolls
bounces floats drifts toward towards across over under left right upward downward center middle
side top bottom appears stays against plain colour color coloured colored moving object
"""


def build(folder: Path, captions: Iterable[str], seed: int) -> None:
    """Write ``tokenizer``, ``tokenizer_2``, ``text_encoder`` and ``text_encoder_2`` into a folder.

    Args:
        folder: made if need be; what is there under these names is replaced.
        captions: texts whose words should become single tokens.
        seed: of the encoders' weights.
    """
    texts = [
        *captions,
        *itertools.chain.from_iterable((word, f"a {word}") for word in COMMON_WORDS.split() * 3),
    ]
    qwen_ids = _write_qwen_tokenizer(folder / "tokenizer", texts)
    clip_ids = _write_clip_tokenizer(folder / "tokenizer_2", texts)
    _write_qwen(folder / "text_encoder", qwen_ids, seed)
    _write_clip(folder / "text_encoder_2", clip_ids, seed)


def _learned_merges(
    donor: Any, texts: Iterable[str], count: int, suffix: str
) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding learns when words are split as ``donor`` splits them."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    if donor.backend_tokenizer.normalizer is not None:
        learner.normalizer = donor.backend_tokenizer.normalizer
    learner.pre_tokenizer = donor.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Ties between merges are broken by token id: every single-letter token gets its id before training.
    ends = [f"{letter}{suffix}" for letter in alphabet] if suffix else []
    trainer = trainers.BpeTrainer(
        vocab_size=count + len(alphabet) + len(ends),
        initial_alphabet=alphabet,
        special_tokens=ends,
        show_progress=False,
        end_of_word_suffix=suffix,
    )
    learner.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]][:count]


def _vocabulary(
    merges: list[tuple[str, str]], suffix: str, special: Iterable[str]
) -> dict[str, int]:
    """Every byte, every byte at a word's end, what the merges make, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}{suffix}" for letter in alphabet] if suffix else []
    words = [*alphabet, *ends, *("".join(merge) for merge in merges), *special]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def _write_tokenizer(
    folder: Path,
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    config: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def _write_qwen_tokenizer(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Token ids by token; the special ones follow the vocabulary, as in the real tokenizer."""
    donor = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[])
    merges = _learned_merges(donor, texts, QWEN_MERGES, "")
    vocabulary = _vocabulary(merges, "", ())
    special = {token: len(vocabulary) + index for index, token in enumerate(QWEN_SPECIAL)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): _added_token(token) for token, index in special.items()
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 1024,
    }
    _write_tokenizer(folder, vocabulary, merges, config)
    return {**vocabulary, **special}


def _write_clip_tokenizer(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Token ids by token."""
    donor = CLIPTokenizer()
    merges = _learned_merges(donor, texts, CLIP_MERGES, "</w>")
    vocabulary = _vocabulary(merges, "</w>", (CLIP_START, CLIP_END))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(vocabulary[token]): _added_token(token) for token in (CLIP_START, CLIP_END)
        },
        "bos_token": CLIP_START,
        "do_lower_case": True,
        "eos_token": CLIP_END,
        "pad_token": CLIP_END,
        "unk_token": CLIP_END,
        "model_max_length": 77,
    }
    _write_tokenizer(folder, vocabulary, merges, config)
    return vocabulary


def _added_token(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _write_qwen(folder: Path, ids: Mapping[str, int], seed: int) -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "float16",
        "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": _rounded(len(ids)),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0],
        },
    }
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).state_dict()
    published = {
        name.replace("model.language_model.", "model.").replace(
            "model.visual.", "visual."
        ): tensor.shape
        for name, tensor in shapes.items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    _write_encoder(folder, config, _random_weights(published, {}, seed))


def _write_clip(folder: Path, ids: Mapping[str, int], seed: int) -> None:
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float16",
        "vocab_size": _rounded(len(ids)),
        "hidden_size": 64,
        "intermediate_size": 128,
        "projection_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": ids[CLIP_START],
        "eos_token_id": ids[CLIP_END],
        "pad_token_id": ids[CLIP_END],
    }
    with torch.device("meta"):
        shapes = CLIPTextModel(CLIPTextConfig(**config)).state_dict()
    published = {
        f"text_model.{name.removeprefix('text_model.')}": t.shape for name, t in shapes.items()
    }
    weights = _random_weights(published, CLIP_GAINS, seed)
    weights["text_model.embeddings.token_embedding.weight"][ids[CLIP_END]] *= 0.1
    _write_encoder(folder, config, weights)


def _random_weights(
    shapes: Mapping[str, torch.Size], gains: Mapping[str, float], seed: int
) -> dict[str, torch.Tensor]:
    """float32 weights: embeddings with spread 1, matrices 1/√inputs, norms 1, biases 0.

    ``gains`` multiply the weights whose names contain their key.
    """
    weights = {}
    for name, shape in sorted(shapes.items()):
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(48))
        if len(shape) == 1:
            weights[name] = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
            continue
        spread = 1.0 if "embed" in name else 1.0 / math.sqrt(math.prod(shape[1:]))
        gain = math.prod(gain for part, gain in gains.items() if part in name)
        weights[name] = torch.randn(shape, generator=generator) * spread * gain
    return weights


def _write_encoder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    halves = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _rounded(count: int) -> int:
    """Up to the next multiple of 64."""
    return -(-count // 64) * 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the four parts")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(f"{args.seed}/tokenizer")
    build(args.out, (describe(random_scene(rng), rng) for _ in range(CAPTIONS)), args.seed)


if __name__ == "__main__":
    main()
