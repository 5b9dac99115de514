"""Converts models, prompts and trained methods to other formats, and merges runs into models."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import convert as converter
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.convert import Format, format_of, require_options_of
from prompt_tuning_jax.checkpoints.convert_model import (
    MAX_SHARD_BYTES,
    Converted,
    StoredAs,
    hf_model_type,
    written,
)
from prompt_tuning_jax.checkpoints.convert_prompt import (
    name_for_peft,
    notes_on_names,
    with_model,
)
from prompt_tuning_jax.checkpoints.destination import (
    PROMPT_SUFFIXES,
    atomic_write_to,
    require_free,
    require_outside,
)
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.inspect import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint, open_model
from prompt_tuning_jax.checkpoints.location import is_address, is_t5x
from prompt_tuning_jax.checkpoints.peft import prompts, weights
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, is_peft, read_config
from prompt_tuning_jax.checkpoints.prompt_file import check_model, save_prompt
from prompt_tuning_jax.checkpoints.run_folder import member_names
from prompt_tuning_jax.checkpoints.t5x.methods import COMBINED, Combined, is_numpy_folder
from prompt_tuning_jax.checkpoints.tuned_checkpoint import (
    TunedCheckpoint,
    is_tuned_file,
    method_of,
    open_tuned,
    read_tuned,
    save_tuned,
)
from prompt_tuning_jax.config.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.paths import BUNDLED, GGUF_MODELS
from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.loading_methods import members_of_run, peft_adapter
from prompt_tuning_jax.inference.setup import build_model, partitioner_of
from prompt_tuning_jax.inference.t5x_methods import holds_method, t5x_method
from prompt_tuning_jax.methods import IA3, PROMPT, LoRA, MethodConfig, merging, method_name
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.storage import expanded


def convert(source: str | Path, destination: str | Path, **options: Any) -> Converted:
    """Converts a model, a prompt or the tuned parameters of a run to another format.

    Options and errors are those of ``checkpoints.convert.convert``.  LoRA, IA3, prefixes and
    multitask prompts convert between a run's files (``tuned/*.safetensors``) and PEFT adapters;
    per-layer prompts, multitask prompts and IA3 in T5X checkpoints become a run's files.
    """
    known = list(inspect.signature(converter.convert).parameters)[2:]
    for name in options:
        if name not in known:
            raise UserError(f"convert has no argument {name!r}: {suggest(name, known)}")
    source = os.path.expanduser(source)
    place = Path(source)
    if place.is_dir() and (place / RUN_CONFIG).is_file():
        kept = [place / name for name in (run_folder.PROMPTS, run_folder.TUNED)]
        source = next((folder for folder in kept if folder.is_dir()), "")
        if not source:
            raise UserError(
                f"{place} is a run that holds nothing to convert: it has neither prompts/ nor "
                "tuned/ yet; what trained all weights, prompt-tuning merge writes as a model"
            )
    if tuned_files(Path(source)) or _asks_for_method(str(source), destination, options.get("to")):
        return convert_tuned(str(source), destination, **options)
    return converter.convert(source, destination, **options)


def _asks_for_method(source: str, destination: str | Path, to: Format | None) -> bool:
    """Returns whether a T5X checkpoint's method is converted to another format."""
    return holds_method(source) and format_of(Path(destination), to) not in ("hf", "t5x")


_WORDS: dict[Format, str] = {
    "npy": "as an .npy file",
    "safetensors": "as a .safetensors file",
    "peft": "as a PEFT adapter",
}


def tuned_files(place: Path) -> list[Path]:
    """Returns the files and PEFT adapters at ``place`` that hold tuned parameters.

    ``place`` is one file, one adapter, a folder that contains only these, or a folder of arrays
    that the original's checkpointer saves.  The list is empty for anything else, plain prompts
    included.
    """
    if _is_tuned(place):
        return [place]
    if not place.is_dir() or is_peft(place):
        return []
    inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    return inside if all(map(_is_tuned, inside)) else []


def _is_tuned(place: Path) -> bool:
    if not place.is_dir():
        return is_tuned_file(place)
    if is_numpy_folder(place):
        return True
    kinds = (*weights.TYPES, *prompts.TYPES)
    return (place / CONFIG).is_file() and read_config(place / CONFIG).get("peft_type") in kinds


def convert_tuned(
    source: str,
    destination: str | Path,
    *,
    to: Format | None = None,
    dtype: StoredAs = "stored",
    model: str | Path = "",
    allow_other_model: bool = False,
    overwrite: bool = False,
    combine: Combined | Literal[""] = "",
    **others: Any,
) -> Converted:
    """Writes each of ``tuned_files(source)`` in another format, bit for bit.

    ``peft`` writes folders that PEFT loads.  ``safetensors`` writes a run's files, or a prompt file
    for a P-tuning adapter, which can also be written as ``npy``.  ``model`` is the frozen model,
    which determines the shapes; it may be left out if the source names a model on this machine.
    PEFT adapters are read back and compared before they are renamed to ``destination``.  Other
    options and errors are those of ``checkpoints.convert.convert``.
    """
    destination = Path(os.path.abspath(expanded(destination)))
    model, to = str(model), format_of(destination, to)
    if to in ("hf", "t5x"):
        raise UserError(
            f"{source} holds what a method trained, and {to} is a format of models: convert it to "
            "peft or safetensors, or merge the run into its model (prompt-tuning merge)"
        )
    require_options_of(to, others)
    if dtype not in ("stored", "float32"):
        raise UserError(f"what a method trained is written as float32: leave out --dtype {dtype}")
    if combine and combine not in COMBINED:
        raise UserError(f"combine is {combine!r}; it is one of {', '.join(COMBINED)}")
    place = Path(source)
    files: list[str | Path] = [*tuned_files(place)] or [source if is_address(source) else place]
    is_file = destination.suffix in PROMPT_SUFFIXES
    one = files[0] in (source, place) or (is_file and len(files) == 1)
    if is_file and not one:
        raise UserError(
            f"{source} holds several files: name a folder for them, without {destination.suffix}, "
            "and say --to"
        )
    folder = to == "peft" or not one
    require_free(destination, overwrite=overwrite, folder=folder)
    name, base = _open_base(files[0], model)
    fingerprint = fingerprint_of(base)
    checkpoints = [_read(file, base, combine or None) for file in files]
    methods = [method_of(stored, file) for file, stored in zip(files, checkpoints, strict=True)]
    for file, stored in zip(files, checkpoints, strict=True):
        check_model(
            stored.metadata,
            fingerprint=fingerprint,
            path=file,
            allow_other_model=allow_other_model,
        )
    if one:
        require_outside(files[0], destination)
    with atomic_write_to(destination, overwrite=overwrite, folder=folder) as aside:
        for file, stored, method in zip(files, checkpoints, methods, strict=True):
            place = aside
            if not one:
                file = Path(file)
                stem = file.name if file.is_dir() else file.stem
                place = aside / (stem if to == "peft" else f"{stem}.{to}")
            if to == "peft":
                _write_adapter(place, stored, method, base, name=name, of=str(file))
                continue
            known = with_model(stored.metadata, base.config, name=name, fingerprint=fingerprint)
            if stored.trainable.keys() == {PROMPT}:
                save_prompt(
                    place,
                    stored.trainable[PROMPT],
                    metadata=known,
                    format="npy" if to == "npy" else "safetensors",
                )
            elif to == "npy":
                raise UserError(
                    f"{file} holds more than a prompt, and .npy cannot: use safetensors"
                )
            else:
                save_tuned(place, dataclasses.replace(stored, metadata=known))
    kinds = sorted({type(method).__name__ for method in methods})
    what = f"what {' and '.join(kinds)} tuned {_WORDS[to]}"
    if len(files) > 1:
        what = f"{len(files)} sets of {what.replace(' tuned as', ' tuned, each as')}"
    notes = []
    if to == "peft":
        if any(stored.metadata.task or stored.metadata.labels for stored in checkpoints):
            notes.append("a PEFT adapter does not hold the task, labels and score")
        notes += notes_on_names([name])
    return written(what, destination, notes=notes)


def _open_base(file: str | Path, model: str) -> tuple[str, ModelCheckpoint]:
    """Returns the frozen model's name and checkpoint.

    The name is ``model``, or else the one in the file.  Raises UserError if the file names no model
    on this machine.
    """
    if model:
        return model, open_source(model, vocabulary=False)
    place = Path(file)
    if (place / CONFIG).is_file():
        named = str(read_config(place / CONFIG).get("base_model_name_or_path") or "")
    elif is_tuned_file(place):
        named = open_tuned(place).metadata.model_name
    else:
        named = str(file) if is_t5x(file) else ""  # the checkpoint holds its model
    is_here = named and (is_address(named) or Path(named).exists())
    if named in (*BUNDLED, *GGUF_MODELS) or is_here:
        return named, open_source(named, vocabulary=False)
    said = f"is for {named}, which is not on this machine" if named else "names no model"
    raise UserError(f"{file} {said}: give --model, whose shapes decide")


def _read(file: str | Path, base: ModelCheckpoint, combined: Combined | None) -> TunedCheckpoint:
    of_t5x = t5x_method(file, base.config, combined=combined)
    if of_t5x is None and combined:
        raise UserError(f"--combine {combined} is about T5X checkpoints, and {file} is not one")
    place = Path(file)
    if of_t5x is not None or not place.is_dir():
        return of_t5x or read_tuned(place, base.config)
    adapter = peft_adapter(place, base.config, own=base.params)
    assert adapter is not None, file  # its kind is checked already
    return adapter


def _write_adapter(
    place: Path,
    stored: TunedCheckpoint,
    method: MethodConfig,
    base: ModelCheckpoint,
    *,
    name: str,
    of: str,
) -> None:
    """Writes a PEFT adapter and reads it back.

    Raises UserError if PEFT has no such adapter, or if the arrays read back differ.
    """
    try:
        if isinstance(method, LoRA | IA3):
            weights.write_peft_weights(
                place,
                method,
                stored.trainable,
                config=base.config,
                base_model_name_or_path=name_for_peft(name),
                base_model_type=hf_model_type(base),
            )
        else:
            prompts.write_peft_prompts(
                place,
                method,
                stored.trainable,
                config=base.config,
                base_model_name_or_path=name_for_peft(name),
            )
        again = peft_adapter(place, base.config)
    except UserError as error:
        raise UserError(f"{of}: {str(error).replace(str(place), 'its adapter')}") from None
    assert again is not None
    # A T5Gemma's prompts are multiplied by a number when they are read, and rounded.
    rtol = 0.0 if base.config.peft_prompt_scale == 1.0 else 1e-6
    for path, array in stored.trainable.items():
        read = again.trainable[path]
        if read.shape != array.shape or not np.allclose(read, array, rtol=rtol, atol=0.0):
            raise UserError(f"{of}: {path} is not in the adapter as it is here")


def export_model(
    workdir: str | Path,
    folder: str | Path,
    *,
    member: str = "",
    dtype: StoredAs = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> bool:
    """Writes a run's best model as a Hugging Face folder, with the tuned parameters merged in.

    Supports methods that can be merged into the weights: LoRA, IA3, and training all or some of the
    weights.  ``dtype="stored"`` keeps the dtype that the run held its weights in.  ``member``
    selects one of several members.  Returns whether the model has all the words that it needs.
    Raises UserError if the folder holds no such run.
    """
    experiment, model = merged_model(workdir, member=member)
    named = experiment.model
    made_here = named.random_weights and named.vocabulary
    without_words = model.config.reads_images
    checkpoint = None if made_here or without_words else open_model(named.name_or_path)
    vocabulary: Any = named.vocabulary or (checkpoint and checkpoint.vocabulary_file)
    if vocabulary and Path(vocabulary).is_dir():
        vocabulary = vocabulary_file(Path(vocabulary))
    write_hf(
        folder,
        model.config,
        {name: np.asarray(array) for name, array in param_tree.split(model)[1].items()},
        vocabulary_file=vocabulary or None,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        model_type="t5" if checkpoint is None else hf_model_type(checkpoint),
    )
    return bool(vocabulary) or without_words


def merged_model(workdir: str | Path, *, member: str = "") -> tuple[Experiment, Model]:
    """Returns a run's experiment, and its best checkpoint merged into a plain model.

    Raises UserError for a folder without a run, for an unknown member, and as
    ``methods.merging.merge`` does.
    """
    workdir = expanded(workdir)
    experiment = run_config(str(workdir)) if workdir.is_dir() else None
    if experiment is None:
        raise UserError(f"{workdir} holds no run; name the working directory of one")
    if not experiment.method.mergeable:
        raise UserError(
            f"{workdir} is a run of {method_name(experiment.method)}, which cannot be merged into "
            f"a model's weights; methods that can are {merging.MERGEABLE}"
        )
    number = _member(workdir, member_names(experiment), member)
    if experiment.model.weights == "quantized":
        raise UserError(
            f"{workdir} was trained beside quantized weights, and what is merged into those is "
            "lost in rounding; train with model.weights=dequantized to merge"
        )
    if experiment.model.quantization != "none":
        raise UserError(
            f"{workdir} was trained beside weights in {experiment.model.quantization}, and what is "
            "merged into those is lost in rounding; train with model.quantization=none to merge"
        )
    model = build_model(experiment)
    members, _ = members_of_run(experiment, model, workdir, partitioner_of(experiment))
    params = {name: jnp.asarray(array[number]) for name, array in members.trainable.items()}
    return experiment, merging.merge(
        param_tree.merge(members.graphdef, {**members.frozen, **params})
    )


def _member(workdir: Path, names: tuple[str, ...], member: str) -> int:
    listed = ", ".join(names)
    if not member and len(names) > 1:
        raise UserError(f"{workdir} has {len(names)} members; name one with --member: {listed}")
    if member and member not in names:
        raise UserError(f"{workdir} has no member {member!r}; it has {listed}")
    return names.index(member) if member else 0


def merge(
    source: str | Path,
    destination: str | Path,
    *,
    member: str = "",
    dtype: StoredAs = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes the best model of a run's folder as a Hugging Face folder of a plain model.

    Supports LoRA, IA3, and runs that trained the model's weights.  ``member`` selects one of
    several members.  ``dtype="stored"`` keeps the dtype that the run held its weights in; merged
    weights are rounded to the dtype written.  An existing destination is kept unless ``overwrite``
    is set, and an error leaves no partial output.  Raises UserError.
    """
    destination = Path(os.path.abspath(expanded(destination)))
    require_free(destination, overwrite=overwrite, folder=True)
    require_outside(expanded(source), destination)
    with atomic_write_to(destination, overwrite=overwrite, folder=True) as aside:
        has_words = export_model(
            source, aside, member=member, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
    notes = [] if has_words else ["it has no vocabulary, since the model that was tuned has none"]
    return written("the merged model as a Hugging Face folder", destination, notes=notes)
