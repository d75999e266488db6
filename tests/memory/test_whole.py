"""Whole models between disk, main memory and the device; the ``meta`` device stands for a GPU here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kandinsky5.memory.whole import WholeTenant, part_on_device

META, CPU = torch.device("meta"), torch.device("cpu")


class Loader:
    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def __call__(self, device: torch.device) -> nn.Module:
        self.devices.append(device)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
        return model.requires_grad_(False)


def tenant(loader: Loader, device: torch.device, home) -> WholeTenant[nn.Module]:
    return WholeTenant(loader, lambda model: [model], device=device, home=home)


def places(model: nn.Module) -> set[str]:
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


def test_from_ram_it_goes_to_the_device_and_nothing_comes_back() -> None:
    loader = Loader()
    guest = tenant(loader, META, "ram")
    model = guest.enter()
    weight = model[0].weight
    assert places(model) == {"meta"}
    guest.leave()
    assert places(model) == {"cpu"}
    assert model[0].weight is not weight
    guest.enter()
    guest.leave()
    assert loader.devices == [CPU]
    assert guest.host_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    guest.close()
    assert guest.host_bytes == 0


def test_from_disk_it_is_loaded_onto_the_device_each_time() -> None:
    loader = Loader()
    guest = tenant(loader, META, "disk")
    for _ in range(2):
        assert places(guest.enter()) == {"meta"}
        guest.leave()
    assert loader.devices == [META, META]
    assert guest.host_bytes == 0


@pytest.mark.parametrize("home", ["device", "ram"])
def test_on_a_cpu_it_is_loaded_once_and_stays(home: str) -> None:
    loader = Loader()
    guest = tenant(loader, CPU, home)
    first = guest.enter()
    guest.leave()
    assert guest.enter() is first
    assert loader.devices == [CPU]
    assert guest.host_bytes > 0


def test_a_part_is_there_only_while_it_is_needed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def read(targets) -> None:
        for tensor in targets.values():
            tensor.fill_(2.0)

    with part_on_device(model, ["1.weight", "1.bias"], read, CPU):
        assert model[1](torch.ones(3)).tolist() == [8.0, 8.0, 8.0]
        assert model[0].weight.is_meta
    assert model[1].weight.is_meta
    assert model[1].bias.is_meta


def test_a_part_that_cannot_be_read_leaves_the_model_as_it_was() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)

    def read(targets) -> None:
        if "bias" in targets:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"), part_on_device(model, ["weight", "bias"], read, CPU):
        pytest.fail("not there")
    assert model.weight.is_meta
