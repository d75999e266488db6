"""The memory plan of what the form says, as the worker will make it. No torch.

The worker plans again when the job starts, with what is free then.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import K1Error, UserError
from kandinsky5.family import TextEncoderShape
from kandinsky5.machine import memory_bytes
from kandinsky5.memory.budget import GB, Budget, in_gb
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.free import ASSUMED_RAM_BYTES, held_bytes, text_formats
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.picture_sizes import size_for_picture
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.ui.model_files import STRENGTH_NAMES, FilesTold
from kandinsky5.ui.pictures import picture_size

if TYPE_CHECKING:
    from kandinsky5.ui.machine_notice import MachineNotice
    from kandinsky5.worker.client import JobSnapshot

PLAN_FIELDS = (
    "preset",
    "width",
    "height",
    "seconds",
    "steps",
    "guidance",
    "expand",
    "expanded_prompt",
    "image",
    "dit",
    "model_dir",
    "weights",
    "text_weights",
    "dtype",
    "vram",
    "ram",
    "attention",
    "nabla_p",
    "nabla_wt",
    "nabla_wh",
    "nabla_ww",
    "vae_tiling",
    "vae_tile",
    "source",
    "resident_blocks",
    "slots",
    "chunk_tokens",
    "chunk_heads",
    *STRENGTH_NAMES,
)
"""What a plan depends on."""
GRAIN_BYTES = GB // 10
"""What is free is rounded down to this, so that a plan does not change with every breath of the machine."""
MAX_PAST_RUNS = 5
OF_THE_IMAGE = "the size follows from the image; planned for about {0} × {1}"
OF_THE_GIVEN = "the size follows from the image: {0} × {1}"
OF_THE_PRESET = "planned with the preset's dimensions: your checkpoint is still being looked at"
NOT_OF_THE_FILE = "planned with the preset's dimensions: your checkpoint cannot be used"
NO_FILES = FilesTold()
BESIDE_LORAS = "planned beside {0} for the LoRAs"
NO_CARD = "there is no GPU here: the VRAM budget is not used"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlook:
    """What can be expected of a job.

    Attributes:
        plan: it, whether it fits or not.
        card: name of the GPU; None where the CPU computes.
        expected_s: how long the job will take; None where nothing tells.
        past_runs: on how many runs of this machine that rests; 0 for the rates of another card.
        notices: what is planned otherwise than asked.
    """

    plan: MemoryPlan
    card: str | None = None
    expected_s: float | None = None
    past_runs: int = 0
    notices: tuple[str, ...] = ()


class Planner:
    """Makes plans for the page.

    Args:
        machine: knows the cards; None computes on the CPU.
        device: of the worker; None lets it choose.
        worker_pid: of the worker's process, whose memory is the next job's to use.
    """

    def __init__(
        self,
        machine: MachineNotice | None = None,
        device: str | None = None,
        worker_pid: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._machine = machine
        self._device = device or "auto"
        self._worker_pid = worker_pid
        self._ratios: dict[str, Ratios | None] = {}

    def outlook(
        self,
        values: Mapping[str, Any],
        history: Iterable[JobSnapshot] = (),
        files: FilesTold = NO_FILES,
    ) -> Outlook | None:
        """What is to be expected of what the form says; None while the machine is not known yet.

        Args:
            values: of :data:`PLAN_FIELDS`, as a request holds them.
            history: jobs that are over, the newest first.
            files: what is known of the model files named.

        Raises:
            UserError: a value out of its range, or a choice that cannot be met.
        """
        report = {} if self._machine is None else self._machine.report()
        if report is None:
            return None
        request, notices = request_for(values)
        card = self._card(report)
        budget = self._budget(request, card)
        job = job_for(request, budget, files)
        adapter_bytes = files.lora_parameters * job.number_bytes
        plan = _planned(job, budget.beside(adapter_bytes))
        if adapter_bytes:
            notices = (*notices, BESIDE_LORAS.format(in_gb(adapter_bytes)))
        if values.get("dit") or values.get("model_dir"):
            if files.pending:
                notices = (*notices, OF_THE_PRESET)
            elif files.transformer is None:
                notices = (*notices, NOT_OF_THE_FILE)
        if card is None and request.vram:
            notices = (*notices, NO_CARD)
        notices = (*notices, *plan.notices)
        expected_s, past_runs = self._expected(plan, history)
        name = None if card is None else str(card["name"])
        return Outlook(plan, name, expected_s, past_runs, notices)

    def _card(self, report: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The card that the worker will take."""
        if self._device == "cpu":
            return None
        cards = report.get("cards") or ()
        index = int(self._device.partition(":")[2] or 0)
        return cards[index] if index < len(cards) else None

    def _budget(self, request: GenerationRequest, card: Mapping[str, Any] | None) -> Budget:
        total_ram, free_ram = memory_bytes()
        if free_ram is not None:
            free_ram += held_bytes(self._worker_pid() or 0)
        ram = round(request.ram * GB) if request.ram else _rounded(free_ram or ASSUMED_RAM_BYTES)
        if card is None:
            return Budget(None, ram, None, total_ram)
        vram = round(request.vram * GB) if request.vram else _rounded(card["free_bytes"])
        return Budget(vram, ram, card["total_bytes"], total_ram)

    def _expected(
        self, plan: MemoryPlan, history: Iterable[JobSnapshot]
    ) -> tuple[float | None, int]:
        """Seconds, and the number of runs of this machine that tell them."""
        found: list[Ratios] = []
        for job in history:
            if job.id not in self._ratios:
                self._ratios[job.id] = _ratios(job, plan.budget)
            ratios = self._ratios[job.id]
            if ratios is not None and ratios.model == plan.job.models.transformer.name:
                found.append(ratios)
            if len(found) == MAX_PAST_RUNS:
                break
        if not found:
            return (None if plan.budget.on_cpu else plan.seconds), 0
        loop_s = _loop_seconds(plan)
        loop = statistics.median(item.loop for item in found)
        rest = statistics.median(item.rest for item in found)
        return loop * loop_s + rest * (plan.seconds - loop_s), len(found)


@dataclass(frozen=True)
class Ratios:
    """By what a job of a model took longer than its plan said: in the loop, and in all else."""

    model: str
    loop: float
    rest: float


def request_for(values: Mapping[str, Any]) -> tuple[GenerationRequest, tuple[str, ...]]:
    """The settled request that a form stands for, as far as a plan depends on it; with notices.

    Raises:
        UserError: a value out of its range.
    """
    preset = PRESETS.get(values["preset"])
    if preset is None:
        raise UserError("preset", values["preset"], "one of the list")
    given = {name: values[name] for name in PLAN_FIELDS if name in values}
    given |= {"dit": None, "model_dir": None, "prompt": "a plan"}
    given["seconds"] = given["seconds"] if preset.is_video else None
    picture = given.get("image") if preset.takes_image else None
    given["image"] = "a picture" if preset.takes_image else None
    if str(given.get("expanded_prompt") or "").strip():
        given["expand"] = False
    notices: tuple[str, ...] = ()
    if not given["width"] and not given["height"]:
        given["width"], given["height"] = preset.sizes_px[0]
        if picture:
            asked = GenerationRequest(**{**given, "width": None, "height": None})
            given["width"], given["height"] = size_for_picture(*picture_size(picture), asked)
            notices = (OF_THE_GIVEN.format(given["width"], given["height"]),)
        elif preset.takes_image:
            notices = (OF_THE_IMAGE.format(*preset.sizes_px[0]),)
    request, changed = settle(GenerationRequest(**given))
    return request, (*changed, *notices)


def job_for(request: GenerationRequest, budget: Budget, files: FilesTold = NO_FILES) -> PlanRequest:
    """The job as the pipeline runs it; whether NF4 gives right numbers only the worker tests.

    Args:
        files: what takes the place of the preset's transformer and text encoder.
    """
    dtype = "fp32" if request.dtype == "fp32" or budget.on_cpu else "bf16"
    shape, stored = files.transformer or (None, "bf16")
    encoder = None
    if (told := files.text_encoder) is not None:
        encoder = TextEncoderShape.of_dimensions(told["dimensions"])
        request = dataclasses.replace(request, expand=request.expand and told["writes"])
    job = PlanRequest.of(
        request, transformer=shape, text_encoder=encoder, file_weights=stored, dtype=dtype
    )
    return dataclasses.replace(job, text_formats=text_formats())


@functools.lru_cache(maxsize=128)
def _planned(job: PlanRequest, budget: Budget) -> MemoryPlan:
    return make_plan(job, budget)


def _ratios(job: JobSnapshot, budget: Budget) -> Ratios | None:
    """What a finished job tells; None where it tells nothing."""
    made = job.result or {}
    taken = made.get("seconds") or {}
    if job.state != "done" or made.get("evaluations_skipped") or not taken.get("denoise"):
        return None
    try:
        values = {**job.request, "width": made["width"], "height": made["height"]}
        request, _ = request_for(values)
        plan = _planned(job_for(request, budget), budget)
    except (K1Error, KeyError, TypeError) as error:  # a job of another version
        log.info("job %s tells nothing of times: %s", job.id, error)
        return None
    loop_s = _loop_seconds(plan)
    rest_s = plan.seconds - loop_s
    if loop_s <= 0 or rest_s <= 0:
        return None
    others = sum(value for name, value in taken.items() if name not in ("denoise", "total"))
    return Ratios(plan.job.models.transformer.name, taken["denoise"] / loop_s, others / rest_s)


def _loop_seconds(plan: MemoryPlan) -> float:
    return sum(item.seconds for item in plan.stages if item.name == "denoise")


def _rounded(size_bytes: int) -> int:
    return max(size_bytes // GRAIN_BYTES * GRAIN_BYTES, GB // 2)
