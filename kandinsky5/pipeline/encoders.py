"""The text encoders as a job uses them: whole on the device, or Qwen layer by layer on a smaller card."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kandinsky5.memory.host import page_lock_for
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.residency import Tenant
from kandinsky5.memory.source import DiskSource, PinnedSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.text_stages import EncoderUse
from kandinsky5.memory.whole import Home, WholeTenant, part_on_device, to_device, to_host
from kandinsky5.model.files import ModelFiles
from kandinsky5.model.text import TextEncoders
from kandinsky5.model.text_generation import OutputLayer
from kandinsky5.model.text_loading import EncoderReader
from kandinsky5.model.text_nf4 import open_qwen
from kandinsky5.model.text_picture import Sight

LAYERS, TABLE = "layers.", "embed_tokens."


def text_tenant(
    files: ModelFiles,
    use: EncoderUse,
    *,
    device: torch.device,
    dtype: torch.dtype,
    home: Home,
    sees: bool = False,
) -> Tenant[TextEncoders]:
    """Both text encoders.

    Args:
        files: where they are.
        use: how Qwen's layers lie while it computes, to the number of buffers, as it was planned.
        device: where they compute.
        dtype: of Qwen's weights, save those in NF4.
        home: where encoders that are used whole wait between uses; pinned layers stay where they are.
        sees: whether Qwen is to see pictures; its vision tower is read then.
    """

    def sight(where: torch.device) -> Sight | None:
        return Sight.load(files.text_encoder, device=where, dtype=dtype) if sees else None

    def opened() -> EncoderReader:
        return open_qwen(files.text_encoder, dtype=dtype, weights=use.weights, device=device)

    def loaded(where: torch.device) -> TextEncoders:
        def qwen() -> Any:
            with opened() as reader:
                return reader.load(where)

        return TextEncoders.load(files, device=where, dtype=dtype, qwen=qwen, sight=sight(where))

    if use.source == "resident":
        return WholeTenant(
            loaded,
            lambda encoders: encoders.modules,
            device=device,
            home=home,
        )
    return StreamedText(files, opened, use, device=device, dtype=dtype, sight=sight)


@dataclass(frozen=True)
class Voice:
    """What the text encoder needs besides itself to answer.

    Attributes:
        layer: its output layer; None where that is its table of embeddings.
        sight: its vision, where it is to see a picture.
    """

    layer: OutputLayer | None
    sight: Sight | None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that has weights."""
        sight = () if self.sight is None else (self.sight.tower,)
        return sight if self.layer is None else (self.layer, *sight)


def voice_tenant(
    files: ModelFiles, *, device: torch.device, dtype: torch.dtype, sees: bool
) -> Tenant[Voice]:
    """Read for one answer, and gone after it."""

    def load(where: torch.device) -> Voice:
        folder = files.text_encoder
        sight = Sight.load(folder, device=where, dtype=dtype) if sees else None
        return Voice(OutputLayer.load(folder, device=where, dtype=dtype), sight)

    return WholeTenant(load, lambda voice: voice.modules, device=device, home="disk")


class StreamedText:
    """Qwen through a few slots on the device; its table of embeddings stays in main memory.

    CLIP is small and goes to the device as a whole. See :class:`kandinsky5.memory.residency.Tenant`.

    Args:
        opened: gives Qwen without its weights, to be read.
        use: ``pinned`` layers stay in page-locked main memory, those on ``disk`` are read in each pass;
            with so many slots and slabs of the ring.
        sight: reads the vision tower, if it is wanted, each time: it is small beside the layers.
    """

    def __init__(
        self,
        files: ModelFiles,
        opened: Callable[[], EncoderReader],
        use: EncoderUse,
        *,
        device: torch.device,
        dtype: torch.dtype,
        sight: Callable[[torch.device], Sight | None],
    ) -> None:
        self._files, self._opened, self._device, self._dtype = files, opened, device, dtype
        self._use, self._sight = use, sight
        self._passes: int | None = None
        self._reader: EncoderReader | None = None
        self._source: PinnedSource | DiskSource | None = None
        self._in_use = ExitStack()

    @property
    def host_bytes(self) -> int:
        return 0 if self._source is None else self._source.host_bytes

    def expect(self, passes: int | None) -> None:
        """So many passes through the layers come in each use from the next one on, at most.

        Nothing is read or copied behind the last of them; None sets no end.
        """
        self._passes = passes

    def enter(self) -> TextEncoders:
        if self._reader is None:
            self._reader = self._opened()
        reader = self._reader
        qwen = reader.model
        if self._source is None:
            self._source = self._layer_source(reader)
        names = [name for name in qwen.state_dict() if not name.startswith(LAYERS)]
        table = [name for name in names if name.startswith(TABLE)]
        small = [name for name in names if name not in table]
        with ExitStack() as undo:
            undo.enter_context(part_on_device(qwen, small, reader.read_into, self._device))
            undo.enter_context(part_on_device(qwen, table, reader.read_into, torch.device("cpu")))
            undo.callback(qwen.rotary_emb.to, "cpu")
            qwen.rotary_emb.to(self._device)
            undo.enter_context(
                Streamer(
                    qwen.layers,
                    self._source,
                    device=self._device,
                    slots=self._use.slots,
                    passes=self._passes,
                )
            )
            for hook in self._around_the_table(qwen.embed_tokens):
                undo.callback(hook.remove)
            encoders = TextEncoders.load(
                self._files,
                device=self._device,
                dtype=self._dtype,
                qwen=lambda: qwen,
                sight=self._sight(self._device),
            )
            self._in_use = undo.pop_all()
        return encoders

    def leave(self) -> None:
        self._in_use.close()

    def close(self) -> None:
        self.leave()
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _layer_source(self, reader: EncoderReader) -> PinnedSource | DiskSource:
        layouts = [BlockLayout.of(layer) for layer in reader.model.layers]

        def fill(index: int, slab: torch.Tensor) -> None:
            views = layouts[index].views(slab)
            reader.read_into({f"{LAYERS}{index}.{name}": view for name, view in views.items()})

        page_lock = page_lock_for(self._device)
        if self._use.source == "pinned":
            return PinnedSource(layouts, fill, page_lock=page_lock)
        return DiskSource(layouts, fill, ring=self._use.ring, page_lock=page_lock)

    def _around_the_table(
        self, table: nn.Module
    ) -> tuple[torch.utils.hooks.RemovableHandle, torch.utils.hooks.RemovableHandle]:
        """Token ids come to main memory to be looked up; what is found goes to the device."""
        return (
            table.register_forward_pre_hook(
                lambda _, ids: tuple(to_host(tensor) for tensor in ids)
            ),
            table.register_forward_hook(lambda _, ids, found: to_device(found, self._device)),
        )
