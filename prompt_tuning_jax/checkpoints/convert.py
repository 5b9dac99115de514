"""Converts models and prompts between formats."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from prompt_tuning_jax.checkpoints.convert_model import (
    DTYPES,
    MAX_SHARD_BYTES,
    Converted,
    StoredAs,
    convert_to_hf,
    convert_to_t5x,
)
from prompt_tuning_jax.checkpoints.convert_prompt import convert_prompts, prompt_files
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.hub import is_gguf
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.checkpoints.t5x.methods import Combined
from prompt_tuning_jax.config.paths import NAMED_MODELS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import expanded

__all__ = ["FORMATS", "Converted", "Format", "convert"]

Format = Literal["hf", "t5x", "npy", "safetensors", "peft"]
FORMATS: tuple[Format, ...] = ("hf", "t5x", "npy", "safetensors", "peft")
_MODELS: tuple[Format, ...] = ("hf", "t5x")
_CHECKPOINT = re.compile(r"checkpoint_\d+")
_OPTIONS = {"max_shard_bytes": "max_shard_size"}  # names that differ on the command line
# The formats that each option applies to.
_FOR: dict[str, tuple[Format, ...]] = {
    "prompt": ("t5x",),
    "step": ("t5x",),
    "unscan": ("t5x",),
    "vocabulary": _MODELS,
    "relpos_max_distance": ("hf",),
    "max_shard_bytes": ("hf",),
    "model": ("npy", "safetensors", "peft"),
    "allow_other_model": ("t5x", "npy", "safetensors", "peft"),
    "combine": ("npy", "safetensors", "peft"),
}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format | None = None,
    dtype: StoredAs = "stored",
    prompt: str | Path = "",
    step: int | None = None,
    unscan: bool = False,
    vocabulary: str | Path = "",
    relpos_max_distance: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model: str | Path = "",
    allow_other_model: bool = False,
    combine: Combined | Literal[""] = "",
    overwrite: bool = False,
) -> Converted:
    """Writes a model or prompt in another format, bit for bit unless ``dtype`` says otherwise.

    ``source`` is a model (as for ``load_model``), a prompt (as for ``load_prompt``), or a folder of
    prompt files.  ``to`` may be omitted if ``destination`` is named ``*.npy``, ``*.safetensors`` or
    ``checkpoint_<step>``.

    Models are written as ``hf``, in files of at most ``max_shard_bytes``, or as ``t5x``, in
    ``destination/checkpoint_<step>``, optionally with a ``prompt``; a ``t5x`` is always a T5.  Both
    get the source's vocabulary or the file ``vocabulary`` (``bytes`` for ByT5's).  ``step``
    defaults to the source's step, or 0.  Written as ``t5x``, a T5X source keeps its optimizer's
    state (unless a new prompt is given) and its scanned layers (unless ``unscan``).  Written as
    ``hf``, it may need ``relpos_max_distance``, which T5X checkpoints do not store.

    Prompts are written as ``npy``, ``safetensors`` (with their metadata) or ``peft``.  ``model`` is
    the frozen model of the prompts.  They must fit it, and a PEFT adapter stores its name.
    ``combine`` is for multitask and per-layer prompts in a T5X checkpoint that does not tell it.

    Arrays are read one by one: the host holds one array, or one file of an ``hf`` folder.  A
    terminal shows a progress bar.  Existing output is replaced only with ``overwrite``; an error or
    interrupt leaves nothing behind.  Raises UserError.
    """
    source, destination = str(source), Path(os.path.abspath(expanded(destination)))
    to = format_of(destination, to)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {
        "prompt": str(prompt),
        "step": step,
        "unscan": unscan,
        "vocabulary": str(vocabulary),
        "relpos_max_distance": relpos_max_distance,
        "max_shard_bytes": None if max_shard_bytes == MAX_SHARD_BYTES else max_shard_bytes,
        "model": str(model),
        "allow_other_model": allow_other_model,
        "combine": combine,
    }
    # ``step=0`` counts as given, although 0 == False.
    given = {n: v for n, v in options.items() if v is not None and v is not False and v != ""}
    require_options_of(to, given)
    used: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite}
    if combine:
        raise UserError(
            f"--combine {combine} is about multitask and per-layer prompts in a T5X checkpoint, "
            f"and {source} holds none"
        )
    used |= {name: value for name, value in given.items() if to in _FOR[name]}
    if to in _MODELS:
        _require_model(source, to)
        write = convert_to_hf if to == "hf" else convert_to_t5x
        return write(source, destination, **used)
    assert to in ("npy", "safetensors", "peft")
    return convert_prompts(_prompt_source(source, destination, to), destination, to=to, **used)


def require_options_of(to: Format, given: Iterable[str]) -> None:
    """Raises UserError for an option that does not apply to the format ``to``."""
    for name in given:
        if to not in _FOR[name]:
            option = _OPTIONS.get(name, name)
            only = " or ".join(_FOR[name])
            raise UserError(f"--{option} only goes with --to {only}; this is written as {to}")


def format_of(destination: Path, to: Format | None) -> Format:
    """Returns ``to``, or the format that the name implies; UserError if the two disagree."""
    suffix = destination.suffix.removeprefix(".")
    if to is not None and to not in FORMATS:
        raise UserError(f"to is {to!r}; it is one of {', '.join(FORMATS)}")
    if destination.suffix in PROMPT_SUFFIXES and to in (None, suffix):
        return "npy" if suffix == "npy" else "safetensors"
    if destination.suffix in PROMPT_SUFFIXES:
        raise UserError(f"{destination} ends in .{suffix}, but --to is {to}: change one of them")
    if to is not None:
        return to
    if _CHECKPOINT.fullmatch(destination.name):
        return "t5x"
    raise UserError(
        f"the name {destination.name} does not tell a format: say --to {', '.join(FORMATS[:-1])} "
        f"or {FORMATS[-1]}"
    )


def _require_model(source: str, to: Format) -> None:
    path = Path(source)
    if is_gguf(path):
        return
    if path.is_dir() and (is_peft(path) or prompt_files(source)):
        kind = "a prompt" if is_peft(path) else "prompts"
    elif path.is_file():
        kind = "a file, as prompts are"
    else:
        return
    instead = (
        f"to put a prompt into a checkpoint, convert the model with --prompt {source}"
        if to == "t5x"
        else "prompts are written as npy, safetensors or peft"
    )
    raise UserError(f"{source} is {kind}, and {to} is a format of models; {instead}")


def _prompt_source(source: str, destination: Path, to: Format) -> str:
    """Returns the prompt or folder to read.

    A folder with a single prompt stands for that prompt if ``destination`` is a file.  Raises
    UserError for a model, and for several prompts that would be written to one file.
    """
    path = Path(source)
    if is_gguf(path) or (not path.exists() and source in NAMED_MODELS):
        raise UserError(f"{source} is a model, and {to} is a format of prompts")
    files = prompt_files(source) if destination.suffix in PROMPT_SUFFIXES else None
    if not files:
        return source
    if len(files) > 1:
        raise UserError(
            f"{source} holds several prompts: name a folder for them, without {destination.suffix},"
            " and say --to"
        )
    return str(files[0])
