import argparse
import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import prompt_tuning_jax
from prompt_tuning_jax.cli import task_listing
from prompt_tuning_jax.cli.main import build_parser, main, parse
from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.config.overrides import diff, to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import conversion, evaluation, inspection, prediction
from prompt_tuning_jax.inference.prediction import UNDESCRIBED, Prediction
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.storage import text_output
from prompt_tuning_jax.training import run

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "train",
    "eval",
    "predict",
    "tasks",
    "metrics",
    "inspect",
    "convert",
    "merge",
    "suite",
    "transfer",
)
CONFIG = """
from prompt_tuning_jax.config.experiment import Experiment, Training
from prompt_tuning_jax.methods import PromptTuning

def get_config():
    return Experiment(method=PromptTuning(length=5), training=Training(steps=7))
"""
BASE = Experiment(method=PromptTuning(length=5), training=Training(steps=7))


@dataclass
class Commands:
    """Stands in for the functions behind the commands and remembers their arguments."""

    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    fails: Exception | None = None
    stopped_by: int = 0

    def _call(self, first: Any, **options: Any) -> None:
        self.calls.append((first, options))
        if self.fails:
            raise self.fails

    def train(self, experiment: Experiment) -> Any:
        self._call(experiment)
        return SimpleNamespace(finished=not self.stopped_by, stopped_by=self.stopped_by)

    def evaluate(self, experiment: Experiment, **options: Any) -> Any:
        self._call(experiment, **options)
        scores = [{"accuracy": 50.0, "invalid": 0.0}, {"accuracy": 75.0, "invalid": 1.0}]
        mean = {"accuracy": 62.5, "invalid": 0.5}
        ensemble = {"accuracy": 87.25, "invalid": 0.0}
        return SimpleNamespace(
            names=("a[b].npy", "seed_1"),
            per_prompt=scores,
            mean=mean,
            best=scores[1],
            ensemble=ensemble,
            split="validation",
            title="validation",
            reports=("t/validation: 2 examples",),
        )

    def predict(self, experiment: Experiment, *, inputs: list[str], **options: Any) -> Any:
        self._call(experiment, inputs=inputs, **options)
        return [
            Prediction(
                prediction=f"{text}\nü",
                log_probs={"good": -0.5, "bad": -1.0},
                votes={"good": 2} if text else None,
            )
            for text in inputs
        ]

    def tasks(self) -> Any:
        return [("a_task", "what it is"), ("b", "")]

    def examples(self, name: str, **options: Any) -> Any:
        self._call(name, **options)
        return [{"inputs": "a text", "inputs ids": [3, 1]}]

    def inspect(self, path: str, **options: Any) -> Any:
        self._call(path, **options)
        return [("kind", "a prompt"), ("length", 20)]

    def describe(self, path: str, **options: Any) -> Any:
        self._call(path, **options)
        return {"kind": "prompt", "length": 20}

    def convert(self, source: str, destination: str, **options: Any) -> Any:
        self._call((source, destination), **options)
        return SimpleNamespace(
            what="a prompt", path=Path("/p"), files=2, bytes=12_345, notes=("a note",)
        )

    def merge(self, source: str, destination: str, **options: Any) -> Any:
        self._call((source, destination), **options)
        return SimpleNamespace(what="a model", path=Path("/p"), files=1, bytes=1_500, notes=())


_HOMES = {
    run: ("train",),
    evaluation: ("evaluate",),
    prediction: ("predict",),
    task_listing: ("tasks", "examples"),
    inspection: ("inspect", "describe"),
    conversion: ("convert", "merge"),
}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    fake = Commands()
    for module, names in _HOMES.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(fake, name))
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    (tmp_path / "c.gin").write_text("N = 7\nTraining.steps = %N\nPromptTuning.length = 5\n")
    (tmp_path / "a.npy").touch()
    (tmp_path / "run").mkdir()
    saved = Experiment(data=Data(task="saved"))
    (tmp_path / "run" / "experiment.json").write_text(to_json(saved))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("train c.py", []),
        ("train --gin_file=c.gin", []),
        ("train --gin_file c.gin", []),
        ("train c.py --set optimizer.learning_rate=0.1", ["optimizer.learning_rate: 0.3 -> 0.1"]),
        ("train --set method.length=6 c.py", ["method.length: 5 -> 6"]),
        ("train c.py --set method.length=6 --set method.length=8", ["method.length: 5 -> 8"]),
        ("train c.py --workdir W", ['training.workdir: "" -> "W"']),
        ("train c.py --data F --eval_data G", ['data.train: "" -> "F"', 'data.eval: "" -> "G"']),
        ("train c.py --model=m", ['model.name_or_path: "tiny" -> "m"']),
        ("train c.py --batch_size 4", ["training.batch_size: 32 -> 4"]),
        ("train c.py --learning_rate 0.1", ["optimizer.learning_rate: 0.3 -> 0.1"]),
        ("train c.py --seeds 0,1,2", ["training.seeds: [0] -> [0, 1, 2]"]),
        ("train c.py --steps 9", ["training.steps: 7 -> 9"]),
        ("train c.py --steps 9 --set training.steps=10", ["training.steps: 7 -> 10"]),
        ("train --gin_file=c.gin --gin.N=9", ["training.steps: 7 -> 9"]),
        ("train --gin_file=c.gin --gin_bindings=N=9", ["training.steps: 7 -> 9"]),
        ("train --gin_file=c.gin --gin.Data.task='t' --steps 9", None),
    ],
)
def test_train_gets_the_experiment(
    commands: Commands, line: str, changes: list[str] | None
) -> None:
    assert main(line.split(" ")) == 0
    ((experiment, options),) = commands.calls
    assert options == {}
    if changes is None:
        changes = ['data.task: "word_valence" -> "t"', "training.steps: 7 -> 9"]
    assert diff(BASE, experiment) == changes


def test_gin_without_a_file_starts_from_the_defaults(commands: Commands) -> None:
    assert main(["train", "--gin.Training.steps=9"]) == 0
    assert diff(Experiment(), commands.calls[0][0]) == ["training.steps: 30000 -> 9"]


def test_gin_files_are_found_on_the_search_paths(commands: Commands, folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "c.gin").rename(folder / "d" / "x.gin")
    assert main(["train", "--gin_file=x.gin", "--gin_search_paths=nowhere,d"]) == 0
    assert commands.calls[0][0] == BASE


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train", ["no config", "CONFIG.py", "--gin_file"]),
        ("train nothing.py", ["no config file nothing.py"]),
        ("train c.gin", ["--gin_file=c.gin"]),
        ("train c.py --gin_file=c.gin", ["either c.py or gin"]),
        ("train c.py --gin.N=3", ["either c.py or gin"]),
        ("train --gin_file=nothing.gin", ["no gin file 'nothing.gin'"]),
        (
            "train --gin_file=c.gin --gin.M=3",
            ["--gin.M", "nothing uses the macro 'M'"],
        ),
        ("train --gin_file=c.gin --gin.N", ["--gin.N", "--gin.NAME=VALUE"]),
        ("train --gin_file=c.gin --gin.N 9", ["--gin.N", "without spaces"]),
        ("train c.py --set optimizer.learning_rat=0.1", ["'optimizer.learning_rate'"]),
        ("train c.py --set training.steps=x", ["training.steps", "whole number", "'x'"]),
        ("train c.py --set training.steps", ["FIELD=VALUE"]),
        ("train c.py --steps -3", ["training.steps is -3"]),
        ("train c.py --steps many", ["training.steps", "whole number", "'many'"]),
        ("train c.py --seeds 0,x", ["training.seeds", "'x'"]),
        ("train c.py --stpes 3", ["unknown argument '--stpes'", "did you mean '--steps'"]),
        ("train c.py --stpes=3", ["unknown argument '--stpes'", "did you mean '--steps'"]),
        ("train c.py --work W", ["unknown argument '--work'"]),
        ("train c.py other.py", ["unknown argument 'other.py'"]),
        ("eval", ["no config", "--prompt of a run"]),
        ("eval --prompt nothing.npy", ["--prompt nothing.npy", "no such file"]),
        ("eval --prompt a.npy", ["no config", "eval --prompt a.npy --eval_data"]),
        ("eval c.py --prompt a.npy --data F", ["--eval_data"]),
        ("eval --prompt run --eval_data F --split train", ["--split train", "--eval_data names"]),
        ("predict hello", ["no config"]),
        ("predict --prompt run --input nothing.txt", ["nothing.txt: No such file or directory\n"]),
        ("predict --prompt run --input c.py hello", ["either TEXT or --input"]),
        ("eval c.py --prompt a.npy --output c.py/x.json", ["--output", "no folder c.py"]),
        ("predict --prompt run x --output no/x.txt", ["--output", "no folder no"]),
        ("tasks word_valence --dump no/x.jsonl", ["--dump", "no folder no"]),
        ("trian c.py", ["'trian'", "did you mean 'train'?", "see prompt-tuning --help"]),
        ("--verison", ["'--verison'", "did you mean '--version'"]),
        ("convert a b --to pef", ["'pef'", "did you mean 'peft'?"]),
        ("similar a --amnog b", ["'--amnog'", "did you mean '--among'"]),
        ("metrics t --predictoins f", ["'--predictoins'", "did you mean '--predictions'"]),
        ("completion bsh", ["'bsh'", "did you mean 'bash'?"]),
        ("train c.py --set training.learning_rate=1", ["mean 'optimizer.learning_rate'"]),
        ("inspect", ["PATH", "see prompt-tuning inspect --help"]),
        ("tasks --limit x", ["--limit", "see prompt-tuning tasks --help"]),
    ],
)
def test_wrong_input_gets_one_line_and_status_2(
    commands: Commands, capsys: pytest.CaptureFixture[str], line: str, parts: list[str]
) -> None:
    assert main(line.split(" ")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts), captured.err


def test_help_where_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "prompt-tuning COMMAND --help" in capsys.readouterr().out


def test_the_version_and_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    line = capsys.readouterr().out
    assert line.startswith(f"prompt-tuning {prompt_tuning_jax.__version__} (Python ")
    assert "jax " in line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "prompt-tuning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tr", {"train", "transfer"}),
        ("train --wor", {"--workdir"}),
        ("convert a b --to p", {"peft"}),
    ],
)
def test_what_completion_offers(line: str, offered: set[str], folder: Path) -> None:
    """As a shell asks for it: argcomplete answers in another file, in place of the command."""
    answer = folder / "answer"
    whole = f"prompt-tuning {line}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": whole,
        "COMP_POINT": str(len(whole)),
    }
    code = "from prompt_tuning_jax.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert {text.strip() for text in answer.read_text().split("\n")} == offered


def test_warnings_are_notes_said_once(
    commands: Commands,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = logging.getLogger("prompt_tuning_jax.data.anything")

    def train(experiment: Experiment) -> Any:
        for number in (1, 1, 2):
            log.warning("%d stands in", number)
        return SimpleNamespace(finished=True, stopped_by=0)

    monkeypatch.setattr(run, "train", train)
    assert main(["train", "c.py"]) == 0
    assert capsys.readouterr().err == "note: 1 stands in\nnote: 2 stands in\n"
    assert not caplog.records  # nor by anybody's handler at the root


def test_errors_of_the_work_itself(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.fails = UserError("the loss is not finite at step 3")
    assert main(["train", "c.py"]) == 2
    assert capsys.readouterr().err == "error: the loss is not finite at step 3\n"
    commands.fails = KeyboardInterrupt()  # type: ignore[assignment]
    assert main(["train", "c.py"]) == 130
    commands.fails = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "c.py"])


@pytest.mark.parametrize(
    ("line", "task", "prompts", "split"),
    [
        ("eval c.py --prompt a.npy", "word_valence", ["a.npy"], None),
        ("eval c.py", "word_valence", [], None),
        ("eval --prompt run", "saved", ["run"], None),
        ("eval --prompt run/a.npy", "saved", ["run/a.npy"], None),
        ("eval c.py --prompt run", "word_valence", ["run"], None),
        ("eval --prompt a.npy --prompt run --split test", "saved", ["a.npy", "run"], "test"),
        ("eval --prompt run --set data.task=t", "t", ["run"], None),
        ("eval --prompt run --eval_data F", "saved", ["run"], None),
        ("eval --prompt run --data F --split train", "saved", ["run"], "train"),
        ("eval --prompt run --data F --set data.eval=G", "saved", ["run"], None),
        ("eval --gin_file=c.gin --prompt run", "word_valence", ["run"], None),
    ],
)
def test_eval_gets_config_prompts_and_split(
    commands: Commands, folder: Path, line: str, task: str, prompts: list[str], split: str | None
) -> None:
    (folder / "run" / "a.npy").touch()
    assert main(line.split(" ")) == 0
    ((experiment, options),) = commands.calls
    assert experiment.data.task == task
    assert options == {"prompts": prompts, "split": split, "labels": ()}


def test_eval_prints_a_table_and_writes_json(
    commands: Commands, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "new").mkdir()
    line = ["eval", "c.py", "--prompt", "a.npy", "--prompt", "run", "--output", "new/s.json"]
    assert main(line) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if "." in line]
    for name, score in [
        ("a[b].npy", "50.00"),
        ("seed_1", "75.00"),
        ("mean", "62.50"),
        ("best", "75.00"),
    ]:
        assert any(name in row and score in row for row in rows), table
    assert any("ensemble" in row and "87.25" in row for row in rows), table
    written = json.loads((folder / "new" / "s.json").read_text())
    assert written["split"] == "validation"
    assert written["per_prompt"][1] == {"prompt": "seed_1", "accuracy": 75.0, "invalid": 1.0}
    assert written["ensemble"]["accuracy"] == 87.25
    assert [path.name for path in (folder / "new").iterdir()] == ["s.json"]


def test_predict_takes_texts_a_file_or_stdin(
    commands: Commands,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "in.txt").write_text("one\n\nthree\n", encoding="utf-8")
    assert main(["predict", "--prompt", "run", "one", "two words"]) == 0
    assert capsys.readouterr().out == "one ü\ntwo words ü\n"
    assert main(["predict", "--prompt", "run", "--input", "in.txt"]) == 0
    assert capsys.readouterr().out == "one ü\n ü\nthree ü\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny"))
    assert main(["predict", "--prompt", "run", "--output", "out.txt"]) == 0
    assert capsys.readouterr().out == ""
    assert (folder / "out.txt").read_text(encoding="utf-8") == "x ü\ny ü\n"
    assert [options["inputs"] for _, options in commands.calls] == [
        ["one", "two words"],
        ["one", "", "three"],
        ["x", "y"],
    ]
    assert all(options["prompts"] == ["run"] for _, options in commands.calls)


def test_predict_as_json_lines(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--prompt", "run", "--json", "one", ""]) == 0
    one, empty = map(json.loads, capsys.readouterr().out.splitlines())
    log_probs = {"good": -0.5, "bad": -1.0}
    assert one == {
        "input": "one",
        "prediction": "one\nü",
        "log_probs": log_probs,
        "votes": {"good": 2},
    }
    assert empty == {"input": "", "prediction": "\nü", "log_probs": log_probs}


def test_predict_finds_its_experiment(commands: Commands) -> None:
    bare = replace(UNDESCRIBED, model=Model(name_or_path="m"))
    for options, expected in [
        (["--prompt", "a.npy", "--model", "m"], bare),
        (["--model", "m"], bare),
        (["--prompt", "run"], Experiment(data=Data(task="saved"))),
        (["--config", "c.py", "--prompt", "run"], BASE),
        (["--gin_file", "c.gin"], BASE),
    ]:
        assert main(["predict", *options, "text"]) == 0
        assert commands.calls[-1][0] == expected


def test_a_text_that_is_not_utf_8_is_refused(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python holds bytes of the command line that are not UTF-8 as lone surrogates.

    So it does with those of stdin, in a locale such as that of most containers.
    """
    assert main(["predict", "--prompt", "run", "fine", "caf\udce9"]) == 2
    assert "TEXT 2 is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("fine\ncaf\udce9\n"))
    assert main(["predict", "--prompt", "run"]) == 2
    assert "line 2 is not UTF-8" in capsys.readouterr().err
    assert not commands.calls


def test_a_byte_order_mark_is_no_part_of_the_first_line(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert main(["predict", "--prompt", "run", "--input", str(file)]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffone\ntwo\n"))
    assert main(["predict", "--prompt", "run"]) == 0
    assert [options["inputs"] for _, options in commands.calls] == [["one", "two"]] * 2


@pytest.mark.parametrize(
    "line", ["predict --prompt run x --output", "eval --prompt run --predictions", "tasks t --dump"]
)
def test_a_folder_is_no_output_and_is_refused_before_the_work(
    commands: Commands, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = line.split()[-1]
    assert main([*line.split(), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {option} {tmp_path} is a folder; name a file\n"
    assert not commands.calls


@pytest.mark.parametrize(
    ("text", "number"), [("0.5", 0.5), ("2", 2.0), ("0", None), ("x", None), ("inf", None)]
)
def test_options_with_fractions(text: str, number: float | None) -> None:
    line = ["serve", "--prompts", "run", "--max_wait_ms", text]
    if number is None:
        with pytest.raises(UserError, match=f"'{text}' is not a number above 0"):
            parse(line)
    else:
        assert getattr(parse(line), "max_wait_ms") == number  # noqa: B009


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_predict_needs_input(
    commands: Commands,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["predict", "--prompt", "run"]) == 2
    assert "empty" in capsys.readouterr().err
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["predict", "--prompt", "run"]) == 2
    assert "no input" in capsys.readouterr().err
    assert not commands.calls


def test_output_to_a_device_leaves_it_a_device(commands: Commands) -> None:
    assert main(["predict", "--prompt", "run", "x", "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_tasks_and_inspect(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    assert capsys.readouterr().out == "a_task  what it is\nb\n"
    assert main(["tasks", "a_task", "--split", "test", "--limit", "2"]) == 0
    assert capsys.readouterr().out == "inputs: a text\ninputs ids: [3, 1]\n\n"
    assert commands.calls.pop() == ("a_task", {"split": "test", "limit": 2})
    assert main(["inspect", "run"]) == 0
    assert capsys.readouterr().out == "kind    a prompt\nlength  20\n"
    assert commands.calls.pop() == ("run", {})
    assert main(["inspect", "run", "--json", "--fingerprint"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": "prompt", "length": 20}
    assert commands.calls.pop() == ("run", {"with_fingerprint": True})


def test_convert(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "a", "b"]) == 0
    assert capsys.readouterr() == ("wrote a prompt: /p (12.3 kB in 2 files)\n", "note: a note\n")
    assert commands.calls.pop() == (("a", "b"), {})
    line = "convert a b --to t5x --step 0 --dtype float32 --overwrite --max_shard_size 1.5GB"
    assert main(line.split()) == 0
    options = {"to": "t5x", "step": 0, "dtype": "float32", "overwrite": True}
    assert commands.calls.pop() == (("a", "b"), {**options, "max_shard_bytes": 1_500_000_000})


def test_merge(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "run", "b", "--to", "hf"]) == 0
    assert capsys.readouterr().out == "wrote a model: /p (1.5 kB)\n"
    assert commands.calls.pop() == (("run", "b"), {})
    line = "merge run b --member seed_1 --dtype bfloat16 --max_shard_size 1MB --overwrite"
    assert main(line.split()) == 0
    options = {"member": "seed_1", "dtype": "bfloat16", "overwrite": True}
    assert commands.calls.pop() == (("run", "b"), {**options, "max_shard_bytes": 1_000_000})


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([command, "--help"] if command else ["--help"])
    assert status.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: prompt-tuning {command}".rstrip())
    assert max(map(len, lines)) <= 100
    for name in () if command else COMMANDS:
        assert any(line.startswith(f"    {name} ") for line in lines)
    if command in ("eval", "predict"):
        words = " ".join(" ".join(lines).split())
        assert "Prompt file, PEFT adapter" in words and "run of any method" in words


def test_as_a_program() -> None:
    """Its own process, so that what ``--help`` imports can be seen."""
    code = (
        "import sys\n"
        "from prompt_tuning_jax.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'seqio', 'orbax', 'gin', 'prompt_tuning_jax.training'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    assert subprocess.run([sys.executable, "-c", code], **options).stderr == ""
    line = "-m prompt_tuning_jax train configs/quickstart.py --set optimizer.learning_rat=1"
    done = subprocess.run([sys.executable, *line.split()], **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: there is no field 'optimizer.learning_rat'; "
        "did you mean 'optimizer.learning_rate'?\n"
    )


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys\n"
        "rows = [('field', 'value')] * 100_000\n"
        "from prompt_tuning_jax.inference import inspection\n"
        "inspection.inspect = lambda path: rows\n"
        "from prompt_tuning_jax.cli.main import main\n"
        "sys.exit(main(['inspect', '.']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"field  value\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As /dev/stdout is, which may lead to a file."""
    file = tmp_path / "out.txt"
    with file.open("w") as opened:
        inode = file.stat().st_ino
        with text_output(f"/proc/self/fd/{opened.fileno()}") as written:
            written.write("scores")
    assert (file.read_text(), file.stat().st_ino) == ("scores", inode)
    with text_output(tmp_path / "other.txt") as written:
        written.write("more")
        assert not (tmp_path / "other.txt").exists()
    assert (tmp_path / "other.txt").read_text() == "more"


def test_the_home_of_the_user_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
    assert main(["convert", "~/a.npy", "~/b.safetensors"]) == 0
    assert (tmp_path / "b.safetensors").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "inspect ~nouser/x",
        "predict x --prompt ~nouser/x",
        "convert ~nouser/x out --to peft",
        "train --data ~nouser/x.jsonl --eval_data ~nouser/y.jsonl --workdir ~nouser/run",
        "serve --prompts ~nouser/x",
    ],
)
def test_the_home_of_an_unknown_user_is_no_such_path(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert "~nouser" in capsys.readouterr().err.splitlines()[-1]


def test_every_option_accepts_its_default() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    tried = 0
    for command in commands.choices.values():
        for action in command._actions:
            if callable(action.type) and isinstance(action.default, int | float):
                assert action.type(str(action.default)) == action.default, action.dest
                tried += 1
    assert tried > 10
