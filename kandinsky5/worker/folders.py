"""Where results go and where models are looked for; the page may change both while jobs wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """Folders of one studio; ``~`` is expanded and relative paths are made absolute here.

    Attributes:
        out_dir: results go there.
        models_dirs: models are looked for there, the first folder first.
        earlier_out_dirs: results went there before, and are still served from there.
    """

    out_dir: Path
    models_dirs: tuple[Path, ...] = ()
    earlier_out_dirs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_dir", _absolute(self.out_dir))
        for name in ("models_dirs", "earlier_out_dirs"):
            object.__setattr__(self, name, tuple(map(_absolute, getattr(self, name))))

    @property
    def model_names(self) -> tuple[str, ...]:
        """``models_dirs`` as a worker is told them."""
        return tuple(map(str, self.models_dirs))

    def holds_result(self, path: Path) -> bool:
        """Whether a file lies where results go, or went; symbolic links are followed first."""
        real = path.resolve()
        return any(
            real.is_relative_to(folder.resolve())
            for folder in (self.out_dir, *self.earlier_out_dirs)
        )


def _absolute(folder: Path) -> Path:
    return folder.expanduser().absolute()
