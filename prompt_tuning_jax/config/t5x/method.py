"""The tuning method of a launch: prompts and their initialization, IA3, model tuning."""

from prompt_tuning_jax.config.gin_syntax import Reference
from prompt_tuning_jax.config.t5x.launch import Value
from prompt_tuning_jax.config.t5x.model import ATTENTION, FLAXFORMER
from prompt_tuning_jax.config.t5x.translation import Translation, number, text, texts

_LAYERS = "prompt_tuning.train.layers."
_PROMPTS = "prompt_tuning.prompts."
_PER_LAYER = "prompt_tuning.extended.train.per_layer."
_IA3 = "prompt_tuning.extended.train.ia3."
_MULTITASK = "prompt_tuning.extended.multitask_prompts."
_ATTENTION = Reference((), f"{FLAXFORMER}attention.{ATTENTION}", True)
_MLP = Reference((), f"{FLAXFORMER}dense.MlpBlock", True)
_MASK = "prompt_tuning.extended.masks.prompt_encoder_attention_mask"
_PROMPT_REGEXES = {
    "PromptTuning": {".*/prompt/.*", ".*prompt.*"},
    "DeepPrompts": {".*/prompt/.*", ".*prompt.*"},
    "MultitaskPrompts": {".*/shared_prompt/.*", ".*/task_prompts/.*", ".*prompt.*"},
    "IA3": {".*/ia3_scaling.*"},
}
_PLACEMENTS = {"prefix_prompt": "prefix", "prefix_prompt_after_bos": "after_first"}
_COMBINE = {
    "AddMultiTaskPrompt": "sum",
    "ConcatMultiTaskPrompt": "concatenation",
    "ConcatFeaturesMultiTaskPrompt": "features",
    "ProjectMultiTaskPrompt": "projection",
}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
_EMBEDDINGS = ("token_embedder/embedding", "shared/embedding")


def translate_method(t: Translation, network: Reference | None, trained: Value | None) -> None:
    """Translates the method; ``trained`` are the expressions of what the optimizer trains."""
    encoder = t.launch.reference(network, "encoder_factory")
    prompted = bool(encoder and encoder.name == f"{_LAYERS}PromptEncoder")
    factory = t.get(encoder, "prompt_factory") if prompted else None
    factory = factory or _bare_prompt(t)
    if decoder := t.get(network, "decoder_factory"):
        in_decoder = isinstance(decoder.value, Reference) and "Prompt" in decoder.value.name
        if in_decoder:
            t.lost(decoder, "method.decoder_length may come nearest")
        else:
            t.same_here(decoder, "the network, which its checkpoint describes")
    if _translate_ia3(t):
        t.method = "IA3"
    elif factory and isinstance(factory.value, Reference):
        _translate_prompts(t, factory.value, t.launch.reference(encoder, "layer_factory"))
        _translate_attention(t)
    elif prompted or (network is None and trained is None):
        t.method = "PromptTuning"  # of files that leave the prompt to others
    elif trained is None or set(texts(trained)) & {".*", "/.*"}:
        t.method = "FullTuning"
        t.same_here(trained, "what the method trains")
        return
    else:
        t.method = "PatternTuning"
        patterns = tuple(pattern.removeprefix("/") for pattern in texts(trained))
        remark = "the expressions match the names of parameters that prompt-tuning inspect prints"
        t.set("method.patterns", patterns, trained, remark=remark)
        return
    if trained is not None:
        if set(texts(trained)) <= _PROMPT_REGEXES[t.method]:
            t.same_here(trained, "what the method trains")
        else:
            t.lost(trained, f"{t.method} trains its own parameters only")


def _bare_prompt(t: Translation) -> Value | None:
    """Returns the prompt of files without a network, such as those of initializations."""
    prompt = None if t.launch.binds(_ATTENTION.name) else t.launch.macro("PROMPT")
    return None if prompt is None or prompt.is_missing else prompt


def _translate_ia3(t: Translation) -> bool:
    scaled = {name: t.get(_ATTENTION, f"{name}_conv") for name in _PROJECTIONS}
    mlp = t.get(_MLP, "intermediate_conv")
    given = {n: v for n, v in scaled.items() if v and _refers_to(v, f"{_IA3}IA3Attention")}
    in_mlp = bool(mlp and _refers_to(mlp, f"{_IA3}IA3"))
    if not given and not in_mlp:
        return False
    names = [name for short, name in _PROJECTIONS.items() if short in given]
    outputs = (f".*/({'|'.join(names)})",) if names else ()
    source = next(iter(given.values()), None)
    t.set("method.outputs", outputs, source)
    t.set("method.inputs", (".*/mlp/wo",) if in_mlp else (), mlp)
    for value in [*given.values()][1:]:
        t.same_here(value, "what the method scales")
    return True


def _refers_to(value: Value, name: str) -> bool:
    return isinstance(value.value, Reference) and value.value.name == name


def _translate_prompts(t: Translation, factory: Reference, layer: Reference | None) -> None:
    prompt = t.launch.reference(factory, "prompt")
    combine = t.get(factory, "combine")
    kind = prompt.name.rpartition(".")[2] if prompt else ""
    if prompt and prompt.name.startswith(_MULTITASK):
        t.method = "MultitaskPrompts"
        _translate_multitask(t, prompt, kind)
    elif layer and layer.name == f"{_PER_LAYER}PromptEncoderLayer":
        t.method = "DeepPrompts"
        per_layer = t.launch.reference(layer, "prompt_factory")
        later = t.get(per_layer, "combine")
        adds = bool(later and _refers_to(later, f"{_PER_LAYER}add_prompt"))
        t.set("method.mode", "add" if adds else "replace", later)
        length = t.get(prompt, "length", "method.length")
        if length:
            t.set(
                *("method.length", length.value, length),
                remark="each layer has one prompt; there the first layer has two, and with replace "
                "the one before it has no effect",
            )
        _translate_init(t, t.get(prompt, "prompt_init"))
        per_layer_prompt = t.launch.reference(per_layer, "prompt")
        t.same_here(t.get(per_layer_prompt, "length"), "the prompts of all layers have one length")
    else:
        t.method = "PromptTuning"
        if kind not in ("", "Prompt"):
            t.lost(t.get(factory, "prompt"), "method=prompt_tuning trains the vectors themselves")
        if length := t.get(prompt, "length", "method.length"):
            if isinstance(length.value, Reference):
                remark = "the length is computed there from a text; set it to its number of tokens"
                t.set("method.length", 100, length, remark=remark)
            else:
                t.set("method.length", number(length, whole=True), length)
        _translate_init(t, t.get(prompt, "prompt_init"))
    if combine and isinstance(combine.value, Reference) and t.method != "DeepPrompts":
        _translate_placement(t, combine, combine.value.name.rpartition(".")[2])
    t.expect(
        *(prompt, "dtype", "bfloat16", "float32"),
        same="prompts are float32, and computed in the model's dtype",
        lost="prompts are float32",
    )


def _translate_placement(t: Translation, combine: Value, short: str) -> None:
    if short == "suffix_prompt":
        t.set("method.placement", "before_eos", combine)
    elif short in _PLACEMENTS:
        t.set("method.placement", _PLACEMENTS[short], combine)
    else:
        t.lost(combine, "prompts are placed by method.placement")


def _translate_multitask(t: Translation, prompt: Reference, kind: str) -> None:
    if kind in _COMBINE:
        t.set("method.combine", _COMBINE[kind], default=kind)
    else:
        note = f"method.combine has no counterpart of {kind}"
        t.set("method.combine", "sum", default=kind, remark=note)
    if length := t.get(prompt, "length", "method.length"):
        t.set("method.length", number(length, whole=True), length)
    if tasks := t.get(prompt, "num_tasks"):
        t.set("method.tasks", number(tasks, whole=True), tasks)
    if task_length := t.get(prompt, "task_length"):
        t.set("method.task_length", number(task_length, whole=True), task_length)
    elif kind == "ConcatMultiTaskPrompt" and length:
        t.set("method.task_length", number(length, whole=True), default="the length of the shared")
    if shared := t.get(prompt, "shared_features"):
        size = 0 if shared.value is None else number(shared, whole=True)
        t.set("method.shared_features", size, shared)
    t.same_here(t.get(prompt, "task_features"), "the model's width decides the tasks' features")
    _translate_init(t, t.get(prompt, "shared_init"))
    _translate_tasks_init(t, t.get(prompt, "tasks_init"))
    if to_task := t.get(prompt, "to_task_idx"):
        t.lost(
            to_task,
            "tasks are told apart by the mixture, data.task, not by an input's first token",
        )
        t.same_here(
            t.get(to_task.value if isinstance(to_task.value, Reference) else None, "vocab_size"),
            "tasks are told apart by the mixture",
        )


def _translate_tasks_init(t: Translation, init: Value | None) -> None:
    drawn = "there from [0, {}), here from [0, 0.5)"
    if init is None or not isinstance(init.value, Reference):
        t.set(
            *("method.tasks_init", "uniform_positive", init),
            default="no initializer",
            remark=drawn.format(0.01),
        )
        return
    scale = t.get(init.value, "scale")
    size = number(scale) if scale else 0.01
    if init.value.name.rpartition(".")[2] != "uniform":
        remark = "there is no such initialization of tasks"
    else:
        remark = "" if size == 0.5 else drawn.format(size)
    t.set("method.tasks_init", "uniform_positive", scale or init, remark=remark)


def _translate_attention(t: Translation) -> None:
    """Which positions a prompt attends to, where the extended masks say it."""
    mask = Reference((), _MASK, True)
    if not t.launch.refers_to(_MASK):
        return
    allowed = t.get(mask, "allowable_attention")
    names = set(texts(allowed)) if allowed and allowed.value is not None else None
    causal = names is None or "prompt->prompt;causal" in names
    if t.method == "DeepPrompts":
        t.lost(allowed, "in deep prompts, all positions attend to each other")
        return
    to_prompt = "causal" if causal else "all" if "prompt->prompt" in (names or ()) else "none"
    t.set("method.prompt_to_prompt", to_prompt, allowed, default="the extended mask's default")
    t.set("method.prompt_to_input", names is None or "prompt->input" in names, allowed)


def _translate_init(t: Translation, init: Value | None) -> None:
    """The initial prompt: where its values come from."""
    if init is None or not isinstance(init.value, Reference):
        if t.method == "PromptTuning":
            remark = "there from [0, 0.01), the default of flax"
            t.set("method.init", "uniform_positive", default="no initializer", remark=remark)
        return
    reference = init.value
    kind = reference.name.rpartition(".")[2]
    if kind == "uniform":
        scale = t.get(reference, "scale")
        size = number(scale) if scale else 0.01
        remark = "" if size == 0.5 else f"there from [0, {size}), here from [0, 0.5)"
        t.set("method.init", "uniform_positive", scale or init, remark=remark)
    elif kind == "from_sample_of_embeddings":
        t.set("method.init", "sampled_vocabulary", init)
        _population(t, reference)
    elif kind == "from_embedded_list":
        t.set("method.init", "class_labels", init)
        if labels := t.get(reference, "texts", "method.init_labels"):
            _set_labels(t, labels)
        _table(t, reference)
        _fill(t, reference)
    elif kind == "from_embedded_string":
        t.set("method.init", "string", init)
        if words := t.get(reference, "text", "method.init_text"):
            t.set("method.init_text", text(words), words)
        _table(t, reference)
        _fill(t, reference)
    elif kind == "from_array":
        array = t.launch.reference(reference, "prompt")
        path = t.get(array, "path", "method.init_path, or --prompt of the command")
        if t.command in ("eval", "predict"):
            t.options.append(f"--prompt {text(path)}" if path else "--prompt PROMPT")
            t.same_here(path, "the command's --prompt")
        else:
            t.set("method.init", "file", init)
            if path:
                t.set("method.init_path", text(path), path)
    else:
        remark = "there is no such initialization"
        t.set("method.init", "uniform_positive", init, remark=remark)


def _set_labels(t: Translation, labels: Value) -> None:
    """Only plain prompts have labels of their own; other methods use the data's."""
    if t.method == "PromptTuning":
        t.set("method.init_labels", texts(labels), labels)
    else:
        remark = "they are also the answers that evaluation ranks"
        t.set("data.labels", texts(labels), labels, remark=remark)


def _population(t: Translation, reference: Reference) -> None:
    if population := t.get(reference, "population_size"):
        size = 0 if population.value is None else number(population, whole=True)
        t.set("method.init_population", size, population)
    else:
        t.set("method.init_population", 0, default="no population_size")
    _table(t, reference)


def _table(t: Translation, reference: Reference) -> None:
    """The embeddings that an initialization reads: here always the frozen model's."""
    same = "the frozen model's embeddings"
    t.same_here(t.get(reference, "vocab"), "the model's vocabulary")
    table = t.launch.reference(reference, "embeddings")
    if table is None:
        return
    restored = t.launch.macro("INITIAL_CHECKPOINT_PATH") or t.launch.macro("CHECKPOINT_PATH")
    checkpoint = t.get(table, "checkpoint_path")
    if checkpoint and restored and checkpoint.value == restored.value:
        t.same_here(checkpoint, same)
    else:
        t.lost(checkpoint, f"a prompt starts from {same}")
    t.expect(table, "variable_path", *_EMBEDDINGS, same=same, lost=f"a prompt starts from {same}")
    t.lost(t.get(table, "path"), f"a prompt starts from {same}")


def _fill(t: Translation, reference: Reference) -> None:
    """What fills the positions that labels or a text leave."""
    fill = t.get(reference, "initializer")
    if fill and _refers_to(fill, f"{_PROMPTS}from_sample_of_embeddings"):
        _population(t, fill.value)
    else:
        t.lost(fill, "positions that the text leaves start from sampled tokens")
