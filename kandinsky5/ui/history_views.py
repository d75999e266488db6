"""Jobs that are over, as fragments of the page. Pure functions of snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky5.ui.queue_views import act_button, asked
from kandinsky5.ui.views import ENDED_WORDS, duration_text, moment, prompt_of, safe, taken_s

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot

PAGE_LENGTH = 12
EMPTY = (
    '<p class="k1-none">Nothing yet. Every job that ends is kept here, newest first: what it made, or why'
    " it made nothing, and the settings to make it again.</p>"
)


def history(jobs: Sequence[JobSnapshot], *, offset: int, total: int) -> str:
    """One page of the jobs that are over.

    Args:
        jobs: of the page, the newest first.
        offset: jobs before the page.
        total: jobs of all pages.
    """
    if not jobs:
        return EMPTY
    rows = "".join(map(_entry, jobs))
    return f'<ol class="k1-past" aria-label="Jobs that are over">{rows}</ol>{_pages(jobs, offset, total)}'


def page_start(offset: int, total: int) -> int:
    """The offset of a page that there is, nearest to this one."""
    last = max(total - 1, 0) // PAGE_LENGTH * PAGE_LENGTH
    return min(max(offset, 0), last) // PAGE_LENGTH * PAGE_LENGTH


def _pages(jobs: Sequence[JobSnapshot], offset: int, total: int) -> str:
    if total <= PAGE_LENGTH:
        return ""

    def turn(by: int, label: str, there: bool) -> str:
        off = "" if there else " disabled"
        return (
            f'<button type="button" class="k1-cancel" data-act="page" data-job="{by}"{off}>'
            f"{label}</button>"
        )

    until = offset + len(jobs)
    return (
        f'<nav class="k1-pages" aria-label="Pages">{turn(-1, "Newer", offset > 0)}'
        f"<span>{offset + 1} – {until} of {total}</span>{turn(1, 'Older', until < total)}</nav>"
    )


def _entry(job: JobSnapshot) -> str:
    return (
        f'<li data-job="{safe(job.id)}" data-state="{safe(job.state)}">{_picture(job)}'
        f'<div class="k1-told"><p class="k1-line"><b>{safe(_headline(job))}</b>'
        f"<span>{safe(_when(job))}</span></p>{_reason(job)}"
        f'<p class="k1-what">{safe(prompt_of(job))}</p><p class="k1-asked">{safe(asked(job))}</p>'
        f'</div><div class="k1-acts">{_acts(job)}</div></li>'
    )


def _headline(job: JobSnapshot) -> str:
    word = ENDED_WORDS.get(job.state, job.state)
    if job.state == "done" and job.is_resumable:
        return f"Stopped at step {job.saved_step} of {job.total}, and decoded"
    if job.state == "done" or not job.total:
        return word if job.started_at or job.state != "stopped" else "Taken off the queue"
    return f"{word} at step {job.step} of {job.total}"


def _when(job: JobSnapshot) -> str:
    took = ""
    if job.started_at and job.finished_at and job.state == "done":
        took = f"took {duration_text(taken_s(job))}"
    return (took + moment(job)).removeprefix(" · ")


def _reason(job: JobSnapshot) -> str:
    if job.state == "done" or not job.message:
        return ""
    return f'<p class="k1-reason">{safe(job.message)}</p>'


def _picture(job: JobSnapshot) -> str:
    """The result, to be seen large; of a job without one its last preview, or a drawing."""
    label = f'aria-label="{safe(f"Show: {prompt_of(job)[:60]}")}"'
    shapes = '<span class="k1-shapes" aria-hidden="true"><i></i><i></i><i></i></span>'
    if not job.output:
        if not job.previews:
            return f'<div class="k1-thumb k1-gone">{shapes}</div>'
        source = f"/k1/preview/{safe(job.id)}/{job.previews[-1]}"
        return f'<div class="k1-thumb"><img src="{source}" alt="" loading="lazy">{shapes}</div>'
    early = f"?step={job.saved_step}" if job.is_resumable else ""
    source = f"/k1/result/{safe(job.id)}{early}"
    kind = "picture" if Path(job.output).suffix == ".png" else "video"
    media = (
        f'<img src="{source}" alt="" loading="lazy">'
        if kind == "picture"
        else f'<video src="{source}#t=0.5" muted loop playsinline preload="metadata" tabindex="-1"></video>'
    )
    return (
        f'<button type="button" class="k1-thumb k1-tile" data-act="view" data-job="{safe(job.id)}"'
        f' data-source="{source}" data-kind="{kind}" data-text="{safe(prompt_of(job))}" {label}>'
        f"{media}{shapes}</button>"
    )


def _acts(job: JobSnapshot) -> str:
    acts = act_button(job, "use", "Use these settings", "Fill the form of Create with its settings")
    if job.is_resumable:
        only_decode = bool(job.total) and job.saved_step == job.total
        label = "Decode again" if only_decode else f"Resume from step {job.saved_step}"
        acts += act_button(job, "resume", label, "Put it back in the queue, to go on")
    if job.output:
        acts += (
            f'<a class="k1-cancel" href="/k1/result/{safe(job.id)}?download" download'
            f' aria-label="{safe(f"Download: {prompt_of(job)[:60]}")}">Download</a>'
        )
    what = f' data-what="{safe(_files(job))}" data-text="{safe(prompt_of(job)[:120])}"'
    return acts + act_button(
        job, "delete", "Delete", "Delete it and its files, after a question", more=what
    )


def _files(job: JobSnapshot) -> str:
    """In words what is deleted with a job."""
    names = list(dict.fromkeys(Path(path).name for path in (*job.outputs, job.output) if path))
    if job.saved_state:
        names.append(f"what was saved at step {job.saved_step}")
    if job.previews:
        names.append("its previews")
    if not names:
        return ""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
