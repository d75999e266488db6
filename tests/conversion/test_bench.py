"""What the conversion's benchmark promises."""

from __future__ import annotations

import pytest

from kandinsky5.conversion.bench import conversion
from kandinsky5.errors import UserError
from kandinsky5.model.recipes import CHUNK_VALUES

MEGABYTE = 10**6


def test_memory_does_not_grow_with_the_file(tmp_path):
    numbers = conversion(blocks=1, folder=str(tmp_path))
    assert numbers["source_bytes"] > 300 * MEGABYTE
    assert numbers["size_bytes"] < 0.7 * numbers["source_bytes"]
    assert 0 < numbers["extra_rss_bytes"] <= 10 * 4 * CHUNK_VALUES  # far from what lies in the file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_four_gigabytes_are_converted_within_600_megabytes(tmp_path):
    numbers = conversion(blocks=32, folder=str(tmp_path))
    assert numbers["source_bytes"] > 4000 * MEGABYTE
    assert 0 < numbers["extra_rss_bytes"] <= 600 * MEGABYTE


def test_a_checkpoint_without_blocks_is_refused():
    with pytest.raises(UserError, match="1 to 512"):
        conversion(blocks=0)
