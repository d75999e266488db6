"""Models, and parts of models, that are on the device as a whole while they are used."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

from kandinsky5.memory import meter

Model = TypeVar("Model")
Home = Literal["device", "ram", "disk"]
"""Where a model stays while it is not used; from ``disk`` it is read again each time."""
Read = Callable[[Mapping[str, torch.Tensor]], None]
"""Fills tensors of main memory, given by their names."""


class WholeTenant(Generic[Model]):
    """A model that is loaded as a whole; see :class:`kandinsky5.memory.residency.Tenant`.

    Args:
        load: gives the model with its weights on a device.
        modules: all modules of the model whose tensors have to be on the device.
        device: where it computes.
        home: where it stays between uses. On a CPU the device is main memory.
    """

    def __init__(
        self,
        load: Callable[[torch.device], Model],
        modules: Callable[[Model], Iterable[nn.Module]],
        *,
        device: torch.device,
        home: Home,
    ) -> None:
        self._load, self._modules, self._device = load, modules, device
        self._home: Home = "device" if device.type == "cpu" and home == "ram" else home
        self._model: Model | None = None
        self._masters: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []

    @property
    def host_bytes(self) -> int:
        if self._model is None or (self._home == "device" and self._device.type != "cpu"):
            return 0
        tensors = (t for m in self._modules(self._model) for t in _saved(m))
        return sum(tensor.nbytes for tensor in tensors)

    def enter(self) -> Model:
        if self._model is None:
            first = torch.device("cpu") if self._home == "ram" else self._device
            self._model = self._load(first)
            if first.type != "cpu":
                tensors = (t for module in self._modules(self._model) for t in _saved(module))
                meter.note_moved(h2d_bytes=sum(tensor.nbytes for tensor in tensors))
        if self._home == "ram":
            for module in self._modules(self._model):
                for entries, name in _places(module):
                    master = entries[name]
                    assert master is not None
                    self._masters.append((entries, name, master))
                    entries[name] = _like(master, to_device(master, self._device))
        return self._model

    def leave(self) -> None:
        for entries, name, master in self._masters:
            entries[name] = master
        self._masters.clear()
        if self._home == "disk":
            self._let_go()

    def close(self) -> None:
        self.leave()
        self._let_go()

    def _let_go(self) -> None:
        if self._model is not None:
            self._model = None
            gc.collect()  # modules may refer to one another in a circle


@contextmanager
def part_on_device(
    model: nn.Module, names: Iterable[str], read: Read, device: torch.device
) -> Iterator[None]:
    """Have some tensors of a model on the device until the ``with`` block is left; then they are as before.

    Args:
        model: the tensors named are on the meta device, or are put aside meanwhile.
        names: as in its ``state_dict()``.
        read: fills one tensor at a time.
        device: where they are needed.
    """
    before: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            entries: dict[str, torch.Tensor | None] = (
                owner._parameters if leaf in owner._parameters else owner._buffers  # type: ignore[assignment]
            )
            old = entries[leaf]
            assert old is not None
            host = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            read({name: host})
            entries[leaf] = _like(old, to_device(host, device))
            before.append((entries, leaf, old))
        yield
    finally:
        for entries, leaf, old in before:
            entries[leaf] = old


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in main memory, to wait there; as it is where it is there already."""
    if tensor.device.type != "cpu":
        meter.note_moved(d2h_bytes=tensor.nbytes)
    return tensor.to("cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device."""
    if tensor.device.type == "cpu" != device.type:
        meter.note_moved(h2d_bytes=tensor.nbytes)
    return tensor.to(device, non_blocking=True)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str]]:
    """Every entry of parameters and buffers, those that are not saved too."""
    for owner in module.modules():
        tables: tuple[dict[str, torch.Tensor | None], ...] = (owner._parameters, owner._buffers)  # type: ignore[assignment]
        for entries in tables:
            for name, tensor in entries.items():
                if tensor is not None:
                    yield entries, name


def _saved(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=False)
    return new
