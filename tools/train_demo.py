"""Train the built-in demo model: a video VAE, then a diffusion transformer, on shapes drawn here.

    python tools/train_demo.py --work DIR                    # train what is missing, then export
    python tools/train_demo.py --work DIR --export FOLDER    # elsewhere than kandinsky5/demo/model
    python tools/train_demo.py --work DIR --start FOLDER     # train an exported model's transformer on

Everything is drawn from --seed. Killed at any moment, the same command goes on from the last saved state.
Uses a GPU when there is one; about two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_dit import DIT, DIT_CONFIG, DIT_CONTINUED, train_dit
from demo_run import FRAMES, SIZE_PX
from demo_text import build as build_text
from demo_vae import VAE_CONFIG, psnr, trained_vae, video_tensor

from kandinsky5.demo.scenes import describe, random_scene, render
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.loading import load_transformer, load_video_vae
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import DEMO_FOLDER

log = logging.getLogger("train_demo")

TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TOKENIZER_CAPTIONS = 20_000


def check_vae(vae: VideoVAE, device: str) -> None:
    """Log how well unseen clips come back."""
    rng = random.Random("unseen clips")
    scores = []
    with torch.inference_mode():
        for _ in range(12):
            truth = video_tensor(np.stack([render(random_scene(rng), FRAMES, SIZE_PX)]), device)
            scores.append(psnr(vae.decode(vae.encode(truth)[0]), truth))
    log.info("VAE: mean %.1f dB, worst %.1f dB", sum(scores) / len(scores), min(scores))


def prepare_text(work: Path, seed: int) -> None:
    """Text towers and tokenizers, made once."""
    if all((work / name).is_dir() for name in TEXT_FOLDERS):
        return
    rng = random.Random(f"{seed}/tokenizer")
    build_text(work, (describe(random_scene(rng), rng) for _ in range(TOKENIZER_CAPTIONS)), seed)


def export(
    target: Path, work: Path, dit: DiffusionTransformer3D, vae: VideoVAE, scale: float
) -> None:
    """Write the whole model in the layout of a -Diffusers folder, weights in float16."""
    vae_config = dataclasses.replace(VAE_CONFIG, scaling_factor=scale)
    parts: dict[str, tuple[torch.nn.Module, str, DiTConfig | VideoVAEConfig]] = {
        "transformer": (dit, "Kandinsky5Transformer3DModel", DIT_CONFIG),
        "vae": (vae, "AutoencoderKLHunyuanVideo", vae_config),
    }
    for name, (model, class_name, config) in parts.items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        described = {"_class_name": class_name, **dataclasses.asdict(config)}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        tensors = {
            key: value.half().cpu().contiguous() for key, value in model.state_dict().items()
        }
        path = folder / "diffusion_pytorch_model.safetensors"
        save_file(tensors, path, metadata={"format": "pt", "k1_model": "demo"})
    for name in TEXT_FOLDERS:
        shutil.copytree(work / name, target / name, dirs_exist_ok=True)
    index = {
        "_class_name": "Kandinsky5T2VPipeline",
        "transformer": ["diffusers", "Kandinsky5Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    log.info("exported to %s, %.1f MB", target, size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the saved states")
    parser.add_argument("--export", type=Path, default=DEMO_FOLDER, help="folder for the model")
    parser.add_argument("--start", type=Path, help="exported model to go on from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if args.start is None:
        stage = DIT
        vae = trained_vae(args.work, device, args.seed)
        prepare_text(args.work, args.seed)
        torch.manual_seed(args.seed)
        dit = DiffusionTransformer3D(DIT_CONFIG).to(device)
    else:
        stage = DIT_CONTINUED
        target = torch.device(device)
        vae = load_video_vae(args.start / "vae", device=target, dtype=torch.float32)
        for name in TEXT_FOLDERS:
            shutil.copytree(args.start / name, args.work / name, dirs_exist_ok=True)
        dit = load_transformer(args.start / "transformer", device=target, dtype=torch.float32)
        dit.requires_grad_(True)
    check_vae(vae, device)
    dit, scale = train_dit(stage, dit, vae, args.work, args.seed)
    export(args.export, args.work, dit, vae, scale)


if __name__ == "__main__":
    main()
