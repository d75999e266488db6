"""What the conversion's benchmark promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kandinsky5.conversion.bench import conversion
from kandinsky5.errors import UserError
from kandinsky5.model.recipes import CHUNK_VALUES

MEGABYTE = 10**6


def measured(folder, **options):
    """In a fresh process: memory that earlier tests freed would be used again and not be seen to grow."""
    program = f"""
import json
from kandinsky5.conversion.bench import conversion
print(json.dumps(conversion(folder={str(folder)!r}, **{options!r})))
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return json.loads(told.stdout)


def test_memory_does_not_grow_with_the_file(tmp_path):
    numbers = measured(tmp_path, blocks=1)
    assert numbers["source_bytes"] > 300 * MEGABYTE
    assert numbers["size_bytes"] < 0.7 * numbers["source_bytes"]
    assert 0 < numbers["extra_rss_bytes"] <= 10 * 4 * CHUNK_VALUES  # far from what lies in the file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_four_gigabytes_are_converted_within_600_megabytes(tmp_path):
    """In fp32, of which 4 GB are half as many numbers to round; their zeros need not be written first."""
    numbers = measured(tmp_path, blocks=16, dtype="fp32", holes=True)
    assert numbers["source_bytes"] > 4000 * MEGABYTE
    assert numbers["size_bytes"] > 1000 * MEGABYTE  # written, every byte
    assert 0 < numbers["extra_rss_bytes"] <= 600 * MEGABYTE


def test_a_checkpoint_without_blocks_is_refused():
    with pytest.raises(UserError, match="1 to 512"):
        conversion(blocks=0)
    with pytest.raises(UserError, match="one of bf16, fp32"):
        conversion(dtype="int4")
