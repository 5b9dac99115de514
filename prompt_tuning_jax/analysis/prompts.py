"""Analyses prompts: their words, what they keep of their start, redundancy, and effects.

This follows section 7 of Lester et al. 2021, and adds what each position does to the answers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.analysis.positions import Effects, Redundancy, leave_one_out, redundancy
from prompt_tuning_jax.analysis.similarity import BY, directions, require_one_model, similarity
from prompt_tuning_jax.analysis.words import (
    NearestWords,
    embedding_rows,
    nearest_words,
    ranks_of,
    token_text,
)
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.prompt_file import (
    StoredPrompt,
    check_fits,
    in_model_space,
    joined_as,
)
from prompt_tuning_jax.checkpoints.run_folder import member_names
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.prompt_sources import prompt_paths, read_all
from prompt_tuning_jax.inference.results import short_names
from prompt_tuning_jax.inference.setup import (
    attach_members,
    build_model,
    model_fingerprint,
    shared_model,
    vocabulary_of,
)
from prompt_tuning_jax.methods import PROMPT
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.training.logging import METRICS_FILE, read_metrics
from prompt_tuning_jax.typing import Array, HostArray

# A position has kept its word if the word is among this many nearest ones, as in the paper.
KEPT = 5


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the positions of a prompt started from.

    Attributes:
      texts: for each position its label or word, and empty where it started from neither.
      are_labels: for each position, whether this is a class label.
      ranks: the rank of the start among the trained position's neighbors (``ranks_of``).
      norms_P: the norms of the vectors at the start.
      moved_P: cosines between the positions at the start and after training.
    """

    texts: tuple[str, ...]
    are_labels: tuple[bool, ...]
    ranks: tuple[int, ...]
    norms_P: HostArray
    moved_P: HostArray

    def kept(self, *, labels: bool) -> tuple[int, int]:
        """Returns how many positions kept their label (or word) in the top 5, of how many."""
        ranks = [
            rank
            for text, is_label, rank in zip(self.texts, self.are_labels, self.ranks, strict=True)
            if text and is_label == labels
        ]
        return sum(rank <= KEPT for rank in ranks), len(ranks)


@dataclass(frozen=True, kw_only=True)
class PromptAnalysis:
    """What was found out about one prompt.

    Attributes:
      cosine, euclidean: its nearest words by each distance.
      with_labels: the number of positions with a class label among the 5 nearest words.
      start: None if the prompt's run is unknown, or its start cannot be computed again.
      norms_P: the norms of its vectors.
      norms: the mean norm at the steps at which the run was evaluated.
      effects: None without data, or for a prompt of one position.
    """

    name: str
    path: str
    stored: StoredPrompt
    cosine: NearestWords
    euclidean: NearestWords
    with_labels: int
    redundancy: Redundancy
    start: Start | None
    norms_P: HostArray
    norms: tuple[tuple[int, float], ...]
    effects: Effects | None

    @property
    def length(self) -> int:
        """The number of positions."""
        return len(self.norms_P)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The prompts, and their similarities ``{by: [prompts, prompts]}`` (``similarity``)."""

    model: str
    prompts: tuple[PromptAnalysis, ...]
    similarities: Mapping[str, HostArray]
    notes: tuple[str, ...] = field(default=())


def analyze(
    prompts: Sequence[str | Path],
    *,
    experiment: Experiment | None = None,
    top: int = 5,
    examples: int = 200,
) -> Analysis:
    """Analyses prompts of one frozen model.

    ``prompts`` are files, adapters, folders of prompts, and runs (all their members).  A prompt in
    a run's folder is evaluated on the data of its run; ``experiment`` describes the model and the
    data of other prompts.  ``top`` is the number of nearest words, and ``examples`` the number of
    evaluation examples for the effects of positions; 0 skips these.

    Raises UserError if the prompts belong to different models, or their model is unknown.
    """
    paths = list(dict.fromkeys(path for one in prompts for path in prompt_paths(one)))
    if not paths:
        raise UserError("name at least one prompt: a file, an adapter, or a run's folder")
    stored = read_all(paths)
    require_one_model(stored)
    runs = {path: _run_of(path) for path in paths}
    of_model = next((run for run in runs.values() if run is not None), experiment)
    if of_model is None:
        raise UserError(
            f"{paths[0]} is not in the folder of a run, so its model is unknown; give --model, or "
            "a config with --config"
        )
    notes: dict[str, None] = {}
    with shared_model():
        model = build_model(of_model)
        fingerprint = model_fingerprint(model)
        scale = model.config.peft_prompt_scale
        stored = {path: in_model_space(one, peft_scale=scale) for path, one in stored.items()}
        for path, one in stored.items():
            check_fits(
                one.prompt_PD,
                one.metadata,
                embed_dim=model.config.embed_dim,
                fingerprint=fingerprint,
                path=path,
            )
        table_VD = embedding_rows(model, vocabulary_of(model))
        analyses = [
            _analyze(
                name,
                path,
                stored[path],
                model,
                table_VD,
                runs[path] or experiment,
                notes,
                is_run=runs[path] is not None,
                top=top,
                examples=examples,
            )
            for name, path in zip(_names(paths), paths, strict=True)
        ]
    arrays = [stored[path].prompt_PD for path in paths]
    matrices: dict[str, HostArray] = {
        by: np.array([[similarity(a, b, by=by) for b in arrays] for a in arrays]) for by in BY
    }
    return Analysis(
        model=of_model.model.name_or_path,
        prompts=tuple(analyses),
        similarities=matrices,
        notes=tuple(notes),
    )


def _names(paths: Sequence[str]) -> list[str]:
    """Returns short names without suffixes and without the folder that every run has."""
    shown = [str(Path(path).with_suffix("")) if Path(path).suffix else path for path in paths]
    shown = [name.replace(f"/{run_folder.PROMPTS}/", "/") for name in shown]
    return short_names(shown) if len(set(shown)) == len(shown) else short_names(paths)


def _run_of(path: str) -> Experiment | None:
    """Returns the experiment of the run in whose ``prompts/`` the file is."""
    place = Path(path)
    folder = place.resolve().parent
    if not place.is_file() or folder.name != run_folder.PROMPTS:
        return None
    return run_config(str(folder.parent))


def _analyze(
    name: str,
    path: str,
    stored: StoredPrompt,
    model: Model,
    table_VD: Array,
    experiment: Experiment | None,
    notes: dict[str, None],
    *,
    is_run: bool,
    top: int,
    examples: int,
) -> PromptAnalysis:
    words = vocabulary_of(model)
    prompt_PD = np.asarray(stored.prompt_PD, np.float32)
    cosine = nearest_words(prompt_PD, table_VD, words, number=top)
    labels = stored.metadata.labels
    start = None
    norms: tuple[tuple[int, float], ...] = ()
    if is_run and experiment is not None:
        start = _start_of(path, prompt_PD, labels, model, table_VD, experiment, notes)
        norms = _norms_of(path, experiment)
    effects = None
    if examples and experiment is not None and _has_data(experiment):
        data = dataclasses.replace(experiment.data, max_eval_examples=examples)
        own_files = bool(data.train or data.eval)
        effects = leave_one_out(
            dataclasses.replace(experiment, data=data, method=joined_as(path, stored.metadata)),
            prompt_PD,
            labels=labels if own_files and not data.labels else (),
        )
    elif examples:
        notes[f"{name}: no data to evaluate on, so the effects of its positions are unknown"] = None
    return PromptAnalysis(
        name=name,
        path=path,
        stored=stored,
        cosine=cosine,
        euclidean=nearest_words(prompt_PD, table_VD, words, number=top, by="euclidean"),
        with_labels=_with_labels(prompt_PD, labels, model, table_VD),
        redundancy=redundancy(prompt_PD),
        start=start,
        norms_P=np.linalg.norm(prompt_PD, axis=1),
        norms=norms,
        effects=effects,
    )


def _has_data(experiment: Experiment) -> bool:
    data = experiment.data
    return bool(data.task or data.eval) and not data.objectives


def _label_vectors(labels: Sequence[str], model: Model, table_VD: Array) -> HostArray:
    """Returns the mean embedding ``[C, D]`` of each label's tokens."""
    encode = vocabulary_of(model).encode
    tokens = [encode(label) for label in labels]
    rows = [np.asarray(table_VD[jnp.asarray(ids)]).mean(axis=0) for ids in tokens if ids]
    return np.stack(rows) if rows else np.zeros((0, table_VD.shape[1]), np.float32)


def _with_labels(prompt_PD: HostArray, labels: Sequence[str], model: Model, table_VD: Array) -> int:
    """Returns the number of positions with any class label among their nearest words."""
    vectors_CD = _label_vectors(labels, model, table_VD)
    ranks_CP = [
        ranks_of(prompt_PD, np.broadcast_to(vector_D, prompt_PD.shape), table_VD)
        for vector_D in vectors_CD
    ]
    return int((np.array(ranks_CP) <= KEPT).any(axis=0).sum()) if ranks_CP else 0


def _start_of(
    path: str,
    prompt_PD: HostArray,
    labels: tuple[str, ...],
    model: Model,
    table_VD: Array,
    experiment: Experiment,
    notes: dict[str, None],
) -> Start | None:
    """Computes the initial prompt of a run's member again, from its config and seed."""
    names = member_names(experiment)
    member = Path(path).stem
    if member not in names:
        return None
    number = names.index(member)
    training = experiment.training
    init = getattr(experiment.method, "init", "")
    if training.inits:
        init, _ = split_init(training.inits[number])
    own = dataclasses.replace(
        training,
        seeds=(training.seeds[number],),
        inits=training.inits[number : number + 1],
        learning_rates=training.learning_rates[number : number + 1],
    )
    try:
        attached = attach_members(
            dataclasses.replace(experiment, training=own), model, labels=labels
        )
    except UserError as error:
        notes[f"{path}: its start cannot be computed again: {error}"] = None
        return None
    start_EPD = attached.trainable.get(PROMPT)
    if start_EPD is None or start_EPD.shape[1:] != prompt_PD.shape:
        return None
    start_PD = np.asarray(start_EPD[0], np.float32)
    labels = getattr(experiment.method, "init_labels", ()) or labels
    texts, are_labels, wanted_PD = _origins(str(init), start_PD, labels, model, table_VD)
    norms_P = np.linalg.norm(start_PD, axis=1)
    products_P = norms_P * np.linalg.norm(prompt_PD, axis=1)
    return Start(
        texts=texts,
        are_labels=are_labels,
        ranks=tuple(ranks_of(prompt_PD, wanted_PD, table_VD)),
        norms_P=norms_P,
        moved_P=(start_PD * prompt_PD).sum(axis=1) / np.where(products_P == 0, 1, products_P),
    )


def _origins(
    init: str, start_PD: HostArray, labels: Sequence[str], model: Model, table_VD: Array
) -> tuple[tuple[str, ...], tuple[bool, ...], HostArray]:
    """Returns each position's start: its text, whether that is a label, and its vector.

    A vector that is no label's is a word if it equals the word's embedding.
    """
    vocabulary = vocabulary_of(model)
    vectors_CD = _label_vectors(labels, model, table_VD)
    texts, are_labels, wanted = [], [], []
    cosines_PV = directions(start_PD) @ directions(np.asarray(table_VD)).T
    for position, vector_D in enumerate(start_PD):
        token = int(cosines_PV[position].argmax())
        is_label = len(vectors_CD) > 0 and (
            init == "described" or (init == "class_labels" and position < len(vectors_CD))
        )
        if is_label:  # class_labels has one position a label, described repeats them
            number = position % len(vectors_CD)
            texts.append(labels[number])
            wanted.append(vectors_CD[number])
        else:
            is_word = cosines_PV[position, token] > 1 - 1e-4
            texts.append(token_text(vocabulary, token) if is_word else "")
            wanted.append(vector_D)
        are_labels.append(is_label)
    return tuple(texts), tuple(are_labels), np.stack(wanted)


def _norms_of(path: str, experiment: Experiment) -> tuple[tuple[int, float], ...]:
    """Reads the mean norms of a run's prompt from its log; empty if the log has none."""
    names = member_names(experiment)
    place = Path(path)
    file = place.resolve().parent.parent / METRICS_FILE
    if place.stem not in names or not file.is_file():
        return ()
    member = names.index(place.stem)
    return tuple(
        (record["step"], float(record["prompt_norm"][member]))
        for record in read_metrics(file)
        if record["kind"] == "eval" and "prompt_norm" in record
    )
