"""Reads and writes prompts.

A prompt is an ``.npy`` file (as the original code writes), a ``.safetensors`` file with metadata,
the folder of a PEFT adapter, or an array in a T5X checkpoint.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata as distributions
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.array_files import (
    checked_prompt,
    npy_safe,
    read_npy,
    read_safetensors,
    safetensors_bytes,
    tuned_by,
)
from prompt_tuning_jax.checkpoints.location import INDEX, is_t5x
from prompt_tuning_jax.checkpoints.parameters import PROMPT, is_prompt, is_trained
from prompt_tuning_jax.checkpoints.peft import adapter_file
from prompt_tuning_jax.checkpoints.t5x.methods import has_method, is_numpy_folder
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.methods import Placement, PromptTuning
from prompt_tuning_jax.config.overrides import checked
from prompt_tuning_jax.data.tasks.registry import tasks_known_as
from prompt_tuning_jax.data.tasks.task import TrainedTask
from prompt_tuning_jax.data.tasks.wording import checked_template, template_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.typing import Array, DType, HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json

Format = Literal["npy", "safetensors"]
# Where a prompt was read from.
Source = Literal["npy", "safetensors", "PEFT adapter", "T5X checkpoint"]
_KEY = "prompt"
_NPY_MAGIC = b"\x93NUMPY"
# The name of the file to which T5X exports a prompt.
_T5X_FILE = "encoder.prompt.prompt.prompt"


@dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """How a prompt was trained, and for what; empty and None mean unknown.

    Attributes:
      model_fingerprint: ``checkpoints.fingerprint.fingerprint`` of the frozen model.
      score: of ``metric`` on the task's evaluation split.
      labels: of the task, or of all tasks of a mixture.
      inputs_template: the wording of the inputs, with columns in braces (``data.tasks.wording``).
      chat: whether inputs were messages in the chat template of the model's tokenizer.
      normalize_length: whether labels were ranked by the mean log-probability of their tokens.
      mixture: its tasks, if it was trained on several.
      combine: how the prompt is joined to the input.
      model_type: the family of the model, such as ``gemma2``; empty for a T5.
      embedding_scale: a factor on the model's token embeddings that the prompt does not get
        (Gemma, T5Gemma): the prompt is in the space of embeddings that have it already.  None is 1.
        transformers 4 multiplies prompts by it as well, and so does every version in a T5Gemma 1.
      origin: where it comes from, if it was not trained.
      created_by: the program that wrote the file.
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
    chat: bool = False
    normalize_length: bool = False
    mixture: tuple[TrainedTask, ...] = ()
    combine: str = ""
    model_type: str = ""
    embedding_scale: float | None = None
    origin: str = ""
    created_by: str = ""


def tasks_of(metadata: PromptMetadata) -> tuple[TrainedTask, ...]:
    """Returns the tasks of the mixture that a prompt was trained on; empty for a single task.

    Old files have only the name of the mixture, which is looked up.
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
    """Returns the metadata for one task of the mixture."""
    return dataclasses.replace(
        metadata,
        task=task.name,
        labels=task.labels,
        inputs_template=task.inputs_template,
        mixture=(),
    )


def shared_labels(labels: Mapping[str, tuple[str, ...]], *, instead: str) -> tuple[str, ...]:
    """Returns the labels that all members of an ensemble share; empty if unknown.

    ``labels`` are by member.  Their common order is kept; otherwise they are sorted, so that the
    order of the members does not matter.  Raises UserError if two members have different labels;
    ``instead`` says what to do.
    """
    known = {name: each for name, each in labels.items() if each}
    if not known:
        return ()
    first, common = next(iter(known.items()))
    for name, other in known.items():
        if {*other} != {*common}:
            raise UserError(
                f"{first} was trained on the labels {listed(common)} and {name} on "
                f"{listed(other)}; {instead}"
            )
    return common if all(other == common for other in known.values()) else tuple(sorted(common))


def generates_text(metadata: PromptMetadata) -> bool:
    """Returns whether a prompt was trained on targets that are not labels.

    A run stores its labels beside its score, and a mixture those of each of its tasks.
    """
    return bool(metadata.metric) and not metadata.labels and not tasks_of(metadata)


def listed(labels: Sequence[str]) -> str:
    """Returns the first labels, for a message."""
    return ", ".join(label[:40] for label in labels[:8]) + ", ..." * (len(labels) > 8)


@dataclass(frozen=True, kw_only=True)
class StoredPrompt:
    """A prompt ``[P,D]`` in its stored dtype, and where it was read from.

    ``adapter`` is the PEFT adapter that contained it, if any.
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
    """Writes a prompt as ``dtype``; ``format`` defaults to the suffix of the file.

    ``dtype=None`` keeps the prompt's dtype (in an ``.npy``, bfloat16 becomes float32).  Only
    safetensors files have metadata; an ``.npy`` is the bare array.  An empty ``created_by`` is
    filled in.  The write is atomic, and the same input gives the same bytes.  Raises UserError if
    the array is not a prompt.
    """
    path = Path(path)
    kind = format or path.suffix.removeprefix(".")
    if kind not in ("npy", "safetensors"):
        raise UserError(
            f"{path}: a prompt is saved as .npy or .safetensors; use one of these suffixes"
        )
    prompt = checked_prompt(np.asarray(prompt_PD), of="the prompt", dtype=dtype)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
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
    """Returns the prompt ``[P,D]`` of a file or folder; see ``load_prompt_with_metadata``."""
    return load_prompt_with_metadata(path, width=width, dtype=dtype)[0]


def load_prompt_with_metadata(
    path: str | Path,
    *,
    width: int | None = None,
    dtype: DType | None = np.float32,
    peft_scale: float = 1.0,
) -> tuple[HostArray, PromptMetadata]:
    """Returns the prompt ``[P,D]`` of a file or folder as ``dtype``, and its metadata.

    The format is detected from the content: an ``.npy`` (also T5X's
    ``encoder.prompt.prompt.prompt``), a ``.safetensors`` of this package, the folder of a PEFT
    adapter, or a T5X checkpoint with a prompt, which may be at a ``gs://`` or ``s3://`` address.
    ``dtype=None`` keeps the stored dtype; ``width`` is the model's, if it is known, and so is
    ``peft_scale`` (``ModelConfig.peft_prompt_scale``), which multiplies a PEFT adapter's prompt.
    Raises UserError if the prompt is missing, damaged, of another width or not a prompt.
    """
    stored = in_model_space(read_prompt(path), peft_scale=peft_scale)
    if width is not None:
        _check_width(stored.prompt_PD, width=width, path=path)
    prompt_PD = stored.prompt_PD if dtype is None else stored.prompt_PD.astype(dtype, copy=False)
    return prompt_PD, stored.metadata


def in_model_space(stored: StoredPrompt, *, peft_scale: float) -> StoredPrompt:
    """Returns the prompt as a model takes it: an adapter's is multiplied by ``peft_scale``."""
    if stored.source != "PEFT adapter" or peft_scale == 1.0:
        return stored
    return replace(stored, prompt_PD=scaled_prompt(stored.prompt_PD, peft_scale))


def scaled_prompt(prompt_PD: HostArray, scale: float) -> HostArray:
    """Returns the prompt times a number, in its dtype; the product is rounded once."""
    return (prompt_PD.astype(np.float32) * np.float32(scale)).astype(prompt_PD.dtype)


def read_prompt(path: str | Path) -> StoredPrompt:
    """Returns the prompt of a file or folder as stored.

    Errors are as in ``load_prompt_with_metadata``.
    """
    given: object = path  # callers may not check types
    if not isinstance(given, str | Path):
        raise UserError(
            f"a prompt is read from a path, not from a value of type {type(given).__name__}"
        )
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
        if is_trained(path.name.replace(".", "/")) and is_numpy_folder(path.parent):
            raise UserError(
                f"{path} is one of several arrays of a method: give their folder, {path.parent}, "
                "to predict, eval and serve --prompt(s), or to convert"
            )
        array, source = read_npy(path), "npy"
    elif start[8:] == b"{":  # eight bytes of length, then JSON
        if (kind := tuned_by(path)) is not None:
            raise UserError(
                f"{path} contains the arrays of {kind or 'another method'}, not a prompt; use it "
                "with predict, eval and serve --prompt(s)"
            )
        hint = ""
        if (path.parent / adapter_file.CONFIG).is_file():
            hint = f"; if it belongs to a PEFT adapter, use its folder {path.parent}"
        array, strings = read_safetensors(path, key=_KEY, of="a prompt's file", hint=hint)
        metadata, source = metadata_from_strings(strings, path=path), "safetensors"
    elif is_t5x(path):
        return _read_t5x(path)
    else:
        raise UserError(f"{path} is neither an .npy nor a .safetensors file{_guess(start)}")
    prompt_PD = checked_prompt(array, of=str(path), dtype=None)
    return StoredPrompt(prompt_PD=prompt_PD, metadata=metadata, source=source)


def joined_as(path: str | Path, metadata: PromptMetadata) -> PromptTuning:
    """Returns how a prompt is joined to the input, as far as its run or its file records it."""
    run = run_config(str(path))
    method = (run.method.plain_prompt() if run is not None else None) or PromptTuning()
    if not metadata.combine:
        return method
    return replace(method, placement=checked(metadata.combine, Placement, f"{path}: combine"))


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

    A prompt without a fingerprint fits every model of its width.
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
    """Raises UserError if the metadata have the fingerprint of another model.

    ``allow_other_model=None`` means that the user has no such option.
    """
    theirs = metadata.model_fingerprint
    if theirs and theirs != fingerprint and not allow_other_model:
        named = " ".join(["", *metadata.model_name.split()])[:100]
        raise UserError(
            f"{path} was trained for another model{named} (fingerprint {theirs[:32]}; this model "
            f"has {fingerprint}); use that model"
            + (", or set allow_other_model" if allow_other_model is not None else "")
        )


def _check_width(prompt: Array | HostArray, *, width: int, path: str | Path) -> None:
    if prompt.shape[-1] != width:
        raise UserError(f"{path} has width {prompt.shape[-1]}, but the model has width {width}")


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
    if is_t5x(folder):
        return _read_t5x(folder)
    named = [p for p in (folder / _T5X_FILE, *sorted(folder.glob("checkpoint_*"))) if p.exists()]
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and is_prompt_file(p))
    inside = named or list(islice(files, 1))
    hint = f"; did you mean {inside[-1]}?" if inside else ""
    raise UserError(
        f"{folder} is a folder without a prompt: "
        f"neither a PEFT adapter's {adapter_file.CONFIG} "
        f"nor a T5X checkpoint's {INDEX!r}{hint}"
    )


def _read_t5x(folder: str | Path) -> StoredPrompt:
    params = open_t5x(folder).params
    if has_method(params):
        others = (n for n in params if (is_trained(n) or is_prompt(n)) and n != PROMPT)
        raise UserError(
            f"{folder} is a T5X checkpoint with more than a prompt in the encoder's input, for "
            f"instance {next(others)}; use it with predict, eval and serve --prompt(s), or convert "
            "it to safetensors"
        )
    stored = params.get(PROMPT)
    if stored is None:
        raise UserError(f"{folder} is a T5X checkpoint without a prompt (no {PROMPT})")
    prompt_PD = checked_prompt(stored.whole(), of=f"{PROMPT} in {folder}", dtype=None)
    return StoredPrompt(prompt_PD=prompt_PD, metadata=PromptMetadata(), source="T5X checkpoint")


def is_prompt_file(path: Path) -> bool:
    """Returns whether a file begins like a prompt file.

    Its suffix does not matter, since T5X's files have none.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start.startswith(_NPY_MAGIC) or start[8:] == b"{"


def _guess(start: bytes) -> str:
    """Returns a hint at what a file is, by its first bytes."""
    if not start:
        return ": it is empty"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ": it is a zip archive (an .npz or PyTorch's)"
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return ": it is a pickle, and pickles are never loaded"
    return ""


def metadata_to_strings(metadata: PromptMetadata) -> dict[str, str]:
    """Converts the known fields to strings, as the format requires: text unchanged, others JSON."""
    known = {
        key: value
        for key, value in dataclasses.asdict(metadata).items()
        if value not in ("", None, ()) and value is not False
    }
    if metadata.score is not None and not math.isfinite(metadata.score):
        del known["score"]  # JSON has no number for it
    return {key: v if isinstance(v, str) else json_text(v) for key, v in known.items()}


def metadata_from_strings(strings: dict[str, str], *, path: Path) -> PromptMetadata:
    """Returns the inverse of ``metadata_to_strings``; keys of other programs are ignored."""
    readers = {
        "seed": lambda text: int(text),
        "steps": lambda text: int(text),
        "score": lambda text: float(text),
        "embedding_scale": lambda text: float(text),
        "labels": lambda text: _labels(read_json(text, of="labels")),
        "inputs_template": checked_template,
        "chat": lambda text: text == "true",
        "normalize_length": lambda text: text == "true",
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
        raise UserError("labels must be a list of strings")
    return tuple(value)


def _mixture(value: Any) -> tuple[TrainedTask, ...]:
    if not isinstance(value, list):
        raise UserError("mixture must be a list of tasks")
    tasks = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise UserError("each task of a mixture must have a name")
        template = one.get("inputs_template", "")
        if not isinstance(template, str):
            raise UserError("inputs_template must be a text")
        tasks.append(
            TrainedTask(
                name=one["name"],
                labels=_labels(one.get("labels", [])),
                inputs_template=checked_template(template),
            )
        )
    return tuple(tasks)


def this_program() -> str:
    """Returns the name and version of this package, for files that it writes."""
    try:
        return f"prompt_tuning_jax {distributions.version('prompt_tuning_jax')}"
    except distributions.PackageNotFoundError:
        return "prompt_tuning_jax"
