"""The model that a run has tuned, as a plain T5 and as a folder that loads again.

Merges what a run has tuned into the model's weights.
"""

import os
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.convert_model import (
    MAX_SHARD_BYTES,
    Converted,
    hf_model_type,
    written,
)
from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free, require_outside
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import open_model
from prompt_tuning_jax.checkpoints.run_folder import (
    member_names,
)
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import vocabulary_file
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading_methods import members_of_run
from prompt_tuning_jax.inference.setup import (
    build_model,
    partitioner_of,
)
from prompt_tuning_jax.methods import merging, method_name
from prompt_tuning_jax.models.t5.model import T5

StoredAs = Literal["float32", "bfloat16", "stored"]


def export_model(
    workdir: str | Path,
    folder: str | Path,
    *,
    member: str = "",
    dtype: StoredAs = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> bool:
    """Writes a run's best model as a Hugging Face folder, what it tuned merged into the weights.

    For methods whose result weights can hold: all weights, some of them, LoRA, IA3.  ``stored`` is
    the dtype that the run held its weights in.  Of several members ``member`` names one.  Says
    whether there was a vocabulary to write.  Raises UserError for a folder that holds no such run.
    """
    experiment, model = merged_model(workdir, member=member)
    named = experiment.model
    made_here = named.random_weights and named.vocabulary
    opened = None if made_here else open_model(named.name_or_path)
    vocabulary: Any = named.vocabulary or (opened and opened.vocabulary_file)
    if vocabulary and Path(vocabulary).is_dir():
        vocabulary = vocabulary_file(Path(vocabulary))
    write_hf(
        folder,
        model.config,
        {name: np.asarray(array) for name, array in param_tree.split(model)[1].items()},
        vocabulary_file=vocabulary or None,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        model_type="t5" if opened is None else hf_model_type(opened),
    )
    return bool(vocabulary)


def merged_model(workdir: str | Path, *, member: str = "") -> tuple[Experiment, T5]:
    """A run's experiment, and the plain T5 that its best member has become.

    Raises UserError for a folder that holds no run, for a member that it does not have, and as
    ``methods.merging.merge`` does.
    """
    workdir = Path(workdir)
    experiment = run_config(str(workdir)) if workdir.is_dir() else None
    if experiment is None:
        raise UserError(f"{workdir} holds no run; name the working directory of one")
    if not experiment.method.mergeable:
        raise UserError(
            f"{workdir} is a run of {method_name(experiment.method)}, which cannot be merged into "
            f"a model's weights; methods that can are {merging.MERGEABLE}"
        )
    number = _member(workdir, member_names(experiment), member)
    if experiment.model.quantization != "none":
        raise UserError(
            f"{workdir} was trained beside weights in {experiment.model.quantization}, and what is "
            "merged into those is lost in rounding; train with model.quantization=none to merge"
        )
    model = build_model(experiment)
    members, _ = members_of_run(experiment, model, workdir, partitioner_of(experiment))
    own = {name: jnp.asarray(array[number]) for name, array in members.trainable.items()}
    return experiment, merging.merge(param_tree.merge(members.graphdef, {**members.frozen, **own}))


def _member(workdir: Path, names: tuple[str, ...], asked: str) -> int:
    listed = ", ".join(names)
    if not asked and len(names) > 1:
        raise UserError(f"{workdir} has {len(names)} members; name one with --member: {listed}")
    if asked and asked not in names:
        raise UserError(f"{workdir} has no member {asked!r}; it has {listed}")
    return names.index(asked) if asked else 0


def merge(
    source: str | Path,
    destination: str | Path,
    *,
    member: str = "",
    dtype: StoredAs = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes the best model of a run's folder as a Hugging Face folder of a plain T5.

    For LoRA, IA3, and runs that trained the model's own weights.  Of several members ``member``
    names one.  ``stored`` is the dtype that the run held its weights in; merged weights are rounded
    to what is written.  What exists stays unless ``overwrite``, and after an error nothing is left.
    Raises UserError.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    require_free(destination, overwrite=overwrite, folder=True)
    require_outside(source, destination)
    with atomic_write_to(destination, overwrite=overwrite, folder=True) as aside:
        has_words = export_model(
            source, aside, member=member, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
    notes = [] if has_words else ["it has no vocabulary, since the model that was tuned has none"]
    return written("the merged model as a Hugging Face folder", destination, notes=notes)
