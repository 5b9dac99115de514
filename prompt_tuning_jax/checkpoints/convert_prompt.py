"""Writes prompts in another format."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from prompt_tuning_jax.checkpoints.convert_model import DTYPES, Converted, StoredAs, written
from prompt_tuning_jax.checkpoints.destination import (
    PROMPT_SUFFIXES,
    atomic_write_to,
    require_free,
    require_outside,
)
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hub import ASSETS, is_hub_name
from prompt_tuning_jax.checkpoints.inspect import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.location import is_address
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft, write_peft
from prompt_tuning_jax.checkpoints.peft.modules import task_type
from prompt_tuning_jax.checkpoints.peft.prompts import require_usual
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    StoredPrompt,
    check_fits,
    joined_as,
    read_prompt,
    save_prompt,
    scaled_prompt,
)
from prompt_tuning_jax.checkpoints.t5x.methods import lost_settings
from prompt_tuning_jax.config.paths import BUNDLED, GGUF_MODELS, T5X_MODELS
from prompt_tuning_jax.data.vocabularies.gguf_metadata import GGUF_SUFFIX
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.registry import find_preset
from prompt_tuning_jax.storage import expanded

PromptFormat = Literal["npy", "safetensors", "peft"]
_WORDS = {"npy": "an .npy file", "safetensors": "a .safetensors file", "peft": "a PEFT adapter"}
_OF_T5 = "SEQ_2_SEQ_LM"  # PEFT's name of the kind of model
# The names of these models on the Hugging Face hub, where PEFT looks for them.
_PEFT_NAMES = {name: f"google/t5-{name.rpartition('_')[2]}-lm-adapt" for name in T5X_MODELS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Base:
    """The frozen model that prompts are for, as far as it is known."""

    name: str = ""
    config: ModelConfig | None = None
    fingerprint: str = ""


def convert_prompts(
    source: str,
    destination: Path,
    *,
    to: PromptFormat,
    dtype: StoredAs = "stored",
    model: str = "",
    allow_other_model: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Writes the prompt ``source``, or every prompt of a folder; arguments as in ``convert``."""
    files = prompt_files(source)
    one_file = files is None and to != "peft"
    require_free(destination, overwrite=overwrite, folder=not one_file)
    names = [source] if files is None else [str(file) for file in files]
    # Read all prompts before writing any: they are small, and one may be damaged.
    prompts = [read_prompt(name) for name in names]
    base = _open_base(model, prompts, to=to, check=not allow_other_model)
    prompts = [_in_space_of(stored, base, to=to) for stored in prompts]
    for name, stored in zip(names, prompts, strict=True):
        _require_fit(stored, base, path=name, allow_other_model=allow_other_model)
    joined = [joined_as(name, s.metadata) for name, s in zip(names, prompts, strict=True)]
    if to == "peft":
        for name, method in zip(names, joined, strict=True):
            try:
                require_usual(method)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    if files is None:  # the prompts of a folder are in memory, so it may be replaced
        require_outside(source, destination)
    if to == "npy" and dtype == "bfloat16":
        raise UserError("an .npy file has no bfloat16: leave out --dtype, or write .safetensors")
    with atomic_write_to(destination, overwrite=overwrite, folder=not one_file) as aside:
        if files is None:
            _write(aside, prompts[0], base, to=to, dtype=dtype, name=source)
        for file, stored in zip(files or [], prompts, strict=False):
            _write(aside / _file_name(file, to), stored, base, to=to, dtype=dtype, name=str(file))
    shapes = sorted({str(list(stored.prompt_PD.shape)) for stored in prompts})
    what = f"a prompt {shapes[0]} as {_WORDS[to]}"
    if files is not None:
        several = f"{len(prompts)} prompts {', '.join(shapes)}, each as {_WORDS[to]}"
        what = what if len(prompts) == 1 else several
    notes = []
    if to == "npy" and any(stored.prompt_PD.dtype.name == "bfloat16" for stored in prompts):
        notes.append("bfloat16 became float32, with the same numbers: .npy does not have it")
    if to != "safetensors" and any(_known(stored.metadata) for stored in prompts):
        notes.append(f"{_WORDS[to]} does not hold the prompt's labels, template and other metadata")
    lost = {setting for method in joined for setting in lost_settings(method)}
    if to == "safetensors":  # its metadata have the placement
        lost = {setting for setting in lost if not setting.startswith("method.placement")}
    if lost:
        notes.append(f"{_WORDS[to]} does not hold {', '.join(sorted(lost))}")
    for rows in sorted({s.adapter.left_out for s in prompts if s.adapter} - {0}):
        notes.append(
            f"PEFT saved the prompt twice, for encoder and decoder: the second {rows} rows, which "
            "it does not use with a T5, are left out"
        )
    if to == "peft":
        if not all(_task_type(stored, base) for stored in prompts):
            notes.append(
                f"its task_type is {_OF_T5}, as for a T5, since nothing tells the kind of model; "
                "for a decoder-only model, give its folder with --model"
            )
        notes += _note_on_scale(prompts[0].metadata, base)
        notes += notes_on_names(base.name or s.metadata.model_name for s in prompts)
    return written(what, destination, notes=notes)


def prompt_files(source: str) -> list[Path] | None:
    """Returns the prompts in a folder, sorted by name; None if ``source`` is anything else.

    Every entry must be a prompt file or the folder of a PEFT adapter.  If files differ only in
    their suffix, the ``.safetensors`` file is used, because it has metadata.
    """
    folder = Path(source)
    if not folder.is_dir() or is_peft(folder):
        return None
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if not inside or not all(map(_is_prompt, inside)):
        return None
    return sorted({_stem(p): p for p in sorted(inside)}.values())


def _is_prompt(path: Path) -> bool:
    return is_peft(path) if path.is_dir() else path.suffix in PROMPT_SUFFIXES


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _file_name(file: Path, to: PromptFormat) -> str:
    return _stem(file) if to == "peft" else f"{_stem(file)}.{to}"


def _write(
    path: Path, stored: StoredPrompt, base: _Base, *, to: PromptFormat, dtype: StoredAs, name: str
) -> None:
    if to == "peft":
        base_name = base.name or stored.metadata.model_name
        if not base_name:
            raise UserError(
                f"{name} does not say which model it is for, and PEFT needs it: give --model, "
                "a name on the Hugging Face hub or a folder"
            )
        write_peft(
            path,
            stored.prompt_PD,
            base_model_name_or_path=name_for_peft(base_name),
            task_type=_task_type(stored, base) or _OF_T5,
            num_layers=base.config.num_reading_layers if base.config else None,
            num_attention_heads=base.config.num_heads if base.config else None,
            like=stored.adapter,
            dtype=DTYPES[dtype],
        )
        return
    metadata = stored.metadata
    if base.config is not None:
        metadata = with_model(metadata, base.config, name=base.name, fingerprint=base.fingerprint)
    save_prompt(path, stored.prompt_PD, metadata=metadata, format=to, dtype=DTYPES[dtype])


def with_model(
    metadata: PromptMetadata, config: ModelConfig, *, name: str, fingerprint: str
) -> PromptMetadata:
    """Returns the metadata with those of the frozen model.

    A prompt that was trained for another model, and is converted nevertheless, is then one for this
    model, and ``origin`` names the other.
    """
    scale = getattr(config, "embedding_scale", 1.0)
    trained_for = metadata.model_fingerprint
    if fingerprint and trained_for not in ("", fingerprint):
        origin = metadata.origin or f"trained for {metadata.model_name} ({trained_for})"
        metadata = dataclasses.replace(metadata, model_name="", model_fingerprint="", origin=origin)
    return dataclasses.replace(
        metadata,
        model_name=metadata.model_name or name,
        model_fingerprint=metadata.model_fingerprint or fingerprint,
        model_type=getattr(config, "model_type", ""),
        embedding_scale=None if scale == 1.0 else scale,
    )


def _in_space_of(stored: StoredPrompt, base: _Base, *, to: PromptFormat) -> StoredPrompt:
    """Returns the prompt in the space in which the new format's readers add it to the input."""
    peft = stored.source == "PEFT adapter"
    scale = _peft_scale(stored.metadata, base)
    if scale == 1.0 or peft == (to == "peft"):
        return stored
    factor = scale if peft else 1.0 / scale
    return dataclasses.replace(stored, prompt_PD=scaled_prompt(stored.prompt_PD, factor))


def _config(metadata: PromptMetadata, base: _Base) -> ModelConfig | None:
    """Returns the configuration of the prompt's model, if it was opened or is a published one."""
    return base.config or find_preset(base.name or metadata.model_name)


def _peft_scale(metadata: PromptMetadata, base: _Base) -> float:
    """Returns ``ModelConfig.peft_prompt_scale`` of the prompt's model, as far as it is known."""
    if (config := _config(metadata, base)) is not None:
        return config.peft_prompt_scale
    return metadata.embedding_scale or 1.0 if metadata.model_type == "t5gemma" else 1.0


def _task_type(stored: StoredPrompt, base: _Base) -> str:
    """Returns PEFT's name of the kind of model; "" if it is unknown."""
    if (config := _config(stored.metadata, base)) is not None:
        return task_type(config)
    if stored.adapter is not None and stored.adapter.task_type:
        return stored.adapter.task_type
    if stored.metadata.model_type in FAMILIES:
        return "CAUSAL_LM"
    # Only runs know a fingerprint, and they leave out the type of a T5.
    is_t5 = base.name in T5X_MODELS or stored.metadata.model_fingerprint
    return _OF_T5 if is_t5 or stored.metadata.model_type else ""


def _note_on_scale(metadata: PromptMetadata, base: _Base) -> list[str]:
    """Returns a note for adapters of models that multiply their token embeddings."""
    config = _config(metadata, base)
    scale = getattr(config, "embedding_scale", metadata.embedding_scale) or 1.0
    if (in_peft := _peft_scale(metadata, base)) != 1.0:
        return [
            f"the adapter's prompt is divided by {in_peft:g}: transformers multiplies the prompts "
            "of this model by it, as it does the embeddings of its tokens"
        ]
    if scale == 1.0 or getattr(config, "model_type", metadata.model_type) != "gemma2":
        return []
    return [
        f"the adapter is for transformers 5.24 or newer: 4.57 multiplies prompts by {scale:g}, as "
        "it does the embeddings of this model's tokens"
    ]


def notes_on_names(names: Iterable[str]) -> list[str]:
    """Returns notes for adapters of models that PEFT cannot load by their name."""
    notes = []
    for name in sorted(set(names)):
        if name in BUNDLED:
            folder = f"folder {ASSETS / name}"
        elif name in GGUF_MODELS or Path(name).suffix == GGUF_SUFFIX or is_address(name):
            folder = "folder that convert --to hf writes of it"
        else:
            continue
        notes.append(f"PEFT cannot load the model {name}: load the adapter onto the {folder}")
    return notes


def name_for_peft(name: str) -> str:
    """Returns a name on the hub, or a folder's absolute path, which works from any folder."""
    if name in BUNDLED:
        return name
    folder = expanded(name)
    return str(folder.resolve()) if folder.is_dir() else _PEFT_NAMES.get(name, name)


def _open_base(
    model: str, prompts: Sequence[StoredPrompt], *, to: PromptFormat, check: bool
) -> _Base:
    """Opens the frozen model that ``--model`` names.

    For PEFT, the default is the model named in the prompts, which is opened if it is a local folder
    or bundled.
    """
    if to != "peft" and not model:
        return _Base()
    names = {p.metadata.model_name for p in prompts} - {""}
    if not model and len(names) > 1:
        raise UserError(
            f"the prompts are for different models, {', '.join(sorted(names))}: convert those of "
            "each model alone, or give --model"
        )
    named = model or next(iter(names), "")
    if to == "peft":
        if not named:
            return _Base()
        # PEFT looks up the sizes itself, so the model is not fetched for them.
        if named in T5X_MODELS or (is_hub_name(named) and not Path(named).is_dir()):
            return _Base(name=named)
        if not model and named not in BUNDLED and not Path(named).is_dir():
            return _Base(name=named)
    checkpoint = open_source(named, vocabulary=False)
    if to == "peft" and not isinstance(checkpoint.source, Path):
        raise UserError(
            f"{named} is a T5X checkpoint, and PEFT needs a Hugging Face folder or name: convert "
            "the model with --to hf, and give that as --model"
        )
    wanted = to == "safetensors" or (check and any(p.metadata.model_fingerprint for p in prompts))
    return _Base(
        name=named,
        config=checkpoint.config,
        fingerprint=fingerprint_of(checkpoint) if wanted else "",
    )


def _require_fit(stored: StoredPrompt, base: _Base, *, path: str, allow_other_model: bool) -> None:
    if base.config is not None:
        check_fits(
            stored.prompt_PD,
            stored.metadata,
            embed_dim=base.config.embed_dim,
            fingerprint=base.fingerprint,
            path=path,
            allow_other_model=allow_other_model,
        )


def _known(metadata: PromptMetadata) -> bool:
    """Returns whether the metadata have more than the model's name and the writing program."""
    known = dataclasses.replace(metadata, model_name="", created_by="")
    return known != PromptMetadata()
