"""Folders of checkpoints, on this machine or in a bucket: ``gs://bucket/path``, ``s3://bucket/path``.

Buckets are read through TensorStore, with the credentials that Google's and Amazon's own tools use;
public buckets need none.  A checkpoint's index names its arrays by paths that its writer chose:
``CheckpointFolder`` turns them into paths below the folder that the user named, or raises an error.
"""

import mmap
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.lazy_arrays import Report
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.untrusted_input import stored_bytes

# In T5X checkpoints: the index of the native format; Orbax's item, and its index.
INDEX = "checkpoint"
ITEM = "state"
METADATA = f"{ITEM}/_METADATA"
# Unfinished saves of T5X, of Orbax (a checkpoint or one item), and of this package.
_UNFINISHED = re.compile(r".*\.tmp-\d*|.*\.orbax-checkpoint-tmp.*|\..*\.tmp", re.DOTALL)
# A msgpack map whose first key is one of the index's.
_INDEX_START = re.compile(rb"([\x81-\x8f]|\xde..)(\xa7version|\xa9optimizer)", re.DOTALL)
# Bytes of an index or of metadata; arrays, which are separate files, may have any size.
_MOST_READ = 2**28

_ADDRESS = re.compile(r"(gs|s3)://([^/]+)/*(.*?)/*", re.DOTALL)
_PART_BYTES = 1 << 26
# About six seconds in all; TensorStore's defaults retry for many minutes.
_RETRIES = {"max_retries": 5, "initial_delay": "200ms", "max_delay": "2s"}
_HINTS = {
    "gs": "log in if it is private (gcloud auth application-default login, or "
    "GOOGLE_APPLICATION_CREDENTIALS), or copy the folder to this machine (gcloud storage cp -r)",
    "s3": "set credentials if it is private (aws configure, or AWS_PROFILE), or copy the folder to "
    "this machine (aws s3 cp --recursive)",
}
# The beginnings of TensorStore's messages for errors of the bucket, not of its files.
_UNREACHABLE = re.compile(
    r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED"
    r"|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN)\b.*|.*(CURL|[Cc]redential|http_response_code='40[13]').*",
    re.DOTALL,
)


def is_address(name: str) -> bool:
    """Returns whether a name is an address, of any scheme, rather than a path."""
    return "://" in name


def store_of(address: str) -> dict[str, Any] | None:
    """Returns TensorStore's spec of a folder in a bucket; None for anything else.

    ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` select an S3-compatible service.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return None
    scheme, bucket, path = match.groups()
    store = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket, "path": as_folder(path)}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return store


def as_folder(path: str) -> str:
    """Returns the path with a slash at the end; empty for the top of the bucket."""
    return f"{path.rstrip('/')}/" if path.rstrip("/") else ""


def retries(*, cached_bytes: int = 0) -> Any:
    """Returns a TensorStore context with few retries.

    An unreachable bucket then fails within seconds.
    """
    import tensorstore

    return tensorstore.Context(
        {
            "gcs_request_retries": _RETRIES,
            "s3_request_retries": _RETRIES,
            "cache_pool": {"total_bytes_limit": cached_bytes},
        }
    )


def unreachable(address: str, error: Exception) -> UserError | None:
    """Returns the error to raise for errors of the bucket; None for errors of the file."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not _UNREACHABLE.fullmatch(str(error)):
        return None
    return UserError(
        f"{address} cannot be read: {one_line(error)}; check the network, {_HINTS[match[1]]}"
    )


def one_line(error: Exception) -> str:
    """Returns the message of another library's error as one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.partition(" [tensorstore_spec=")[0]
    # TensorStore's messages begin with what it did and end with what went wrong.
    return line if len(line) <= 240 else f"{line[:60]} ... {line[-160:]}"


class Bucket:
    """The files below an address; UserError, in one line, if they cannot be read."""

    def __init__(self, address: str) -> None:
        import tensorstore

        self.address = address.rstrip("/")
        self._store = self._call(
            lambda: tensorstore.KvStore.open(store_of(address), context=retries()).result()
        )

    def names(self) -> list[str]:
        """Returns the names of the files directly in the folder."""
        keys = self._call(lambda: self._store.list().result())
        return sorted(name for name in (key.decode() for key in keys) if "/" not in name)

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a small file; None if it does not exist."""
        result = self._call(lambda: self._store.read(name).result())
        return bytes(result.value) if result.state == "value" else None

    def has_changed(self, name: str, generation: str) -> bool:
        """Returns whether a file is no longer of the given generation."""
        known = bytes.fromhex(generation)
        # One byte is enough to tell.
        read = self._store.read(name, if_not_equal=known, byte_range=slice(0, 1))
        return bool(self._call(read.result).state != "unspecified")

    def fetch(self, name: str, path: Path, *, report: Report) -> str:
        """Copies a file to ``path``, part by part, and returns its generation."""
        generations: set[bytes] = set()
        offset = 0
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            while part := self._part(name, offset):
                file.write(part.value)
                generations.add(part.stamp.generation)
                offset += len(part.value)
                report(name, len(part.value))
                if len(part.value) < _PART_BYTES:
                    break
            if len(generations) > 1:
                raise UserError(
                    f"{self.address}/{name} was replaced while it was being read: try again"
                )
        return generations.pop().hex() if generations else ""

    def _part(self, name: str, offset: int) -> Any:
        """Returns the next part of a file; None at its end.  A shorter part is the last one."""
        for end in (offset + _PART_BYTES, None):
            try:
                result = self._store.read(name, byte_range=slice(offset, end)).result()
            except ValueError as error:
                if str(error).startswith("OUT_OF_RANGE"):  # the file ends within this part
                    continue
                raise self._failure(error) from error
            except Exception as error:
                raise self._failure(error) from error
            if result.state != "value":
                raise UserError(f"{self.address}/{name} no longer exists")
            return result
        return None

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:  # each kind of store raises different types
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        plain = UserError(f"{self.address} cannot be read: {one_line(error)}")
        return unreachable(self.address, error) or plain


@dataclass(frozen=True, kw_only=True)
class CheckpointFolder:
    """A checkpoint's folder: ``root`` on this machine, or a TensorStore ``store`` in a bucket.

    T5X's older checkpoints may be one file; ``file`` is its path, and ``root`` its folder.
    """

    name: str
    root: Path | None
    store: dict[str, Any]
    file: Path | None = None

    @classmethod
    def of(cls, folder: str | Path) -> "CheckpointFolder":
        """Opens a folder, a file, or a ``gs://`` or ``s3://`` address of a folder.

        Raises UserError for an unfinished save.
        """
        name = str(folder).rstrip("/") or str(folder)
        store = store_of(name)
        root = None if store else Path(folder).resolve()
        file = root if root is not None and root.is_file() else None
        if file is not None:
            root = file.parent
        for last in {posixpath.basename(name), root.name if root else ""}:
            if _UNFINISHED.fullmatch(last):
                raise UserError(f"{name} is an unfinished save: use an earlier checkpoint")
        store = store or {"driver": "file", "path": f"{root}/"}
        return cls(name=name, root=root, store=store, file=file)

    def read_index(self) -> bytes | memoryview | None:
        """Returns the bytes of T5X's index, or None; a file is mapped and may have any size."""
        if self.file is None:
            return self.read(INDEX)
        try:
            with self.file.open("rb") as stream:
                return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UserError(f"{self.file} cannot be read: {one_line(error)}") from error

    def read(self, path: str) -> bytes | None:
        """Returns the bytes of a file, or None; UserError for a link out of the folder."""
        if self.root is not None:
            file = self._inside(path, "a file")
            try:
                if not file.is_file():
                    return None
                with file.open("rb") as stream:
                    data = stream.read(_MOST_READ + 1)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
            if len(data) > _MOST_READ:
                raise UserError(
                    f"{file} has more than {_MOST_READ} bytes, which is too large for an index"
                )
            return data
        return Bucket(self.name).read(path)

    def has_file(self, path: str) -> bool:
        """Returns whether the file exists; UserError for a link out of the folder."""
        if self.root is None:
            return self.read(path) is not None
        return self._inside(path, "a file").is_file()

    def stored_bytes(self) -> int | None:
        """Returns the bytes of all files in the folder on disk; None for a bucket."""
        return None if self.root is None else stored_bytes(self.root)

    def below(self, path: object, *, of: str) -> dict[str, Any]:
        """Returns TensorStore's spec of the subfolder ``path``; ``of`` names its array in messages.

        UserError if it does not exist, or is not below this folder, by its name or by a link.
        """
        if not isinstance(path, str):
            raise UserError(f"{self.name}: the path of {of} is not a text")
        normal = posixpath.normpath(path)
        if path.startswith("/") or "\0" in path or normal.split("/")[0] in ("..", "."):
            raise UserError(f"{self.name}: {of} is at {path!r}, outside the folder")
        if self.root is not None:
            folder = self._inside(normal, of)
            if not folder.is_dir():
                raise UserError(
                    f"{self.name} has no folder {path!r} for {of}: the copy is incomplete"
                )
            for file in folder.rglob("*"):
                if file.is_symlink():
                    self._inside(str(file.relative_to(self.root)), of)
        return {**self.store, "path": as_folder(f"{self.store['path']}{normal}")}

    def _inside(self, path: str, of: str) -> Path:
        assert self.root is not None
        resolved = (self.root / path).resolve()
        allowed = (self.root, *_blobs(self.root))
        if resolved == self.root or not any(resolved.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{self.name}: {of} is at {path!r}, outside the folder")
        return self.root / path


def _blobs(root: Path) -> tuple[Path, ...]:
    """Returns further folders that links may lead to: the blobs of the Hugging Face hub's cache.

    Its snapshots, ``models--org--name/snapshots/<commit>``, are folders of links to
    ``models--org--name/blobs``, or to ``blobs`` of the whole cache.
    """
    for snapshot in (root, *root.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            return model / "blobs", model.parent / "blobs"
    return ()


def is_t5x(folder: str | Path) -> bool:
    """Returns whether a folder has an index of T5X's formats, or a file begins like one.

    Raises UserError for unfinished saves.
    """
    place = CheckpointFolder.of(folder)
    if place.file is not None:
        try:
            with place.file.open("rb") as stream:
                return _INDEX_START.match(stream.read(16)) is not None
        except OSError:
            return False
    return place.has_file(INDEX) or place.has_file(METADATA)
