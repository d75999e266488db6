"""The queue as fragments of the page: what runs, and what waits. Pure functions of snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.ui.views import can_be_stopped, progress_parts, prompt_of, safe

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot

EMPTY = (
    '<p class="k1-none">Nothing waits. What you generate while a job runs lines up here: jobs run one at'
    " a time, and the models stay loaded between them.</p>"
)
PAUSED = (
    '<p class="k1-notice" role="status">The queue is paused: no further job begins until you press “Go on”,'
    " not even after the studio was started anew.{}</p>"
)
STILL_RUNS = " The running job goes on to its end; Stop ends it."


def pause_line(queue: Sequence[JobSnapshot], *, paused: bool) -> str:
    """What it means that the queue is paused; nothing while it is not."""
    runs = any(job.state == "running" for job in queue)
    return PAUSED.format(STILL_RUNS if runs else "") if paused else ""


def running(queue: Sequence[JobSnapshot]) -> str:
    """The card of the running job; nothing where none runs."""
    return "".join(_card(job) for job in queue if job.state == "running")


def _card(job: JobSnapshot) -> str:
    head, detail, bar = progress_parts(job)
    active = ' data-active="yes"' if can_be_stopped(job) else ""
    if active and job.stage == "denoise" and job.step:
        active += ' data-painted="yes"'
    picture = f"/k1/preview/{safe(job.id)}/{job.previews[-1]}" if job.previews else ""
    return (
        f'<section class="k1-progress" data-state="running" data-kind="{safe(job.kind)}"'
        f' data-job="{safe(job.id)}" data-picture="{picture}"{active}>'
        f'<p class="k1-line"><b>{safe(head)}</b><span>{safe(detail)}</span></p>{bar}'
        f'<p class="k1-what">{safe(prompt_of(job))}</p><p class="k1-asked">{safe(asked(job))}</p></section>'
    )


def waiting(queue: Sequence[JobSnapshot]) -> str:
    """The jobs that wait, in their order, each with what can be done with it."""
    jobs = [job for job in queue if job.state == "queued"]
    if not jobs:
        return EMPTY
    movable = [job.id for job in jobs if job.kind == "generate"]
    rows = "".join(
        _row(job, is_first=[job.id] == movable[:1], is_last=[job.id] == movable[-1:])
        for job in jobs
    )
    return f'<ol class="k1-waiting" aria-label="Waiting jobs">{rows}</ol>'


def _row(job: JobSnapshot, *, is_first: bool, is_last: bool) -> str:
    acts = ""
    if job.kind == "generate":
        acts += act_button(job, "up", "↑", "Move up", disabled=is_first)
        acts += act_button(job, "down", "↓", "Move down", disabled=is_last)
    if job.can_be_edited:
        acts += act_button(job, "edit", "Edit", "Change its settings")
    if job.kind == "generate":
        acts += act_button(job, "duplicate", "Duplicate", "Queue the same once more, as the last")
    acts += act_button(job, "cancel", "Cancel", "Take it off the queue")
    return (
        f'<li data-job="{safe(job.id)}"><span class="k1-place">{job.place}</span>'
        f'<div class="k1-told"><p class="k1-what">{safe(prompt_of(job))}</p>'
        f'<p class="k1-asked">{safe(asked(job))}</p></div><div class="k1-acts">{acts}</div></li>'
    )


def act_button(
    job: JobSnapshot, act: str, label: str, title: str, *, disabled: bool = False, more: str = ""
) -> str:
    """A button of a job; the page's script tells the handlers of ``act``.

    Args:
        more: further attributes, escaped already.
    """
    name = f"{title}: {prompt_of(job)[:60]}"
    off = " disabled" if disabled else ""
    return (
        f'<button type="button" class="k1-cancel" data-act="{act}" data-job="{safe(job.id)}"'
        f' title="{safe(title)}" aria-label="{safe(name)}"{more}{off}>{safe(label)}</button>'
    )


def asked(job: JobSnapshot) -> str:
    """In one line what a job was asked for: preset, size, length, steps, seed."""
    if job.kind == "expand":
        return "only its prompt is rewritten"
    try:
        request, _ = settle(GenerationRequest.from_dict(job.request))
    except UserError:
        return str(job.request.get("preset", ""))
    words = [PRESETS[request.preset].title]
    if request.width and request.height:
        words.append(f"{request.width} × {request.height}")
    if request.seconds:
        words.append(f"{request.seconds:g} s")
    words.append(f"{request.steps} steps")
    if request.seed is not None:
        drawn = ", drawn" if job.seed_drawn and job.can_be_edited else ""
        words.append(f"seed {request.seed}{drawn}")
    if job.state == "queued" and job.resume_from is not None:
        words.append(f"goes on from step {job.saved_step} of {job.total}")
    return " · ".join(words)


def editing_line(job: JobSnapshot | None) -> str:
    """What becomes of the form while it holds a waiting job's settings; ``job`` is None once that is gone."""
    if job is not None and job.can_be_edited:
        text = (
            f"The form holds job no. {job.place} of the queue, which waits unchanged until you press"
            " “Replace the waiting job”."
        )
        label = "Leave it as it is"
    else:
        text = "The job of which the form holds the settings waits no longer: Generate makes a new one."
        label = "All right"
    return (
        f'<p class="k1-editing" role="status"><span>{safe(text)}</span>'
        f'<button type="button" class="k1-cancel" data-act="leave">{label}</button></p>'
    )
