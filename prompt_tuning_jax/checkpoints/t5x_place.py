"""Where a T5X checkpoint lies, and that nothing in it leads anywhere else.

An index names its arrays by paths, and whoever wrote it chose them: here they become places below
the folder that the user named, on this machine or in a bucket, or an error.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError

_BUCKET = re.compile(r"(gs|s3)://([^/]+)/*(.*?)/*", re.DOTALL)
_DRIVERS = {"gs": "gcs", "s3": "s3"}
# T5X's own saves, Orbax's (of the whole or of an item), and this project's.
_UNFINISHED = re.compile(r".*\.tmp-\d*|.*\.orbax-checkpoint-tmp.*|\..*\.tmp", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A checkpoint's folder: ``root`` on this machine, or ``store`` (TensorStore's) in a bucket."""

    name: str
    root: Path | None
    store: dict[str, Any]

    @classmethod
    def of(cls, folder: str | Path) -> "Place":
        """The place of a folder or of a ``gs://`` or ``s3://`` address; UserError if unfinished."""
        name = str(folder).rstrip("/") or str(folder)
        bucket = _BUCKET.fullmatch(name)
        root = None if bucket else Path(folder).resolve()
        for last in {posixpath.basename(name), root.name if root else ""}:
            if _UNFINISHED.fullmatch(last):
                raise UserError(f"{name} is a save that was not finished: use an earlier one")
        if bucket:
            driver = _DRIVERS[bucket[1]]
            store = {"driver": driver, "bucket": bucket[2], "path": _as_folder(bucket[3])}
        else:
            store = {"driver": "file", "path": f"{root}/"}
        return cls(name=name, root=root, store=store)

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None if there is none; UserError for a link out of the folder."""
        if self.root is not None:
            file = self._inside(path, "a file")
            try:
                return file.read_bytes() if file.is_file() else None
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        import tensorstore

        try:
            found = tensorstore.KvStore.open(self.store).result().read(path).result()
        except Exception as error:  # each kind of store has its own
            raise UserError(f"{self.name}/{path} cannot be read: {one_line(error)}") from error
        return bytes(found.value) if found.state == "value" else None

    def below(self, path: object, *, of: str) -> dict[str, Any]:
        """TensorStore's place of the folder ``path``; ``of`` says whose, for the messages.

        UserError if it is not below this folder, by its name or by a link, or not there.
        """
        if not isinstance(path, str):
            raise UserError(f"{self.name}: the place of {of} is not readable")
        normal = posixpath.normpath(path)
        if path.startswith("/") or "\0" in path or normal.split("/")[0] in ("..", "."):
            raise UserError(f"{self.name}: {of} is at {path!r}, outside of the folder")
        if self.root is not None:
            folder = self._inside(normal, of)
            if not folder.is_dir():
                raise UserError(
                    f"{self.name} has no folder {path!r} for {of}: the copy is incomplete"
                )
            for file in folder.rglob("*"):
                if file.is_symlink():
                    self._inside(str(file.relative_to(self.root)), of)
        return {**self.store, "path": _as_folder(f"{self.store['path']}{normal}")}

    def _inside(self, path: str, of: str) -> Path:
        assert self.root is not None
        resolved = (self.root / path).resolve()
        if not resolved.is_relative_to(self.root) or resolved == self.root:
            raise UserError(f"{self.name}: {of} is at {path!r}, outside of the folder")
        return self.root / path


def one_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.partition(" [tensorstore_spec=")[0]
    # TensorStore says first what it did and last what went wrong.
    return line if len(line) <= 240 else f"{line[:60]} ... {line[-160:]}"


def _as_folder(path: str) -> str:
    return f"{path.rstrip('/')}/" if path.rstrip("/") else ""
