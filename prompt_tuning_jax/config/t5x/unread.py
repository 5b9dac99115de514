"""Bindings that no field expresses, and why: the first rule that matches one decides."""

import re
from dataclasses import dataclass

from prompt_tuning_jax.config.t5x.launch import Value
from prompt_tuning_jax.config.t5x.translation import Translation

# Macros of a network's sizes.
_SIZES = (
    r"(NUM_(HEADS|EMBEDDINGS|(ENCODER|DECODER)_LAYERS)|(HEAD|EMBED|MLP)_DIM|SCALE|ARCHITECTURE)"
)
_NETWORK = "the network, which its checkpoint describes"


@dataclass(frozen=True)
class _Rule:
    """Bindings whose ``configurable.parameter`` matches: the same here, or lost.

    Without ``lost`` every value is the same here; otherwise only ``values`` are, and ``lost`` says
    why others are not.
    """

    pattern: str
    same: str = ""
    values: tuple[object, ...] = ()
    lost: str = ""


_SCRIPT = r"(__main__|t5x\.(train|eval|infer|precompile))\."
_ONCE = "evaluation reads each example once, in order"
_CHOICE = "what is trainable is the method's choice"
_FACTORED = "second moments are factored by size"
_SAVED = "a run saves what it trains, and resumes bit for bit"
_RULES = (
    _Rule(
        r".*\.RelativePositionBiases\.num_buckets",
        *(_NETWORK, (32,), "position biases have 32 buckets"),
    ),
    _Rule(
        r".*\.RelativePositionBiases\.max_distance",
        *(_NETWORK, (128,), "the distance is 128 for 32 buckets, and proportional for others"),
    ),
    _Rule(
        r".*\.scan_layers|.*\.scanned|.*\.layer_remat",
        "layers of a checkpoint may be scanned; see training.remat",
    ),
    _Rule(r"(flaxformer|flax\.linen|jax\.nn)\..*", _NETWORK),
    _Rule(r"t5x\.examples\..*\.network\..*", _NETWORK),
    _Rule(r"prompt_tuning\.(train\.layers|masks)\..*", _NETWORK),
    _Rule(
        r"prompt_tuning\.extended\.(masks|train\.(ia3|per_layer|multitask_prompts))\..*", _NETWORK
    ),
    _Rule(r"prompt_tuning\.train\.utils\.Checkpointer\.save_paths", _SAVED),
    _Rule(
        r"t5x\.utils\.SaveCheckpointConfig\.keep",
        lost="a run keeps its last and its best checkpoint",
    ),
    _Rule(
        r"t5x\.utils\.(Save|Restore)CheckpointConfig\."
        r"(dtype|save_dataset|restore_dataset|checkpointer_cls)",
        _SAVED,
    ),
    _Rule(r"t5x\.utils\.CheckpointConfig\.(save|restore)", _SAVED),
    _Rule(
        r"t5x\.utils\.DatasetConfig\.(use_cached|use_memory_cache|use_custom_packing_ops)",
        "tokenized examples are cached; see data.cache",
    ),
    _Rule(
        r"t5x\.utils\.DatasetConfig\.pack",
        *("examples are not packed", (False,), "examples are not packed"),
    ),
    _Rule(r"t5x\.utils\.DatasetConfig\..*", _ONCE),
    _Rule(
        r"t5x\.trainer\.Trainer\..*",
        *("an option that is off", (None,), "the trainer has no such option"),
    ),
    _Rule(
        r"t5x\.utils\.create_learning_rate_scheduler\..*",
        *("an option that is off", (None,), "see the schedules of optimizer.schedule"),
    ),
    _Rule(
        _SCRIPT + "train.eval_steps",
        lost="the loss is computed on the whole evaluation split, with data.metrics=loss",
    ),
    _Rule(
        _SCRIPT + r".*\.use_hardware_rng",
        *("random numbers", (False, None), "random numbers do not depend on the hardware"),
    ),
    _Rule(
        _SCRIPT + r".*\.(summarize_config_fn|trainer_cls|inference_evaluator_cls|partitioner|model"
        r"|.*dataset_cfg|.*checkpoint_cfg|fallback_init_rng)",
        "parts of the launch",
    ),
    _Rule(
        _SCRIPT + r"(evaluate|infer)\.output_dir",
        lost="name files with the command's --output and --predictions",
    ),
    _Rule(
        _SCRIPT + r"infer\.mode",
        *("predictions", ("predict", "predict_with_aux"), "score texts with pt.score"),
    ),
    _Rule(
        _SCRIPT + r"infer\.(checkpoint_period|shard_id|num_shards)",
        *("one process predicts all", (100, 0, 1), "one process predicts all examples"),
    ),
    _Rule(
        r"seqio\.(Evaluator|JSONLogger|PyLoggingLogger|TensorBoardLogger)\..*",
        "metrics, predictions and TensorBoard",
    ),
    _Rule(r"seqio\.(SentencePieceVocabulary|ByteVocabulary)\..*", "the model's vocabulary"),
    _Rule(r"t5x\.partitioning\..*", "the table in mesh.rules"),
    _Rule(r"t5x\.adafactor\.(HParamMap|standard_(logical_)?factor_rules)\..*", _FACTORED),
    _Rule(r"t5x\.adafactor\.Adafactor\.(factor_map|dtype_momentum)", _FACTORED),
    _Rule(
        r"(flax\.traverse_util|t5x\.optimizers)\.(ModelParamTraversal|MultiOptimizer)\..*", _CHOICE
    ),
    _Rule(r"prompt_tuning\.train\.(utils|optim|partitioning)\..*", _CHOICE),
    _Rule(r"prompt_tuning\.(train\.)?prompts\..*", "prompts of another initialization"),
    _Rule(r"t5x\.decoding\..*", lost="the Python API and the server have options of sampling"),
)


def classify_unread(t: Translation) -> None:
    """Notes every binding that was not translated as the same here, or as lost."""
    for name, value in t.launch.unread():
        _classify(t, name, value)
    for macro in t.launch.unused_macros():
        if macro.is_missing:
            continue
        if re.fullmatch(_SIZES, macro.name):
            t.same_here(macro, _NETWORK)
        else:
            t.lost(macro, "nothing refers to it")


def _classify(t: Translation, name: str, value: Value) -> None:
    rule = next((rule for rule in _RULES if re.fullmatch(rule.pattern, name)), None)
    configurable = name.rpartition(".")[0]
    if value.is_missing and not (rule and rule.lost):
        t.same_here(value, "a value that is not given")
    elif rule is None and not t.launch.refers_to(configurable) and "." in configurable:
        t.same_here(value, "no part of the launch")
    elif rule is None:
        t.lost(value, f"there is no counterpart of {name}")
    elif not rule.lost or value.value in rule.values:
        t.same_here(value, rule.same)
    else:
        t.lost(value, rule.lost)
