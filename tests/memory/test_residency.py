"""Models stay warm while they are the right ones, and leave when they are not."""

from __future__ import annotations

import weakref

import pytest
import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory.residency import Residency, is_out_of_memory


def test_a_model_is_loaded_once_while_its_key_stays() -> None:
    residency, loads = Residency(), []
    for _ in range(3):
        residency.get("VAE", "a", lambda: loads.append(1) or torch.nn.Linear(2, 2))
    assert loads == [1]


def test_the_old_model_is_gone_before_the_new_one_is_loaded() -> None:
    residency = Residency()
    old = weakref.ref(residency.get("transformer", "a", lambda: torch.nn.Linear(2, 2)))
    alive_while_loading = []

    def load() -> torch.nn.Module:
        alive_while_loading.append(old() is not None)
        return torch.nn.Linear(3, 3)

    residency.get("transformer", "b", load)
    assert alive_while_loading == [False]


def test_roles_do_not_disturb_each_other() -> None:
    residency = Residency()
    vae = residency.get("VAE", "a", lambda: torch.nn.Linear(2, 2))
    residency.get("transformer", "a", lambda: torch.nn.Linear(2, 2))
    residency.release("transformer")
    assert residency.get("VAE", "a", lambda: pytest.fail("loaded again")) is vae


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_while_loading_lets_everything_go_and_says_so(error) -> None:
    residency = Residency()
    held = weakref.ref(residency.get("VAE", "a", lambda: torch.nn.Linear(2, 2)))

    def load() -> torch.nn.Module:
        raise error

    with pytest.raises(OutOfMemory, match="transformer"):
        residency.get("transformer", "a", load)
    assert held() is None


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        Residency().get("VAE", "a", _fail)


def _fail() -> torch.nn.Module:
    raise RuntimeError("shapes do not match")
