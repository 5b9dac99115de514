"""Data, optimizer, training and devices of a launch."""

from math import prod, sqrt
from typing import Any

from prompt_tuning_jax.config.gin_syntax import Reference
from prompt_tuning_jax.config.t5x.launch import Value
from prompt_tuning_jax.config.t5x.model import step_difference
from prompt_tuning_jax.config.t5x.translation import Translation, number, text, whole_numbers
from prompt_tuning_jax.errors import UserError

_FEATURES = {"inputs": "data.inputs_length", "targets": "data.targets_length"}
# Modules whose tasks this package has itself.
_TASK_MODULES = ("prompt_tuning", "t5")
# The default of ``t5x.utils.create_learning_rate_scheduler``.
_FACTORS = "constant * linear_warmup * rsqrt_decay"
_ADAFACTOR = "t5x.adafactor.Adafactor"
_OPTIMIZERS = {
    "t5x.optimizers.adamw": "adamw",
    "t5x.optimizers.adam": "adamw",
    "t5x.optimizers.sgd": "sgd",
}
_OTHER_PARAMETERS = {"b1": "beta1", "b2": "beta2", "momentum": "momentum"}


def translate_task(t: Translation, dataset: Reference | None) -> None:
    """Translates the task, its module and its lengths."""
    if name := t.get(dataset, "mixture_or_task_name", "data.task"):
        t.set("data.task", text(name), name)
    else:
        t.set("data.task", "", default="no task is given")
    if (module := t.get(dataset, "module")) and module.value:
        if text(module).partition(".")[0] in _TASK_MODULES:
            t.same_here(module, "a task's name says where it is")
        elif module.is_flag:
            t.set("data.module", text(module), module)
        else:
            t.lost(
                module,
                "a gin file may not name code to import; if you trust it, use "
                f"--set data.module={module.value}",
            )
    lengths = t.get(dataset, "task_feature_lengths", "data.inputs_length and data.targets_length")
    _lengths(t, lengths)


def _lengths(t: Translation, lengths: Value | None) -> None:
    if lengths is None:
        return
    if lengths.value is None:
        remark = "lengths are fixed; there they are the longest of the data"
        t.set("data.inputs_length", 512, lengths, remark=remark)
        return
    if not isinstance(lengths.value, dict):
        raise UserError(
            f"{lengths.where}: {lengths.name} is {lengths.value!r}; expected a dictionary such as "
            "{'inputs': 512, 'targets': 8}"
        )
    for feature, length in lengths.value.items():
        whole = isinstance(length, int) and not isinstance(length, bool)
        if feature in _FEATURES and whole:
            t.set(_FEATURES[feature], length, lengths)
        else:
            t.lost(lengths, f"the feature {feature!r} has no length here")


def translate_training_data(t: Translation, run: Reference) -> None:
    """Translates the data that a launch trains and evaluates on."""
    train = t.launch.reference(run, "train_dataset_cfg")
    infer = t.launch.reference(run, "infer_eval_dataset_cfg")
    losses = t.launch.reference(run, "train_eval_dataset_cfg")
    translate_task(t, train)
    if split := t.get(train, "split"):
        t.set("data.train_split", text(split), split)
    if batch := t.get(train, "batch_size", "training.batch_size"):
        t.set("training.batch_size", number(batch, whole=True), batch)
    t.expect(
        *(train, "pack", False),
        same="examples are not packed",
        lost="examples are not packed, so a batch has this number of examples",
    )
    t.expect(train, "shuffle", True, same="training data is shuffled", lost="it is shuffled anyway")
    t.expect(
        *(train, "seed", None),
        same="training.seeds orders the examples",
        lost="training.seeds orders the examples, too",
    )
    for other in (infer, losses):
        name = t.get(other, "mixture_or_task_name")
        if name and name.value != t.value("data.task") and name.value:
            t.lost(name, "evaluation is on the task that is trained on")
        else:
            t.same_here(name, "evaluation is on the task that is trained on")
    if split := t.get(infer, "split") or t.get(losses, "split"):
        t.set("data.eval_split", text(split), split)
    if batch := t.get(infer, "batch_size"):
        t.set("evaluation.batch_size", number(batch, whole=True), batch)
    lengths, longest = t.get(train, "task_feature_lengths"), t.get(infer, "task_feature_lengths")
    if longest and (lengths is None or longest.value != lengths.value):
        t.lost(longest, "evaluation cuts inputs at data.inputs_length; there to the longest")
    _examples(t, t.launch.reference(run, "inference_evaluator_cls"))


def translate_evaluation_data(t: Translation, dataset: Reference | None) -> None:
    """Translates the data that a launch of eval or infer reads."""
    translate_task(t, dataset)
    if split := t.get(dataset, "split"):
        t.set("data.eval_split", text(split), split)
    if batch := t.get(dataset, "batch_size"):
        t.set("evaluation.batch_size", number(batch, whole=True), batch)


def _examples(t: Translation, evaluator: Reference | None) -> None:
    if (examples := t.get(evaluator, "num_examples")) and examples.value:
        t.set("data.max_eval_examples", number(examples, whole=True), examples)


def translate_training(t: Translation, run: Reference, restored: int) -> None:
    """Translates steps, intervals, seeds and the folder of a launch of train."""
    relative = t.get(run, "relative_steps")
    total = t.get(run, "total_steps", "" if relative and relative.value else "training.steps")
    if relative and relative.value:
        t.set("training.steps", number(relative, whole=True), relative)
        t.same_here(total, "the steps are those relative to the checkpoint")
    elif total:
        remark = f"counts from the checkpoint's step {restored:,}" if restored else ""
        t.set("training.steps", step_difference(total, restored), total, remark=remark)
    steps = t.value("training.steps", 0)
    if period := t.get(run, "eval_period"):
        every = number(period, whole=True)
        never = "every run evaluates at its end"
        t.set("training.eval_every", every or steps or 1, period, remark="" if every else never)
    save = t.launch.reference(t.launch.reference(run, "checkpoint_cfg"), "save")
    if (period := t.get(save, "period")) and period.value:
        t.set("training.save_every", number(period, whole=True), period)
    if (seed := t.get(run, "random_seed")) and seed.value is not None:
        t.set("training.seeds", (number(seed, whole=True),), seed, remark="draws other numbers")
    else:
        t.set(
            *("training.seeds", (0,), seed),
            remark="a seed is fixed; there it is the time of the launch",
        )
    if folder := t.get(run, "model_dir", "training.workdir"):
        if "://" in text(folder):
            t.lost(folder, "a run's folder is on this machine; give --workdir FOLDER")
        else:
            t.set("training.workdir", text(folder), folder)
    trainer = t.launch.reference(run, "trainer_cls")
    if (parts := t.get(trainer, "num_microbatches")) and parts.value:
        t.set("training.gradient_accumulation", number(parts, whole=True), parts)
    _schedule(t, t.launch.reference(trainer, "learning_rate_fn"), restored)


def _schedule(t: Translation, schedule: Reference | None, restored: int) -> None:
    if schedule is None:
        return
    factors = t.get(schedule, "factors")
    names = {n.strip() for n in (text(factors) if factors else _FACTORS).split("*")}
    base = t.get(schedule, "base_learning_rate")
    warmup = t.get(schedule, "warmup_steps")
    offset = t.get(schedule, "step_offset")
    rate = float(number(base)) if base else 0.5
    warmup_steps = number(warmup, whole=True) if warmup else 1000
    step = max(restored - (number(offset, whole=True) if offset else 0), 0)
    t.same_here(offset, "schedules count from the run's first step")
    if names <= {"constant", "linear_warmup"}:
        t.set("optimizer.learning_rate", rate, base, default="T5X's default")
        if "linear_warmup" in names and step < warmup_steps:
            t.set("optimizer.warmup_steps", warmup_steps - step, warmup)
        else:
            t.same_here(warmup, "a constant learning rate has no warmup")
        t.same_here(factors, "a constant learning rate")
        return
    if names <= {"constant", "linear_warmup", "rsqrt_decay"}:
        rate /= sqrt(max(step, warmup_steps, 1))
        if step:
            t.set(
                *("optimizer.learning_rate", rate, base),
                remark="constant; there it falls from this value with the square root of the "
                f"step, which starts at {step:,}",
            )
            t.same_here(factors, "the learning rate's own remark")
            return
        t.set("optimizer.learning_rate", rate, base, default="T5X's default")
        t.set("optimizer.schedule", "rsqrt", factors, default="T5X's default")
        remark = (
            "" if "linear_warmup" in names else "rises to the rate; there it is constant until then"
        )
        t.set(
            *("optimizer.warmup_steps", warmup_steps, warmup),
            default="T5X's default",
            remark=remark,
        )
        return
    t.set("optimizer.learning_rate", rate, base, default="T5X's default")
    t.lost(factors, "schedules are constant, linear, cosine or rsqrt; see optimizer.schedule")


def translate_optimizer(t: Translation, optimizer: Reference | None, restored: int) -> Value | None:
    """Translates the optimizer; returns the expressions of the parameters that it trains."""
    if optimizer is None:
        return None
    trained = None
    if optimizer.name.endswith(".MultiOptimizer"):
        pairs = t.get(optimizer, "traversals_and_optimizers")
        entries = pairs.value if pairs and isinstance(pairs.value, list | tuple) else ()
        pair = entries[0] if len(entries) == 1 else None
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            t.lost(pairs, "one optimizer trains all trainable parameters")
            return None
        traversal, optimizer = pair
        by_name = traversal if isinstance(traversal, Reference) else None
        matcher = t.launch.reference(by_name, "filter_fn")
        trained = t.get(matcher, "regexes")
        t.same_here(pairs, "what is trainable is the method's choice")
    if not isinstance(optimizer, Reference):
        return trained
    if optimizer.name == _ADAFACTOR:
        _adafactor(t, optimizer, restored)
    elif optimizer.name in _OPTIMIZERS:
        t.set("optimizer.name", _OPTIMIZERS[optimizer.name], default=optimizer.name)
        t.set("optimizer.weight_decay", 0.0, default=optimizer.name)
        for theirs, ours in _OTHER_PARAMETERS.items():
            if value := t.get(optimizer, theirs):
                t.set(f"optimizer.{ours}", float(number(value)), value)
        if decay := t.get(optimizer, "weight_decay"):
            t.set("optimizer.weight_decay", float(number(decay)), decay)
        elif optimizer.name.endswith("adamw"):
            t.set("optimizer.weight_decay", 1e-4, default="optax's default")
        t.lost(t.get(optimizer, "learning_rate"), "the rate of the trainer's schedule is used")
    else:
        remark = "optimizers are adafactor, adamw and sgd"
        t.set("optimizer.name", "adafactor", default=optimizer.name, remark=remark)
    return trained


def _adafactor(t: Translation, adafactor: Reference, restored: int) -> None:
    default = "Adafactor's default"

    def numbers(parameter: str, field: str, otherwise: float) -> None:
        value = t.get(adafactor, parameter)
        chosen: Any = otherwise
        if value:
            chosen = 0.0 if value.value is None else float(number(value))
        t.set(f"optimizer.{field}", chosen, value, default=default)

    t.set("optimizer.name", "adafactor", default=adafactor.name)
    numbers("decay_rate", "decay_rate", 0.8)
    numbers("weight_decay_rate", "weight_decay", 0.0)
    numbers("clipping_threshold", "clipping_threshold", 1.0)
    scale = t.get(adafactor, "multiply_by_parameter_scale")
    if scale and not isinstance(scale.value, bool):
        remark = "updates are scaled by all parameters, or by none"
        t.set("optimizer.multiply_by_parameter_scale", True, scale, remark=remark)
    else:
        scaled = True if scale is None else scale.value
        t.set("optimizer.multiply_by_parameter_scale", scaled, scale, default=default)
    factored, least = t.get(adafactor, "factored"), t.get(adafactor, "min_dim_size_to_factor")
    size = 128 if least is None else number(least, whole=True)
    if factored and factored.value is False:
        size = 0
    t.set("optimizer.min_dim_size_to_factor", size, factored or least, default=default)
    t.same_here(t.get(adafactor, "logical_factor_rules"), "second moments are factored by size")
    offset = t.get(adafactor, "step_offset")
    start = restored - (number(offset, whole=True) if offset else 0)
    t.set("optimizer.initial_step", max(start, 0), default="the checkpoint's step")
    t.same_here(offset, "the optimizer's first step")
    if clip := t.get(adafactor, "global_norm_clip_threshold"):
        t.set("optimizer.gradient_clip_norm", float(number(clip)) if clip.value else 0.0, clip)
    t.expect(adafactor, "beta1", None, same="no momentum", lost="Adafactor has no momentum")


def translate_mesh(t: Translation, partitioner: Reference | None) -> None:
    """Translates how a model is partitioned."""
    submesh = t.get(partitioner, "model_parallel_submesh")
    parts = t.get(partitioner, "num_partitions")
    if submesh and submesh.value:
        t.set("mesh.model", prod(whole_numbers(submesh)), submesh)
        t.same_here(parts, "the submesh says it")
    elif parts and parts.value:
        t.set("mesh.model", number(parts, whole=True), parts)
    for name, fields in (
        ("ici_mesh_shape", ("data", "model")),
        ("dcn_mesh_shape", ("dcn_data", "dcn_model")),
    ):
        shape = t.get(partitioner, name)
        if shape and shape.value:
            for field, size in zip(fields, whole_numbers(shape), strict=False):
                t.set(f"mesh.{field}", size, shape)
    rules = t.launch.reference(partitioner, "logical_axis_rules")
    if (dims := t.get(rules, "parameter_partitioning_dims")) and dims.value == 2:
        t.set("mesh.data", 1, dims)
        t.set("mesh.fsdp", -1, dims)
    if (dims := t.get(rules, "activation_partitioning_dims")) and dims.value == 2:
        t.lost(dims, "activations are sharded by the table in mesh.rules")
    extra = t.get(rules, "additional_rules")
    if (
        extra
        and isinstance(extra.value, Reference)
        and extra.value.name.startswith("prompt_tuning.")
    ):
        t.same_here(extra, "prompts are replicated")
    else:
        t.lost(extra, "arrays are sharded by the table in mesh.rules")
