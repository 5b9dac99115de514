"""``prompt-tuning import-gin``: launches in the form of T5X's and of the original's gin files."""

from dataclasses import replace
from pathlib import Path

import pytest

from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.t5x.launch import read_launch
from prompt_tuning_jax.config.t5x.translate import translate, translated_experiment
from prompt_tuning_jax.config.t5x.translation import Translation
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import IA3, DeepPrompts, FullTuning, MultitaskPrompts, PatternTuning

ROOT = Path(__file__).resolve().parents[2]

NETWORK = """
from __gin__ import dynamic_registration
from flax import linen
from flaxformer.components import dense
from flaxformer.components.attention import dense_attention
from flaxformer.architectures.t5 import t5_architecture

NUM_HEADS = %gin.REQUIRED
ACTIVATION_DTYPE = 'bfloat16'
DROPOUT_RATE = 0.0
ARCHITECTURE = @t5_architecture.EncoderDecoder()
t5_architecture.EncoderDecoder:
  encoder_factory = @t5_architecture.Encoder
  dtype = %ACTIVATION_DTYPE
DROPOUT_FACTORY = @dropout_factory/linen.Dropout
dropout_factory/linen.Dropout.rate = %DROPOUT_RATE
t5_architecture.Encoder.input_dropout_factory = %DROPOUT_FACTORY
dense_attention.MultiHeadDotProductAttention:
  num_heads = %NUM_HEADS
  dropout_rate = %DROPOUT_RATE
dense.MlpBlock.activations = ('gelu', 'linear')
"""
MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import models
from t5x import optimizers as optim
from t5x import utils
from flax import linen
from flax import traverse_util
from prompt_tuning import prompts
from prompt_tuning.train import layers as prompt_layers
from prompt_tuning.train import prompts as train_prompts
from prompt_tuning.train import utils as prompt_utils

include 'network.gin'
NUM_HEADS = 12
PROMPT_LENGTH = 100
PROMPT = @train_prompts.Prompt
train_prompts.Prompt.prompt = @prompts.Prompt()
prompts.Prompt:
  length = %PROMPT_LENGTH
  prompt_init = @prompt_init/linen.initializers.uniform()
prompt_init/linen.initializers.uniform.scale = 0.5
ARCHITECTURE = @prompt_layers.PromptEncoderDecoder()
prompt_layers.PromptEncoderDecoder:
  encoder_factory = @prompt_layers.PromptEncoder
  dtype = %ACTIVATION_DTYPE
prompt_layers.PromptEncoder.prompt_factory = %PROMPT
adafactor.Adafactor:
  decay_rate = 0.8
  step_offset = 0
  multiply_by_parameter_scale = False
  weight_decay_rate = 0.00001
OPTIMIZER = @optim.MultiOptimizer()
optim.MultiOptimizer.traversals_and_optimizers = (
    (@traverse_util.ModelParamTraversal(), @adafactor.Adafactor()),)
traverse_util.ModelParamTraversal.filter_fn = @prompt_utils.match_any()
PROMPT_REGEX = [".*/prompt/.*"]
prompt_utils.match_any.regexes = %PROMPT_REGEX
utils.RestoreCheckpointConfig:
  fallback_to_scratch = True
  assignment_map = ((r"^.*prompt.*$", None),)
Z_LOSS = 0.0001
LABEL_SMOOTHING = 0.0
LOSS_NORMALIZING_FACTOR = None
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary.sentencepiece_model_file = "gs://v/cc_all.32000.100extra/s.model"
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = %ARCHITECTURE
  input_vocabulary = %VOCABULARY
  output_vocabulary = %VOCABULARY
  optimizer_def = %OPTIMIZER
  z_loss = %Z_LOSS
  label_smoothing = %LABEL_SMOOTHING
  loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR
"""
RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import seqio
from t5x import partitioning
from t5x import trainer
from t5x import utils

MODEL_DIR = %gin.REQUIRED
MIXTURE_OR_TASK_NAME = %gin.REQUIRED
TASK_FEATURE_LENGTHS = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
DROPOUT_RATE = 0.1
USE_CACHED_TASKS = True
BATCH_SIZE = 128
EVAL_PERIOD = 1000
RANDOM_SEED = None
train_script.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  train_dataset_cfg = @train/utils.DatasetConfig()
  infer_eval_dataset_cfg = @infer_eval/utils.DatasetConfig()
  checkpoint_cfg = @utils.CheckpointConfig()
  partitioner = @partitioning.PjitPartitioner()
  trainer_cls = @trainer.Trainer
  total_steps = %TRAIN_STEPS
  eval_period = %EVAL_PERIOD
  random_seed = %RANDOM_SEED
train/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  split = 'train'
  batch_size = %BATCH_SIZE
  use_cached = %USE_CACHED_TASKS
  pack = False
  module = %MIXTURE_OR_TASK_MODULE
infer_eval/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = None  # longest
  split = 'validation'
  batch_size = %BATCH_SIZE
utils.CheckpointConfig:
  restore = @utils.RestoreCheckpointConfig()
  save = @utils.SaveCheckpointConfig()
utils.RestoreCheckpointConfig:
  path = %INITIAL_CHECKPOINT_PATH
  mode = 'specific'
  dtype = 'float32'
utils.SaveCheckpointConfig.period = 1000
partitioning.PjitPartitioner.num_partitions = 1
trainer.Trainer:
  num_microbatches = None
  learning_rate_fn = @utils.create_learning_rate_scheduler()
utils.create_learning_rate_scheduler:
  factors = "constant"
  base_learning_rate = 0.3
  warmup_steps = 1000
"""
LABELS = """
from __gin__ import dynamic_registration
from prompt_tuning import prompts
from prompt_tuning.train import prompts as train_prompts

CLASS_LABELS = %gin.REQUIRED
PROMPT = @train_prompts.Prompt
train_prompts.Prompt.prompt = @prompts.Prompt()
prompts.Prompt.prompt_init = @prompt_init/prompts.from_embedded_list()
prompt_init/prompts.from_embedded_list:
  embeddings = @prompt_init/prompts.t5x_load()
  texts = %CLASS_LABELS
  initializer = @prompt_init/prompts.from_sample_of_embeddings()
prompt_init/prompts.from_sample_of_embeddings:
  embeddings = @prompt_init/prompts.t5x_load()
  population_size = 5000
prompt_init/prompts.t5x_load:
  checkpoint_path = %INITIAL_CHECKPOINT_PATH
  variable_path = "token_embedder/embedding"
"""
RELEASED = "gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_base/checkpoint_1100000"
FLAGS = (
    "CLASS_LABELS=['positive', 'negative']",
    "MODEL_DIR='runs/released'",
    "MIXTURE_OR_TASK_NAME='taskless_glue_sst2_v200_examples'",
    "MIXTURE_OR_TASK_MODULE='prompt_tuning.data.glue'",
    "TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 8}",
    f"INITIAL_CHECKPOINT_PATH='{RELEASED}'",
    "TRAIN_STEPS=1_150_000",
    "USE_CACHED_TASKS=False",
)
FILES = ("model.gin", "labels.gin", "run.gin")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = {"network": NETWORK, "model": MODEL, "run": RUN, "labels": LABELS}
    for name, text in texts.items():
        (tmp_path / f"{name}.gin").write_text(text)
    return tmp_path


def imported(*flags: str, files: tuple[str, ...] = FILES, extra: str = "") -> Translation:
    if extra:
        Path("extra.gin").write_text(extra)
        files = (*files, "extra.gin")
    return translate(read_launch(files, [*FLAGS, *flags]))


def experiment(*flags: str, extra: str = "") -> Experiment:
    return translated_experiment(imported(*flags, extra=extra))


def remarks(t: Translation, kind: str) -> dict[str, str]:
    return {one.binding.partition(" = ")[0]: one.text for one in t.remarks if one.kind == kind}


def test_the_original_demo_is_the_released_config() -> None:
    expected = load_config(str(ROOT / "configs" / "released.py"))
    found = experiment()
    assert found.method == replace(expected.method, init_labels=("positive", "negative"))
    assert found == replace(expected, method=found.method)


def test_what_differs_is_listed_and_nothing_else() -> None:
    t = imported()
    assert remarks(t, "changed").keys() == {"TRAIN_STEPS", "RANDOM_SEED"}
    assert "1,100,000" in remarks(t, "changed")["TRAIN_STEPS"]
    assert remarks(t, "lost").keys() == {"infer_eval/utils.DatasetConfig.task_feature_lengths"}
    assert not remarks(t, "missing")


def test_the_command_writes_a_config_that_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--gin.{flag}" for flag in FLAGS]
    arguments = ["import-gin", "model.gin", "--gin_file=labels.gin", "--gin_file=run.gin", *flags]
    arguments += ["--tfds_data_dir=/data", "--output", "config.py"]
    assert main([*arguments, "--gin_search_paths=."]) == 0
    printed = capsys.readouterr().out
    assert "training.steps=50000" in printed
    assert "prompt-tuning train config.py" in printed
    found = load_config("config.py")
    assert found == replace(experiment(), data=replace(experiment().data, data_dir="/data"))
    before = Path("config.py").read_bytes()
    assert main(arguments) == 2  # not without --overwrite
    assert main([*arguments, "--overwrite", "--gin.BATCH_SIZE='many'"]) == 2
    assert "--gin.BATCH_SIZE" in capsys.readouterr().err
    assert Path("config.py").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        *("config.py", "labels.gin", "model.gin", "network.gin", "run.gin")
    ]


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("BATCH_SIZE=32", "training.batch_size", 32),
        ("DROPOUT_RATE=0.0", "model.dropout_rate", 0.0),
        ("EVAL_PERIOD=50", "training.eval_every", 50),
        ("RANDOM_SEED=3", "training.seeds", (3,)),
        ("PROMPT_LENGTH=7", "method.length", 7),
        ("LOSS_NORMALIZING_FACTOR='NUM_REAL_TARGET_TOKENS'",
         "training.loss_normalization", "tokens"),
        ("utils.SaveCheckpointConfig.period=20", "training.save_every", 20),
        ("PjitPartitioner.model_parallel_submesh=(4, 4, 1, 2)", "mesh.model", 32),
        ("partitioning.PjitPartitioner.num_partitions=2", "mesh.model", 2),
        ("trainer.Trainer.num_microbatches=4", "training.gradient_accumulation", 4),
        ("train_script.train.relative_steps=9", "training.steps", 9),
        ("infer_eval/utils.DatasetConfig.split='test'", "data.eval_split", "test"),
        ("adafactor.Adafactor.step_offset=1_100_000", "optimizer.initial_step", 0),
        ("adafactor.Adafactor.factored=False", "optimizer.min_dim_size_to_factor", 0),
        ("adafactor.Adafactor.weight_decay_rate=None", "optimizer.weight_decay", 0.0),
        ("models.EncoderDecoderModel.predict_batch_with_aux.num_decodes=4",
         "evaluation.num_beams", 4),
        ("train/utils.DatasetConfig.module='mine'", "data.module", "mine"),
        ("INITIAL_CHECKPOINT_PATH='/here/checkpoint_1000000'", "training.steps", 150_000),
        ("INITIAL_CHECKPOINT_PATH='/a/checkpoint_7/'", "model.name_or_path", "/a/checkpoint_7/"),
    ],
)  # fmt: skip
def test_a_flag_sets_a_field(flag: str, field: str, value: object) -> None:
    group, _, name = field.partition(".")
    assert getattr(getattr(experiment(flag), group), name) == value


@pytest.mark.parametrize(
    ("flag", "kind", "name"),
    [
        ("LABEL_SMOOTHING=0.1", "lost", "LABEL_SMOOTHING"),
        ("LOSS_NORMALIZING_FACTOR=233472", "changed", "LOSS_NORMALIZING_FACTOR"),
        ("train/utils.DatasetConfig.pack=True", "lost", "train/utils.DatasetConfig.pack"),
        ("INITIAL_CHECKPOINT_PATH='/here/model'", "lost", "INITIAL_CHECKPOINT_PATH"),
        ("MODEL_DIR='gs://bucket/run'", "lost", "MODEL_DIR"),
        ("TASK_FEATURE_LENGTHS={'inputs': 5, 'choices': 6}", "lost", "TASK_FEATURE_LENGTHS"),
        ("PROMPT_REGEX=['.*']", "lost", "PROMPT_REGEX"),
        ("prompt_init/linen.initializers.uniform.scale=0.1", "", ""),  # replaced by the labels
        ("UNKNOWN=3", "lost", "UNKNOWN"),
        ("utils.SaveCheckpointConfig.keep=1", "lost", "utils.SaveCheckpointConfig.keep"),
        ("utils.create_learning_rate_scheduler.factors='constant * decay_every'", "lost",
         "utils.create_learning_rate_scheduler.factors"),
        ("utils.RestoreCheckpointConfig.assignment_map=((r'a(.*)', r'b\\1'),)", "lost",
         "utils.RestoreCheckpointConfig.assignment_map"),
        ("train_prompts.Prompt.prompt=@mine.Computed()", "lost", "train_prompts.Prompt.prompt"),
        ("trainer.Trainer.weight_metrics_computer=@mine.Computer()", "lost",
         "trainer.Trainer.weight_metrics_computer"),
    ],
)  # fmt: skip
def test_a_binding_without_counterpart_is_listed(flag: str, kind: str, name: str) -> None:
    before = {(r.kind, r.binding.partition(" = ")[0]) for r in imported().remarks}
    after = {(r.kind, r.binding.partition(" = ")[0]) for r in imported(flag).remarks}
    assert (kind, name) in after - before if kind else after == before


def test_the_step_of_a_checkpoint_whose_name_does_not_tell_it() -> None:
    launch = read_launch(FILES, [*FLAGS, "INITIAL_CHECKPOINT_PATH='/here/model'"])
    found = translated_experiment(translate(launch, restored_step=1_149_000))
    assert (found.training.steps, found.optimizer.initial_step) == (1_000, 1_149_000)


@pytest.mark.parametrize(
    "value", ["3", "'x'", "['x']", "{'x': [1]}", "@a.b()", "(3, (4,))", "1e999"]
)
def test_values_of_other_types_never_crash(value: str) -> None:
    names = (
        *("PROMPT", "PROMPT_REGEX", "OPTIMIZER", "LOSS_NORMALIZING_FACTOR", "ARCHITECTURE"),
        *("utils.RestoreCheckpointConfig.assignment_map", "adafactor.Adafactor.decay_rate"),
        "optim.MultiOptimizer.traversals_and_optimizers",
        "partitioning.PjitPartitioner.model_parallel_submesh",
        "prompt_layers.PromptEncoder.layer_remat",
    )
    for name in names:
        try:
            translated_experiment(imported(f"{name}={value}"))
        except UserError as error:
            assert "\n" not in str(error)


IA3_FILE = """
from __gin__ import dynamic_registration
from flaxformer.components import dense
from flaxformer.components.attention import dense_attention
from prompt_tuning.extended.train import ia3
dense_attention.MultiHeadDotProductAttention:
  k_conv = @ia3.IA3Attention()
  v_conv = @ia3.IA3Attention()
dense.MlpBlock.intermediate_conv = @ia3.IA3()
PROMPT_REGEX = [".*/ia3_scaling.*"]
"""
MULTITASK = """
from __gin__ import dynamic_registration
from flax import linen
from prompt_tuning.extended import masks
from prompt_tuning.extended import multitask_prompts
from prompt_tuning.extended.train import multitask_prompts as train_prompts
from prompt_tuning.train import layers as prompt_layers
prompt_layers.PromptEncoderDecoder.encoder_mask_factory = @masks.prompt_encoder_attention_mask
masks.prompt_encoder_attention_mask:
  prompt_length = 106
  multitask = True
PROMPT = @train_prompts.MultiTaskPrompt
train_prompts.MultiTaskPrompt.prompt = @multitask_prompts.ConcatMultiTaskPrompt()
multitask_prompts.ConcatMultiTaskPrompt:
  length = %PROMPT_LENGTH
  task_length = 6
  num_tasks = 8
  shared_init = @prompt_init/linen.initializers.uniform()
PROMPT_REGEX = [".*/shared_prompt/.*", ".*/task_prompts/.*"]
"""
PER_LAYER = """
from __gin__ import dynamic_registration
from prompt_tuning import prompts
from prompt_tuning.extended.train import per_layer
from prompt_tuning.train import layers as prompt_layers
from prompt_tuning.train import prompts as train_prompts
prompt_layers.PromptEncoder.layer_factory = @per_layer.PromptEncoderLayer
per_layer.PromptEncoderLayer.prompt_factory = @per_layer/train_prompts.Prompt
per_layer/train_prompts.Prompt:
  prompt = @prompts.Prompt()
  combine = @per_layer.add_prompt
"""
MODEL_TUNING = """
from __gin__ import dynamic_registration
from t5x import adafactor
from t5x import models
from t5x.examples.t5 import network
OPTIMIZER = @adafactor.Adafactor()
models.EncoderDecoderModel.module = @network.Transformer()
network.Transformer.config = @network.T5Config()
network.T5Config.dtype = 'float32'
network.T5Config.dropout_rate = 0.25
"""
FROM_TEXT = """
from __gin__ import dynamic_registration
from prompt_tuning import prompts
prompts.Prompt.prompt_init = @prompt_init/prompts.from_embedded_string()
prompt_init/prompts.from_embedded_string.text = "It is great"
"""
FROM_FILE = """
from __gin__ import dynamic_registration
from prompt_tuning import prompts
prompts.Prompt.prompt_init = @prompt_init/prompts.from_array()
prompt_init/prompts.from_array.prompt = @prompt_init/prompts.np_load()
prompt_init/prompts.np_load.path = '/prompts/mnli.npy'
"""


def test_the_methods_of_the_original() -> None:
    assert experiment(extra=IA3_FILE).method == IA3()
    multitask = experiment(extra=MULTITASK).method
    assert multitask == MultitaskPrompts(
        combine="concatenation",
        length=100,
        task_length=6,
        tasks=8,
        init="uniform_positive",
        tasks_init="uniform_positive",
        prompt_to_prompt="causal",
    )
    for kind, combine in (("ConcatFeatures", "features"), ("Project", "projection")):
        text = MULTITASK.replace("ConcatMulti", f"{kind}Multi")
        found = experiment(extra=text.replace("task_length = 6", "shared_features = 32")).method
        assert isinstance(found, MultitaskPrompts)
        assert (found.combine, found.shared_features) == (combine, 32)
    deep = experiment(extra=PER_LAYER).method
    assert isinstance(deep, DeepPrompts)
    assert (deep.length, deep.mode, deep.init) == (100, "add", "class_labels")
    assert "evaluation" in remarks(imported(extra=PER_LAYER), "changed")["CLASS_LABELS"]
    regexes = 'PROMPT_REGEX = ["/decoder/.*/scale", ".*/bias"]'
    whole = "ARCHITECTURE = @flaxformer.architectures.t5.t5_architecture.EncoderDecoder()\n"
    pattern = experiment(extra=whole + regexes).method
    assert pattern == PatternTuning(patterns=("decoder/.*/scale", ".*/bias"))


PERCEPTRON = """
from __gin__ import dynamic_registration
from prompt_tuning.extended.perceptron.train import models
MODEL = @models.PerceptronLossEncoderDecoderModel()
models.PerceptronLossEncoderDecoderModel:
  module = %ARCHITECTURE
  z_loss = %Z_LOSS
  length_normalize = True
  hinge = 0.2
"""
WAYWARD = """
from __gin__ import dynamic_registration
from prompt_tuning import prompts
from prompt_tuning.extended.train import wayward
MODEL = @wayward.WaywardPromptEncoderDecoderModel()
wayward.WaywardPromptEncoderDecoderModel:
  module = %ARCHITECTURE
  discrete_prompt = @near/wayward.execute_initializer()
  distance = @wayward.squared_l2_distance
  gamma = 0.5
near/wayward.execute_initializer.init = @near/prompts.from_embedded_string()
near/prompts.from_embedded_string.text = "It is great"
"""


def test_the_losses_of_the_original() -> None:
    found = experiment(extra=PERCEPTRON)
    training, evaluation = found.training, found.evaluation
    assert (training.loss, training.margin, training.normalize_length) == ("perceptron", 0.2, True)
    assert training.z_loss == 0
    assert (evaluation.strategy, evaluation.normalize_length) == ("rank", True)
    labels = PERCEPTRON.replace("PerceptronLoss", "CrossEntropy").replace("hinge = 0.2", "")
    assert experiment(extra=labels).training.loss == "labels"
    training = experiment(extra=WAYWARD).training
    assert (training.wayward_text, training.wayward_weight) == ("It is great", 0.5)
    assert training.loss == "tokens"


def test_model_tuning_with_the_network_of_t5x() -> None:
    found = experiment(extra=MODEL_TUNING)
    assert found.method == FullTuning()
    assert (found.model.dtype, found.model.dropout_rate) == ("float32", 0.25)


def test_prompts_from_a_text_and_from_a_file() -> None:
    text = experiment(extra=FROM_TEXT).method
    assert (text.init, text.init_text) == ("string", "It is great")  # type: ignore[attr-defined]
    file = experiment(extra=FROM_FILE).method
    assert (file.init, file.init_path) == ("file", "/prompts/mnli.npy")  # type: ignore[attr-defined]


def test_a_launch_of_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "eval.gin").write_text("""
from __gin__ import dynamic_registration
import __main__ as eval_script
from t5x import utils
eval_script.evaluate:
  model = %MODEL
  dataset_cfg = @utils.DatasetConfig()
  restore_checkpoint_cfg = @utils.RestoreCheckpointConfig()
  output_dir = '/results'
utils.DatasetConfig:
  mixture_or_task_name = 'taskless_glue_sst2_v200_examples'
  task_feature_lengths = {'inputs': 512, 'targets': 8}
  split = 'validation'
  batch_size = 16
utils.RestoreCheckpointConfig.path = '/models/checkpoint_1'
""")
    (folder / "from_file.gin").write_text(FROM_FILE)
    command = ["import-gin", "model.gin", "eval.gin", "from_file.gin", "--output", "e.py"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "prompt-tuning eval e.py --prompt /prompts/mnli.npy" in printed
    found = load_config("e.py")
    assert (found.evaluation.batch_size, found.data.eval_split) == (16, "validation")
    assert found.model.name_or_path == "/models/checkpoint_1"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("train.train", "train"),
        ("eval.evaluate", "eval"),
        ("infer.infer", "predict"),
        ("precompile.precompile", "plan"),
    ],
)
def test_a_launch_names_its_script_as_main_or_as_a_module_of_t5x(
    folder: Path, script: str, command: str
) -> None:
    module = script.partition(".")[0]
    for line in (f"import __main__ as {module}", f"from t5x import {module}"):
        (folder / "launch.gin").write_text(
            f"from __gin__ import dynamic_registration\n{line}\n{script}.model = 3\n"
        )
        assert translate(read_launch(["launch.gin"])).command == command


def test_a_decay_from_the_first_step_without_warmup() -> None:
    flags = (
        "utils.create_learning_rate_scheduler.factors='constant * rsqrt_decay'",
        "utils.create_learning_rate_scheduler.base_learning_rate=0.5",
        "utils.create_learning_rate_scheduler.warmup_steps=0",
    )
    launch = read_launch(FILES, [*FLAGS, *flags])
    found = translated_experiment(translate(launch, restored_step=0))
    assert found.optimizer.learning_rate == 0.5


def test_the_schedule_that_a_launch_leaves_to_t5x_falls(folder: Path) -> None:
    given = '  factors = "constant"\n  base_learning_rate = 0.3\n  warmup_steps = 1000\n'
    assert given in RUN
    (folder / "run.gin").write_text(RUN.replace(given, "  step_offset = 0\n"))
    for restored, (schedule, warmup, rate) in {
        0: ("rsqrt", 1000, 0.5 / 1000**0.5),
        10_000: ("constant", 0, 0.5 / 100),
    }.items():
        t = translate(read_launch(FILES, FLAGS), restored_step=restored)
        found = translated_experiment(t).optimizer
        assert (found.schedule, found.warmup_steps) == (schedule, warmup)
        assert found.learning_rate == pytest.approx(rate)
        assert ("optimizer.learning_rate" in remarks(t, "changed")) == (restored > 0)


def test_parts_of_a_launch_say_what_is_missing() -> None:
    for files in (("run.gin",), ("labels.gin",), ("network.gin",), ("model.gin",)):
        t = translate(read_launch(files))
        translated_experiment(t)
        missing = remarks(t, "missing")
        assert ("TRAIN_STEPS" in missing) == (files == ("run.gin",))
        assert ("CLASS_LABELS" in missing) == (files == ("labels.gin",))


def test_names_are_those_of_the_file_that_imports_them(folder: Path) -> None:
    (folder / "other.gin").write_text("""
from __gin__ import dynamic_registration
from prompt_tuning.extended.perceptron.train import models
models.CrossEntropyEncoderDecoderModel.z_loss = 0.5
""")
    launch = read_launch(["model.gin", "other.gin"], ["models.EncoderDecoderModel.z_loss=0.25"])
    z_losses = {k.name: b.value for k, b in launch.bindings.items() if k.parameter == "z_loss"}
    assert z_losses == {
        "t5x.models.EncoderDecoderModel": 0.25,
        "prompt_tuning.extended.perceptron.train.models.CrossEntropyEncoderDecoderModel": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("include '/etc/passwd'", ["extra.gin line 1", "outside"]),
        ("include 'gone.gin'", ["extra.gin line 1", "gone.gin", "--gin_search_paths"]),
        ("\nBATCH_SIZE = 'many'", ["extra.gin line 2", "BATCH_SIZE", "'many'", "whole number"]),
        ("TASK_FEATURE_LENGTHS = 5", ["extra.gin line 1", "dictionary"]),
        ("CLASS_LABELS = [1]", ["extra.gin line 1", "list of texts"]),
        ("TRAIN_STEPS = 1_000", ["extra.gin line 1", "1100000", "larger"]),
        ("A = %B\nB = %A\nBATCH_SIZE = %A", ["refers to itself"]),
        ("BATCH_SIZE = [%BATCH_SIZE]", ["refers to"]),
        ("a = 3 4", ["extra.gin line 1", "cannot read"]),
    ],
)
def test_wrong_files_get_one_line(folder: Path, text: str, parts: list[str]) -> None:
    (folder / "extra.gin").write_text(text)
    flags = [flag for flag in FLAGS if not text.strip().startswith(flag.partition("=")[0])]
    with pytest.raises(UserError) as error:
        translate(read_launch([*FILES, "extra.gin"], flags))
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_text_of_a_file_cannot_become_code(folder: Path) -> None:
    """Quotes, line breaks and ends of comments in names and values stay text."""
    task = 'a"""\nimport os\n\\"\'\u2028x'
    (folder / "extra.gin").write_text(f"MIXTURE_OR_TASK_NAME = {task!r}\nX = {task!r}\n")
    Path('b"""\\.gin').write_text("")
    files = [*FILES, "extra.gin", 'b"""\\.gin']
    flags = [f"--gin.{flag}" for flag in FLAGS if not flag.startswith("MIXTURE_OR_TASK_NAME")]
    assert main(["import-gin", *files, *flags, "--output", 'c"""\\.py']) == 0
    source = Path('c"""\\.py').read_text()
    assert "\nimport os" not in source
    assert load_config('c"""\\.py').data.task == task


def test_macros_that_hold_each_other_twice_do_not_grow_without_bound(folder: Path) -> None:
    lines = [f"M{i} = [%M{i + 1}, %M{i + 1}]" for i in range(40)]
    (folder / "extra.gin").write_text("\n".join([*lines, "M40 = 1", "CLASS_LABELS = %M0"]))
    with pytest.raises(UserError, match="too many items"):
        translate(read_launch([*FILES, "extra.gin"], FLAGS[1:]))
