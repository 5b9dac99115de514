"""Output files and folders that appear complete, and replace others only on request."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import FLAX, INDEX_SUFFIX, SAFETENSORS, TORCH
from prompt_tuning_jax.checkpoints.location import INDEX, ITEM, METADATA
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.data.vocabularies.tokenizer_files import TOKENIZER_FILES
from prompt_tuning_jax.errors import UserError

PROMPT_SUFFIXES = (".npy", ".safetensors")
_WEIGHTS = (SAFETENSORS, FLAX, TORCH)
# Files of models and adapters, and the entries of T5X checkpoints beside them.
_MODEL_FILES = re.compile(
    r"(generation_|preprocessor_|adapter_)?config\.json|README\.md|LICENSE.*|\.gitattributes|"
    r"((pytorch_|flax_|adapter_)?model)(-\d+-of-\d+)?\.(safetensors|bin|msgpack)(\.index\.json)?|"
    + "|".join(map(re.escape, TOKENIZER_FILES))
)
_T5X = re.compile(rf"{INDEX}|{ITEM}|_[A-Z_]+|(target|state|dataset)\..*")


def require_free(destination: Path, *, overwrite: bool, folder: bool) -> None:
    """Raises UserError unless a file (or a ``folder``) can be written to ``destination``.

    A folder can be written to an empty folder.  With ``overwrite`` a file replaces a file, and a
    folder replaces a folder that contains only a model or only prompts.
    """
    if not os.path.lexists(destination):
        return
    if folder and _is_real_folder(destination) and not _entries(destination):
        return
    if not overwrite:
        raise UserError(f"{destination} exists already: choose another name, or use --overwrite")
    if folder != destination.is_dir():
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise UserError(
            f"{destination} is a {there}, but a {wanted} is to be written: choose another name"
        )
    if folder and not _holds_a_checkpoint(destination):
        raise UserError(
            f"{destination} is a folder with more than a model or prompts, which --overwrite does "
            "not replace: choose another name"
        )


def require_outside(source: str | Path, destination: Path) -> None:
    """Raises UserError if replacing the folder ``destination`` would delete the source."""
    if "://" in str(source) or not destination.is_dir():
        return
    if destination.resolve() in Path(source).resolve().parents:
        raise UserError(f"{destination} contains the source {source}: choose another name")


@contextmanager
def atomic_write_to(destination: Path, *, overwrite: bool, folder: bool) -> Iterator[Path]:
    """Yields a temporary path of the same name, and moves it to ``destination`` at the end.

    The path is in a hidden folder beside ``destination`` and does not exist yet.  The old
    ``destination`` is replaced only when the new one is complete.  After an error, the folders that
    were created for it are removed.  Raises UserError as ``require_free`` does, and for errors of
    the file system.
    """
    require_free(destination, overwrite=overwrite, folder=folder)
    parents = [p for p in (destination.parent, *destination.parent.parents) if not p.exists()]
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary / destination.name
        _swap(
            temporary / destination.name, destination, old=temporary / "replaced" / destination.name
        )
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # not empty, if the write succeeded
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
    entries = _entries(folder)
    if is_peft(folder):
        return all(map(_is_of_a_model, entries))
    if (folder / CONFIG).is_file():
        has_weights = any(
            (folder / (w + end)).is_file() for w in _WEIGHTS for end in ("", INDEX_SUFFIX)
        )
        return has_weights and all(map(_is_of_a_model, entries))
    if any((folder / name).is_file() for name in (INDEX, METADATA)):
        return all(_T5X.fullmatch(p.name) or _is_of_a_model(p) for p in entries)
    return all(p.suffix in PROMPT_SUFFIXES if p.is_file() else is_peft(p) for p in entries)


def _is_of_a_model(entry: Path) -> bool:
    """Returns whether libraries write a file of this name beside a model or an adapter."""
    return entry.is_file() and bool(_MODEL_FILES.fullmatch(entry.name))
