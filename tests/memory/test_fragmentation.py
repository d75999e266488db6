"""When memory ran out because it lies in pieces, told by numbers alone."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory import fragmentation
from kandinsky5.memory.fragmentation import DeviceMemory, asked_bytes, is_in_pieces, lies_in_pieces
from kandinsky5.memory.residency import Residency

GIB = 1 << 30


@pytest.mark.parametrize(
    ("reserved", "allocated", "asked", "in_pieces"),
    [
        (10 * GIB, 7 * GIB, 2 * GIB, True),  # it would fit into what lies idle
        (10 * GIB, 9 * GIB, 2 * GIB, False),  # it would not, however it lay
        (10 * GIB, 10 * GIB - 4096, 512, False),  # gaps there always are
        (10 * GIB, 7 * GIB, 0, True),  # nobody said how much was asked for
        (0, 0, 0, False),
        (10 * GIB, 10 * GIB, 0, False),
    ],
)
def test_pieces_are_what_is_reserved_and_idle_and_would_do(
    reserved: int, allocated: int, asked: int, in_pieces: bool
) -> None:
    assert is_in_pieces(DeviceMemory(reserved, allocated), asked) is in_pieces


def test_memory_that_torch_does_not_divide_up_is_never_in_pieces() -> None:
    assert not is_in_pieces(None, GIB)


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity", 2 * GIB),
        ("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 8 GiB total)", 20 << 20),
        ("Tried to allocate 512 bytes", 512),
        ("CUDA error: out of memory", 0),
    ],
)
def test_what_was_asked_for_is_read_from_the_allocator_s_message(said: str, asked: int) -> None:
    assert asked_bytes(torch.OutOfMemoryError(said)) == asked


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_main_memory_that_runs_out_says_nothing_of_the_device(error, monkeypatch) -> None:
    monkeypatch.setattr(fragmentation, "device_memory", lambda: DeviceMemory(10 * GIB, GIB))
    assert not lies_in_pieces(error)
    assert lies_in_pieces(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))


def test_a_model_that_finds_only_pieces_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        host_bytes = 0

        def enter(self) -> object:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def leave(self) -> None: ...

        def close(self) -> None: ...

    for idle, in_pieces in ((3 * GIB, True), (GIB, False)):
        held = DeviceMemory(10 * GIB, 10 * GIB - idle)
        monkeypatch.setattr(fragmentation, "device_memory", lambda held=held: held)
        with pytest.raises(OutOfMemory) as refusal, Residency().lease("VAE", 1, Large):
            pass
        assert refusal.value.in_pieces is in_pieces
        assert lies_in_pieces(torch.OutOfMemoryError("Tried to allocate 2.00 GiB")) is in_pieces
