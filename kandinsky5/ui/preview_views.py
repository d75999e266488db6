"""The live preview as fragments of the page: a frame that stays, and data that changes with the step.

The page's script (preview.js) moves the pictures, so that nothing is drawn anew while only the clock ticks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kandinsky5.ui.views import is_active, prompt_of, safe

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot

FRAME = """<figure class="k1-live" aria-label="Preview"><div class="k1-stage"></div><figcaption>
<label for="k1-step">Preview</label><input type="range" id="k1-step" min="0" max="0" value="0" step="1">
<output for="k1-step"></output></figcaption></figure>"""


def preview_data(job: JobSnapshot | None, *, beside_result: bool) -> str:
    """What the script is to show: the pictures of a job that has no result yet; nothing otherwise.

    Args:
        beside_result: the player stays below it, because a result was chosen to be looked at.
    """
    if job is None or not job.previews or job.state == "done":
        return ""
    steps = " ".join(map(str, job.previews))
    live = "yes" if is_active(job) else ""
    beside = "yes" if beside_result else ""
    return (
        f'<i data-job="{safe(job.id)}" data-steps="{steps}" data-total="{job.total}" data-live="{live}"'
        f' data-beside="{beside}" data-prompt="{safe(prompt_of(job)[:120])}"></i>'
    )
