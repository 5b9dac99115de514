"""Files are written aside and renamed, so that a reader sees the old one or the new one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_tuning_jax.errors import UserError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes the place of ``path`` at the end.

    Missing folders are made.  If the body fails, nothing is left and ``path`` is as it was; a
    failure of the file system becomes a UserError that names ``path``.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _flush(aside)
        os.replace(aside, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            aside.unlink()


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` whose files go into ``folder`` at the end.

    A new folder appears all at once.  In one that exists, files of the same name are replaced one
    by one in the order of their names backwards, and the others stay.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        # Backwards puts weights before the config that describes them: after a kill in between
        # the shapes do not match, which a reader reports.
        files = sorted(aside.iterdir(), reverse=True)
        for file in files:
            _flush(file)
        if folder.exists():
            for file in files:
                os.replace(file, folder / file.name)
        else:
            os.replace(aside, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Puts the bytes on the disk before the name points to them, for the sake of power cuts."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> UserError:
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"cannot write {path}: {error.strerror or error}{where}")
