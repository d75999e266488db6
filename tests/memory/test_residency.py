"""Models stay warm while they are the right ones, and leave when they are not."""

from __future__ import annotations

import weakref

import pytest
import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory.residency import Residency, is_out_of_memory


class Guest:
    """A tenant that notes what is done with it."""

    def __init__(self, nbytes: int = 0, error: BaseException | None = None) -> None:
        self.host_bytes, self.error = nbytes, error
        self.log: list[str] = []

    def enter(self) -> str:
        self.log.append("enter")
        if self.error is not None:
            raise self.error
        return "model"

    def leave(self) -> None:
        self.log.append("leave")

    def close(self) -> None:
        self.log.append("close")
        self.host_bytes = 0


def visit(residency: Residency, role: str, guest: Guest, key: str = "a") -> None:
    with residency.lease(role, key, lambda: guest) as model:
        assert model == "model"


def test_a_tenant_is_made_once_while_its_key_stays() -> None:
    residency, guest, made = Residency(), Guest(), []
    for _ in range(3):
        with residency.lease("VAE", "a", lambda: made.append(1) or guest):
            pass
    assert made == [1]
    assert guest.log == ["enter", "leave"] * 3


def test_the_old_one_is_closed_before_the_new_one_is_made() -> None:
    residency, old = Residency(), Guest()
    visit(residency, "transformer", old)
    gone = weakref.ref(old)
    log = old.log
    del old
    seen = []

    def make() -> Guest:
        seen.append((log[-1], gone() is None))
        return Guest()

    residency.tenant("transformer", "b", make)
    assert seen == [("close", True)]


def test_it_leaves_the_device_when_the_stage_fails() -> None:
    residency, guest = Residency(), Guest()
    with pytest.raises(ValueError, match="stage"), residency.lease("VAE", "a", lambda: guest):
        raise ValueError("stage")
    assert guest.log == ["enter", "leave"]


def test_roles_do_not_disturb_each_other() -> None:
    residency, vae = Residency(), Guest()
    visit(residency, "VAE", vae)
    visit(residency, "transformer", Guest())
    residency.release("transformer")
    assert residency.tenant("VAE", "a", lambda: pytest.fail("made again")) is vae


def test_the_least_recently_used_goes_first_when_main_memory_is_short() -> None:
    residency = Residency(host_budget_bytes=100)
    text, vae, dit = Guest(60), Guest(30), Guest(50)
    visit(residency, "text encoder", text)
    visit(residency, "VAE", vae)
    visit(residency, "text encoder", text)
    visit(residency, "transformer", dit)
    assert vae.log[-1] == "close"
    assert text.log[-1] == "close"  # 60 + 50 is still too much
    assert dit.log[-1] == "leave"
    assert residency.host_bytes == 50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OutOfMemory("the slots do not fit"),
    ],
)
@pytest.mark.parametrize("where", ["make", "enter"])
def test_running_out_while_loading_lets_everything_go_and_says_so(error, where: str) -> None:
    residency, other = Residency(), Guest()
    visit(residency, "VAE", other)

    def make() -> Guest:
        if where == "make":
            raise error
        return Guest(error=error)

    with (
        pytest.raises(OutOfMemory, match=r"transformer|slots"),
        residency.lease("transformer", "a", make),
    ):
        pytest.fail("there is no model")
    assert other.log[-1] == "close"
    assert residency.host_bytes == 0


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    residency = Residency()
    with (
        pytest.raises(RuntimeError, match="shapes"),
        residency.lease("VAE", "a", lambda: Guest(error=RuntimeError("shapes do not match"))),
    ):
        pytest.fail("there is no model")


def test_what_is_in_use_stays_whatever_the_budget_and_others_ask() -> None:
    residency, busy, idle = Residency(host_budget_bytes=0), Guest(8), Guest(8)
    with residency.lease("transformer", "a", lambda: busy):
        visit(residency, "VAE", idle)
        residency.keep_only({})
        residency.release()
        assert "close" not in busy.log
    assert idle.log[-1] == "close"
    assert busy.log == ["enter", "leave", "close"]


def test_only_those_whose_keys_are_still_wanted_stay() -> None:
    residency, kept, other, unnamed = Residency(), Guest(), Guest(), Guest()
    for role, guest in (("transformer", kept), ("VAE", other), ("text encoder", unnamed)):
        visit(residency, role, guest)
    residency.keep_only({"transformer": "a", "VAE": "b"})
    assert residency.held("transformer") is kept
    assert residency.held("VAE") is residency.held("text encoder") is None
    assert other.log[-1] == unnamed.log[-1] == "close"


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "Error out of memory at line 81 in file ops.cu",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_libraries_that_find_no_memory_are_understood(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
