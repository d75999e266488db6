"""Long token sequences a part at a time, so that little of what lies between two layers exists at once.

Everything is written for parts; one part that is the whole is the plain way. While gradients are recorded
there is one part and nothing is overwritten, because the backward pass needs the old values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ActivationChunks:
    """How much of a visual block is in flight at once; None is all of it.

    Attributes:
        tokens: visual tokens that go through norms, projections and feed-forward together, ≥ 1. Smaller
            costs time only where the matrix products become too small for the device (below ~1,000).
        heads: heads of self-attention whose queries, keys and values exist together, ≥ 1. Each further
            group normalises (and quantises) the tokens once more.

    Raises:
        ValueError: a number below 1.
    """

    tokens: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"chunks of {size} {name}: at least 1 is needed, or None for all")


WHOLE = ActivationChunks()


def spans(length: int, size: int | None) -> Iterator[slice]:
    """Consecutive slices of 0 … length of at most ``size`` (None: one), the last one perhaps shorter."""
    if size is None or torch.is_grad_enabled():
        size = length
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def part_of(x: torch.Tensor, span: slice, dim: int) -> torch.Tensor:
    """The span of x along ``dim``, sharing its memory."""
    return x.narrow(dim, span.start, span.stop - span.start)


def joined(
    parts: Iterable[tuple[torch.Tensor, ...]], length: int, dim: int
) -> tuple[torch.Tensor, ...]:
    """Tensors that come in consecutive parts along ``dim``, each laid in its place as it comes.

    A part that is the whole is handed on as it is: without chunks nothing is copied.

    Args:
        parts: tuples of as many tensors as the result; those of one tuple are equally long along ``dim``.
        length: what the parts add up to.
    """
    wholes: tuple[torch.Tensor, ...] = ()
    start = 0
    for part in parts:
        size = part[0].shape[dim]
        if size == length:
            return part
        wholes = wholes or tuple(_resized(tensor, dim, length) for tensor in part)
        for i, whole in enumerate(wholes):
            whole.narrow(dim, start, size).copy_(part[i])
        start += size
        del part  # not kept while the next one is made
    return wholes


def renewed(
    x: torch.Tensor, size: int | None, function: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    """``function(part, where)`` for every part of the tokens of x, written over it.

    Args:
        x: [..., S, D]; overwritten and returned, unless gradients are recorded: then x stays and the
            result is new.
        size: tokens per part, or None.
        function: takes [..., n, D] and the slice of tokens that it is, gives the same shape and dtype.
    """
    if torch.is_grad_enabled():
        return function(x, slice(0, x.shape[-2]))
    for where in spans(x.shape[-2], size):
        part = part_of(x, where, dim=-2)
        part.copy_(function(part, where))
    return x


def _resized(like: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    shape = list(like.shape)
    shape[dim] = length
    return like.new_empty(shape)
