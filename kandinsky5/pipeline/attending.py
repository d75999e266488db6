"""How a job's transformer attends: which engine, and whether to all tokens or to NABLA's choice of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from kandinsky5.errors import UserError
from kandinsky5.model.attention import AttentionEngine, NablaParams, sdpa
from kandinsky5.model.engines import choose_engine, nabla_problem
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, nabla_of

NABLA_FIELDS = ("nabla_p", "nabla_wt", "nabla_wh", "nabla_ww")


@dataclass(frozen=True)
class Attending:
    """What attention is computed with.

    Attributes:
        name: of the engine.
        engine: of the text, and of the visual tokens unless ``sparse``.
        sparse: NABLA for the visual tokens, or None for full attention.
        notices: what the user should know of it.
    """

    name: str = "sdpa"
    engine: AttentionEngine = sdpa
    sparse: NablaParams | None = None
    notices: tuple[str, ...] = ()

    def planned(self, request: GenerationRequest) -> GenerationRequest:
        """The request for its memory plan, which is to know of full attention in NABLA's place."""
        if self.sparse is None and nabla_of(request) is not None:
            return replace(request, attention="sdpa")
        return request


def attending_of(
    request: GenerationRequest, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Attending:
    """What this request is to be computed with on this machine.

    Raises:
        UserError: what was asked for by name cannot be used here.
    """
    notices = []
    settings, preset = nabla_of(request), PRESETS[request.preset]
    sparse = None if settings is None else NablaParams(**asdict(settings))
    problem = None if sparse is None else nabla_problem(device, dtype, head_dim)
    if problem is not None:
        if request.attention == "nabla":
            raise UserError("attention", "nabla", f"{problem}; choose sdpa, which is slower")
        notices.append(f"sparse attention (NABLA) is not used: {problem}; full attention is slower")
        sparse = None
    elif sparse is None:
        if preset.nabla is not None:
            notices.append(
                f"{preset.name} was made for sparse attention (NABLA): full attention is slower;"
                " attention auto or nabla takes it"
            )
        given = [name for name in NABLA_FIELDS if getattr(request, name) is not None]
        if given:
            notices.append(f"{', '.join(given)}: without effect, attention is not nabla")
    name, engine = choose_engine(request.attention, device=device, dtype=dtype, head_dim=head_dim)
    return Attending(name, engine, sparse, tuple(notices))
