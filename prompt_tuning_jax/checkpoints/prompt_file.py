"""One trained prompt, in every form that there is.

A file of its own (``.npy`` as the original code writes it, or ``.safetensors``), a PEFT adapter's
folder, or an array in a T5X checkpoint.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as distributions
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.peft import adapter_file
from prompt_tuning_jax.checkpoints.prompt_array import (
    checked_prompt,
    npy_safe,
    read_npy,
    read_safetensors,
    safetensors_bytes,
)
from prompt_tuning_jax.checkpoints.t5x import reader
from prompt_tuning_jax.checkpoints.tuned_format import tuned_by
from prompt_tuning_jax.data.tasks.task import TrainedTask, tasks_known_as
from prompt_tuning_jax.data.tasks.wording import checked_template, template_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.typing import Array, DType, HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json

Format = Literal["npy", "safetensors"]
# What a prompt is read from.
Source = Literal["npy", "safetensors", "PEFT adapter", "T5X checkpoint"]
_KEY = "prompt"
_NPY_MAGIC = b"\x93NUMPY"
# What T5X's own export of a prompt to a file calls it.
_T5X_FILE = "encoder.prompt.prompt.prompt"


@dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """What a prompt was trained for and how; empty and None mean not known.

    ``inputs_template`` is the wording of its inputs, with columns in braces
    (``data.wording``), and ``mixture`` the tasks where it was trained on several, whose labels
    are all in ``labels``.  ``model_fingerprint`` is ``checkpoints.fingerprint.fingerprint`` of the
    frozen model, ``score`` the value of ``metric`` on the task's evaluation split, ``combine`` how
    the prompt is joined to the input, ``origin`` where it is from if it was not trained,
    ``created_by`` the program that wrote the file.
    """

    model_fingerprint: str = ""
    model_name: str = ""
    task: str = ""
    init: str = ""
    seed: int | None = None
    steps: int | None = None
    metric: str = ""
    score: float | None = None
    labels: tuple[str, ...] = ()
    inputs_template: str = ""
    mixture: tuple[TrainedTask, ...] = ()
    combine: str = ""
    origin: str = ""
    created_by: str = ""


def tasks_of(metadata: PromptMetadata) -> tuple[TrainedTask, ...]:
    """The tasks of the mixture that a prompt was trained on; none where it was one alone.

    Files of before the mixture was written into them have its name, which may be known here.
    """
    if metadata.mixture:
        return metadata.mixture
    known = tasks_known_as(metadata.task)
    if len(known) < 2:
        return ()
    return tuple(
        TrainedTask(
            name=task.name,
            labels=tuple(one for one in task.labels if one in metadata.labels) or task.labels,
            inputs_template="" if task.from_text is None else template_of(task.from_text),
        )
        for task in known
    )


def for_task(metadata: PromptMetadata, task: TrainedTask) -> PromptMetadata:
    """The same of one of its tasks alone."""
    return dataclasses.replace(
        metadata,
        task=task.name,
        labels=task.labels,
        inputs_template=task.inputs_template,
        mixture=(),
    )


def shared_labels(labels: Mapping[str, tuple[str, ...]], *, instead: str) -> tuple[str, ...]:
    """What all prompts that vote together choose between, by their names; empty: not known.

    In the order that all have, else in alphabetical order, so that the order of the prompts
    decides nothing.  UserError where two know other labels; ``instead`` says what to do.
    """
    known = {name: own for name, own in labels.items() if own}
    if not known:
        return ()
    first, own = next(iter(known.items()))
    for name, other in known.items():
        if {*other} != {*own}:
            raise UserError(
                f"{first} was trained on the labels {listed(own)} and {name} on {listed(other)}; "
                f"{instead}"
            )
    return own if all(other == own for other in known.values()) else tuple(sorted(own))


def listed(labels: Sequence[str]) -> str:
    """Labels in a message: the first of them."""
    return ", ".join(label[:40] for label in labels[:8]) + ", ..." * (len(labels) > 8)


@dataclass(frozen=True, kw_only=True)
class StoredPrompt:
    """A prompt ``[P,D]`` in the floating-point type that it is stored in, and where it was.

    ``adapter`` is the PEFT adapter that it was in, if it was in one.
    """

    prompt_PD: HostArray
    metadata: PromptMetadata
    source: Source
    adapter: adapter_file.PeftPrompt | None = None


def save_prompt(
    path: str | Path,
    prompt_PD: Array | HostArray,
    *,
    metadata: PromptMetadata | None = None,
    format: Format | None = None,
    dtype: DType | None = np.float32,
) -> None:
    """Writes a prompt as ``dtype``; ``format`` is by the name's ending unless given.

    ``dtype`` None keeps the prompt's own (in an ``.npy``, bfloat16 becomes float32).  Only
    safetensors holds metadata: an ``.npy`` is the bare array.  An empty ``created_by`` is filled
    in.  The same input gives the same bytes.  The file is written aside and renamed.  Raises
    UserError for what is not a prompt.
    """
    path = Path(path)
    kind = format or path.suffix.removeprefix(".")
    if kind not in ("npy", "safetensors"):
        raise UserError(f"{path}: a prompt is saved as .npy or .safetensors; name it so")
    prompt = checked_prompt(np.asarray(prompt_PD), of="the prompt", dtype=dtype)
    with atomic_write(path) as aside, aside.open("wb") as file:
        if kind == "npy":
            np.lib.format.write_array(file, npy_safe(prompt), allow_pickle=False)
        else:
            described = metadata or PromptMetadata()
            if not described.created_by:
                described = dataclasses.replace(described, created_by=this_program())
            file.write(safetensors_bytes(prompt, key=_KEY, metadata=metadata_to_strings(described)))


def load_prompt(
    path: str | Path, *, width: int | None = None, dtype: DType | None = np.float32
) -> HostArray:
    """The prompt ``[P,D]`` in a file or folder; see ``load_prompt_with_metadata``."""
    return load_prompt_with_metadata(path, width=width, dtype=dtype)[0]


def load_prompt_with_metadata(
    path: str | Path, *, width: int | None = None, dtype: DType | None = np.float32
) -> tuple[HostArray, PromptMetadata]:
    """The prompt ``[P,D]`` in a file or folder as ``dtype``, and what is known about it.

    What it is, is told by content: an ``.npy`` (also T5X's ``encoder.prompt.prompt.prompt``), this
    project's ``.safetensors``, the folder of a PEFT adapter, or a T5X checkpoint with a prompt,
    which may be at a ``gs://`` or ``s3://`` address.
    ``dtype`` None keeps the floating-point type that is stored; ``width`` is the model's, if it is
    known.  Raises UserError if it is missing, damaged, of another width or not a prompt.
    """
    stored = read_prompt(path)
    if width is not None:
        _check_width(stored.prompt_PD, width=width, path=path)
    prompt_PD = stored.prompt_PD if dtype is None else stored.prompt_PD.astype(dtype, copy=False)
    return prompt_PD, stored.metadata


def read_prompt(path: str | Path) -> StoredPrompt:
    """The prompt in a file or folder as it is stored; errors as ``load_prompt_with_metadata``."""
    given: object = path  # not everybody checks types
    if not isinstance(given, str | Path):
        raise UserError(f"a prompt is read from a path, not from {type(given).__name__}")
    if "://" in str(path):
        return _read_t5x(str(path))
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}") from error
    source: Source
    metadata = PromptMetadata()
    if start.startswith(_NPY_MAGIC):
        array, source = read_npy(path), "npy"
    elif start[8:] == b"{":  # eight bytes of length, then JSON
        if (kind := tuned_by(path)) is not None:
            raise UserError(
                f"{path} holds what {kind or 'another method'} tuned and no prompt; predict, eval "
                "and serve take it with --prompt(s)"
            )
        hint = ""
        if (path.parent / adapter_file.CONFIG).is_file():
            hint = f"; if it belongs to a PEFT adapter, name the folder {path.parent}"
        array, strings = read_safetensors(path, key=_KEY, of="a prompt's file", hint=hint)
        metadata, source = metadata_from_strings(strings, path=path), "safetensors"
    else:
        raise UserError(f"{path} is neither an .npy nor a .safetensors file{_guess(start)}")
    prompt_PD = checked_prompt(array, of=str(path), dtype=None)
    return StoredPrompt(prompt_PD=prompt_PD, metadata=metadata, source=source)


def check_fits(
    prompt: Array | HostArray,
    metadata: PromptMetadata,
    *,
    embed_dim: int,
    fingerprint: str,
    path: str | Path,
    allow_other_model: bool | None = None,
) -> None:
    """Raises UserError unless a prompt is for the frozen model with this width and fingerprint.

    A prompt that does not say which model it is for may be for any of its width.
    """
    _check_width(prompt, width=embed_dim, path=path)
    check_model(metadata, fingerprint=fingerprint, path=path, allow_other_model=allow_other_model)


def check_model(
    metadata: PromptMetadata,
    *,
    fingerprint: str,
    path: str | Path,
    allow_other_model: bool | None = None,
) -> None:
    """Raises UserError where something says that it was trained for another model than this.

    ``allow_other_model`` is None where the user is not offered that.
    """
    theirs = metadata.model_fingerprint
    if theirs and theirs != fingerprint and not allow_other_model:
        named = " ".join(["", *metadata.model_name.split()])[:100]
        raise UserError(
            f"{path} was trained for another model{named} (fingerprint {theirs[:32]}, this one has "
            f"{fingerprint}); use that one"
            + (", or say allow_other_model to go on" if allow_other_model is not None else "")
        )


def _check_width(prompt: Array | HostArray, *, width: int, path: str | Path) -> None:
    if prompt.shape[-1] != width:
        raise UserError(f"{path} has width {prompt.shape[-1]}, and the model has width {width}")


def _read_folder(folder: Path) -> StoredPrompt:
    if adapter_file.is_peft(folder):
        adapter = adapter_file.read_peft(folder)
        metadata = PromptMetadata(
            model_name=adapter.base_model_name_or_path,
            created_by=f"peft {adapter.peft_version}".rstrip(),
        )
        return StoredPrompt(
            prompt_PD=adapter.prompt_PD, metadata=metadata, source="PEFT adapter", adapter=adapter
        )
    if reader.is_t5x(folder):
        return _read_t5x(folder)
    named = [p for p in (folder / _T5X_FILE, *sorted(folder.glob("checkpoint_*"))) if p.exists()]
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and is_prompt_file(p))
    inside = named or list(islice(files, 1))
    hint = f"; did you mean {inside[-1]}?" if inside else ""
    raise UserError(
        f"{folder} is a folder without a prompt: "
        f"it has neither a PEFT adapter's {adapter_file.CONFIG} "
        f"nor a T5X checkpoint's {reader.INDEX!r}{hint}"
    )


def _read_t5x(folder: str | Path) -> StoredPrompt:
    params = reader.open_t5x(folder).params
    if others := [name for name in params if reader.is_prompt(name) and name != reader.PROMPT]:
        raise UserError(
            f"{folder} is a T5X checkpoint with {len(others)} prompts besides the encoder's input, "
            f"{others[0]} first; only one prompt, at {reader.PROMPT}, is read"
        )
    stored = params.get(reader.PROMPT)
    if stored is None:
        raise UserError(f"{folder} is a T5X checkpoint without a prompt (no {reader.PROMPT})")
    prompt_PD = checked_prompt(stored.whole(), of=f"{reader.PROMPT} in {folder}", dtype=None)
    return StoredPrompt(prompt_PD=prompt_PD, metadata=PromptMetadata(), source="T5X checkpoint")


def is_prompt_file(path: Path) -> bool:
    """Whether a file begins as one that can hold a prompt, whatever its name; T5X's has none."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start.startswith(_NPY_MAGIC) or start[8:] == b"{"


def _guess(start: bytes) -> str:
    """What a file that is no prompt is, by its first bytes."""
    if not start:
        return ": it is empty"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ": it is a zip archive (an .npz or PyTorch's)"
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return ": it is a pickle, which is never loaded"
    return ""


def metadata_to_strings(metadata: PromptMetadata) -> dict[str, str]:
    """Only what is known; text as it is and the rest as JSON, since values must be strings."""
    known = {
        key: value
        for key, value in dataclasses.asdict(metadata).items()
        if value not in ("", None, ())
    }
    if metadata.score is not None and not math.isfinite(metadata.score):
        del known["score"]  # JSON has no number for it
    return {key: v if isinstance(v, str) else json_text(v) for key, v in known.items()}


def metadata_from_strings(strings: dict[str, str], *, path: Path) -> PromptMetadata:
    """The inverse of ``metadata_to_strings``; keys of other programs are passed over."""
    readers = {
        "seed": lambda text: int(text),
        "steps": lambda text: int(text),
        "score": lambda text: float(text),
        "labels": lambda text: _labels(read_json(text, of="labels")),
        "inputs_template": checked_template,
        "mixture": lambda text: _mixture(read_json(text, of="mixture")),
    }
    values: dict[str, Any] = {}
    for field in dataclasses.fields(PromptMetadata):
        if field.name in strings:
            text = strings[field.name]
            try:
                values[field.name] = readers.get(field.name, str)(text)
            except UserError as error:
                raise UserError(f"{path}: its metadata: {error}") from None
            except ValueError as error:
                raise UserError(
                    f"{path}: damaged metadata: {field.name} must be a number, not {text[:60]!r}"
                ) from error
    return PromptMetadata(**values)


def _labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("labels are a list of strings")
    return tuple(value)


def _mixture(value: Any) -> tuple[TrainedTask, ...]:
    if not isinstance(value, list):
        raise ValueError("a mixture is a list of tasks")
    tasks = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError("each task of a mixture has a name")
        template = one.get("inputs_template", "")
        if not isinstance(template, str):
            raise ValueError("inputs_template is a text")
        tasks.append(
            TrainedTask(
                name=one["name"],
                labels=_labels(one.get("labels", [])),
                inputs_template=checked_template(template),
            )
        )
    return tuple(tasks)


def this_program() -> str:
    """Its name and version, for what it writes."""
    try:
        return f"prompt_tuning_jax {distributions.version('prompt_tuning_jax')}"
    except distributions.PackageNotFoundError:
        return "prompt_tuning_jax"
