"""What a VAE alone can decode: kept latents, and the saved state of a run behind its last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kandinsky5.errors import UserError
from kandinsky5.output.run_state import RunState, describe_run_state, load_run_state
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.model_inputs import FirstFrame
from kandinsky5.presets import PRESETS


def read_decodable(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Final latents [T, H, W, C] float32 on the CPU, and their request, empty where none is told.

    Raises:
        UserError: field ``file``: neither latents nor a state, one that cannot be trusted, or a state with
            steps left.
    """
    try:
        return load_latents(path, field="file")
    except UserError as error:
        no_latents = error
    try:
        summary = describe_run_state(path)
    except UserError:
        raise no_latents from None
    if summary.step < summary.total:
        left = f"{summary.total - summary.step} of {summary.total} steps left"
        raise UserError("file", str(path), f"a run with {left}: resume it (k1.py resume)")
    state = load_run_state(path)
    return _final(state), state.written_to(None).request.to_dict()


def _final(state: RunState) -> torch.Tensor:
    """The state's latent as :meth:`ModelInputs.finished` leaves it; only a video's first frame changes it."""
    is_video = PRESETS[state.request.preset].is_video
    if state.first_frame is None or not is_video:
        return state.latent
    return FirstFrame(state.first_frame).finished(state.latent)
