"""Files on the hub: listed, and fetched so that a large one goes on where it was cut off.

The hub's library keeps the cache, the login and the address (``HF_HOME``, ``HF_HUB_CACHE``,
``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). From version 2 on it throws away what a failed download
had: a large file is therefore first brought into its cache here, under a name of K1's own while it is not
whole, and then handed to it.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.files import cached_repository, hub_cache

LARGE_BYTES = 50_000_000
"""From this size on a file is worth going on with."""
BEGUN_SUFFIX = ".k1.incomplete"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub that is wanted.

    Attributes:
        repository: ``owner/name``.
        path: inside it.
        size_bytes: 0 where the hub does not tell.
        is_here: whether the cache has it whole.
        begun_bytes: how much of it an earlier download has left.
    """

    repository: str
    path: str
    size_bytes: int
    is_here: bool
    begun_bytes: int = 0

    @property
    def to_fetch_bytes(self) -> int:
        return 0 if self.is_here else max(0, self.size_bytes - self.begun_bytes)


def listed(repository: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """A repository's files that fit a pattern.

    Raises:
        CheckpointError: the hub may not be asked, cannot be reached, or has no such file.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            hub_cache(),
            f"parts of {repository} are missing and HF_HUB_OFFLINE forbids fetching them",
        )
    with _said_in_one_line(repository):
        info = HfApi().model_info(repository, files_metadata=True)
    wanted = [
        _described(repository, sibling, info.sha)
        for sibling in info.siblings or []
        if any(fnmatch(sibling.rfilename, pattern) for pattern in patterns)
    ]
    if not wanted:
        raise CheckpointError(
            hub_cache(), f"{repository} on the hub has none of {', '.join(patterns)}"
        )
    return wanted


def fetch(file: RemoteFile) -> None:
    """Bring a file into the hub's cache; a large one goes on where it was cut off.

    Raises:
        CheckpointError: it does not come, or comes in another size than the hub says.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    with _said_in_one_line(f"{file.repository}/{file.path}"):
        if file.size_bytes >= LARGE_BYTES:
            url, headers = hf_hub_url(file.repository, file.path), build_hf_headers()
            found = get_hf_file_metadata(url, headers=headers)
            if found.etag and found.size:
                blob = _blob(file.repository, found.etag)
                _fetch_blob(url, headers, blob, found.size)
        hf_hub_download(file.repository, file.path)


def _described(repository: str, sibling: Any, revision: str) -> RemoteFile:
    from huggingface_hub import try_to_load_from_cache

    here = try_to_load_from_cache(repository, sibling.rfilename, revision=revision)
    begun = 0
    if sibling.lfs is not None:
        part = _begun(_blob(repository, sibling.lfs.sha256))
        begun = part.stat().st_size if part.is_file() else 0
    return RemoteFile(
        repository, sibling.rfilename, sibling.size or 0, isinstance(here, str), begun
    )


def _blob(repository: str, etag: str) -> Path:
    """Where the cache keeps a file's content."""
    return cached_repository(hub_cache(), repository) / "blobs" / etag


def _begun(blob: Path) -> Path:
    return blob.with_name(blob.name + BEGUN_SUFFIX)


def _fetch_blob(url: str, headers: dict[str, str], blob: Path, size_bytes: int) -> None:
    """Put a file's content where the library looks before it fetches anything itself."""
    from huggingface_hub.file_download import http_get

    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = _begun(blob)
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(part, "is being fetched by another program") from error
        if stream.tell() > size_bytes:
            _empty(stream)
        if stream.tell() < size_bytes:
            http_get(url, stream, resume_size=stream.tell(), headers=headers)
        if stream.tell() != size_bytes:
            got = stream.tell()
            _empty(stream)
            raise CheckpointError(part, f"{got} bytes came, the hub says {size_bytes}: try again")
        stream.flush()
        part.replace(blob)


def _empty(stream: IO[bytes]) -> None:
    stream.seek(0)
    stream.truncate()


@contextmanager
def _said_in_one_line(what: str) -> Iterator[None]:
    """What goes wrong on the way to the hub, with the next thing to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # Newer versions of the hub's library speak HTTP with httpx2.
    http = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            hub_cache(),
            f"{what} is gated: accept its terms on the hub's page, then log in with: hf auth login",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise CheckpointError(hub_cache(), f"the hub answers {status} for {what}") from error
    except (LocalEntryNotFoundError, http.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            hub_cache(),
            f"{what} could not be fetched ({reason}); the same command goes on where this stopped",
        ) from error
