"""One trained prompt in one file: ``.npy`` as the original code writes it, or ``.safetensors``."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.atomic import written_aside
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, HostArray

Format = Literal["npy", "safetensors"]
_KEY = "prompt"
_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """What a prompt was trained for and how; empty and None mean not known.

    ``model_fingerprint`` is ``checkpoints.fingerprint.fingerprint`` of the frozen model, ``score``
    the value of ``metric`` on the task's evaluation split, ``combine`` how the prompt is joined to
    the input, ``created_by`` the program that wrote the file.
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
    combine: str = ""
    created_by: str = ""


def save_prompt(
    path: str | Path,
    prompt_PD: Array | HostArray,
    *,
    metadata: PromptMetadata | None = None,
    format: Format | None = None,
) -> None:
    """Writes a prompt as float32; ``format`` is by the name's ending unless given.

    Only safetensors holds metadata: an ``.npy`` is the bare array.  An empty ``created_by`` is
    filled in.  The file is written aside and renamed.  Raises UserError for what is not a prompt.
    """
    path = Path(path)
    kind = format or path.suffix.removeprefix(".")
    if kind not in ("npy", "safetensors"):
        raise UserError(f"{path}: a prompt is saved as .npy or .safetensors; name it so")
    prompt = _checked(np.asarray(prompt_PD), of="the prompt")
    with written_aside(path) as aside, aside.open("wb") as file:
        if kind == "npy":
            np.lib.format.write_array(file, prompt, allow_pickle=False)
        else:
            from safetensors.numpy import save

            described = metadata or PromptMetadata()
            if not described.created_by:
                described = dataclasses.replace(described, created_by=_this_program())
            file.write(save({_KEY: prompt}, metadata=_to_strings(described)))


def load_prompt(path: str | Path) -> HostArray:
    """The prompt in a file, float32 ``[P,D]``; see ``load_prompt_with_metadata``."""
    return load_prompt_with_metadata(path)[0]


def load_prompt_with_metadata(path: str | Path) -> tuple[HostArray, PromptMetadata]:
    """The prompt in a file, float32 ``[P,D]``, and what is known about it.

    The format is by content, so T5X's ``encoder.prompt.prompt.prompt`` is read too; other floating
    types are converted.  Raises UserError if the file is missing, damaged or not a prompt.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not the file of a prompt")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}") from error
    if start.startswith(_NPY_MAGIC):
        return _checked(_read_npy(path), of=str(path)), PromptMetadata()
    if start[8:] == b"{":  # eight bytes of length, then JSON
        array, strings = _read_safetensors(path)
        return _checked(array, of=str(path)), _from_strings(strings, path=path)
    raise UserError(f"{path} is neither an .npy nor a .safetensors file")


def check_fits(
    prompt: Array | HostArray,
    metadata: PromptMetadata,
    *,
    embed_dim: int,
    fingerprint: str,
    path: str | Path,
    allow_other_model: bool = False,
) -> None:
    """Raises UserError unless a prompt is for the frozen model with this width and fingerprint.

    A prompt that does not say which model it is for may be for any of its width.
    """
    width = prompt.shape[-1]
    if width != embed_dim:
        raise UserError(f"{path} has width {width}, and the model has width {embed_dim}")
    theirs = metadata.model_fingerprint
    if theirs and theirs != fingerprint and not allow_other_model:
        named = f" {metadata.model_name}" if metadata.model_name else ""
        raise UserError(
            f"{path} was trained for another model{named} (fingerprint {theirs}, this one has "
            f"{fingerprint}); use that one, or say allow_other_model to go on"
        )


def _checked(prompt: HostArray, *, of: str) -> HostArray:
    """As contiguous float32, if this is a prompt."""
    shape = list(prompt.shape)
    if prompt.ndim != 2:
        raise UserError(f"{of} has shape {shape}; a prompt has two axes, [length, model width]")
    if not prompt.size:
        raise UserError(f"{of} is empty: its shape is {shape}")
    if prompt.dtype.kind not in "fV" or (prompt.dtype.kind == "V" and prompt.dtype != "bfloat16"):
        raise UserError(f"{of} holds {prompt.dtype}; a prompt holds floating-point numbers")
    with np.errstate(over="ignore"):  # what is too large for float32 is reported below
        prompt = np.ascontiguousarray(prompt, np.float32)
    if not np.isfinite(prompt).all():
        raise UserError(f"{of} holds numbers that are not finite (NaN or infinity)")
    return prompt


def _read_npy(path: Path) -> HostArray:
    try:
        # Mapped: a header that claims more than the file has is an error, not an allocation.
        array: HostArray = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=10_000)
        return array
    except Exception as error:  # numpy raises many kinds for damaged headers
        raise UserError(f"{path} is a damaged .npy file: {_line(error)}") from error


def _read_safetensors(path: Path) -> tuple[HostArray, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if names != [_KEY]:
                listed = ", ".join(sorted(names)[:5]) or "nothing"
                raise UserError(f"{path} holds {listed}; a prompt's file holds one array {_KEY!r}")
            return file.get_tensor(_KEY), file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is a damaged .safetensors file: {_line(error)}") from error


def _to_strings(metadata: PromptMetadata) -> dict[str, str]:
    """Only what is known; text as it is and the rest as JSON, since values must be strings."""
    known = {key: value for key, value in vars(metadata).items() if value not in ("", None, ())}
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in known.items()}


def _from_strings(strings: dict[str, str], *, path: Path) -> PromptMetadata:
    """The inverse of ``_to_strings``; keys of other programs are passed over."""
    readers = {
        "seed": lambda text: int(text),
        "steps": lambda text: int(text),
        "score": lambda text: float(text),
        "labels": lambda text: _labels(json.loads(text)),
    }
    values: dict[str, Any] = {}
    for field in dataclasses.fields(PromptMetadata):
        if field.name in strings:
            text = strings[field.name]
            try:
                values[field.name] = readers.get(field.name, str)(text)
            except ValueError as error:
                raise UserError(f"{path}: its metadata has {field.name} = {text[:80]!r}") from error
    return PromptMetadata(**values)


def _labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("labels are a list of strings")
    return tuple(value)


def _this_program() -> str:
    try:
        return f"prompt_tuning_jax {distributions.version('prompt_tuning_jax')}"
    except distributions.PackageNotFoundError:
        return "prompt_tuning_jax"


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
