"""How a job's transformer attends: which engine, and whether to all tokens or to NABLA's choice of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kandinsky5.errors import UserError
from kandinsky5.model.attention import AttentionEngine, NablaParams, sdpa
from kandinsky5.model.engines import KINDS, choose_engine, nabla_problem
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

    @property
    def facts(self) -> dict[str, Any]:
        """What of it decides the bits of the result and the request does not say; JSON-ready."""
        return {"engine": self.name, "nabla": self.sparse is not None}

    def planned(self, request: GenerationRequest) -> GenerationRequest:
        """The request for its memory plan, which is to know of full attention in NABLA's place."""
        if self.sparse is None and nabla_of(request) is not None:
            return replace(request, attention="sdpa")
        return request


def attending_of(
    request: GenerationRequest,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    before: Mapping[str, Any] | None = None,
) -> Attending:
    """What this request is to be computed with on this machine.

    Args:
        before: what a run that is gone on with was begun with, as :attr:`Attending.facts` gave it: the same
            is taken again where it is to be had, and it is said where not. Anything else that stands in a
            file counts as nothing.

    Raises:
        UserError: what was asked for by name cannot be used here.
    """
    begun = {} if before is None else before
    sparse, notices = _sparse_of(request, begun.get("nabla"), device, dtype, head_dim)
    name = request.attention
    if name in ("auto", "nabla") and begun.get("engine") in ("sdpa", *KINDS):
        name = begun["engine"]
    try:
        name, engine = choose_engine(name, device=device, dtype=dtype, head_dim=head_dim)
    except UserError as error:
        if name == request.attention:
            raise
        wanted, why = name, error.allowed.partition(";")[0]
        name, engine = choose_engine("auto", device=device, dtype=dtype, head_dim=head_dim)
        notices.append(
            f"this run was begun with attention {wanted} and goes on with {name} ({why}):"
            " not to the bit what it would have become"
        )
    return Attending(name, engine, sparse, tuple(notices))


def _sparse_of(
    request: GenerationRequest,
    begun_sparse: object,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> tuple[NablaParams | None, list[str]]:
    """NABLA's settings or None for full attention, and what there is to be said of it.

    Args:
        begun_sparse: whether a run that is gone on with had NABLA; None where there is none.
    """
    settings, preset = nabla_of(request), PRESETS[request.preset]
    if settings is not None:
        if begun_sparse is False and request.attention != "nabla":
            return None, ["full attention, as this run was begun, not NABLA"]
        problem = nabla_problem(device, dtype, head_dim)
        if problem is None:
            return NablaParams(**asdict(settings)), []
        if request.attention == "nabla":
            raise UserError("attention", "nabla", f"{problem}; choose sdpa, which is slower")
        return None, [
            f"sparse attention (NABLA) is not used: {problem}; full attention is slower"
            + (", and not what this run was begun with" if begun_sparse is True else "")
        ]
    notices = []
    if preset.nabla is not None:
        notices.append(
            f"{preset.name} was made for sparse attention (NABLA): full attention is slower;"
            " attention auto or nabla takes it"
        )
    given = [name for name in NABLA_FIELDS if getattr(request, name) is not None]
    if given:
        notices.append(f"{', '.join(given)}: without effect, attention is not nabla")
    return None, notices
