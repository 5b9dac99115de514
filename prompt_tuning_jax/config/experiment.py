"""An experiment is data: model + method + data + optimizer + training + evaluation + mesh."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from prompt_tuning_jax.methods import Config, Method, PromptTuning

# Before the name of a module that only a run's folder names: such a module is never imported.
NOT_IMPORTED = "not imported: "


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """Which frozen T5, and how its numbers are held.

    ``name_or_path`` is a bundled name (``tiny``), a folder, or with ``random_weights`` a preset.
    """

    name_or_path: str = "tiny"
    random_weights: bool = False
    vocabulary: str = ""  # a SentencePiece file; empty: the one that comes with the model
    # How random weights' token embeddings start: drawn, or from which words stand near which.
    embeddings: Literal["normal", "cooccurrence"] = "normal"
    # How their attention starts: drawn, looking at what is similar and passing it on, or also
    # looking for classes that prompts describe (attention_start.py).
    attention: Literal["normal", "mimetic", "matching"] = "normal"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Frozen weights in 8 or 4 bits, for methods that leave them frozen (models/quantization.py).
    quantization: Literal["none", "int8", "int4"] = "none"
    dropout_rate: float = 0.1


ObjectiveName: TypeAlias = Literal[
    "span_corruption",
    "prefix_lm",
    "label_by_likeness",
    "label_by_presence",
    "label_by_topic",
    "missing_word",
    "dictionary",
    "next_part",
    "restore_order",
]


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """Which examples; ``train``/``eval`` are files of your own and take the place of ``task``.

    Templates name columns in braces, e.g. ``"premise: {premise} hypothesis: {hypothesis}"``;
    lengths are in tokens, the end-of-sequence token included.

    With ``objectives`` (pre-training, LM adaptation) ``train`` is a folder of text files, and so is
    ``eval``; without it the end of the training text is held out.
    """

    task: str = "word_valence"
    module: str = ""  # a Python module to import first, for instance one that registers SeqIO tasks
    train: str = ""
    eval: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str = ""
    inputs_column: str = "inputs"
    targets_column: str = "targets"
    inputs_template: str = ""
    targets_template: str = ""
    # Of files of your own: targets are labels to choose between, or text; auto decides by how many
    # there are and how often they repeat, and says so.
    targets: Literal["auto", "labels", "text"] = "auto"
    allow_empty_targets: bool = False  # where nothing is an answer, too
    # Of .csv and .tsv files: whether the first line names the columns (without, they are 0, 1, ...,
    # or as `columns` names them), and what separates them; empty: what the file evidently has.
    header: bool = True
    columns: tuple[str, ...] = ()
    separator: str = ""
    labels: tuple[str, ...] = ()  # empty: the task's, or the distinct targets of the training file
    # How much examples count in the training loss by their label: LABEL=WEIGHT each (others 1), or
    # balanced (N / (labels * examples of this one)).  The loss and the tokens of an example are
    # multiplied by it before training.loss_normalization divides; evaluation is as it was.
    class_weights: tuple[str, ...] = ()
    # Empty: the task's, or accuracy.  ``loss`` is the targets' mean cross entropy per token.
    metrics: tuple[str, ...] = ()
    inputs_length: int = 128
    targets_length: int = 8
    # Batches of about equally long inputs, padded to one of few lengths: auto (at most four, chosen
    # for the data), auto:N, lengths as 64,128,256, or none: inputs_length for all.
    buckets: str = "auto"
    max_eval_examples: int = 0  # 0: all
    cache: bool = True
    objectives: tuple[ObjectiveName, ...] = ()
    objective_weights: tuple[float, ...] = ()  # empty: equal
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    dictionary: str = ""  # folder of WordNet's files, for the objective of that name
    probes: tuple[str, ...] = ()  # tasks, or TRAIN:EVAL files, to tune a short prompt on each time


@dataclass(frozen=True, kw_only=True)
class Optimizer(Config):
    """The paper's optimizer by default (Lester et al. 2021, section 3 and appendix A)."""

    name: Literal["adafactor", "adamw", "sgd"] = "adafactor"
    learning_rate: float = 0.3
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0  # 0: training.steps
    end_learning_rate: float = 0.0
    weight_decay: float = 1e-5
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    multiply_by_parameter_scale: bool = False
    min_dim_size_to_factor: int = 0  # 0: never factor; 128 is what T5X does
    initial_step: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    gradient_clip_norm: float = 0.0
    # REGEX=FACTOR each: of tuned arrays whose whole path matches (the first match decides) the
    # learning rate is so many times the others', for instance .*/lora_b_RF=16.
    rates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """How long, how wide, and how many prompts at once.

    ``seeds`` has one entry per prompt trained at once: it decides the prompt's initial value, its
    order of examples and its dropout.  ``learning_rates`` and ``inits`` are empty, or hold one
    entry per seed and replace ``optimizer.learning_rate`` and ``method.init`` for that prompt.
    """

    steps: int = 30_000
    batch_size: int = 32
    # Parts that a batch is computed in, one after another, for the same gradient in less memory.
    # 0: one; on a CPU so many that activations stay in its cache, which is faster.
    gradient_accumulation: int = 0
    # What the backward computes again to save memory: nothing, all but the results of linear maps
    # (attention scores above all), or all but each layer's input.
    remat: Literal["none", "dots", "full"] = "none"
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    inits: tuple[str, ...] = ()
    loss_normalization: Literal["tokens", "sum"] = "tokens"
    z_loss: float = 0.0
    eval_every: int = 1000
    save_every: int = 1000
    log_every: int = 50
    # The run ends after so many evaluations without a better one of any member; 0: never.
    patience: int = 0
    workdir: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Config):
    """How predictions are made: ``rank`` scores the label strings, ``greedy`` and ``beam`` write.

    ``auto`` ranks where the task has labels, and else writes greedily.
    """

    strategy: Literal["auto", "rank", "greedy", "beam"] = "auto"
    batch_size: int = 128
    num_beams: int = 4  # beam
    # rank: a label's score is the mean log-probability of its tokens, not the sum, which favours
    # short labels.
    normalize_length: bool = False
    # greedy and beam, each as in transformers:
    min_length: int = 0  # of what is written, in tokens, the end included
    repetition_penalty: float = 1.0  # 1: none
    no_repeat_ngram_size: int = 0  # no run of this many tokens is written twice; 0 allows repeats
    best_by: str = ""  # empty: the task's first metric; loss is always one
    # Whether the largest or the smallest of it is best; auto: as the metric or its name says.
    best_mode: Literal["auto", "max", "min"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Mesh(Config):
    """Devices along each mesh axis within a slice, and slices along it; -1 takes all that are left.

    A slice is what a fast network joins: a TPU slice, or a host's GPUs.  ``rules`` change the table
    of sharding.py, for instance ``embed=`` (replicated), ``vocab=fsdp`` or ``batch=data+fsdp``.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1
    dcn_model: int = 1
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """Everything that a run depends on; equal experiments give equal runs."""

    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=PromptTuning)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)
