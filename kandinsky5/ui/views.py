"""What happens, as fragments of the page. Pure functions of snapshots; texts from people are escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.presets import PRESETS

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot

STAGE_WORDS = {
    "load": "Loading the model",
    "expand": "Expanding the prompt",
    "encode text": "Reading the prompt",
    "encode image": "Looking at the image",
    "prepare": "Preparing the schedule",
    "denoise": "Painting",
    "decode": "Decoding frames",
    "save": "Saving",
}
ENDED_WORDS = {
    "done": "Finished",
    "failed": "Failed",
    "stopped": "Stopped",
    "interrupted": "Interrupted",
}
PAUSED_LINE = (
    '<p class="k1-paused"><span>The queue is paused: no further job begins.</span>'
    '<button type="button" class="k1-cancel" data-go="on">Go on</button></p>'
)
LEAST_STALL_S = 0.05
"""Shorter waits for weights in a step are not worth a word."""
_TEMPLATE_SIGNS = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})


def safe(value: object) -> str:
    """Text for the page; also inert in the template language of gradio's HTML component."""
    return html.escape(str(value)).translate(_TEMPLATE_SIGNS)


def duration_text(seconds: float) -> str:
    """A time a person reads at a glance: ``0.8 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def gigabytes(size_bytes: float) -> str:
    """Bytes as a person reads them: ``270 MB``, ``11.4 GB``."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def is_active(job: JobSnapshot) -> bool:
    """Whether the job waits or runs."""
    return job.state in ("queued", "running")


def can_be_stopped(job: JobSnapshot) -> bool:
    """Whether the job is not over and was not told to stop yet."""
    return is_active(job) and not job.is_stopping


def prompt_of(job: JobSnapshot) -> str:
    return str(job.request.get("prompt", ""))


def progress(
    job: JobSnapshot | None,
    queue: Sequence[JobSnapshot],
    resumable: Sequence[JobSnapshot] = (),
    paused: bool = False,
) -> str:
    """The card that tells how the watched job fares, the jobs around it and those that can be resumed.

    Args:
        paused: no further job begins.
    """
    rows = "".join(_queue_row(other) for other in queue if job is None or other.id != job.id)
    rows += "".join(
        _resumable_row(other) for other in resumable if job is None or other.id != job.id
    )
    others = f'<ol class="k1-queue" aria-label="Other jobs">{rows}</ol>' if rows else ""
    others = (PAUSED_LINE if paused else "") + others
    if job is None:
        return (
            '<section class="k1-progress" data-state="idle" data-title="K1">'
            '<p class="k1-line"><b>Ready</b><span>Describe a scene, then press Generate.</span></p>'
            f"{others}</section>"
        )
    head, detail, bar = progress_parts(job)
    notices = "" if job.output else _notices(job)  # the result has them
    active = ' data-active="yes"' if can_be_stopped(job) else ""
    if active and job.stage == "denoise" and job.step:
        active += ' data-painted="yes"'
    return (
        f'<section class="k1-progress" data-state="{safe(job.state)}" data-job="{safe(job.id)}"'
        f' data-kind="{safe(job.kind)}"'
        f' data-title="{safe(_title(job))}"{active}>'
        f'<p class="k1-line" role="status"><b>{safe(head)}</b><span>{safe(detail)}</span></p>{bar}'
        f'<p class="k1-what">{safe(_told_prompt(job))}</p>{notices}{_ways_on(job)}{others}</section>'
    )


def _told_prompt(job: JobSnapshot) -> str:
    """The prompt; while it is rewritten, the end of what it has become so far."""
    if job.stage == "expand" and job.expanded_prompt:
        return (
            f"…{job.expanded_prompt[-200:]}"
            if len(job.expanded_prompt) > 200
            else job.expanded_prompt
        )
    return prompt_of(job)


def progress_parts(job: JobSnapshot) -> tuple[str, str, str]:
    """(headline, detail, bar) of a job; the bar is HTML, the others are text."""
    if job.state == "queued":
        ahead = f"{job.place} ahead of it" if job.place > 0 else "starts in a moment"
        return "In the queue", ahead, _bar(None)
    if job.is_stopping:
        return "Stopping", "at the end of this step", _bar(None)
    if job.state == "running":
        stage = STAGE_WORDS.get(job.stage or "", "Starting")
        if job.stage == "denoise" and job.total:
            return stage, _step_text(job), _bar(job.step / job.total)
        return (
            stage,
            "",
            _bar(1.0 if job.stage in ("decode", "save") else None),
        )
    if job.state == "done" and job.is_resumable:
        at = f"at step {job.saved_step} of {job.total}; what was there by then was decoded"
        return ENDED_WORDS["stopped"], at, ""
    if job.state == "done":
        took = (job.finished_at or 0) - (job.started_at or 0)
        return ENDED_WORDS["done"], f"in {duration_text(max(took, 0))}{moment(job)}", ""
    if job.state == "stopped":
        at = f"at step {job.step} of {job.total}" if job.total else "before its first step"
        return ENDED_WORDS["stopped"], at, ""
    return ENDED_WORDS.get(job.state, job.state), job.message or "the log says more", ""


def moment(job: JobSnapshot) -> str:
    """When it ended, by this machine's clock: a page that was loaded again shows what was last."""
    if not job.finished_at:
        return ""
    ended, now = time.localtime(job.finished_at), time.localtime()
    today = ended[:3] == now[:3]
    return f" · {time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', ended)}"


def _step_text(job: JobSnapshot) -> str:
    parts = [f"step {job.step} of {job.total}"]
    if job.seconds_per_step is not None:
        parts.append(f"{duration_text(job.seconds_per_step)} a step")
    if job.eta_s is not None:
        parts.append(f"about {duration_text(job.eta_s)} left")
    if job.h2d_bytes:
        parts.append(f"{gigabytes(job.h2d_bytes)} moved a step")
    if job.stall_s >= LEAST_STALL_S:
        parts.append(f"{duration_text(job.stall_s)} of it waiting")
    return " · ".join(parts)


def _title(job: JobSnapshot) -> str:
    if job.state == "running" and job.stage == "denoise" and job.total:
        left = f" · {duration_text(job.eta_s)} left" if job.eta_s is not None else ""
        return f"{round(100 * job.step / job.total)} %{left} · K1"
    if job.state == "running":
        return f"{STAGE_WORDS.get(job.stage or '', 'Starting')} · K1"
    return {"queued": "Waiting · K1", "done": "✓ Done · K1", "failed": "Failed · K1"}.get(
        job.state, "K1"
    )


def _bar(share: float | None) -> str:
    if share is None:
        return '<div class="k1-bar" role="progressbar" aria-label="Progress"><i class="k1-unknown"></i></div>'
    percent = round(100 * share, 1)
    return (
        '<div class="k1-bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{percent:g}"><i style="width:{percent:g}%"></i></div>'
    )


def _notices(job: JobSnapshot) -> str:
    rows = "".join(f"<li>{safe(text)}</li>" for text in job.notices)
    return f'<ul class="k1-notices">{rows}</ul>' if rows else ""


def _queue_row(job: JobSnapshot) -> str:
    place = "now" if job.state == "running" else f"no. {job.place}"
    return (
        f'<li><span class="k1-place">{safe(place)}</span><span class="k1-clip">{safe(prompt_of(job))}</span>'
        f'<button type="button" class="k1-cancel" data-stop="{safe(job.id)}" title="Stop this job"'
        f' aria-label="Stop: {safe(prompt_of(job)[:60])}">Stop</button></li>'
    )


def _ways_on(job: JobSnapshot) -> str:
    """Buttons of a job that can be resumed."""
    if not job.is_resumable:
        return ""
    return (
        f'<p class="k1-ways"><button type="button" class="k1-resume" data-resume="{safe(job.id)}">'
        f"Resume from step {job.saved_step}</button>"
        f'<button type="button" class="k1-cancel" data-drop="{safe(job.id)}">Drop it</button></p>'
    )


def _resumable_row(job: JobSnapshot) -> str:
    text = safe(prompt_of(job)[:60])
    return (
        f'<li><span class="k1-place">{job.saved_step}/{job.total}</span>'
        f'<span class="k1-clip">{safe(prompt_of(job))}</span>'
        f'<button type="button" class="k1-cancel" data-resume="{safe(job.id)}"'
        f' title="Go on from step {job.saved_step}" aria-label="Resume: {text}">Resume</button>'
        f'<button type="button" class="k1-cancel" data-drop="{safe(job.id)}"'
        f' title="Drop what was saved of it" aria-label="Drop: {text}">Drop</button></li>'
    )


def player(job: JobSnapshot | None) -> str:
    """The result: its picture and what made it; a drawing while there is none."""
    if job is None or not job.output:
        return (
            '<figure class="k1-player k1-empty"><div class="k1-stage">'
            '<div class="k1-shapes" aria-hidden="true"><i></i><i></i><i></i></div>'
            "<p>Your video plays here as soon as it is made.</p></div></figure>"
        )
    # A job that goes on after an early result gets another one.
    early = f"?step={job.saved_step}" if job.is_resumable else ""
    source = f"/k1/result/{safe(job.id)}{early}"
    label = safe(prompt_of(job)[:120])
    if Path(job.output).suffix == ".png":
        media = f'<img src="{source}" alt="{label}">'
    else:
        switches = "controls autoplay loop muted playsinline"
        media = f'<video src="{source}" aria-label="{label}" {switches}></video>'
    facts = "".join(
        f"<li><span>{safe(name)}</span> {safe(value)}</li>" for name, value in result_facts(job)
    )
    return (
        f'<figure class="k1-player" data-job="{safe(job.id)}"><div class="k1-stage">{media}</div>'
        f'<figcaption><p class="k1-prompt">{safe(prompt_of(job))}</p><ul class="k1-facts">{facts}</ul>'
        f"{_expanded(job)}{_by_stage(job)}{_notices(job)}"
        f'<a class="k1-download" href="{source}?download" download>Download</a>'
        "</figcaption></figure>"
    )


def taken_s(job: JobSnapshot) -> float:
    """Seconds that a job took; what a resumed one had taken before stands in its stages alone."""
    seconds = (job.result or {}).get("seconds") or {}
    stages = sum(value for name, value in seconds.items() if name != "total")
    return max((job.finished_at or 0.0) - (job.started_at or 0.0), stages, 0.0)


def result_facts(job: JobSnapshot) -> list[tuple[str, str]]:
    """What a result is and what it took, as (name, value)."""
    made: dict[str, Any] = job.result or {}
    found: list[tuple[str, str]] = []
    preset = PRESETS.get(str(job.request.get("preset")))
    if (seed := made.get("seed", job.request.get("seed"))) is not None:
        found.append(("seed", str(seed)))
    if made.get("width") and made.get("height"):
        found.append(("size", f"{made['width']} × {made['height']}"))
    if made.get("frames", 1) > 1:
        found.append(("frames", str(made["frames"])))
    if made.get("steps_run"):
        found.append(("steps", str(made["steps_run"])))
    if job.started_at and job.finished_at:
        found.append(("took", duration_text(taken_s(job))))
    peak = made.get("peak_vram_bytes") or made.get("peak_rss_bytes")
    if peak:
        found.append(("VRAM" if made.get("peak_vram_bytes") else "memory", gigabytes(peak)))
    if made.get("h2d_bytes"):
        found.append(("moved", gigabytes(made["h2d_bytes"])))
    if skipped := made.get("evaluations_skipped"):
        whole = skipped + made.get("evaluations_run", 0)
        found.append(("skipped", f"{skipped} of {whole} evaluations"))
    if preset:
        found.append(("preset", preset.name))
    return found


def _expanded(job: JobSnapshot) -> str:
    """What the text encoder made of the prompt, folded away."""
    text = (job.result or {}).get("expanded_prompt")
    if not text:
        return ""
    return (
        '<details class="k1-by-stage"><summary>The prompt as it was expanded</summary>'
        f"<p>{safe(text)}</p></details>"
    )


def _by_stage(job: JobSnapshot) -> str:
    """Time and peak memory of each stage, folded away."""
    made: dict[str, Any] = job.result or {}
    seconds, peaks = made.get("seconds") or {}, made.get("stage_peaks") or {}
    names = [name for name in STAGE_WORDS if name in seconds]
    if not names:
        return ""
    on_gpu = any(peak.get("vram_bytes") for peak in peaks.values())
    use = "vram_bytes" if on_gpu else "rss_bytes"
    rows = ""
    for name in names:
        peak = peaks.get(name, {}).get(use)
        rows += (
            f"<tr><th scope=row>{STAGE_WORDS[name]}</th><td>{duration_text(seconds[name])}</td>"
            f"<td>{gigabytes(peak) if peak else ''}</td></tr>"
        )
    return (
        '<details class="k1-by-stage"><summary>Time and memory by stage</summary><table><thead><tr>'
        f"<th>Stage</th><th>Time</th><th>{'VRAM' if on_gpu else 'Memory'}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def gallery(jobs: Sequence[JobSnapshot], shown_id: str | None) -> str:
    """Finished jobs as buttons, newest first."""
    tiles = "".join(_tile(job, job.id == shown_id) for job in jobs)
    if not tiles:
        return '<p class="k1-none">Results of this machine will be listed here, newest first.</p>'
    return f'<div class="k1-gallery">{tiles}</div>'


def _tile(job: JobSnapshot, shown: bool) -> str:
    source = f"/k1/result/{safe(job.id)}"
    picture = (
        f'<img src="{source}" alt="" loading="lazy">'
        if Path(job.output or "").suffix == ".png"
        else f'<video src="{source}#t=0.5" muted loop playsinline preload="metadata" tabindex="-1"></video>'
    )
    current = ' aria-current="true"' if shown else ""
    text = safe(prompt_of(job))
    return (
        f'<button type="button" class="k1-tile" data-job="{safe(job.id)}" title="{text}"{current}>'
        f'{picture}<span class="k1-clip">{text}</span></button>'
    )


def problem(field: str, text: str) -> str:
    """The line that says why nothing was started; the page's script also sets it at the field."""
    return f'<p class="k1-problem" role="alert" data-field="{safe(field)}">{safe(text)}</p>'


def notice(text: str) -> str:
    """A line about this machine, or nothing."""
    return f'<p class="k1-notice" role="status">{safe(text)}</p>' if text else ""
