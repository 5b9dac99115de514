"""A file or folder takes its name when it is whole, and takes nothing else's without being told."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_tuning_jax.checkpoints.hf.config import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import FLAX, INDEX_SUFFIX, SAFETENSORS, TORCH
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.checkpoints.t5x.orbax import METADATA
from prompt_tuning_jax.checkpoints.t5x.reader import INDEX
from prompt_tuning_jax.errors import UserError

PROMPT_SUFFIXES = (".npy", ".safetensors")


def require_free(destination: Path, *, overwrite: bool, folder: bool) -> None:
    """Raises UserError unless a file (or a ``folder``) can be put at ``destination``.

    An empty folder is free for a folder.  With ``overwrite`` a file makes place for a file, and a
    folder for a folder if it holds a model or prompts and nothing but them.
    """
    if not os.path.lexists(destination):
        return
    if folder and _is_real_folder(destination) and not _entries(destination):
        return
    if not overwrite:
        raise UserError(f"{destination} exists already: name another, or say --overwrite")
    if folder != destination.is_dir():
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise UserError(
            f"{destination} is a {there}, and a {wanted} is to be written: name another"
        )
    if folder and not _holds_a_checkpoint(destination):
        raise UserError(
            f"{destination} is a folder that holds more than a model or prompts, which "
            "--overwrite does not replace: name another"
        )


def require_outside(source: str | Path, destination: Path) -> None:
    """Raises UserError if replacing the folder ``destination`` took the source with it."""
    if "://" in str(source) or not destination.is_dir():
        return
    if destination.resolve() in Path(source).resolve().parents:
        raise UserError(f"{destination} holds the source {source}: name another place")


@contextmanager
def atomic_write_to(destination: Path, *, overwrite: bool, folder: bool) -> Iterator[Path]:
    """A path to write to, of the same name, which becomes ``destination`` at the end, or nothing.

    It lies in a hidden folder beside ``destination`` and does not exist yet.  What was at
    ``destination`` goes only when all of the new is there.  After an error, folders that were made
    on the way to it are gone again.  Raises UserError as ``require_free`` and for the file system.
    """
    require_free(destination, overwrite=overwrite, folder=folder)
    parents = [p for p in (destination.parent, *destination.parent.parents) if not p.exists()]
    aside = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside / destination.name
        _swap(aside / destination.name, destination, old=aside / "replaced" / destination.name)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # what has been written keeps them
                parent.rmdir()


def _swap(new: Path, destination: Path, *, old: Path) -> None:
    if not _is_real_folder(destination):
        os.replace(new, destination)
        return
    old.parent.mkdir()
    os.rename(destination, old)
    try:
        os.rename(new, destination)
    except BaseException:
        os.rename(old, destination)
        raise


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def _holds_a_checkpoint(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    weights = (SAFETENSORS, FLAX, TORCH)
    # PEFT's trainer leaves a config.json of the model beside an adapter.
    if (folder / CONFIG).is_file() and not is_peft(folder):
        return any((folder / (w + end)).is_file() for w in weights for end in ("", INDEX_SUFFIX))
    if is_peft(folder) or any((folder / name).is_file() for name in (INDEX, METADATA)):
        return True
    return all(p.suffix in PROMPT_SUFFIXES if p.is_file() else is_peft(p) for p in _entries(folder))
