"""Files are written aside and renamed, so that a reader sees the old one or the new one.

Where this project keeps what it can make again.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_tuning_jax.errors import UserError

# The names that are written aside, and whose process number is in them.
_ASIDE = re.compile(r"\..+\.([0-9]+)\.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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


def remove_leftovers(*folders: Path) -> None:
    """Removes what processes that are no more had begun to write aside in these folders.

    Also what is of this process's number: such a one had the number before it, so that this must
    come before this one writes there itself.
    """
    for folder in folders:
        with suppress(OSError):
            for path in folder.iterdir():
                found = _ASIDE.fullmatch(path.name)
                if found is None or _is_another_alive(int(found[1])):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()


def _is_another_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _flush(path: Path) -> None:
    """Puts the bytes on the disk before the name points to them, for the sake of power cuts."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> UserError:
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"cannot write {path}: {error.strerror or error}{where}")


def user_cache(name: str) -> Path:
    """``$XDG_CACHE_HOME/prompt_tuning_jax/NAME``, ``~/.cache`` where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prompt_tuning_jax" / name
