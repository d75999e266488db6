"""The one owner of device memory: a stage borrows a model, and gives it back whatever happens.

Between stages models stay warm where their tenant says: on the device, in main memory, or nowhere. What they
hold of main memory is kept within a budget, the least recently used going first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory.fragmentation import lies_in_pieces

Model = TypeVar("Model")
ModelOut = TypeVar("ModelOut", covariant=True)


class Tenant(Protocol[ModelOut]):
    """A model that can be brought to the device and taken away again, any number of times."""

    @property
    def host_bytes(self) -> int:
        """Main memory it holds now."""
        ...

    def enter(self) -> ModelOut:
        """Have it ready to compute.

        Raises:
            OutOfMemory, torch.OutOfMemoryError: there is no room; nothing is left on the device.
        """
        ...

    def leave(self) -> None:
        """Give back the device memory that it does not need to stay warm. Also after a failed enter."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Residency:
    """Keeps one tenant for each role while its key stays the same.

    Args:
        host_budget_bytes: main memory that idle models may hold; None sets no limit.
    """

    def __init__(self, host_budget_bytes: int | None = None) -> None:
        self.host_budget_bytes = host_budget_bytes
        self._held: dict[str, tuple[Hashable, Tenant[object]]] = {}
        self._in_use: list[Tenant[Any]] = []

    @property
    def host_bytes(self) -> int:
        """Main memory held by all tenants."""
        return sum(tenant.host_bytes for _, tenant in self._held.values())

    def tenant(self, role: str, key: Hashable, make: Callable[[], Tenant[Model]]) -> Tenant[Model]:
        """The tenant of a role: the one held if its key is equal, else a new one; not brought to the device.

        Raises:
            OutOfMemory: there is no room for it; everything else held has been let go then.
        """
        held = self._held.pop(role, None)
        if held is not None and held[0] == key:
            self._held[role] = held  # now the most recently used
            return held[1]  # type: ignore[return-value]
        if held is not None:
            held[1].close()
            del held
            self._collect()
        with self._all_let_go_when_out_of_memory(role):
            tenant = make()
        self._held[role] = (key, tenant)
        return tenant

    @contextmanager
    def lease(self, role: str, key: Hashable, make: Callable[[], Tenant[Model]]) -> Iterator[Model]:
        """The model of a role, ready to compute until the ``with`` block is left.

        Raises:
            OutOfMemory: there is no room for it; everything else held has been let go then.
        """
        with self.lease_of(role, self.tenant(role, key, make)) as model:
            yield model

    @contextmanager
    def lease_of(self, role: str, tenant: Tenant[Model]) -> Iterator[Model]:
        """As :meth:`lease`, of the tenant that :meth:`tenant` gave."""
        try:
            with self._all_let_go_when_out_of_memory(role):
                model = tenant.enter()
            self._in_use.append(tenant)
            yield model
        except BaseException:
            gc.collect()  # what was computed last may hang on cycles of frames and errors
            raise
        finally:
            if tenant in self._in_use:
                self._in_use.remove(tenant)
            tenant.leave()
            self.keep_within_budget()
            _empty_device_cache()

    def held(self, role: str) -> Tenant[Any] | None:
        """The tenant of a role, whatever its key; None where there is none."""
        return self._held[role][1] if role in self._held else None

    def keep_only(self, keys: Mapping[str, Hashable]) -> None:
        """Let go of every role whose key is not the one given here."""
        others = [role for role, (key, _) in self._held.items() if keys.get(role) != key]
        if others:
            self.release(*others)

    def release(self, *roles: str) -> None:
        """Let go of these roles, or of all; what is in use stays."""
        for role in roles or list(self._held):
            self._close(role)
        self._collect()

    def keep_within_budget(self) -> None:
        """Let go of what is idle, the least recently used first, until the rest is within the budget."""
        for role in list(self._held):
            if self.host_budget_bytes is None or self.host_bytes <= self.host_budget_bytes:
                return
            if self._held[role][1].host_bytes:
                self.release(role)

    def _close(self, role: str) -> None:
        if role in self._held and self._held[role][1] not in self._in_use:
            self._held.pop(role)[1].close()

    @contextmanager
    def _all_let_go_when_out_of_memory(self, role: str) -> Iterator[None]:
        try:
            yield
        except (OutOfMemory, *MEMORY_ERRORS) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            in_pieces = lies_in_pieces(error)
            self.release()
            if isinstance(error, OutOfMemory):
                raise
            said = f"out of memory while loading the {role}"
            raise OutOfMemory(said, in_pieces=in_pieces) from error

    def _collect(self) -> None:
        gc.collect()
        _empty_device_cache()


def _empty_device_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What torch raises when memory runs out; ask :func:`is_out_of_memory` before believing it."""


_SAID = ("defaultcpuallocator", "out of memory", "_status_alloc_failed")
"""In a RuntimeError by torch's CPU allocator; by CUDA's runtime and driver, Triton and bitsandbytes; by
cuBLAS and cuDNN. In small letters."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or main memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _SAID)
