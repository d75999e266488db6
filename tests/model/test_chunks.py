"""Sequences in parts: where they are cut, how parts are laid together, what is overwritten."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from kandinsky5.model.chunks import ActivationChunks, joined, renewed, spans


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (7, None, [(0, 7)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (2, 5, [(0, 2)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_spans_cover_the_length_once(
    length: int, size: int | None, expected: list[tuple[int, int]]
) -> None:
    with torch.no_grad():
        assert [(span.start, span.stop) for span in spans(length, size)] == expected
    assert list(spans(length, size)) == [slice(0, length)], "one span while gradients are recorded"


def test_parts_are_laid_side_by_side() -> None:
    whole, other = torch.randn(2, 7, 3), torch.randn(7, 4).half()
    with torch.no_grad():
        parts = ((whole[:, s], other[s].unsqueeze(0).expand(2, -1, -1)) for s in spans(7, 3))
        first, second = joined(parts, 7, dim=1)
    assert torch.equal(first, whole)
    assert second.dtype == torch.half and torch.equal(second[1], other)


def test_one_part_is_handed_on_without_a_copy() -> None:
    part = torch.randn(5, 2)
    (result,) = joined(iter([(part,)]), 5, dim=0)
    assert result is part


def test_a_part_is_gone_before_the_next_is_made() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[tuple[torch.Tensor]]:
        for _ in range(3):
            assert all(part() is None for part in made)
            part = torch.zeros(2, 4)
            made.append(weakref.ref(part))
            given = (part,)
            del part
            yield given
            del given

    assert joined(parts(), 6, dim=0)[0].shape == (6, 4)


def test_renewing_overwrites_without_gradients_and_makes_anew_with_them() -> None:
    x = torch.arange(10.0).view(5, 2)
    kept = x.clone()
    addend = torch.randn(5, 2)
    new = renewed(x, 2, lambda part, where: part * 2 + addend[where])
    assert torch.equal(x, kept) and torch.equal(new, kept * 2 + addend)
    with torch.no_grad():
        assert renewed(x, 2, lambda part, where: part * 2 + addend[where]) is x
    assert torch.equal(x, new)


@pytest.mark.parametrize("given", [{"tokens": 0}, {"heads": -1}])
def test_chunks_below_one_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ActivationChunks(**given)
