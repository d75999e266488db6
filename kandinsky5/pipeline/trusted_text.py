"""Whether a plan may have the text encoder in NF4: only where bitsandbytes gives right numbers."""

from __future__ import annotations

import dataclasses

import torch

from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.model.text_nf4 import nf4_problem


def with_trusted_text(plan: MemoryPlan, device: torch.device) -> MemoryPlan:
    """The plan, made again without NF4 where that fails its self-test on the device.

    Only a plan with NF4 has bitsandbytes imported and tested.

    Raises:
        UserError: NF4 was asked for and cannot be used, with what to do.
        OutOfMemory: no room for the test.
    """
    uses = (plan.text.encode, plan.text.expand)
    if not any(use is not None and use.weights == "nf4" for use in uses):
        return plan
    try:
        problem = nf4_problem(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("out of memory during the self-test of NF4") from error
    if problem is None:
        return plan
    if plan.job.choices.text_weights == "nf4":
        raise UserError("text_weights", "nf4", f"auto and bf16 work here; {problem}")
    other = make_plan(dataclasses.replace(plan.job, text_formats=("bf16",)), plan.budget)
    return dataclasses.replace(other, notices=(*other.notices, f"NF4 is not used: {problem}"))
