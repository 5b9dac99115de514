"""Atomic writes: a reader sees either the old file or the new one.

Also a user's home in paths, the order of files in a folder, and the folder of this package's
caches.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from prompt_tuning_jax.errors import UserError

# Temporary names, which contain the process number of their writer.
_TEMPORARY = re.compile(r"\..+\.([0-9]+)\.tmp")


def expanded(path: str | Path) -> Path:
    """Returns the path with a leading ``~`` or ``~user`` replaced by that user's home.

    That of an unknown user stays as it is, a path that does not exist: ``Path.expanduser`` raises
    RuntimeError.
    """
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it to ``path`` at the end.

    Missing folders are created.  If the body fails, the temporary file is removed and ``path`` is
    unchanged.  Errors of the file system become a UserError that names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def text_output(path: str | Path) -> Iterator[TextIO]:
    """Yields a text file that is written to ``path``, atomically unless that is a device.

    A device, such as /dev/stdout, is written to as it is: renaming a file to it would replace it.
    """
    place = Path(path)
    is_device = place.as_posix().startswith(("/dev/", "/proc/"))
    if is_device or (place.exists() and not place.is_file()):
        try:
            with place.open("w", encoding="utf-8") as file:
                yield file
        except OSError as error:
            raise _cannot_write(place, error) from error
        return
    with atomic_write(place) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


@contextmanager
def atomic_write_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder, and moves its files into ``folder`` at the end.

    A new folder appears all at once.  In an existing one, files of the same name are replaced one
    by one, in reverse order of their names, and other files stay.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        # The reverse order puts weights before the config that describes them: if the process is
        # killed in between, their shapes do not match, which a reader reports.
        files = sorted(temporary.iterdir(), reverse=True)
        for file in files:
            flush_to_disk(file)
        if folder.exists():
            for file in files:
                os.replace(file, folder / file.name)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files that processes which no longer run left in these folders.

    Files with this process's own number are removed, too (an earlier process had the same number),
    so call this before this process writes there.
    """
    for folder in folders:
        with suppress(OSError):
            for path in folder.iterdir():
                match = _TEMPORARY.fullmatch(path.name)
                if match is None or _is_another_alive(int(match[1])):
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
    except OSError:  # another user's process
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Writes the bytes to the disk before the rename, so that a power cut loses neither file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> UserError:
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"cannot write {path}: {error.strerror or error}{where}")


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts seed_2 before seed_10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d{1,18})", name)
    ]


def user_cache(name: str) -> Path:
    """Returns ``$XDG_CACHE_HOME/prompt_tuning_jax/NAME``.

    ``~/.cache`` is used if that is not set, or relative, as the XDG specification says.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "prompt_tuning_jax" / name
