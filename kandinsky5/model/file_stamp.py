"""Whether a part of a model on disk is still the one that was read."""

from __future__ import annotations

import stat
from pathlib import Path

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import INDEX_SUFFIX, shards_of

FileStamp = tuple[tuple[str, int, int, int], ...]


def file_stamp(path: Path) -> FileStamp:
    """Tells whether a part of a model on disk is still the same; goes into the key of a warm model.

    Args:
        path: of :class:`ModelFiles`: a file, an index of shards, or a folder.

    Returns:
        For every file of the part, sorted: (name, mtime in ns, bytes, inode). The part of a single file is
        that file and the config.json beside it; of an index, its shards too; of a folder, all files in it.
        Links count as what they lead to, and a file that is not there is left out.

    Raises:
        CheckpointError: nothing is there, or the index cannot be read.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        folder = path
    else:
        folder = path.parent
        shards = shards_of(path) if path.name.endswith(INDEX_SUFFIX) else ()
        names = sorted({path.name, "config.json", *shards})
    stamp = []
    for name in names:
        try:
            found = (folder / name).stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            stamp.append((name, found.st_mtime_ns, found.st_size, found.st_ino))
    if not path.exists():
        raise CheckpointError(path, "no such file or folder")
    return tuple(stamp)
