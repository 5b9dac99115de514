"""What tests of whole runs share: a micro T5 with its vocabulary, data of its own, experiments."""

import atexit
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt_with_metadata
from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training.logging import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("blue", "green", "red")
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "lo", "mi", "ta")]
# The vocabulary has 92 pieces and 100 sentinels.
CONFIG = T5Config(
    vocab_size=208,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
LENGTH = 5


@functools.cache
def scratch() -> Path:
    """A folder for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_run_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def vocabulary_file(size: int = 92) -> Path:
    """A SentencePiece file in which each label is one piece."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices([*WORDS, *LABELS, "the"], k=10)) for _ in range(500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        user_defined_symbols=[f"▁{label}" for label in LABELS],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = scratch() / f"{size}.model"
    path.write_bytes(model.getvalue())
    return path


@functools.cache
def model_folder(*, seed: int = 0, config: T5Config = CONFIG) -> Path:
    """A micro T5 with random weights as a Hugging Face folder.

    Its blocks are louder than T5's start makes them, so that a prompt makes a difference.
    """
    folder = scratch() / f"t5_{seed}_{config.embed_dim}"
    _, params = param_tree.split(T5(config, rngs=nnx.Rngs(seed)))
    louder = ("query/kernel", "out/kernel", "wo/kernel")
    params = {name: 4 * p if name.endswith(louder) else p for name, p in params.items()}
    write_hf(folder, config, params, vocabulary_file=vocabulary_file(), dtype="float32")
    return folder


def rows(number: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Examples whose label is the color named in the text; half are ``red``."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        label = draw.choice([*LABELS, "red"])
        text = [*draw.choices(WORDS, k=2), label, draw.choice(WORDS)]
        found.append({"inputs": " ".join(text), "targets": label})
    return found


def write_rows(path: Path, examples: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    return path


@functools.cache
def train_file() -> Path:
    return write_rows(scratch() / "train.jsonl", rows(48, seed=1))


@functools.cache
def eval_file() -> Path:
    return write_rows(scratch() / "eval.jsonl", rows(24, seed=2))


@functools.cache
def text_folder() -> Path:
    """Sentences of a few words each for pre-training; words keep company, so there is something
    to learn.
    """
    draw = random.Random(3)
    folder = scratch() / "text"
    folder.mkdir()
    lines = []
    for _ in range(600):
        first = draw.randrange(len(WORDS) - 5)
        lines.append(" ".join(draw.choices(WORDS[first : first + 5], k=12)))
    (folder / "a.txt").write_text("\n".join(lines[:300]), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(lines[300:]), encoding="utf-8")
    return folder


def experiment(workdir: Path | str, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Twelve steps of a prompt of five rows; ``changes`` are by field: ``training.steps``.

    Without dropout, which is half of what a step takes to compile.
    """
    base = Experiment(
        model=Model(name_or_path=str(model_folder()), dropout_rate=0.0),
        method=PromptTuning(length=LENGTH, init_population=0),
        data=Data(
            task="",
            train=str(train_file()),
            eval=str(eval_file()),
            inputs_length=16,
            targets_length=4,
        ),
        optimizer=Optimizer(learning_rate=3.0),
        training=Training(
            steps=12, batch_size=4, eval_every=4, save_every=3, log_every=2, workdir=str(workdir)
        ),
    )
    for field, value in (changes or {}).items():
        group, _, name = field.partition(".")
        if name:
            value = dataclasses.replace(getattr(base, group), **{name: value})
        base = dataclasses.replace(base, **{group: value})
    return base


def write_config(path: Path, of: Experiment) -> Path:
    """A config file for the command line."""
    path.write_text(
        "from prompt_tuning_jax.config.overrides import from_json\n"
        f"TEXT = {to_json(of)!r}\n"
        "def get_config():\n"
        "    return from_json(TEXT)\n",
        encoding="utf-8",
    )
    return path


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """``prompt-tuning ARGUMENTS`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning_jax", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def measurements(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without the one field that depends on the machine."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in one.items() if not k.endswith("_per_second")} for one in records]


def outcome(workdir: Path) -> dict[str, Any]:
    """All that a run leaves and that must not depend on where it was interrupted."""
    found: dict[str, Any] = {"metrics": measurements(workdir)}
    for kind in ("last", "best"):
        saved = train_state.read_latest(workdir / "checkpoints" / kind)
        assert saved is not None, f"no {kind} checkpoint in {workdir}"
        step, leaves, extra = saved
        found[kind] = (step, {name: _exactly(leaf) for name, leaf in leaves.items()}, extra)
    for file in sorted((workdir / "prompts").iterdir()):
        if not file.name.startswith("."):  # a kill may leave a file half written aside
            prompt_PD, metadata = load_prompt_with_metadata(file)
            found[file.name] = (_exactly(prompt_PD), metadata)
    found["results"] = json.loads((workdir / "results.json").read_text())
    return found


def _exactly(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()
