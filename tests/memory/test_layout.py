"""A block's tensors lie aligned in one slab, and resident blocks lie evenly among the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kandinsky5.memory.layout import ALIGNMENT_BYTES, BlockLayout, spread
from tests.memory.streaming_models import Block, fill_from, stack


def test_every_saved_tensor_has_its_aligned_place_and_none_overlaps() -> None:
    with torch.device("meta"):
        block = Block(6, 5)
    layout = BlockLayout.of(block)
    assert [entry.name for entry in layout.entries] == list(block.state_dict())
    assert all(entry.offset % ALIGNMENT_BYTES == 0 for entry in layout.entries)
    ends = [entry.offset + entry.nbytes for entry in layout.entries]
    starts = [entry.offset for entry in layout.entries[1:]] + [layout.nbytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert layout.nbytes % ALIGNMENT_BYTES == 0
    assert layout.tensor_bytes == sum(
        t.numel() * t.element_size() for t in block.state_dict().values()
    )


def test_views_show_what_was_written_under_the_right_names() -> None:
    blocks = stack((5,))
    layout = BlockLayout.of(blocks[0])
    slab = torch.full((layout.nbytes + 100,), 255, dtype=torch.uint8)
    fill_from(blocks, [layout])(0, slab)
    for name, view in layout.views(slab).items():
        assert torch.equal(view, blocks[0].state_dict()[name])
        assert view.untyped_storage().data_ptr() == slab.data_ptr()


def test_left_out_submodules_have_no_place() -> None:
    names = [
        entry.name for entry in BlockLayout.of(stack((5,))[0], ("modulation", "norm.bias")).entries
    ]
    assert not [name for name in names if name.startswith("modulation")]
    assert "norm.weight" in names and "norm.bias" not in names


def test_a_name_is_left_out_only_as_a_whole() -> None:
    block = nn.ModuleDict({"inner": nn.Linear(2, 2), "inner_too": nn.Linear(2, 2)})
    assert len(BlockLayout.of(block, ("inner",)).entries) == 2


def test_blocks_that_are_alike_have_equal_layouts() -> None:
    one, other, third = (BlockLayout.of(block) for block in stack((5, 5, 6)))
    assert one == other != third
    assert hash(one) == hash(other)


@given(st.integers(1, 70), st.data())
def test_resident_blocks_leave_gaps_that_differ_by_one_at_most(blocks: int, data) -> None:
    count = data.draw(st.integers(1, blocks))
    indices = spread(count, blocks)
    assert len(set(indices)) == count and indices[0] == 0 and indices[-1] < blocks
    following = [*indices[1:], indices[0] + blocks]  # round and round
    gaps = {after - before for before, after in zip(indices, following, strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_no_resident_block_is_a_number_too() -> None:
    assert spread(0, 5) == ()


@pytest.mark.parametrize("count", [-1, 6])
def test_more_resident_blocks_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="0 to 5"):
        spread(count, 5)
