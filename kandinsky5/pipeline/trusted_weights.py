"""Which weights a plan may keep: those of a format that gives right numbers on this device."""

from __future__ import annotations

import dataclasses

import torch

from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.model.fast_weights import WeightsPath, is_examined, weights_path


def with_trusted_weights(plan: MemoryPlan, device: torch.device) -> MemoryPlan:
    """The plan, made again without its format of weights where that fails its self-test on the device.

    Only a plan with quantised weights has anything tested. A format that was asked for, and one without which
    the job would not fit, is kept as long as a slower way gives right numbers; a notice says so.

    Raises:
        UserError: no way gives right numbers in the format that was asked for.
        OutOfMemory: none does in the only format that fits, or there is no room for the test.
    """
    weights = plan.denoise.weights
    if not is_examined(weights):
        return plan
    try:
        path = weights_path(weights, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of memory during the self-test of {weights}") from error
    if path.failed is None:
        return _said(plan, path.lacking and f"{weights} weights are slow here: {path.lacking}")
    if plan.job.choices.weights is None:
        other = _made_again(plan, weights)
        if other is not None:
            return _said(other, f"{weights} weights are not chosen: {path.failed}")
        if path.way is None:
            raise OutOfMemory(f"{path.failed}; without {weights} weights this job does not fit")
    return _said(plan, _by_another_way(weights, path))


def _by_another_way(weights: str, path: WeightsPath) -> str:
    if path.way is None:
        raise UserError("weights", weights, f"bf16 works here; {path.failed}")
    return f"{weights} weights are computed another way ({path.way}), slower: {path.failed}"


def _made_again(plan: MemoryPlan, weights: str) -> MemoryPlan | None:
    """With any other format, a file that is stored in this one being read as bf16; None where none fits."""
    job = plan.job
    formats = tuple(name for name in job.formats if name != weights)
    if job.file_weights == weights:
        job = dataclasses.replace(job, choices=dataclasses.replace(job.choices, weights="bf16"))
    try:
        other = make_plan(dataclasses.replace(job, formats=formats), plan.budget)
    except UserError:  # as bf16 it does not fit, as it is stored it would
        return None
    if not other.fits:
        return None
    by_itself = make_plan(plan.job, plan.budget).notices
    added = tuple(text for text in plan.notices if text not in by_itself)
    return dataclasses.replace(other, notices=(*other.notices, *added))


def _said(plan: MemoryPlan, notice: str | None) -> MemoryPlan:
    if not notice or notice in plan.notices:
        return plan
    return dataclasses.replace(plan, notices=(*plan.notices, notice))
