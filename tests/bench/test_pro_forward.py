"""True shapes from the disk: every byte once a step, and main memory that the blocks do not fill (A10)."""

from __future__ import annotations

import pytest

from kandinsky5.bench.pro_forward import RING, SLOTS, pro_forward
from kandinsky5.bench.random_file import FREE_BYTES
from kandinsky5.errors import UserError
from kandinsky5.output.atomic import free_bytes

BLOCKS = 2 * (SLOTS + RING)
"""Of Lite: a file of 0.6 GB, of which no more than half the blocks may be in main memory at once."""
WORKING_BYTES = 100_000_000
PREPARE_BYTES = 600_000_000
FILE_BYTES = 700_000_000


def test_a_guided_step_reads_each_byte_once_and_holds_as_many_blocks_as_slots_and_ring(
    tmp_path,
) -> None:
    if free_bytes(tmp_path) < FILE_BYTES + FREE_BYTES:
        pytest.skip("no room on the disk for a file of 0.6 GB")
    found = pro_forward(model="lite", blocks=BLOCKS, text_blocks=1, folder=str(tmp_path))
    assert found["reached"] == {"A10": None}  # that is the whole of Pro, 22 GB
    assert found["finite"] and found["each_byte_once"]
    assert list(tmp_path.iterdir()) == []

    # Two slots and two slabs of the ring hold blocks, however many there are: so for Pro's 60 blocks of
    # 270 MB the loop takes 1.08 GB and as much beside them as here, of the 4 GB that are the target.
    slabs = (SLOTS + RING) * found["block_bytes"]
    loop = found["denoise_peak_rss_bytes"] - found["between_rss_bytes"]
    assert loop <= slabs + WORKING_BYTES < BLOCKS * found["block_bytes"]
    assert found["peak_rss_bytes"] - found["rss_before_bytes"] <= PREPARE_BYTES

    # Copied is what is read, whole slabs with their gaps, and nothing beyond the last step.
    read, steps = found["read_bytes_per_step"], found["steps"]
    assert read == BLOCKS * found["block_bytes"]
    copied = sum(step["h2d_bytes"] for step in steps)
    assert 2 * read <= copied <= 1.001 * 2 * read
    assert sum(step["d2h_bytes"] for step in steps) == 0
    if found["system_read_bytes"] is not None:  # embeddings and the output layer come on top
        expected = 2 * found["read_bytes_per_step"]
        assert expected <= found["system_read_bytes"] <= 1.01 * expected


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": SLOTS}, {"blocks": 61}, {"text_blocks": 0}, {"steps": 0}, {"tokens": 6}],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        pro_forward(**wrong)


def test_a_folder_that_is_not_there_or_too_full_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="a folder that exists"):
        pro_forward(folder=str(tmp_path / "none"))
    monkeypatch.setattr("kandinsky5.bench.random_file.free_bytes", lambda path: 10**9)
    with pytest.raises(UserError, match=r"23.8 GB free, there are 1.0"):
        pro_forward(folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
