"""The benchmark of the live preview looks at what it times; no time is asserted here."""

from __future__ import annotations

import json

import pytest
import torch

from kandinsky5.bench import preview_cost as bench
from kandinsky5.bench.preview_cost import preview_cost
from kandinsky5.errors import UserError


def test_previews_of_five_seconds_at_512x768_are_at_most_300_kb() -> None:
    document = preview_cost(runs=1)
    assert document["latent"] == [31, 64, 96, 16]
    assert document["reached"]["bytes"]
    sizes = [case["bytes"] for case in document["cases"]]
    assert sizes == sorted(sizes) and 10_000 < sizes[0] < sizes[-1] <= 300_000
    assert json.loads(json.dumps(document))["benchmark"] == "preview-cost"


def test_a_limit_that_is_passed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_BYTES", 10)
    monkeypatch.setattr(bench, "MOST_MS", 0.0)
    document = preview_cost(height=64, width=64, seconds=0.5, runs=1)
    assert document["reached"] == {"wall_ms": False, "bytes": False}


def test_a_preview_that_lacks_frames_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    previewer = bench.LinearPreviewer
    whole = previewer.pixels
    monkeypatch.setattr(previewer, "pixels", lambda self, clean: whole(self, clean)[:-1])
    with pytest.raises(RuntimeError, match="frames"):
        preview_cost(height=64, width=64, seconds=0.5, runs=1)


def test_scenes_have_the_noise_asked_for() -> None:
    calm, noisy = (
        bench.scene((5, 16, 16), noise, torch.Generator().manual_seed(0)) for noise in (0.0, 1.0)
    )
    assert calm.std().item() == pytest.approx(1.0)
    assert (noisy - calm).std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"height": 100}, {"width": 8192}, {"seconds": 0.0}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        preview_cost(**wrong)
