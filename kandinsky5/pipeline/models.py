"""The models of a job, kept warm between stages and jobs as far as its memory plan allows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.events import reading
from kandinsky5.memory.residency import Residency
from kandinsky5.memory.text_stages import EXPANSION_TOKENS, EncoderUse
from kandinsky5.memory.whole import Home, WholeTenant
from kandinsky5.model import vae_loading
from kandinsky5.model.file_stamp import FileStamp, file_stamp
from kandinsky5.model.loading import load_vae
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import TextEncoders
from kandinsky5.pipeline.encoders import StreamedText, Voice, text_tenant, voice_tenant
from kandinsky5.pipeline.job import Job, PaintingJob
from kandinsky5.pipeline.planning import home_of, placement_of, settings_of
from kandinsky5.pipeline.transformer import RunningTransformer, TransformerTenant

Model = TypeVar("Model")
TEXT, TRANSFORMER, VAE = "text encoder", "transformer", "VAE"
WRITER, VOICE = "text encoder that writes", "output layer"
"""Roles, as they are named to the user."""
_NAMES = {TEXT: "text encoders", TRANSFORMER: TRANSFORMER, VAE: VAE}
"""Role → name in the plan."""


class Models:
    """Lends a job its models. What a file held when it was read is in its key: a new file is read anew."""

    def __init__(self) -> None:
        self._models = Residency()

    def make_room(self, job: Job) -> None:
        """Let go of what the job has no use for, and of what its plan, as it now is, has no room for."""
        keys: dict[str, Hashable] = {VAE: self._vae_key(job, job.device, job.dtype)}
        if isinstance(job, PaintingJob):
            keys |= {TEXT: self._text_key(job), TRANSFORMER: self._transformer_key(job)}
        self._models.keep_only(keys)
        if isinstance(tenant := self._models.held(TRANSFORMER), TransformerTenant):
            tenant.place(placement_of(job.plan))
        self._models.host_budget_bytes = job.plan.budget.ram_bytes
        self._models.keep_within_budget()

    def done_with(self, job: Job, *roles: str) -> None:
        """Let go of these, their stages being over, where the plan keeps them nowhere.

        Not as soon as each is left: until then a stage may come to it again.
        """
        gone = [role for role in roles if home_of(job.plan, _NAMES[role]) == "disk"]
        if gone:
            self._models.release(*gone)

    def release(self) -> None:
        """Let go of all of them."""
        self._models.release()

    def text_encoders(
        self, job: PaintingJob, use: EncoderUse | None = None
    ) -> AbstractContextManager[TextEncoders]:
        """Both text encoders, as the plan has them for encoding, or for expanding in a use of its own.

        What is otherwise than for encoding is let go after use: the encoders that encode wait beside it.
        """
        passes = job.plan.job.branches if use is None else EXPANSION_TOKENS
        use = use or job.plan.text.encode
        is_apart = use != job.plan.text.encode
        role = WRITER if is_apart else TEXT
        home: Home = "disk" if is_apart else home_of(job.plan, "text encoders")
        tenant = self._models.tenant(
            role,
            self._text_key(job, use),
            lambda: text_tenant(
                job.files,
                use,
                device=job.device,
                dtype=job.dtype,
                home=home,
                sees=job.plan.job.encoder_sees,
            ),
        )
        if isinstance(tenant, StreamedText):
            tenant.expect(passes)
        lease = self._models.lease_of(role, tenant)
        lease = self._then_released(role, lease) if is_apart else lease
        return _told(job, job.files.text_encoder, lease)

    @contextmanager
    def _then_released(self, role: str, lease: AbstractContextManager[Model]) -> Iterator[Model]:
        try:
            with lease as model:
                yield model
        finally:
            self._models.release(role)

    def voice(self, job: PaintingJob) -> AbstractContextManager[Voice]:
        """What the text encoder needs besides itself to rewrite a prompt."""
        sees = job.picture is not None and not job.plan.job.encoder_sees
        lease = self._models.lease(
            VOICE,
            (self._text_key(job), sees),
            lambda: voice_tenant(job.files, device=job.device, dtype=job.dtype, sees=sees),
        )
        return _told(job, job.files.text_encoder, lease)

    def transformer_tenant(self, job: PaintingJob) -> TransformerTenant:
        """The transformer as it is now planned; :meth:`transformer` brings it to the device."""
        path, weights = job.files.transformer, settings_of(job.plan)["weights"]
        placement = placement_of(job.plan)

        def made() -> TransformerTenant:
            reader = TransformerReader(path, weights=weights, dtype=job.dtype)
            return TransformerTenant(reader, device=job.device, placement=placement)

        tenant = self._models.tenant(TRANSFORMER, self._transformer_key(job), made)
        assert isinstance(tenant, TransformerTenant)
        tenant.place(placement)
        tenant.adapters.choose(job.loras, job.dtype)
        tenant.attend(job.attending.engine, job.attending.sparse)
        return tenant

    def transformer(
        self, job: PaintingJob, tenant: TransformerTenant
    ) -> AbstractContextManager[RunningTransformer]:
        return _told(job, job.files.transformer, self._models.lease_of(TRANSFORMER, tenant))

    def vae(
        self, job: Job, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[vae_loading.VAE]:
        device, dtype, home = device or job.device, dtype or job.dtype, home_of(job.plan, "VAE")
        folder = job.vae
        lease = self._models.lease(
            VAE,
            self._vae_key(job, device, dtype),
            lambda: WholeTenant(
                lambda where: load_vae(folder, job.preset.vae, device=where, dtype=dtype),
                lambda vae: [vae],
                device=device,
                home=home,
            ),
        )
        return _told(job, folder, lease)

    def _text_key(self, job: PaintingJob, use: EncoderUse | None = None) -> Hashable:
        files, use = job.files, use or job.plan.text.encode
        home = home_of(job.plan, "text encoders")
        parts = (files.text_encoder, files.text_encoder_2, files.tokenizer, files.tokenizer_2)
        how = (job.device, job.dtype, use, home, job.plan.job.encoder_sees)
        return (*(_stamp(part) for part in parts), parts, *how)

    def _transformer_key(self, job: PaintingJob) -> Hashable:
        path = job.files.transformer
        return (path, _stamp(path), job.device, job.dtype, settings_of(job.plan)["weights"])

    def _vae_key(self, job: Job, device: torch.device, dtype: torch.dtype) -> Hashable:
        return (job.vae, _stamp(job.vae), device, dtype, home_of(job.plan, "VAE"))


@contextmanager
def ready(job: Job, lease: AbstractContextManager[Model]) -> Iterator[Model]:
    """The model that is leased; bringing it to the device is a stage of its own."""
    with ExitStack() as held:
        with job.stage("load"):
            model = held.enter_context(lease)
        yield model


@contextmanager
def _told(job: Job, path: Path, lease: AbstractContextManager[Model]) -> Iterator[Model]:
    """The model that is leased; its file is named while it is brought."""
    with ExitStack() as held:
        with reading(job.emit, path):
            model = held.enter_context(lease)
        yield model


def _stamp(path: Path) -> FileStamp | None:
    """None where nothing is any more: whoever has to read it says so, whoever has read it goes on."""
    try:
        return file_stamp(path)
    except CheckpointError:
        return None
