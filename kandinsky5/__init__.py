"""K1: Kandinsky 5.0 videos and images on consumer cards.

from kandinsky5 import generate, GenerationRequest
result = generate(GenerationRequest(prompt="a red circle moves right", seed=1, out="circle.mp4"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky5.events import EventSink, ignore
from kandinsky5.request import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from kandinsky5.output.autosave import StateKeeper

__version__ = "0.1.0"
__all__ = ["GenerationRequest", "GenerationResult", "__version__", "generate"]


def generate(
    request: GenerationRequest,
    *,
    emit: EventSink = ignore,
    should_stop: Callable[[], bool] = lambda: False,
    models_dirs: tuple[Path, ...] = (),
    states: StateKeeper | None = None,
) -> GenerationResult:
    """Make one picture or video in this process.

    Args:
        request: what to make; without ``out`` the file goes to the working directory under a name made of
            preset and seed.
        emit: gets the events of :mod:`kandinsky5.events` as they happen.
        should_stop: asked before every step; true ends the job with :class:`Stopped`.
        models_dirs: folders in which models are looked for.
        states: keeps the unfinished run on disk; None keeps nothing.

    Raises:
        UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`.
    """
    from kandinsky5.pipeline.pipeline import caching_pipeline  # torch is loaded here, not on import

    pipeline = caching_pipeline(models_dirs=models_dirs)
    return pipeline.run(request, emit=emit, should_stop=should_stop, states=states)
