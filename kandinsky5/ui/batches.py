"""Several jobs of one form: the next seeds, a job for each line of the prompt, for each picture."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.errors import K1Error, UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import MAX_SEED, GenerationRequest
from kandinsky5.ui import form
from kandinsky5.ui.typed import seed_of
from kandinsky5.ui.views import safe

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

MAX_JOBS = 32
"""Most jobs that one press of Generate puts in the queue."""
DRAWN_SEEDS = 2**31
LABEL = "Generate"
BATCH_FIELDS = ("preset", "prompt", "seed", "image", "images", "count", "per_line")
"""Fields on which it depends how many jobs there will be."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one press of Generate makes: each line with each picture and each seed.

    Attributes:
        lines: prompts.
        pictures: paths of input pictures; a single None where there is none.
        seeds: how many of each.
    """

    lines: tuple[str, ...]
    pictures: tuple[str | None, ...]
    seeds: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Batch:
        """From the form.

        Args:
            values: of :data:`BATCH_FIELDS`.

        Raises:
            UserError: a number of jobs that cannot be.
        """
        lines: tuple[str, ...] = (str(values["prompt"] or ""),)
        if values["per_line"]:
            lines = lines_of(lines[0]) or ("",)
        pictures: tuple[str | None, ...] = (values["image"],)
        preset = PRESETS.get(values["preset"])
        if preset is not None and preset.takes_image:
            given = (values["image"], *(values["images"] or ()))
            pictures = tuple(path for path in given if path) or (None,)
        batch = cls(lines, pictures, _count(values["count"]))
        if batch.jobs > MAX_JOBS:
            raise UserError("count", f"{batch.jobs} jobs", f"at most {MAX_JOBS} jobs at once")
        return batch

    @property
    def jobs(self) -> int:
        """How many there are."""
        return len(self.lines) * len(self.pictures) * self.seeds


def lines_of(prompt: str) -> tuple[str, ...]:
    """The prompts of a job per line: without blanks around them, empty lines left out."""
    return tuple(line.strip() for line in prompt.splitlines() if line.strip())


def requests_from(values: Mapping[str, Any]) -> list[GenerationRequest]:
    """The requests that a filled form stands for, in the order in which they shall run.

    Args:
        values: value of each control by its field's name.

    Raises:
        UserError: naming the field that cannot be used.
    """
    batch = Batch.of(values)
    if len(batch.lines) > 1 and str(values["expanded_prompt"] or "").strip():
        allowed = "it is for one prompt: empty it, or make one job of all lines"
        raise UserError("expanded_prompt", values["expanded_prompt"], allowed)
    each = [
        form.request_from({**values, "prompt": batch.lines[0], "image": picture})
        for picture in batch.pictures
    ]
    first_seed = seed_of(values["seed"])
    if batch.jobs == 1:
        return each
    if first_seed is None and batch.seeds > 1:
        first_seed = secrets.randbelow(DRAWN_SEEDS)
    if first_seed is not None and first_seed + batch.seeds - 1 > MAX_SEED:
        raise UserError("seed", first_seed, f"at most {MAX_SEED} with the last job's")
    found = itertools.product(batch.lines, each, range(batch.seeds))
    return [
        dataclasses.replace(
            request,
            prompt=line,
            seed=None if first_seed is None else first_seed + number,
        )
        for line, request, number in found
    ]


def submitted(client: WorkerClient, requests: Sequence[GenerationRequest], token: str) -> str:
    """Queue them all.

    Args:
        token: of the press; the same one again queues nothing twice.

    Returns:
        The first job's id.

    Raises:
        K1Error: one cannot be queued; says how many were.
    """
    ids: list[str] = []
    for number, request in enumerate(requests):
        try:
            ids.append(client.submit(request, token=_token_of(token, number)))
        except K1Error as error:
            if not ids:
                raise
            raise K1Error(
                f"{len(ids)} of {len(requests)} jobs are queued; then: {error}"
            ) from error
    return ids[0]


def batch_told(label: str, *values: Any) -> tuple[str, Any]:
    """How many jobs Generate will make.

    Args:
        label: of the button by now.
        values: of :data:`BATCH_FIELDS`.

    Returns:
        A line, empty for one job, and the button's label where it changes.
    """
    line, new = _told(values)
    return line, gr.skip() if new == label else new


def _told(values: Sequence[Any]) -> tuple[str, str]:
    """The line and the label."""
    named = dict(zip(BATCH_FIELDS, values, strict=True))
    try:
        batch = Batch.of(named)
    except UserError as error:
        return f'<p class="k1-batch" data-over="yes">{safe(form.problem_text(error))}</p>', LABEL
    if batch.jobs == 1:
        return "", LABEL
    told = safe(_words(batch, named["seed"]))
    return f'<p class="k1-batch">{told}</p>', f"{LABEL} {batch.jobs} jobs"


def _words(batch: Batch, seed: Any) -> str:
    """Such as “6 jobs: 3 prompts, seeds 7 to 8 each”."""
    parts = []
    if len(batch.lines) > 1:
        parts.append(f"{len(batch.lines)} prompts")
    if len(batch.pictures) > 1:
        parts.append(f"{len(batch.pictures)} images")
    if batch.seeds > 1:
        try:
            first = seed_of(seed)
        except UserError:
            first = None
        seeds = f"{batch.seeds} seeds in a row, the first drawn"
        parts.append(seeds if first is None else f"seeds {first} to {first + batch.seeds - 1}")
    return f"{batch.jobs} jobs: {' × '.join(parts)}"


def _count(value: Any) -> int:
    number = 1 if value is None else value
    if number not in range(1, MAX_JOBS + 1):
        raise UserError("count", value, f"a whole number from 1 to {MAX_JOBS}")
    return int(number)


def _token_of(token: str, number: int) -> str | None:
    if not token:
        return None
    return token if number == 0 else f"{token}-{number}"
