"""Writes a model in another format, array by array."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free, require_outside
from prompt_tuning_jax.checkpoints.gguf.model import stored_types
from prompt_tuning_jax.checkpoints.hf.config import model_type_of, tokenizer_files
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.hub import is_gguf
from prompt_tuning_jax.checkpoints.inspect import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray, progress
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint
from prompt_tuning_jax.checkpoints.parameters import PROMPT, config_of, is_trained, require_t5
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    check_model,
    joined_as,
    read_prompt,
)
from prompt_tuning_jax.checkpoints.t5x.arrays import scan_axis
from prompt_tuning_jax.checkpoints.t5x.methods import lost_settings, stacked, t5x_arrays
from prompt_tuning_jax.checkpoints.t5x.reader import T5XCheckpoint
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.checkpoints.tuned_checkpoint import is_tuned_file, method_of, read_tuned
from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.typing import HostArray

StoredAs = Literal["stored", "float32", "bfloat16"]
DTYPES: dict[str, np.dtype | None] = {
    "stored": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MT5_ROWS = 250_112
MAX_SHARD_BYTES = 2_000_000_000

_CHECKPOINT = re.compile(r"checkpoint_(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A finished conversion: a description, its path, counts of files and bytes, and notes."""

    what: str
    path: Path
    files: int
    bytes: int
    notes: tuple[str, ...] = ()


def convert_to_hf(
    source: str,
    destination: Path,
    *,
    dtype: StoredAs = "stored",
    vocabulary: str = "",
    relpos_max_distance: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes the model ``source`` as a Hugging Face folder; see ``convert`` for the arguments."""
    require_free(destination, overwrite=overwrite, folder=True)
    checkpoint, words = _open(source, vocabulary, relpos_max_distance)
    require_outside(checkpoint.location, destination)
    arrays = {name: _cast(array, DTYPES[dtype]) for name, array in checkpoint.params.items()}
    with (
        atomic_write_to(destination, overwrite=overwrite, folder=True) as aside,
        _shown(source, arrays.values()) as counted,
    ):
        write_hf(
            aside,
            checkpoint.config,
            {name: counted(name, array) for name, array in arrays.items()},
            vocabulary_file=words,
            dtype="stored",
            max_shard_bytes=max_shard_bytes,
            model_type=hf_model_type(checkpoint),
        )
    notes = []
    quantized = is_gguf(Path(checkpoint.location)) and set(
        stored_types(Path(checkpoint.location))[0]
    )
    if quantized and not quantized <= {"F32", "F16", "BF16"} and dtype == "stored":
        notes.append(
            "its quantized weights are written as float32, number for number: --dtype bfloat16 "
            "halves that, and rounds them again"
        )
    if words is None and not checkpoint.config.reads_images:
        notes.append("it has no vocabulary, since the source has none: give it with --vocabulary")
    if trained := _own_trained(checkpoint):
        what = (
            "prompt in the source is" if trained.keys() == {PROMPT} else "trained arrays there are"
        )
        notes.append(f"the {what} left out: convert them to npy, safetensors or peft")
    return written("a model as a Hugging Face folder", destination, notes=notes)


def convert_to_t5x(
    source: str,
    destination: Path,
    *,
    dtype: StoredAs = "stored",
    prompt: str = "",
    step: int | None = None,
    unscan: bool = False,
    vocabulary: str = "",
    allow_other_model: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Writes the model ``source`` as a T5X native checkpoint; see ``convert`` for the arguments."""
    checkpoint, words = _open(source, vocabulary, None)
    if isinstance(checkpoint.config, CausalLMConfig | T5GemmaConfig):
        raise UserError(
            f"{source} is a {checkpoint.config.model_type}, and a T5X checkpoint holds a T5: "
            "convert it to hf"
        )
    config = require_t5(checkpoint.config, what="writing a T5X checkpoint")
    t5x = checkpoint.source if isinstance(checkpoint.source, T5XCheckpoint) else None
    final, step = _checkpoint_folder(destination, step, t5x)
    require_free(final, overwrite=overwrite, folder=True)
    require_outside(checkpoint.location, final)
    if config.token_ids != TokenIds():
        raise UserError(
            f"{source} has token ids of its own ({describe(config.token_ids)}), and a T5X "
            f"checkpoint cannot say so: it has T5's ({describe(TokenIds())}); convert it to hf"
        )
    beside = {} if words is None else tokenizer_files(words, config)
    notes = []
    trained: Mapping[str, LazyArray | HostArray] = _own_trained(checkpoint)
    # A T5X source keeps its stored layout unless the options ask for a change.
    params: Mapping[str, LazyArray] = checkpoint.params
    state: Mapping[str, LazyArray | None] | None = None
    as_it_was = False
    if t5x is not None:
        as_it_was = not prompt and not (unscan and t5x.scanned)
        if not unscan:
            stored = t5x.stored.items()
            params = {n: a for n, a in stored if not is_trained(n)}
            trained = {n: a for n, a in stored if is_trained(n)}
        if as_it_was:
            state = t5x.open_state()
        elif t5x.state_names:
            notes.append("the optimizer's state in the source is left out")
    if prompt:
        axis = None
        if t5x is not None and t5x.scanned and not unscan:
            axis = scan_axis(t5x.stored)
        trained, lost = _trained_in(
            checkpoint, prompt, axis=axis, allow_other_model=allow_other_model
        )
        if lost:
            notes.append(f"a T5X checkpoint does not say {', '.join(lost)}: say so to T5X")
    arrays = {name: _cast(array, DTYPES[dtype]) for name, array in params.items()}
    slots = [slot for slot in (state or {}).values() if slot is not None]
    with (
        atomic_write_to(final, overwrite=overwrite, folder=True) as aside,
        _shown(source, [*arrays.values(), *slots]) as counted,
    ):
        write_t5x(
            aside.parent,
            {name: counted(name, array) for name, array in arrays.items()},
            step=step,
            trained=trained,
            state=state
            if state is None
            else {n: None if slot is None else counted(n, slot) for n, slot in state.items()},
            inline=t5x.inline if t5x is not None and as_it_was else (),
        )
        _write_vocabulary(aside, beside)
    if t5x is None:
        notes += _lost_in_t5x(config, checkpoint.params)
        if (kind := hf_model_type(checkpoint)) == "mt5":
            again = kind if config.vocab_size == MT5_ROWS else "t5, which differs in name"
            notes.append(
                f"a T5X checkpoint does not keep the name {kind} of the family; converted back to "
                f"hf it is {again}"
            )
    holding = _holding(trained)
    return written(f"a model{holding} as a T5X checkpoint of step {step}", final, notes=notes)


def describe(ids: TokenIds) -> str:
    """Describes the token ids in words."""
    return f"padding {ids.pad}, end {ids.eos}, start {ids.start}"


def written(what: str, path: Path, *, notes: list[str]) -> Converted:
    """Describes the output at ``path`` with its number of files and its size."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    return Converted(what=what, path=path, files=len(files), bytes=size, notes=tuple(notes))


def _open(
    source: str, vocabulary: str, relpos_max_distance: int | None
) -> tuple[ModelCheckpoint, str | Path | None]:
    """Opens the model, and returns it with its vocabulary file or the given one."""
    checkpoint = open_source(
        source, relpos_max_distance=relpos_max_distance, vocabulary=not vocabulary
    )
    words: str | Path | None = vocabulary or checkpoint.vocabulary_file
    if vocabulary and Path(vocabulary).is_dir():
        words = vocabulary_file(Path(vocabulary))
        if words is None:
            raise UserError(f"{vocabulary} is a folder without a vocabulary: name a file")
    return checkpoint, words


def hf_model_type(checkpoint: ModelCheckpoint) -> str:
    """Returns the ``model_type``; T5X checkpoints with mT5's number of embeddings are ``mt5``."""
    if isinstance(checkpoint.source, Path) and checkpoint.gguf is None:
        return model_type_of(checkpoint.source)
    if isinstance(checkpoint.config, CausalLMConfig | T5GemmaConfig):
        return checkpoint.config.model_type
    return "mt5" if checkpoint.config.vocab_size == MT5_ROWS else "t5"


def _own_trained(checkpoint: ModelCheckpoint) -> dict[str, LazyArray]:
    """Returns the prompts and scales in a T5X checkpoint, by name."""
    if isinstance(checkpoint.source, Path):
        return {}
    return {n: a for n, a in checkpoint.source.params.items() if is_trained(n)}


def _holding(trained: Mapping[str, LazyArray | HostArray]) -> str:
    """Says what a checkpoint holds beside the model."""
    if trained.keys() == {PROMPT}:
        return f" with a prompt {list(trained[PROMPT].shape)}"
    return f" with {len(trained)} trained arrays" if trained else ""


def _trained_in(
    checkpoint: ModelCheckpoint, path: str, *, axis: int | None, allow_other_model: bool
) -> tuple[dict[str, HostArray], list[str]]:
    """Reads a prompt, or a file of another method, under T5X's names.

    Also returns the settings that the checkpoint does not store.  ``axis`` is the one along which
    the checkpoint stacks layers; None if it has a name for each.
    """
    config = require_t5(checkpoint.config, what="writing a T5X checkpoint")

    def fingerprint(metadata: PromptMetadata) -> str:
        is_compared = metadata.model_fingerprint and not allow_other_model
        return fingerprint_of(checkpoint) if is_compared else ""

    if is_tuned_file(Path(path)):
        stored = read_tuned(Path(path), config)
        check_model(
            stored.metadata,
            fingerprint=fingerprint(stored.metadata),
            path=path,
            allow_other_model=allow_other_model,
        )
        method = method_of(stored, path)
        arrays = t5x_arrays(method, stored.trainable, config, of=path)
        lost = lost_settings(method)
    else:
        prompt = read_prompt(path)
        check_fits(
            prompt.prompt_PD,
            prompt.metadata,
            embed_dim=config.embed_dim,
            fingerprint=fingerprint(prompt.metadata),
            path=path,
            allow_other_model=allow_other_model,
        )
        arrays = {PROMPT: prompt.prompt_PD}
        lost = lost_settings(joined_as(path, prompt.metadata))
    return arrays if axis is None else stacked(arrays, axis=axis), lost


def _checkpoint_folder(
    destination: Path, step: int | None, checkpoint: T5XCheckpoint | None
) -> tuple[Path, int]:
    """Returns the path of ``checkpoint_<step>``, and the step.

    ``destination`` is that path or its parent folder.
    """
    named = _CHECKPOINT.fullmatch(destination.name)
    if step is None:
        step = checkpoint.step if checkpoint is not None else int(named[1]) if named else 0
    if named is None:
        return destination / f"checkpoint_{step}", step
    if int(named[1]) != step:
        raise UserError(
            f"{destination} names step {int(named[1])}, but the checkpoint has step {step}: "
            f"name it checkpoint_{step}, or give --step {int(named[1])}"
        )
    return destination.with_name(f"checkpoint_{step}"), step


def _write_vocabulary(folder: Path, files: Mapping[str, Path | dict[str, object]]) -> None:
    """Writes the vocabulary where ``open_model`` finds it; T5X ignores files not in its index."""
    for name, source in files.items():
        if isinstance(source, Path):
            shutil.copyfile(source, folder / name)
        else:
            (folder / name).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _lost_in_t5x(config: T5Config, params: Mapping[str, LazyArray]) -> list[str]:
    """Lists the settings that a T5X checkpoint does not store and its shapes do not imply."""
    guessed = config_of(params)
    differing = [
        f"{field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(T5Config)
        if getattr(config, field.name) != getattr(guessed, field.name)
    ]
    if not differing:
        return []
    return [f"a T5X checkpoint does not say {', '.join(differing)}: say so where it is loaded"]


@contextmanager
def _shown(
    source: str, arrays: Iterable[LazyArray]
) -> Iterator[Callable[[str, LazyArray], LazyArray]]:
    """Shows a progress bar; yields a function that makes an array advance the bar when read."""
    with progress(f"converting {source}", total=sum(array.nbytes for array in arrays)) as report:

        def counted(name: str, array: LazyArray) -> LazyArray:
            def read(index: Index) -> HostArray:
                part = array.read(index)
                report(name, part.nbytes)
                return part

            return dataclasses.replace(array, read=read)

        yield counted


def _cast(array: LazyArray, dtype: np.dtype | None) -> LazyArray:
    if dtype is None or dtype == array.dtype:
        return array
    return dataclasses.replace(
        array, dtype=dtype, read=lambda index: array.read(index).astype(dtype)
    )
