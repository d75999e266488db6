"""What the studio is started with; checked before anything else is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kandinsky5.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class StudioOptions:
    """How the studio runs.

    Attributes:
        host: address to listen on; one of this machine alone unless ``listen``.
        port: 1 … 65535.
        listen: let other machines in; needs ``auth``.
        auth: ``USER:PASS`` asked of every visitor, or None.
        out_dir: folder of the results; None: the one in the settings.
        state_dir: folder of the jobs and of uploaded pictures.
        models_dirs: folders in which models are looked for, before those in the settings.
        device: for the worker; None lets it choose.
        upload_bytes: of the largest file that a visitor may send; larger ones are refused as they come in.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    listen: bool = False
    auth: str | None = None
    out_dir: Path | None = None
    state_dir: Path = field(default_factory=lambda: Path("state"))
    models_dirs: tuple[Path, ...] = ()
    device: str | None = None
    upload_bytes: int = 64_000_000

    @property
    def bind_host(self) -> str:
        """The address for the socket: every interface when listening without a host of its own."""
        if self.listen and self.host in LOOPBACK:
            return "0.0.0.0"
        return "127.0.0.1" if self.host == "localhost" else self.host.strip("[]")

    @property
    def uploads_dir(self) -> Path:
        """Uploaded pictures; they outlive a restart because waiting jobs name them."""
        return self.state_dir.expanduser().absolute() / "uploads"

    @property
    def credentials(self) -> tuple[str, str] | None:
        """(user, password), or None when nobody is asked."""
        if self.auth is None:
            return None
        user, _, password = self.auth.partition(":")
        return user, password

    def check(self) -> None:
        """Refuse what would open the studio to strangers.

        Raises:
            UserError: naming the option.
        """
        if not 1 <= self.port <= 65535:
            raise UserError("port", self.port, "a number from 1 to 65535")
        if self.credentials is not None and not all(self.credentials):
            raise UserError("auth", "(hidden)", "USER:PASS, neither of them empty")
        if self.listen and self.auth is None:
            raise UserError(
                "listen",
                "no --auth",
                "anyone on the network could make videos and read files here: add --auth USER:PASS",
            )
        if not self.listen and self.host not in LOOPBACK:
            raise UserError(
                "host",
                self.host,
                "127.0.0.1 or localhost; to let other machines in add --listen --auth USER:PASS",
            )
