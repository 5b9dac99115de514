"""Where a T5X checkpoint lies, and that nothing in it leads anywhere else.

An index names its arrays by paths, and whoever wrote it chose them: here they become places below
the folder that the user named, on this machine or in a bucket, or an error.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.bucket import Bucket, as_folder, one_line, store_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import stored_bytes

__all__ = ["Place", "one_line"]

# T5X's own saves, Orbax's (of the whole or of an item), and this project's.
_UNFINISHED = re.compile(r".*\.tmp-\d*|.*\.orbax-checkpoint-tmp.*|\..*\.tmp", re.DOTALL)
# Bytes of an index or of metadata; arrays of any size lie beside it.
_MOST_READ = 2**28


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
        store = store_of(name)
        root = None if store else Path(folder).resolve()
        for last in {posixpath.basename(name), root.name if root else ""}:
            if _UNFINISHED.fullmatch(last):
                raise UserError(f"{name} is a save that was not finished: use an earlier one")
        return cls(name=name, root=root, store=store or {"driver": "file", "path": f"{root}/"})

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None if there is none; UserError for a link out of the folder."""
        if self.root is not None:
            file = self._inside(path, "a file")
            try:
                if not file.is_file():
                    return None
                with file.open("rb") as opened:
                    data = opened.read(_MOST_READ + 1)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
            if len(data) > _MOST_READ:
                raise UserError(f"{file} has more than the {_MOST_READ} bytes that are read of one")
            return data
        return Bucket(self.name).read(path)

    def stored_bytes(self) -> int | None:
        """What all files of the folder take on the disk; None in a bucket."""
        return None if self.root is None else stored_bytes(self.root)

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
        return {**self.store, "path": as_folder(f"{self.store['path']}{normal}")}

    def _inside(self, path: str, of: str) -> Path:
        assert self.root is not None
        resolved = (self.root / path).resolve()
        allowed = (self.root, *_blobs(self.root))
        if resolved == self.root or not any(resolved.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{self.name}: {of} is at {path!r}, outside of the folder")
        return self.root / path


def _blobs(root: Path) -> tuple[Path, ...]:
    """Where the files of a folder in the cache of the Hugging Face hub are; none for any other.

    The cache keeps them beside its snapshots, ``models--org--name/snapshots/<commit>``, which are
    folders of links to ``models--org--name/blobs``, or further to ``blobs`` of the whole cache.
    """
    for snapshot in (root, *root.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            return model / "blobs", model.parent / "blobs"
    return ()
