"""What users see and must not change unnoticed, and how the files beside this one are recorded.

From the root of the checkout::

    python -m tests.golden.record                          # the JSON files, from the code as it is
    python -m tests.golden.record --run                    # also the stopped run and its prompts
    python -m tests.golden.record --rename tuned/=other/   # only names of arrays in its checkpoints

The stopped run shows that a checkpoint written by older code is continued with the same bits, so
record it anew only where the numbers change on purpose.  Where only names on disk change, edit
``run/experiment.json`` by hand and use ``--rename``, which keeps every array as it is.
"""

import argparse
import asyncio
import dataclasses
import importlib.metadata
import inspect
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import typing
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import sentencepiece
from safetensors import safe_open
from safetensors.numpy import save_file

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.cli.main import build_parser, main
from prompt_tuning_jax.methods import METHODS
from prompt_tuning_jax.serving.app import make_app
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import Tasks
from tests import tiny_run
from tests.serving.serving_app import validator
from tests.serving.serving_micro import SHAPES, micro_model

GOLDEN = Path(__file__).resolve().parent
MODEL, TRAIN, EVAL = GOLDEN / "model", GOLDEN / "train.jsonl", GOLDEN / "eval.jsonl"
STOPPED_RUN, FINAL_PROMPTS, MACHINE = GOLDEN / "run", GOLDEN / "final", GOLDEN / "machine.json"
SEEDS = (1, 4)  # both are best after the last step: the prompts kept are the last ones
# In the files of the stopped run, for the folders of the machine that recorded it.
_PLACEHOLDERS = {"{golden}": GOLDEN}
_WORKDIR = "{workdir}"
_STOP_AFTER = "step 4"  # of eight; the signal comes when the line of its evaluation is printed
# Texts for people, which may be reworded at any time, and what FastAPI makes of Python names.
_TEXTS = ("description", "operationId", "summary", "title")


def train_arguments(workdir: Path) -> list[str]:
    """The command of the recorded run: two prompts, with dropout, saved between evaluations."""
    arguments = ["train", "--model", str(MODEL), "--data", str(TRAIN), "--eval_data", str(EVAL)]
    arguments += ["--workdir", str(workdir), "--seeds", ",".join(map(str, SEEDS))]
    arguments += ["--steps", "8", "--batch_size", "4", "--learning_rate", "1"]
    fields = {
        "method.length": 4,
        "method.init_population": 0,
        "data.inputs_length": 16,
        "data.targets_length": 4,
        "evaluation.best_by": "loss",
        "training.eval_every": 4,
        "training.save_every": 3,
        "training.log_every": 2,
    }
    return arguments + [x for field, value in fields.items() for x in ("--set", f"{field}={value}")]


def ia3_arguments(workdir: Path) -> list[str]:
    """One step of a method that trains other arrays than a prompt."""
    arguments = ["train", "--model", str(MODEL), "--data", str(TRAIN), "--eval_data", str(EVAL)]
    arguments += ["--workdir", str(workdir), "--steps", "1", "--batch_size", "4"]
    for field in ("method=ia3", "data.inputs_length=16", "data.targets_length=4"):
        arguments += ["--set", field]
    return arguments


def copy_stopped_run(folder: Path) -> None:
    """Copies the stopped run to a new folder, whose config names the files that are here."""
    shutil.copytree(STOPPED_RUN, folder)
    config = folder / "experiment.json"
    text = config.read_text(encoding="utf-8")
    for placeholder, path in {**_PLACEHOLDERS, _WORKDIR: folder}.items():
        text = text.replace(placeholder, str(path))
    config.write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What decides the last bits: who compiles, and for which instructions."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    vectors = ("avx", "fma", "amx", "sse4", "asimd", "sve")
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")},
        "architecture": platform.machine(),
        "instructions": sorted(word for word in words if word.startswith(vectors)),
    }


def python_names() -> dict[str, Any]:
    """Each public name -> its parameters, with kinds and defaults, and what it returns."""
    recorded = {}
    for name in pt.__all__:
        value = getattr(pt, name)
        about: dict[str, Any] = {
            "parameters": [
                f"{parameter.replace(annotation=parameter.empty)} ({parameter.kind.description})"
                for parameter in inspect.signature(value).parameters.values()
            ]
        }
        if isinstance(value, type):
            about["bases"] = [base.__name__ for base in value.__mro__[1:-1]]
        else:
            returned = typing.get_type_hints(inspect.unwrap(value))["return"]
            if fields := _fields_of_result(returned):
                about["fields of the result"] = fields
        recorded[name] = about
    return recorded


def _fields_of_result(returned: Any) -> list[str]:
    """The field names of the dataclass that is returned, or of those in the list returned."""
    if dataclasses.is_dataclass(returned):
        return [field.name for field in dataclasses.fields(returned)]
    return [name for part in typing.get_args(returned) for name in _fields_of_result(part)]


def config_fields() -> dict[str, Any]:
    """Each field of an experiment -> its type and default, for all methods."""
    recorded = {"Experiment": _fields(pt.Experiment)}
    for field in dataclasses.fields(pt.Experiment):
        if field.name != "method":
            recorded[field.name] = _fields(typing.get_type_hints(pt.Experiment)[field.name])
    recorded |= {f"method={name}": _fields(kind) for name, kind in METHODS.items()}
    return recorded


def _fields(config: type) -> dict[str, str]:
    hints = typing.get_type_hints(config)
    described = {}
    for field in dataclasses.fields(config):
        hint, default = hints[field.name], field.default
        kind = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        kind = re.sub(r"\b(?:typing|prompt_tuning_jax)\.(?:\w+\.)*", "", kind)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            default = default if isinstance(default, tuple) else f"{type(default).__name__}()"
        end = "" if default is dataclasses.MISSING else f" = {default!r}"
        described[field.name] = kind + end
    return described


def command_line() -> dict[str, Any]:
    """Each command -> its arguments: spellings, default, choices, how many values."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    recorded = {"prompt-tuning": _arguments(parser)}
    recorded |= {name: _arguments(commands.choices[name]) for name in commands.choices}
    return recorded


def _arguments(parser: argparse.ArgumentParser) -> dict[str, str]:
    described = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        kind = type(action).__name__.strip("_").removesuffix("Action")
        about = {
            "kind": None if kind == "Store" else kind,
            "nargs": action.nargs or None,
            "default": None if action.default is False else action.default,
            "choices": list(action.choices) if action.choices else None,
            "required": action.required or None,
        }
        name = " ".join(action.option_strings) or str(action.metavar or action.dest)
        described[name] = ", ".join(f"{k}={v!r}" for k, v in about.items() if v is not None)
    return described


def served_schema() -> dict[str, Any]:
    """What ``/openapi.json`` says, and the names of the metrics, with both tokens in use."""
    service = Service(Engine(micro_model(), shapes=SHAPES), Tasks({}), validator=validator())
    app = make_app(service, token="secret", admin_token="let-me-change")

    async def get() -> tuple[Any, str]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            document, metrics = await client.get("/openapi.json"), await client.get("/metrics")
            return document.json(), metrics.text

    document, metrics = asyncio.run(get())
    kinds = [line.removeprefix("# TYPE ") for line in metrics.splitlines() if "# TYPE" in line]
    ours = sorted(kind for kind in kinds if not kind.startswith(("process_", "python_")))
    return {"openapi": _without_texts(document), "metrics": ours}


def _without_texts(document: Any) -> Any:
    """The OpenAPI document without its texts for people."""
    if isinstance(document, list):
        return [_without_texts(value) for value in document]
    if not isinstance(document, dict):
        return document
    return {
        key: _without_texts(value)
        for key, value in document.items()
        if not (key in _TEXTS and isinstance(value, str))
    }


def run_folder(folder: Path) -> dict[str, Any]:
    """A run's files and what is in them, by name and type; orbax's files in a checkpoint are its.

    An entry of ``contents`` for a file of JSON has its keys, nested; for a safetensors file the
    keys of its metadata and its arrays; for a checkpoint its arrays and what is saved beside.
    """
    files, contents = [], dict[str, Any]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        saved = re.fullmatch(r"checkpoints/(\w+)/\d+", name)
        if saved:
            files.append(f"{name}/")
            _, arrays, extra = train_state.read_latest(path.parent) or (0, {}, {})
            contents[f"checkpoints/{saved[1]}"] = {
                "arrays": _arrays(arrays),
                "extra": _kinds(extra),
            }
        if not path.is_file() or name.startswith("checkpoints/"):
            continue
        files.append(re.sub(r"(events\.out\.tfevents)\..*", r"\1.*", name))
        if path.suffix == ".json":
            contents[name] = _kinds(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            contents[name] = _distinct([_kinds(json.loads(x)) for x in path.open(encoding="utf-8")])
        elif path.suffix == ".safetensors":
            metadata, loaded = _read_safetensors(path)
            contents[name] = {"metadata": sorted(metadata), "arrays": _arrays(loaded)}
        elif path.suffix == ".npy":
            contents[name] = _arrays({"": np.load(path)})[""]
    return {"files": files, "contents": contents}


def _kinds(value: Any) -> Any:
    """A value of JSON with the type of each leaf for the leaf; of a list the distinct items."""
    if isinstance(value, dict):
        return {key: _kinds(one) for key, one in value.items()}
    if isinstance(value, list):
        return _distinct([_kinds(one) for one in value])
    return type(value).__name__


def _distinct(values: list[Any]) -> list[Any]:
    return [one for i, one in enumerate(values) if one not in values[:i]]


def _arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{a.dtype.name}{list(a.shape)}" for name, a in sorted(arrays.items())}


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(path, "numpy") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict


def is_machine_of_recording() -> bool:
    return MACHINE.read_text(encoding="utf-8") == as_text(machine())


def write_json(path: Path, value: Any) -> None:
    path.write_text(as_text(value), encoding="utf-8")


def as_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _record_run() -> None:
    """Trains until after step 4, stops by SIGTERM, keeps that; resumes, and keeps the prompts."""
    if not MODEL.is_dir():
        shutil.copytree(tiny_run.model_folder(), MODEL)
        _write_small_vocabulary(MODEL / "spiece.model")
        tiny_run.write_rows(TRAIN, tiny_run.rows(48, seed=1))
        tiny_run.write_rows(EVAL, tiny_run.rows(24, seed=2))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        try:
            with redirect_stdout(_Stopping()):
                main(train_arguments(folder))
        except SystemExit as stopped:
            assert stopped.code == 128 + signal.SIGTERM, stopped.code
        shutil.rmtree(STOPPED_RUN, ignore_errors=True)
        shutil.copytree(folder, STOPPED_RUN, ignore=shutil.ignore_patterns("tensorboard"))
        _leave_out_paths(STOPPED_RUN, folder)
        assert main(train_arguments(folder)) == 0
        FINAL_PROMPTS.mkdir(exist_ok=True)
        for seed in SEEDS:
            shutil.copy(folder / f"prompts/seed_{seed}.npy", FINAL_PROMPTS)
    write_json(MACHINE, machine())


class _Stopping(io.StringIO):
    """A standard output that sends this process SIGTERM when it reads of a certain step."""

    sent = False

    def write(self, text: str) -> int:
        if _STOP_AFTER in text and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return sys.__stdout__.write(text)  # type: ignore[union-attr]


def _write_small_vocabulary(path: Path) -> None:
    """That of ``tiny_run`` without the table of Unicode's normal forms, which is most of it."""
    draw = random.Random(0)
    words = [*tiny_run.WORDS, *tiny_run.LABELS, "the"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choices(words, k=10)) for _ in range(500)]),
        model_writer=model,
        vocab_size=92,
        user_defined_symbols=[f"▁{label}" for label in tiny_run.LABELS],
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _leave_out_paths(run: Path, workdir: Path) -> None:
    """Replaces this machine's folders in a run's texts and in the metadata of its prompts."""

    def neutral(text: str) -> str:
        for placeholder, path in {_WORKDIR: workdir, **_PLACEHOLDERS}.items():
            text = text.replace(str(path), placeholder)
        return text

    for path in (*run.glob("*.json*"), *run.rglob("*.txt")):
        path.write_text(neutral(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in run.rglob("*.safetensors"):
        metadata, arrays = _read_safetensors(path)
        save_file(arrays, path, {key: neutral(value) for key, value in metadata.items()})


def _rename_arrays(renames: Mapping[str, str], finished: Path) -> None:
    """Writes the newest checkpoints of the stopped run with other names for the same arrays.

    What the code of today calls the model and the data comes from a run that it has made.
    """
    for kind in ("last", "best"):
        folder = STOPPED_RUN / "checkpoints" / kind
        saved, fresh = (
            train_state.read_latest(folder),
            train_state.read_latest(finished / "checkpoints" / kind),
        )
        assert saved is not None and fresh is not None
        step, arrays, extra = saved
        for old, new in renames.items():
            arrays = {
                new + name.removeprefix(old) if name.startswith(old) else name: array
                for name, array in arrays.items()
            }
        if arrays.keys() != fresh[1].keys():
            raise SystemExit(f"{kind}: {sorted(arrays)} are renamed, {sorted(fresh[1])} wanted")
        shutil.rmtree(folder)
        extra |= {key: fresh[2][key] for key in ("fingerprint", "data")}
        train_state.save(folder, step, arrays, extra)
    _leave_out_paths(STOPPED_RUN, STOPPED_RUN)


def _main() -> None:
    import tests.conftest  # noqa: F401  # the environment of the tests: its flags decide the bits

    parser = argparse.ArgumentParser(description="Record what tests/test_golden.py compares with.")
    parser.add_argument("--run", action="store_true", help="also record the stopped run anew")
    parser.add_argument("--rename", nargs="+", metavar="OLD=NEW", help="prefixes of array names")
    args = parser.parse_args()
    if args.run:
        _record_run()
    with tempfile.TemporaryDirectory() as scratch:
        finished, ia3 = Path(scratch) / "prompt", Path(scratch) / "ia3"
        assert main(train_arguments(finished)) == main(ia3_arguments(ia3)) == 0
        if args.rename:
            _rename_arrays(dict(one.split("=") for one in args.rename), finished)
            return
        write_json(GOLDEN / "run_folder.json", run_folder(finished))
        write_json(GOLDEN / "run_folder_ia3.json", run_folder(ia3))
    write_json(GOLDEN / "python.json", python_names())
    write_json(GOLDEN / "config.json", config_fields())
    write_json(GOLDEN / "commands.json", command_line())
    write_json(GOLDEN / "http.json", served_schema())


if __name__ == "__main__":
    _main()
