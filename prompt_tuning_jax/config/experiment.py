"""An experiment is data: model + method + data + optimizer + training + evaluation + mesh.

The comment above or beside a field is its documentation; see ``field_docs``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from prompt_tuning_jax.config.base import Config
from prompt_tuning_jax.config.methods import MethodConfig, PromptTuning

# Prefix of a module name that only a run's folder names: such a module is never imported.
NOT_IMPORTED = "not imported: "


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """The frozen model and the precision of its weights."""

    lower_bounds: ClassVar[Mapping[str, float]] = {"dropout_rate": 0, "logits_mb": 1}

    # Bundled model (``tiny``), published name, Hugging Face name, or folder; with
    # ``random_weights`` also the name of a size.
    name_or_path: str = "tiny"
    random_weights: bool = False  # draw the weights instead of loading them
    # SentencePiece file, tokenizer.json or GGUF file; empty: the model's vocabulary.
    vocabulary: str = ""
    # Initialization of random token embeddings: drawn from a normal distribution, or computed from
    # which words occur near each other in the training text.
    embeddings: Literal["normal", "cooccurrence"] = "normal"
    # Initialization of random attention: ``mimetic`` attends to similar tokens and copies them;
    # ``matching`` also attends to the classes that a prompt describes.
    attention_init: Literal["normal", "mimetic", "matching"] = "normal"
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the computation
    # Dtype of the frozen weights; those that train are float32.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Frozen weights in 8 or 4 bits, for methods that keep them frozen.
    quantization: Literal["none", "int8", "int4"] = "none"
    # Frozen weights that a GGUF file stores quantized: ``quantized`` keeps the types Q8_0, Q4_0 and
    # Q4_1 in 8 and 4 bits, with exactly the values that ``dequantized`` has in param_dtype.
    weights: Literal["dequantized", "quantized"] = "dequantized"
    # Largest float32 array of logits in losses and ranking, in MB; beyond it, they are computed in
    # parts of the vocabulary.
    logits_mb: int = 64
    dropout_rate: float = 0.1  # dropout in the frozen model while training
    # How attention over the input is computed: products and softmax apart (``xla``), or in one
    # kernel for TPUs or GPUs (``fused``).  ``auto`` is ``xla`` until the kernels have run on such
    # devices.
    attention: Literal["auto", "xla", "fused"] = "auto"


ObjectiveName: TypeAlias = Literal[
    "span_corruption",
    "prefix_lm",
    "text_infilling",
    "token_deletion",
    "label_by_similarity",
    "label_by_keyword",
    "label_by_topic",
    "missing_word",
    "dictionary",
    "next_part",
    "restore_order",
]


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """The examples: a registered task, or your files in ``train`` and ``eval``.

    Templates name columns in braces, for example ``"premise: {premise} hypothesis: {hypothesis}"``.
    Lengths are in tokens and include the end-of-sequence token.

    With ``objectives`` (pre-training, LM adaptation) ``train`` and ``eval`` are folders of text
    files; without ``eval``, the end of the training text is held out.
    """

    lower_bounds: ClassVar[Mapping[str, float]] = {
        "inputs_length": 1,
        "targets_length": 1,
        "max_train_examples": 0,
        "max_eval_examples": 0,
        "mean_span_length": 1,
    }

    task: str = "word_valence"  # task to train and evaluate on; prompt-tuning tasks lists them
    module: str = ""  # Python module to import first, for example one that registers SeqIO tasks
    # File with your training examples: jsonl, csv, tsv, json or parquet.  Images: a folder with a
    # folder of PNG or JPEG files for each class, an IDX file (MNIST's form), or an npz file.
    train: str = ""
    eval: str = ""  # file with your evaluation examples, or images
    train_split: str = "train"  # split of the task to train on
    eval_split: str = "validation"  # split of the task to evaluate on
    # Folder of the tasks' data: official files, or prepared by TFDS (also gs://...).
    data_dir: str = ""
    inputs_column: str = "inputs"  # column of your files that holds the input
    targets_column: str = "targets"  # column of your files that holds the target
    inputs_template: str = ""  # input made from several columns, instead of inputs_column
    targets_template: str = ""  # target made from several columns, instead of targets_column
    # Text in front of every target and label, for example ``<extra_id_0> `` for a model that was
    # pre-trained on span corruption alone.  Metrics compare predictions without it.
    targets_prefix: str = ""
    # What the targets of your files are: labels to choose between, or free text.  ``auto`` decides
    # by how many different targets there are and how often they repeat, and prints its choice.
    targets: Literal["auto", "labels", "text"] = "auto"
    allow_empty_targets: bool = False  # accept examples whose target is empty
    header: bool = True  # whether the first line of a csv or tsv file names the columns
    # Names of the columns of a csv or tsv file; without a header and names: 0, 1, 2 and so on
    columns: tuple[str, ...] = ()
    separator: str = ""  # separator of csv and tsv files; empty: detected
    labels: tuple[str, ...] = ()  # empty: the task's labels, or the targets of the training file
    # Weights of examples in the training loss by label: LABEL=WEIGHT each (1 for other labels), or
    # ``balanced`` (N / (labels * examples of the label)).  The weight multiplies an example's loss
    # and its token count, before training.loss_normalization; evaluation ignores it.
    class_weights: tuple[str, ...] = ()
    # Metrics to evaluate; empty: the task's, or accuracy.  ``loss`` is the mean cross entropy per
    # target token.
    metrics: tuple[str, ...] = ()
    # Whether each input, with its template, is one message of a user, in the chat template of the
    # model's tokenizer.  Special tokens that are written out in an input are text.
    chat: bool = False
    inputs_length: int = 128  # longest input; longer ones are cut
    targets_length: int = 8  # longest target; longer texts are cut, and longer labels are errors
    # Lengths that batches of similarly long inputs are padded to: ``auto`` (at most four, chosen
    # for the data), ``auto:N``, lengths such as ``64,128,256``, or ``none`` (inputs_length only).
    buckets: str = "auto"
    # Random changes of training images: ``flip`` mirrors half of them, ``crop`` moves each by up to
    # an eighth of its size.
    augment: tuple[Literal["flip", "crop"], ...] = ()
    # Train on at most N examples of each task, drawn with the first of training.seeds; 0: all.
    max_train_examples: int = 0
    max_eval_examples: int = 0  # evaluate on at most N evenly spaced examples; 0: all
    cache: bool = True  # keep tokenized examples on disk
    objectives: tuple[ObjectiveName, ...] = ()  # text objectives to pre-train on, mixed
    objective_weights: tuple[float, ...] = ()  # share of each objective; empty: equal shares
    noise_density: float = 0.15  # fraction of tokens that denoising objectives mask or delete
    mean_span_length: float = 3.0  # mean length of the masked spans, in tokens
    dictionary: str = ""  # folder of WordNet's files, for the dictionary objective
    # Tasks, or TRAIN:EVAL files, to tune a short prompt on at each evaluation of pre-training.
    probes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Optimizer(Config):
    """The optimizer; the defaults are the paper's (Lester et al. 2021, section 3, appendix A)."""

    lower_bounds: ClassVar[Mapping[str, float]] = dict.fromkeys(
        (
            *("learning_rate", "warmup_steps", "decay_steps", "end_learning_rate"),
            *("weight_decay", "clipping_threshold", "min_dim_size_to_factor", "initial_step"),
            *("gradient_clip_norm", "decay_rate", "beta1", "beta2", "momentum"),
        ),
        0,
    )

    name: Literal["adafactor", "adamw", "sgd"] = "adafactor"  # optimizer
    learning_rate: float = 0.3  # peak learning rate
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"  # after the warmup
    warmup_steps: int = 0  # steps of linear warmup
    decay_steps: int = 0  # step at which linear and cosine schedules end; 0: training.steps
    # Learning rate at the end of linear and cosine schedules; with ``training.learning_rates``,
    # each falls in the same proportion.
    end_learning_rate: float = 0.0
    # Fraction of a parameter that each step subtracts; AdamW and SGD multiply it by the learning
    # rate.
    weight_decay: float = 1e-5
    decay_rate: float = 0.8  # Adafactor: exponent of the second moment's decay
    clipping_threshold: float = 1.0  # Adafactor: largest RMS of an update
    multiply_by_parameter_scale: bool = False  # Adafactor: scale updates by the parameter's RMS
    # Adafactor: smallest dimension at which second moments are factored; 0: never factor.  T5X
    # uses 128.
    min_dim_size_to_factor: int = 0
    initial_step: int = 0  # step at which the optimizer starts counting; T5X starts at 1,100,000
    beta1: float = 0.9  # AdamW: decay of the first moment
    beta2: float = 0.999  # AdamW: decay of the second moment
    momentum: float = 0.0  # SGD: momentum
    gradient_clip_norm: float = 0.0  # clip the gradient to this global norm; 0: no clipping
    # REGEX=FACTOR each: multiply the learning rate of parameters whose whole path matches, for
    # example .*/lora_b_RF=16.  The first match decides.
    rates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """How long to train, with which batches, and how many prompts at once.

    ``seeds`` has one entry per prompt that is trained at once.  A seed decides the prompt's initial
    value, its order of examples and its dropout.
    """

    lower_bounds: ClassVar[Mapping[str, float]] = {
        **dict.fromkeys(("steps", "batch_size", "eval_every", "save_every", "log_every"), 1),
        **dict.fromkeys(
            ("z_loss", "margin", "wayward_weight", "gradient_accumulation", "patience"), 0
        ),
    }

    steps: int = 30_000  # optimizer steps; a larger number than a finished run's extends the run
    batch_size: int = 32  # examples per step
    # Microbatches per batch, computed one after another: the same gradient with less memory.  0:
    # one, or on a CPU as many as keep the activations in its cache.
    gradient_accumulation: int = 0
    # Rematerialization: what the backward pass computes again to save memory.  ``dots`` saves the
    # outputs of linear maps, ``full`` only the inputs of layers.  On a CPU, ``none`` is ``dots``
    # where activations would take more than half a gigabyte.
    remat: Literal["none", "dots", "full"] = "none"
    # Compile layers of the same structure once, as a loop, in training and its evaluations, which
    # is faster.  ``auto`` is on for accelerators and off for CPUs, where a loop copies the weights
    # of each layer.
    scan_layers: Literal["auto", "on", "off"] = "auto"
    seeds: tuple[int, ...] = (0,)  # one prompt per seed, all trained at once
    learning_rates: tuple[float, ...] = ()  # one per seed, instead of optimizer.learning_rate
    # One per seed, instead of method.init; ``file=PATH`` starts from that prompt file.
    inits: tuple[str, ...] = ()
    # Cross entropy of the target's ``tokens``, or a loss over the scores of the task's labels
    # alone, each the log-probability of its tokens: their cross entropy (``labels``), how far the
    # target's is below the best (``perceptron``), or below the best other plus the margin
    # (``hinge``).  Evaluation is the same for all, so set evaluation.strategy=rank, or leave auto.
    loss: Literal["tokens", "labels", "perceptron", "hinge"] = "tokens"
    # With ``hinge``: by how much the target has to be better.  With ``perceptron``: a constant in
    # the loss, as in the original code.
    margin: float = 0.0
    # With a loss over labels: score a label by the mean log-probability of its tokens, not the sum.
    normalize_length: bool = False
    # Mean over target tokens (over examples, with a loss over labels), or the sum.
    loss_normalization: Literal["tokens", "sum"] = "tokens"
    z_loss: float = 0.0  # weight of the squared log-partition in the loss; T5X uses 1e-4
    # Text near whose embeddings prompt tuning holds the prompt, which has as many positions as the
    # text has tokens (wayward prompts, Khashabi et al. 2021).
    wayward_text: str = ""
    # Weight of the squared distance to these embeddings, averaged over positions and added to the
    # normalized loss.
    wayward_weight: float = 0.01
    eval_every: int = 1000  # steps between evaluations
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 50  # steps between lines of the log
    patience: int = 0  # stop after N evaluations without an improvement of any prompt; 0: never
    workdir: str = ""  # folder of the run; an existing run there is resumed


@dataclass(frozen=True, kw_only=True)
class Evaluation(Config):
    """How predictions are made and which checkpoint is the best."""

    lower_bounds: ClassVar[Mapping[str, float]] = {"batch_size": 1, "num_beams": 1}

    # ``rank`` scores the labels, ``greedy`` and ``beam`` generate text; ``auto`` is rank for a task
    # with labels and greedy for others.
    strategy: Literal["auto", "rank", "greedy", "beam"] = "auto"
    batch_size: int = 128  # examples per batch
    num_beams: int = 4  # with beam: number of beams
    # With rank: score a label by the mean log-probability of its tokens instead of their sum, which
    # favors short labels.
    normalize_length: bool = False
    min_length: int = 0  # fewest tokens to generate, end of sequence included
    repetition_penalty: float = 1.0  # as in transformers; 1: none
    no_repeat_ngram_size: int = 0  # no n-gram of this size occurs twice; 0: no limit
    best_by: str = ""  # metric of the best checkpoint; empty: the task's first.  ``loss`` is valid
    # Whether the largest or the smallest value is the best; auto: as the metric defines.
    best_mode: Literal["auto", "max", "min"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Mesh(Config):
    """The device mesh: sizes of its axes within a slice, and numbers of slices.

    A slice is a set of devices with a fast network: a TPU slice, or the GPUs of one host.  At most
    one of ``data``, ``fsdp`` and ``model`` is -1, which stands for all remaining devices.
    """

    lower_bounds: ClassVar[Mapping[str, float]] = {"dcn_data": 1, "dcn_fsdp": 1, "dcn_model": 1}

    data: int = -1  # data parallelism within a slice
    fsdp: int = 1  # data parallelism with sharded parameters
    model: int = 1  # tensor parallelism
    dcn_data: int = 1  # slices along the data axis
    dcn_fsdp: int = 1  # slices along the fsdp axis
    dcn_model: int = 1  # slices along the model axis
    # Changes of the sharding table (distributed/sharding.py), for example ``embed=`` (replicated),
    # ``vocab=fsdp`` or ``batch=data+fsdp``.
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """Everything that a run depends on; equal experiments give equal runs."""

    model: Model = field(default_factory=Model)
    method: MethodConfig = field(default_factory=PromptTuning)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)
