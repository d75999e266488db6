"""The models of a job, kept warm between stages and jobs as far as its memory plan allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch

from kandinsky5.memory.residency import Residency
from kandinsky5.memory.whole import WholeTenant
from kandinsky5.model.files import file_stamp
from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import TextEncoders
from kandinsky5.model.vae import VideoVAE
from kandinsky5.pipeline.encoders import text_tenant
from kandinsky5.pipeline.job import Job, PaintingJob
from kandinsky5.pipeline.planning import home_of, placement_of, settings_of
from kandinsky5.pipeline.transformer import RunningTransformer, TransformerTenant

Model = TypeVar("Model")


class Models:
    """Lends a job its models. What a file held when it was read is in its key: a new file is read anew."""

    def __init__(self) -> None:
        self._models = Residency()

    def keep_within(self, host_bytes: int) -> None:
        """Idle models hold no more main memory than this."""
        self._models.host_budget_bytes = host_bytes

    def release(self) -> None:
        """Let go of all of them."""
        self._models.release()

    def text_encoders(self, job: PaintingJob) -> AbstractContextManager[TextEncoders]:
        files, use = job.files, job.plan.text.encode
        home = home_of(job.plan, "text encoders")
        parts = (files.text_encoder, files.text_encoder_2, files.tokenizer, files.tokenizer_2)
        key = (*(file_stamp(part) for part in parts), parts, job.device, job.dtype, use, home)
        return self._models.lease(
            "text encoder",
            key,
            lambda: text_tenant(
                files, device=job.device, dtype=job.dtype, source=use.source, home=home
            ),
        )

    def transformer_tenant(self, job: PaintingJob) -> TransformerTenant:
        """The transformer as it is now planned, not yet on the device."""
        path, weights = job.files.transformer, settings_of(job.plan)["weights"]
        placement = placement_of(job.plan)

        def made() -> TransformerTenant:
            reader = TransformerReader(path, weights=weights, dtype=job.dtype)
            return TransformerTenant(reader, device=job.device, placement=placement)

        key = (path, file_stamp(path), job.device, job.dtype, weights)
        tenant = self._models.tenant("transformer", key, made)
        assert isinstance(tenant, TransformerTenant)
        tenant.place(placement)
        return tenant

    def transformer(self, job: PaintingJob) -> AbstractContextManager[RunningTransformer]:
        tenant = self.transformer_tenant(job)
        return self._models.lease_of("transformer", tenant)

    def vae(
        self, job: Job, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[VideoVAE]:
        device, dtype, home = device or job.device, dtype or job.dtype, home_of(job.plan, "VAE")
        folder = job.vae
        return self._models.lease(
            "VAE",
            (folder, file_stamp(folder), device, dtype, home),
            lambda: WholeTenant(
                lambda where: load_video_vae(folder, device=where, dtype=dtype),
                lambda vae: [vae],
                device=device,
                home=home,
            ),
        )


@contextmanager
def ready(job: Job, lease: AbstractContextManager[Model]) -> Iterator[Model]:
    """The model that is leased; bringing it to the device is a stage of its own."""
    with ExitStack() as held:
        with job.stage("load"):
            model = held.enter_context(lease)
        yield model
