from pathlib import Path

import pytest

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.config.overrides import apply_override, diff
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import FullTuning, PromptTuning

BASE = """
TRAIN_STEPS = 7
PROMPT_LENGTH = 20
include 'method.gin'
Training.steps = %TRAIN_STEPS
Data:
  labels = ['a', 'b']  # a comment

  inputs_length = 16
"""
METHOD = """
Experiment.method = @PromptTuning()
PromptTuning.length = %PROMPT_LENGTH
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gin").write_text(BASE)
    (tmp_path / "method.gin").write_text(METHOD)
    return tmp_path


def changes(experiment: Experiment) -> list[str]:
    return diff(Experiment(), experiment)


def test_nothing_bound_is_the_default() -> None:
    assert experiment_from_gin([]) == Experiment()


def test_files_blocks_macros_and_includes(folder: Path) -> None:
    assert changes(experiment_from_gin(["base.gin"])) == [
        "method.length: 100 -> 20",
        'data.labels: [] -> ["a", "b"]',
        "data.inputs_length: 128 -> 16",
        "training.steps: 30000 -> 7",
    ]


@pytest.mark.parametrize(
    ("binding", "override"),
    [
        ("PROMPT_LENGTH=3", "method.length=3"),
        ("PROMPT_LENGTH = 3", "method.length=3"),
        ("Optimizer.learning_rate=0.1", "optimizer.learning_rate=0.1"),
        ("Optimizer.learning_rate=1", "optimizer.learning_rate=1.0"),
        (
            "Optimizer.multiply_by_parameter_scale=True",
            "optimizer.multiply_by_parameter_scale=true",
        ),
        ("prompt_tuning_jax.Optimizer.learning_rate=0.1", "optimizer.learning_rate=0.1"),
        ("Training.seeds=(0, 1)", "training.seeds=0,1"),
        ("Training.seeds=[0, 1]", "training.seeds=0,1"),
        ("Data.task='x'", "data.task=x"),
        ('Data.inputs_template="a=b"', "data.inputs_template=a=b"),
        ("PromptTuning.init='uniform'", "method.init=uniform"),
        ("Experiment.method=@FullTuning()", "method=full"),
        ("Experiment.method=@prompt_tuning_jax.FullTuning()", "method=full"),
        ("TRAIN_STEPS=1_000", "training.steps=1000"),
    ],
)
def test_a_flag_is_an_override(folder: Path, binding: str, override: str) -> None:
    # A file that names a method names its optimizer too.
    expected = apply_override(experiment_from_gin(["base.gin"]), override)
    assert experiment_from_gin(["base.gin"], [binding]) == expected


def test_later_files_and_flags_win(folder: Path) -> None:
    (folder / "more.gin").write_text("Training.steps = 8\nTraining.batch_size = 4")
    both = experiment_from_gin(["base.gin", "more.gin"], ["Training.batch_size=5"])
    assert (both.training.steps, both.training.batch_size) == (8, 5)
    assert both.method == PromptTuning(length=20)


def test_calls_are_independent(folder: Path) -> None:
    experiment_from_gin(["base.gin"], ["Optimizer.learning_rate=0.1"])
    assert experiment_from_gin([]) == Experiment()
    with pytest.raises(UserError):
        experiment_from_gin(["method.gin"])  # the macro of the first call is gone


def test_the_host_programs_own_gin_is_left_alone(folder: Path) -> None:
    import gin

    gin.constant("prompt_tuning_jax_test.MINE", 3)
    before = gin.config_str(), gin.config_is_locked()
    experiment_from_gin(["base.gin"])
    assert (gin.config_str(), gin.config_is_locked()) == before
    with pytest.raises(UserError, match="MINE"):
        experiment_from_gin([], ["Training.steps=%prompt_tuning_jax_test.MINE"])


def test_scopes_and_macros_that_hold_references(folder: Path) -> None:
    bindings = [
        "Experiment.optimizer=@slow/sgd/Optimizer()",
        "Optimizer.learning_rate=0.5",
        "Optimizer.weight_decay=0.25",
        "slow/Optimizer.learning_rate=0.125",
        "slow/sgd/Optimizer.name='sgd'",
        "METHOD=@FullTuning()",
        "Experiment.method=%METHOD",
    ]
    with pytest.raises(UserError, match=r"Optimizer\.learning_rate has no effect"):
        experiment_from_gin([], bindings)
    del bindings[1]  # in a file it may stand: the inner scope wins
    (folder / "outer.gin").write_text("Optimizer.learning_rate=0.5")
    assert experiment_from_gin(["outer.gin"], bindings).optimizer.learning_rate == 0.125
    optimizer = experiment_from_gin([], bindings).optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("sgd", 0.125, 0.25)
    assert experiment_from_gin([], bindings).method == FullTuning()


def test_search_paths_and_the_folder_of_the_including_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    expected = experiment_from_gin([str(folder / "base.gin")])
    assert experiment_from_gin(["base.gin"], search_paths=["nowhere", str(folder)]) == expected
    assert experiment_from_gin(["base.gin"], search_paths=["", ".."]) == expected
    with pytest.raises(UserError, match=r"no gin file 'base\.gin'.*--gin_search_paths"):
        experiment_from_gin(["base.gin"])
    with pytest.raises(UserError, match=r"no gin file 'base\.gin'.*nowhere"):
        experiment_from_gin(["base.gin"], search_paths=["nowhere"])


@pytest.mark.parametrize(
    "statement",
    [
        "import os",
        "import os as o",
        "from os import path",
        "import antigravity.gin",
    ],
)
def test_imports_are_refused_wherever_they_stand(folder: Path, statement: str) -> None:
    (folder / "method.gin").write_text(f"{METHOD}\n{statement}\n")
    with pytest.raises(UserError, match=r"method\.gin line 5: gin files may not import") as error:
        experiment_from_gin(["base.gin"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        experiment_from_gin([], [f"A=1\n{statement}"])
    with pytest.raises(UserError):
        experiment_from_gin([], [statement])


def test_an_include_stays_within_the_folders_it_was_given(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (folder / "secret.gin").write_text("Training.steps = 1")
    for target in ("../secret.gin", str(folder / "secret.gin")):
        (inner / "main.gin").write_text(f"include '{target}'")
        assert experiment_from_gin(["inner/main.gin"]).training.steps == 1  # below where we are
    outside = folder.parent / f"{folder.name}_outside.gin"
    outside.write_text("Training.steps = 2")
    try:
        for target in (f"../{outside.name}", str(outside)):
            (folder / "main.gin").write_text(f"include '{target}'")
            with pytest.raises(UserError, match=r"main\.gin line 1: .*is outside"):
                experiment_from_gin(["main.gin"])
            found = experiment_from_gin(["main.gin"], search_paths=[str(folder.parent)])
            assert found.training.steps == 2
        (folder / "link.gin").symlink_to(outside)
        (folder / "main.gin").write_text("include 'link.gin'")
        with pytest.raises(UserError, match="is outside"):
            experiment_from_gin(["main.gin"])
    finally:
        outside.unlink()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "Optimizer.learning_rat = 1",
            ["line 1", "Optimizer", "'learning_rat'", "'learning_rate'"],
        ),
        ("\nOptimiser.name = 'sgd'", ["line 2", "'Optimiser'", "did you mean 'Optimizer'?"]),
        ("Optimiser:\n  name = 'sgd'", ["line 1", "'Optimiser'", "'Optimizer'"]),
        ("Data:\n  task = 'a'\n  tusk = 'b'", ["line 3", "'tusk'", "'task'"]),
        ("t5x.Optimizer.name = 'sgd'", ["'t5x.Optimizer'"]),
        ("Optimizer = 'sgd'", ["line 1", "Optimizer.NAME"]),
        ("Experiment.method = @FullTunin()", ["'FullTunin'", "'FullTuning'"]),
        ("Experiment.method = @FullTuning", ["parentheses"]),
        ("Experiment.method = 'full'", ["Experiment.method", "'full'", "@PromptTuning()"]),
        ("Experiment.method = {'class': 'FullTuning'}", ["Experiment.method", "@PromptTuning()"]),
        ("Experiment.optimizer = @Data()", ["optimizer", "expected Optimizer, got Data"]),
        ("Experiment.method = @Experiment()", ["method", "got Experiment"]),
        ("Model.name_or_path = @Model()", ["model.name_or_path", "text", "@Model()"]),
        ("Optimizer.learning_rate = 'fast'", ["optimizer.learning_rate", "number", "'fast'"]),
        ("Training.steps = 1e3", ["training.steps", "whole number", "1000.0"]),
        ("Training.steps = True", ["training.steps", "whole number", "True"]),
        ("\n\nTraining.steps = 1e3", ["own.gin line 3", "training.steps", "whole number"]),
        ("Training.seeds = 3", ["training.seeds", "list", "3"]),
        ("Training.seeds = [@Data()]", ["training.seeds", "@Data()"]),
        ("Model.dtype = 'float16'", ["model.dtype", "bfloat16"]),
        ("Training.steps = %B", ["line 1", "the macro 'B' has no value"]),
        ("A = 3\nTraining.steps = %B", ["line 1", "nothing uses the macro 'A'"]),
        ("STEPS = 3\nSTEP = 3\nTraining.steps = %STEPS", ["line 2", "'STEP'", "'STEPS'"]),
        ("A = %B\nB = %A\nTraining.steps = %A", ["refers to itself"]),
        (
            "\n".join(f"A{i} = %A{i + 1}" for i in range(2000)) + "\nTraining.steps = %A0",
            ["more than 100 macros lead to"],
        ),
        ("A = %gin.REQUIRED\nTraining.steps = %A", ["A must be given", "--gin.A=VALUE"]),
        ("Training.steps = %gin.REQUIRED", ["Training.steps must be given"]),
        ("include 'own.gin'", ["own.gin", "itself"]),
        ("include 'nothing.gin'", ["line 1", "'nothing.gin'"]),
        ("Data.task = tiny", ["line 1", "cannot read 'Data.task = tiny'", "quotes"]),
        ("\nData.task =", ["line 2", "cannot read"]),
        ("\nData.labels = ['a',", ["own.gin line", "cannot read"]),
        ("Data.task = -", ["cannot read"]),
        ("Data", ["cannot read"]),
        ("Data.task = 'a", ["cannot read"]),
        ("Data.task = 'a' 3", ["cannot read"]),
        ("Data:\ntask = 3", ["cannot read"]),
        ("Data.task = __import__('os')", ["cannot read"]),
        ("Data.task = $x", ["cannot read"]),
        ("Data.labels = " + "[" * 5000, ["own.gin"]),
        ("Data.task = 'a'\x00", ["own.gin"]),
    ],
)
def test_wrong_files_get_one_line(folder: Path, text: str, parts: list[str]) -> None:
    (folder / "own.gin").write_text(text)
    with pytest.raises(UserError) as error:
        experiment_from_gin(["own.gin"])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_file_that_is_not_text(folder: Path) -> None:
    (folder / "own.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the gin file own"):
        experiment_from_gin(["own.gin"])


@pytest.mark.parametrize(
    ("binding", "parts"),
    [
        ("PROMT_LENGTH=3", ["--gin.PROMT_LENGTH", "did you mean 'PROMPT_LENGTH'?"]),
        ("Optimizer.learning_rat=3", ["--gin.Optimizer.learning_rat", "'learning_rate'"]),
        ("TRAIN_STEPS=many", ["--gin.TRAIN_STEPS", "quotes"]),
        ("TRAIN_STEPS=", ["--gin.TRAIN_STEPS", "cannot read"]),
        ("TRAIN_STEPS", ["--gin.TRAIN_STEPS", "NAME=VALUE"]),
        ("PromptTunin.length=3", ["'PromptTuning'"]),
        ("a/Optimizer.learning_rate=3", ["no effect", "@a/Optimizer()"]),
        ("TRAIN_STEPS='7'", ["training.steps", "whole number", "'7'"]),
    ],
)
def test_wrong_flags_get_one_line(folder: Path, binding: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        experiment_from_gin(["base.gin"], [binding])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_parameter_of_a_method_that_is_not_used(folder: Path) -> None:
    flags = ["Experiment.method=@FullTuning()", "PromptTuning.length=3"]
    with pytest.raises(UserError, match=r"--gin.Experiment.method='@PromptTuning\(\)'"):
        experiment_from_gin(["base.gin"], flags)
    assert experiment_from_gin(["base.gin"], flags[:1]).method == FullTuning()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("from __gin__ import dynamic_registration", 1),
        ("\nfrom t5x import utils\nutils.SaveCheckpointConfig.period = 5", 2),
        ("import __main__ as train_script", 1),
        ("prompts.Prompt.length = 5", 1),
        ("NUM_HEADS = 12", 1),
    ],
)
def test_a_file_of_t5x_is_sent_to_its_command(folder: Path, text: str, line: int) -> None:
    (folder / "own.gin").write_text(text)
    with pytest.raises(
        UserError, match=rf"own\.gin line {line}: .*prompt-tuning import-gin"
    ) as error:
        experiment_from_gin(["own.gin"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            "TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 9}",
            ["data.inputs_length: 16 -> 512", "data.targets_length: 8 -> 9"],
        ),
        ("INITIAL_CHECKPOINT_PATH='gs://a/b'", ['model.name_or_path: "tiny" -> "gs://a/b"']),
        ("MIXTURE_OR_TASK_NAME='x'", ['data.task: "word_valence" -> "x"']),
        ("MIXTURE_OR_TASK_MODULE='mine.tasks'", ['data.module: "" -> "mine.tasks"']),
        ("MIXTURE_OR_TASK_MODULE='prompt_tuning.data.glue'", []),
        ("MIXTURE_OR_TASK_MODULE=None", []),
        ("USE_CACHED_TASKS=False", []),
        ("CLASS_LABELS=['good', 'bad']", ['method.init_labels: [] -> ["good", "bad"]']),
        ("EVAL_PERIOD=5", ["training.eval_every: 1000 -> 5"]),
        ("LOSS_NORMALIZING_FACTOR=None", ['training.loss_normalization: "tokens" -> "sum"']),
        ("LOSS_NORMALIZING_FACTOR=233472", ['training.loss_normalization: "tokens" -> "sum"']),
        ("RANDOM_SEED=7", ["training.seeds: [0] -> [7]"]),
        ("RANDOM_SEED=None", []),
        ("DROPOUT_RATE=0.0", ["model.dropout_rate: 0.1 -> 0.0"]),
        ("BATCH_SIZE=3", ["training.batch_size: 32 -> 3"]),
        ("PROMPT_LENGTH=3", ["method.length: 20 -> 3"]),  # a macro of the file
    ],
)
def test_macros_of_t5x_as_flags(folder: Path, flag: str, expected: list[str]) -> None:
    before = experiment_from_gin(["base.gin"])
    assert diff(before, experiment_from_gin(["base.gin"], [flag])) == expected


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("TASK_FEATURE_LENGTHS=5", ["--gin.TASK_FEATURE_LENGTHS", "{'inputs': 512"]),
        ("TASK_FEATURE_LENGTHS={'text': 5}", ["--gin.TASK_FEATURE_LENGTHS", "{'inputs': 512"]),
        ("TASK_FEATURE_LENGTHS={[1]: 5}", ["--gin.TASK_FEATURE_LENGTHS", "cannot read"]),
        ("LOSS_NORMALIZING_FACTOR='AVERAGE_PER_SEQUENCE'", ["AVERAGE_PER_SEQUENCE", "a sum"]),
        ("EVAL_PERIOD='often'", ["training.eval_every", "'often'"]),
        ("EVAL_PERIODS=5", ["did you mean 'EVAL_PERIOD'?"]),
    ],
)
def test_wrong_macros_of_t5x(folder: Path, flag: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        experiment_from_gin(["base.gin"], [flag])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_steps_that_include_those_of_the_checkpoint_are_noted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "base.gin").write_text(f"{BASE}\nOptimizer.initial_step = 1_100_000\n")
    experiment_from_gin(["base.gin"], ["TRAIN_STEPS=50_000"])
    assert not caplog.messages
    experiment_from_gin(["base.gin"], ["TRAIN_STEPS=1_150_000"])
    assert len(caplog.messages) == 1
    assert "there it is 50000 steps" in caplog.messages[0]


def test_macros_that_hold_each_other_twice_do_not_grow_without_bound(folder: Path) -> None:
    lines = [f"M{i} = [%M{i + 1}, %M{i + 1}]" for i in range(40)]
    (folder / "own.gin").write_text("\n".join([*lines, "M40 = 1", "Training.seeds = %M0"]))
    with pytest.raises(UserError, match="too many items"):
        experiment_from_gin(["own.gin"])


def test_includes_that_repeat_each_other_end(folder: Path) -> None:
    for i in range(12):
        (folder / f"f{i}.gin").write_text(f"include 'f{i + 1}.gin'\n" * 2)
    (folder / "f12.gin").write_text("")
    with pytest.raises(UserError, match="more than 500 files"):
        experiment_from_gin(["f0.gin"])
