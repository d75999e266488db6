"""What a stretch of work took is told for that stretch, and added up over several."""

from __future__ import annotations

import threading

import torch
from demo_runs import quick, ran
from torch import nn

from kandinsky5.events import StageDone, StepDone
from kandinsky5.memory import meter
from kandinsky5.memory.meter import Peaks
from kandinsky5.memory.whole import WholeTenant, part_on_device, to_device
from kandinsky5.pipeline import models
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.transformer import Placement

META = torch.device("meta")


def moved_bytes() -> tuple[int, int]:
    taken = meter.peaks()
    return taken.h2d_bytes, taken.d2h_bytes


def test_two_stretches_have_the_larger_peaks_and_the_sums_of_what_was_moved() -> None:
    first, second = Peaks(5, 20, 100, 7, 0.5), Peaks(6, 10, 1, 1, 0.25)
    assert first.joined(second) == Peaks(6, 20, 101, 8, 0.75)
    assert first.joined(None) == first


def test_measuring_begins_anew_and_counts_what_other_threads_move() -> None:
    meter.note_moved(h2d_bytes=1)
    meter.start_measuring()

    def many() -> None:
        for _ in range(500):
            meter.note_moved(h2d_bytes=2, d2h_bytes=1)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moved_bytes() == (4000, 2000)


def test_whatever_goes_to_another_device_is_counted_and_what_stays_is_not() -> None:
    meter.start_measuring()
    to_device(torch.zeros(4), torch.device("cpu"))
    assert moved_bytes() == (0, 0)
    to_device(torch.zeros(4), META)
    assert moved_bytes() == (16, 0)
    layer = nn.Linear(2, 3, device="meta")
    with part_on_device(layer, ["weight"], lambda targets: None, META):
        assert moved_bytes() == (16 + 24, 0)
    tenant = WholeTenant(lambda where: nn.Linear(2, 3), lambda m: [m], device=META, home="ram")
    tenant.enter()
    assert moved_bytes() == (16 + 24 + 36, 0)
    tenant.close()


def test_a_job_tells_of_every_step_and_stage_what_the_result_tells(tmp_path, monkeypatch) -> None:
    placement = Placement(resident=0, slots=2, source="disk", ring=2)
    monkeypatch.setattr(models, "placement_of", lambda plan: placement)
    pipeline = Pipeline()
    run = ran(tmp_path, quick(steps=2), pipeline=pipeline)
    pipeline.release()
    assert run.result is not None
    told = {event.stage: event for event in run.events if isinstance(event, StageDone)}
    assert told.keys() == run.result.stage_peaks.keys() == run.result.seconds.keys() - {"total"}
    for stage, taken in run.result.stage_peaks.items():
        assert {name: getattr(told[stage], name) for name in taken} == taken
    steps = [event for event in run.events if isinstance(event, StepDone)]
    denoise = run.result.stage_peaks["denoise"]
    assert sum(step.h2d_bytes for step in steps) == denoise["h2d_bytes"] == run.result.h2d_bytes > 0
    assert sum(step.stall_s for step in steps) <= denoise["stall_s"] + 1e-6
    assert denoise["stall_s"] > 0 == run.result.d2h_bytes
    assert run.result.stage_peaks["prepare"]["h2d_bytes"] > 0
