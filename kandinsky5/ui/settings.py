"""What the user set once for the whole studio, kept as ``settings.json`` in the state folder.

``{"version": 1, "models_dirs": […], "out_dir": "", "crf": 16, "preview": true, "theme": "system",
"remember_form": true, "earlier_out_dirs": […]}``; what is missing takes its default.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import UserError
from kandinsky5.request import RANGES, GenerationRequest
from kandinsky5.ui.settings_file import KeptFile
from kandinsky5.worker.client import Folders

if TYPE_CHECKING:
    from kandinsky5.ui.options import StudioOptions

VERSION = 1
FILE_NAME = "settings.json"
THEMES = {"system": "As the system", "light": "Light", "dark": "Dark"}
DEFAULT_OUT_DIR = Path("outputs")
MAX_FOLDERS = 16


@dataclass(frozen=True)
class Settings:
    """Settings whose values are checked; that folders exist is checked where they are entered.

    Attributes:
        models_dirs: folders in which models are looked for; absolute.
        out_dir: folder of the results, absolute; empty for ``outputs`` where K1 was started.
        crf: what an empty “Video CRF” comes to, 0 … 51.
        preview: whether a new form has the live preview on.
        theme: one of :data:`THEMES`.
        remember_form: whether browsers keep what is typed into the form.
        earlier_out_dirs: folders of results before ``out_dir``, the latest last; what lies there is shown.
        others: what else stood in the file; it is kept.

    Raises:
        UserError: naming the setting.
    """

    models_dirs: tuple[str, ...] = ()
    out_dir: str = ""
    crf: int = GenerationRequest.crf
    preview: bool = True
    theme: str = "system"
    remember_form: bool = True
    earlier_out_dirs: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NAMES:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the form's controls with what these settings put in the place of an empty one."""
        is_empty = not str(values.get("crf") or "").strip()
        return {**values, "crf": str(self.crf)} if is_empty and "crf" in values else dict(values)


NAMES = tuple(item.name for item in dataclasses.fields(Settings) if item.name != "others")


def settings_in(values: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
    """Settings from what a file holds, and a line for each value that cannot be used: its default holds."""
    good: dict[str, Any] = {}
    problems = []
    for name in NAMES:
        try:
            if name in values:
                good[name] = _checked(name, values[name])
        except UserError as error:
            problems.append(f"{name}: {error.allowed}; the default holds")
    others = {name: value for name, value in values.items() if name not in NAMES}
    return Settings(**good, others=others), tuple(problems)


def _checked(name: str, value: Any) -> Any:
    if name in ("models_dirs", "earlier_out_dirs"):
        return _checked_folders(name, value)
    if name in ("preview", "remember_form"):
        if not isinstance(value, bool):
            raise UserError(name, value, "true or false")
    elif name == "crf":
        low, high = (int(bound) for bound in RANGES["crf"])
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(name, value, f"a whole number from {low} (lossless) to {high}")
    elif name == "theme":
        if not isinstance(value, str) or value not in THEMES:
            raise UserError(name, value, f"one of {', '.join(THEMES)}")
    elif not _is_folder_name(value, allow_empty=True):
        raise UserError(name, value, "the path of a folder, from the root on")
    return value


def _checked_folders(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(map(_is_folder_name, value)):
        raise UserError(name, value, "a list of paths of folders, from the root on")
    if len(value) > MAX_FOLDERS:
        raise UserError(name, f"{len(value)} folders", f"at most {MAX_FOLDERS}")
    return tuple(dict.fromkeys(value))


def _is_folder_name(value: Any, allow_empty: bool = False) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    return Path(value).is_absolute() if value else allow_empty


def read_settings(state_dir: Path) -> Settings:
    """The settings of a state folder, for a command that only reads them."""
    return settings_in(_file_in(state_dir).read(rename_damaged=False))[0]


def _file_in(state_dir: Path) -> KeptFile:
    return KeptFile(state_dir.expanduser().absolute() / FILE_NAME, VERSION)


class StudioSettings:
    """The settings of a running studio, and what they and its options come to.

    Args:
        options: what the studio was started with; they win.

    Attributes:
        options: likewise.
        notices: what is wrong with the file, one line each.
    """

    def __init__(self, options: StudioOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._file = _file_in(options.state_dir)
        self._settings, problems = settings_in(self._file.read())
        self.notices = tuple(
            line
            for line in (self._file.notice, *(f"{FILE_NAME}: {text}" for text in problems))
            if line
        )

    def __call__(self) -> Settings:
        """The settings at this moment."""
        return self._settings

    @property
    def folders(self) -> Folders:
        """Folders by the command line, else by the settings."""
        settings, options = self._settings, self.options
        set_dir = Path(settings.out_dir or DEFAULT_OUT_DIR)
        out_dir = options.out_dir or set_dir
        earlier = (*map(Path, settings.earlier_out_dirs), *({set_dir} - {out_dir}))
        given = tuple(Folders(out_dir, options.models_dirs).models_dirs)
        models_dirs = dict.fromkeys((*given, *map(Path, settings.models_dirs)))
        return Folders(out_dir, tuple(models_dirs), earlier)

    def change(self, changes: Mapping[str, Any]) -> Settings:
        """Set some and keep all on disk; results stay visible when they go elsewhere from now on.

        Raises:
            UserError: a value that cannot be used, or a file of a newer program.
            K1Error: the file cannot be written. Nothing is changed then.
        """
        with self._lock:
            before, results = self._settings, str(self.folders.out_dir)
            self._settings = dataclasses.replace(before, **changes)
            try:
                if (now := str(self.folders.out_dir)) != results:
                    kept = [*self._settings.earlier_out_dirs, results]
                    earlier = tuple(dict.fromkeys(folder for folder in kept if folder != now))
                    self._settings = dataclasses.replace(
                        self._settings, earlier_out_dirs=earlier[-MAX_FOLDERS:]
                    )
                values = {name: getattr(self._settings, name) for name in NAMES}
                self._file.write({**self._settings.others, **values})
            except BaseException:
                self._settings = before
                raise
            return self._settings
