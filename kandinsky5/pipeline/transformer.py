"""The transformer as a job uses it: prepared once per schedule, then run block by block as the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kandinsky5.memory.host import page_lock_for
from kandinsky5.memory.layout import BlockLayout, spread
from kandinsky5.memory.source import DiskSource, Fill, PinnedSource
from kandinsky5.memory.streamer import Streamer, Traffic
from kandinsky5.memory.whole import part_on_device, to_device, to_host
from kandinsky5.model.attention import AttentionEngine, NablaParams
from kandinsky5.model.chunks import WHOLE, ActivationChunks
from kandinsky5.model.dit import DiTConfig, Residual, StepConditioning
from kandinsky5.model.positions import VisualPositions
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.adapters import Adapters

BLOCKS = "visual_transformer_blocks"
TEXT_BLOCKS = "text_transformer_blocks"
MODULATION = "visual_modulation"
_ONCE_A_SCHEDULE = (
    "time_embeddings.",
    "text_embeddings.",
    "pooled_text_embeddings.",
    "out_layer.modulation.",
)
"""Small parts that only :meth:`TransformerTenant.prepare` needs."""


@dataclass(frozen=True)
class Placement:
    """Where the blocks' weights are and how many of them are in flight.

    Attributes:
        resident: blocks that stay on the device while it denoises; None for all.
        slots: buffers for the others.
        source: where those wait: page-locked main memory, or the file itself.
        ring: slabs of main memory that a disk is read ahead into.
        stays: whether what is on the device stays there between jobs.
        kept: whether resident blocks wait in main memory between jobs, instead of being read again.
        chunks: of the activations.
    """

    resident: int | None = None
    slots: int = 2
    source: Literal["ram", "disk"] = "ram"
    ring: int = 2
    stays: bool = False
    kept: bool = False
    chunks: ActivationChunks = WHOLE


class RunningTransformer:
    """A transformer that is ready to compute; what :func:`kandinsky5.pipeline.denoise.denoise` takes.

    Attributes:
        config: its dimensions.
        traffic: of the weights since it was made.
        weight_bytes: of blocks that it holds on the device.
    """

    def __init__(self, tenant: TransformerTenant, streamer: Streamer) -> None:
        self._tenant, self._streamer = tenant, streamer
        self.config = tenant.config
        self.weight_bytes = streamer.slot_bytes + streamer.resident_bytes

    @property
    def notice(self) -> str | None:
        """What the user should know of the weights' memory; may come while they are read."""
        return self._tenant.notice

    @property
    def traffic(self) -> Traffic:
        return self._streamer.traffic()

    def prepare(
        self, conditionings: Sequence[Conditioning], times: Sequence[float]
    ) -> list[list[StepConditioning]]:
        """As the model's own; better done before the blocks are on the device."""
        return self._tenant.prepare(conditionings, times).rows

    def expect(self, passes: int) -> None:
        """So many evaluations will run the blocks; before this and beyond them none is fetched ahead."""
        self._streamer.expect(passes)

    def positions(
        self, latent: torch.Tensor, *, rope_scale: tuple[float, float, float]
    ) -> VisualPositions:
        """As the model's own, with NABLA where the tenant attends so."""
        model, sparse = self._tenant.model, self._tenant.sparse
        return model.positions(latent, rope_scale=rope_scale, sparse=sparse)

    def evaluate(
        self,
        x: torch.Tensor,
        branches: Sequence[StepConditioning],
        positions: VisualPositions,
        *,
        residuals: Sequence[Residual | None] | None = None,
    ) -> list[torch.Tensor]:
        """As the model's own; the next step's first weights are then already coming."""
        velocities = self._tenant.model.evaluate(x, branches, positions, residuals=residuals)
        self._streamer.end_step()
        return velocities


@dataclass
class WaitingSchedule:
    """Prepared conditionings in main memory, brought to the device step by step.

    Attributes:
        rows: for each step from ``start_step`` on, for each prompt.
        device: where they are wanted.
    """

    rows: list[list[StepConditioning]]
    device: torch.device
    start_step: int = 0

    def branches(self, step: int, skips: Sequence[bool]) -> Sequence[StepConditioning]:
        rows = self.rows[step - self.start_step][: len(skips)]
        return [self._brought(row, skip) for row, skip in zip(rows, skips, strict=True)]

    def _brought(self, row: StepConditioning, skip: bool) -> StepConditioning:
        if skip:
            row = StepConditioning(row.text[:0], (), row.out)
        tensors = (row.text, *row.visual, row.out)
        text, *visual, out = (to_device(tensor, self.device) for tensor in tensors)
        return StepConditioning(text, tuple(visual), out)


class TransformerTenant:
    """A transformer between its file, main memory and the device.

    See :class:`kandinsky5.memory.residency.Tenant`.

    Args:
        reader: of the checkpoint; closed with the tenant.
        device: where it computes.
        placement: may be changed by :meth:`place` between uses.

    Attributes:
        adapters: LoRAs beside its layers; others may be chosen between uses.
    """

    def __init__(
        self, reader: TransformerReader, *, device: torch.device, placement: Placement
    ) -> None:
        self._reader, self._device = reader, device
        self.model = reader.model
        self.adapters = Adapters(reader.model, device)
        self.sparse: NablaParams | None = None
        self._placement = placement
        self._source: PinnedSource | DiskSource | None = None
        self._kept: _Kept | None = None
        self._running: tuple[RunningTransformer, ExitStack] | None = None

    @property
    def config(self) -> DiTConfig:
        return self.model.config

    @property
    def notice(self) -> str | None:
        """What the user should know of the weights' memory."""
        return None if self._source is None else self._source.notice

    @property
    def host_bytes(self) -> int:
        held = 0 if self._source is None else self._source.host_bytes
        if self._running is not None and self._device.type == "cpu":
            held += self._running[0].weight_bytes
        return held + (0 if self._kept is None else self._kept.host_bytes)

    def place(self, placement: Placement) -> None:
        """Change the placement, while it is not in use; what is held otherwise is given back."""
        before, self._placement = self._placement, placement
        chunks, stays = placement.chunks, placement.stays
        if not stays or dataclasses.replace(before, chunks=chunks, stays=stays) != placement:
            self._off_the_device()
        if (before.source, before.ring, before.kept) != (
            placement.source,
            placement.ring,
            placement.kept,
        ):
            self._close_source()

    def attend(self, engine: AttentionEngine, sparse: NablaParams | None) -> None:
        """Compute with this engine from now on, and with NABLA among the visual tokens if given."""
        self.model.use_attention(engine)
        self.sparse = sparse

    @torch.inference_mode()
    def prepare(
        self,
        conditionings: Sequence[Conditioning],
        times: Sequence[float],
        *,
        start_step: int = 0,
    ) -> WaitingSchedule:
        """All that a schedule takes from its prompts; its weights are read for it and gone afterwards.

        Args:
            conditionings: the prompts.
            times: of the steps from ``start_step`` on.
            start_step: steps that are done already.
        """
        wanted = [
            Conditioning(to_device(c.text, self._device), to_device(c.pooled, self._device))
            for c in conditionings
        ]
        model = self.model
        self.adapters.attach()
        with self._part(_ONCE_A_SCHEDULE), ExitStack() as streamers:
            for blocks, prefix, inner in (
                (model.text_transformer_blocks, TEXT_BLOCKS, ""),
                (model.visual_modulations, BLOCKS, f"{MODULATION}."),
            ):
                source = self._disk_source(blocks, prefix, inner)
                streamers.callback(source.close)
                streamers.enter_context(Streamer(blocks, source, device=self._device, passes=1))
            rows = model.prepare(wanted, times, keep=to_host)
        return WaitingSchedule(rows, self._device, start_step)

    def enter(self) -> RunningTransformer:
        self.model.chunks = self._placement.chunks
        self.adapters.attach()
        if self._running is None:
            with ExitStack() as undo:
                undo.enter_context(self._part(("visual_embeddings.", "out_layer.out_layer.")))
                streamer = undo.enter_context(self._streamer())
                self._running = RunningTransformer(self, streamer), undo.pop_all()
        return self._running[0]

    def leave(self) -> None:
        if not self._placement.stays:
            self._off_the_device()

    def close(self) -> None:
        self._off_the_device()
        self._close_source()
        self._reader.close()

    def _streamer(self) -> Streamer:
        placement, blocks = self._placement, self.model.visual_transformer_blocks
        if self._source is None:
            self._source = self._block_source()
        count = len(blocks)
        resident = count if placement.resident is None else min(placement.resident, count)
        return Streamer(
            blocks,
            self._source,
            device=self._device,
            slots=placement.slots,
            resident=spread(resident, count),
            passes=0,
        )

    def _block_source(self) -> PinnedSource | DiskSource:
        blocks, placement = self.model.visual_transformer_blocks, self._placement
        if placement.source == "disk" or self._device.type == "cpu":
            return self._disk_source(blocks, BLOCKS, "", skip=(MODULATION,), ring=placement.ring)
        layouts = [BlockLayout.of(block, skip=(MODULATION,)) for block in blocks]
        fill: Fill = _Fill(self._reader, BLOCKS, "", layouts)
        if placement.kept:
            fill = self._kept = _Kept(fill)
        return PinnedSource(layouts, fill, page_lock=page_lock_for(self._device))

    def _disk_source(
        self,
        blocks: nn.ModuleList,
        prefix: str,
        inner: str,
        *,
        skip: Collection[str] = (),
        ring: int = 2,
    ) -> DiskSource:
        layouts = [BlockLayout.of(block, skip=skip) for block in blocks]
        fill = _Fill(self._reader, prefix, inner, layouts)
        return DiskSource(layouts, fill, ring=ring, page_lock=page_lock_for(self._device))

    @contextmanager
    def _part(self, prefixes: tuple[str, ...]) -> Iterator[None]:
        names = [name for name in self.model.state_dict() if name.startswith(prefixes)]
        with part_on_device(self.model, names, self._reader.read_into, self._device):
            yield

    def _off_the_device(self) -> None:
        if self._running is not None:
            _, undo = self._running
            self._running = None
            undo.close()
        self.adapters.detach()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        self._kept = None


class _Kept:
    """Blocks that were read once and are copied from main memory ever after."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill
        self._slabs: dict[int, torch.Tensor] = {}

    @property
    def host_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs.values())

    def __call__(self, index: int, slab: torch.Tensor) -> None:
        if index in self._slabs:
            slab.copy_(self._slabs[index])
        else:
            self._fill(index, slab)
            self._slabs[index] = slab.clone()


@dataclass(frozen=True)
class _Fill:
    """Reads block ``index`` of a list in the checkpoint into a slab."""

    reader: TransformerReader
    prefix: str
    inner: str
    layouts: Sequence[BlockLayout]

    def __call__(self, index: int, slab: torch.Tensor) -> None:
        start = f"{self.prefix}.{index}.{self.inner}"
        views: Mapping[str, torch.Tensor] = self.layouts[index].views(slab)
        self.reader.read_into({start + name: view for name, view in views.items()})
