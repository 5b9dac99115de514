"""The model that a run has tuned, as a folder that loads again."""

from pathlib import Path

import numpy as np

from prompt_tuning_jax import build, run_folder
from prompt_tuning_jax.checkpoints.hf import write_hf
from prompt_tuning_jax.checkpoints.load import open_model
from prompt_tuning_jax.config_file import run_config
from prompt_tuning_jax.data.hf_tokenizer import vocabulary_file
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import DescribedPrompts, FullTuning

PREFIX = "model/"


def export_model(workdir: str | Path, folder: str | Path) -> None:
    """Writes the best model of a model-tuning run as a Hugging Face folder, weights in bfloat16.

    Of several members the first is written.  Raises UserError for a folder that holds no such run.
    """
    workdir = Path(workdir)
    experiment = run_config(str(workdir)) if workdir.is_dir() else None
    if experiment is None or not isinstance(experiment.method, FullTuning | DescribedPrompts):
        raise UserError(f"{workdir} holds no run of model tuning (method=full)")
    tuned = run_folder.read_best(workdir)
    params = {name.removeprefix(PREFIX): np.asarray(array[0]) for name, array in tuned.items()}
    named = experiment.model
    vocabulary = named.vocabulary or open_model(named.name_or_path).vocabulary_file
    if vocabulary is not None and Path(vocabulary).is_dir():
        vocabulary = vocabulary_file(Path(vocabulary))
    write_hf(
        folder,
        build.build_model(experiment).config,
        params,
        vocabulary_file=vocabulary,
    )
