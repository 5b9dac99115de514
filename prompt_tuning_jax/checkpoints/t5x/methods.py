"""Per-layer prompts, multitask prompts and IA3 under the names that the original code gives them.

Sources: prompt_tuning/extended/train/per_layer.py, extended/multitask_prompts.py and
extended/train/ia3.py; flaxformer names a module after the attribute that holds it.  A checkpoint
does not always tell how its arrays are combined: ``Combined`` says it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np

from prompt_tuning_jax.checkpoints.array_files import read_npy, require_finite
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, in_memory
from prompt_tuning_jax.checkpoints.parameters import PROMPT, is_prompt, is_trained
from prompt_tuning_jax.checkpoints.t5x.arrays import OptimizerState
from prompt_tuning_jax.config.methods import (
    IA3,
    Combine,
    DeepPrompts,
    MethodConfig,
    MultitaskPrompts,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, HostArray

# How the prompts of layers, or of tasks, are combined with the first or shared prompt.
Combined: TypeAlias = Literal["replace", "add", "sum", "concatenation", "features", "projection"]
COMBINED: tuple[Combined, ...] = get_args(Combined)
_Arrays: TypeAlias = dict[str, HostArray]

_NPY_MAGIC = b"\x93NUMPY"
_SHARED = "encoder/prompt/prompt/shared_prompt"
_TASKS = "encoder/prompt/prompt/task_prompts/embedding"
_LAYER = "encoder/layers_{}/prompt/prompt/prompt"
_LAYERED = "method/vectors/prompts_PD"
_OF_LAYER = re.compile(r"encoder/layers_(\d+)/prompt/prompt/prompt")
_SCALE = re.compile(r"(.+)/(([qkv])_conv|intermediate_conv)/ia3_scaling")
_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
_BLOCKS = {
    "encoder": ("attention",),
    "decoder": ("self_attention", "encoder_decoder_attention"),
}
# Squared gradients of a parameter that has none: Adafactor's epsilon, 1e-30, per step.
_NO_GRADIENT = 1e-28


def is_numpy_folder(folder: Path) -> bool:
    """Returns whether a folder has arrays of a method as the original's checkpointer saves them.

    They are files without a suffix, such as ``encoder.layers_0.prompt.prompt.prompt``.
    """
    return len(_numpy_files(folder)) > 1


def numpy_arrays(folder: Path) -> dict[str, LazyArray]:
    """Returns the arrays in such a folder by T5X's name."""
    return {
        name: in_memory(read_npy(file), where=str(file))
        for name, file in _numpy_files(folder).items()
    }


def _numpy_files(folder: Path) -> dict[str, Path]:
    files = {}
    for file in sorted(folder.glob("*coder.*")):
        name = file.name.replace(".", "/")
        if file.suffix != ".npy" and is_trained(name) and file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(_NPY_MAGIC)) == _NPY_MAGIC:
                    files[name] = file
    return files


def has_method(params: Mapping[str, Any]) -> bool:
    """Returns whether these parameters, by name, hold more than a plain prompt of any method."""
    return any(_is_added(name) and name != PROMPT for name in params)


def _is_added(name: str) -> bool:
    """Returns whether a parameter belongs to a method, known or not."""
    return is_trained(name) or is_prompt(name)


def kind_of(params: Mapping[str, Any]) -> str:
    """Returns the name of the method's class, by the names of its parameters.

    Returns "" if it is unknown.
    """
    if any(_SCALE.fullmatch(name) for name in params):
        return "IA3"
    if _SHARED in params or _TASKS in params:
        return "MultitaskPrompts"
    return "DeepPrompts" if any(_OF_LAYER.fullmatch(name) for name in params) else ""


def read_method(
    params: Mapping[str, LazyArray],
    config: T5Config,
    *,
    of: str,
    combined: Combined | None = None,
    open_state: Callable[[], OptimizerState] | None = None,
) -> tuple[MethodConfig, _Arrays]:
    """Returns the method whose parameters are among ``params``, and its arrays by our path.

    ``combined`` is needed where shapes and the optimizer's state (``open_state``) do not tell it.
    Multitask prompts are read with the attention that is the original's default, causal among the
    positions of the prompt.  Raises UserError, naming ``of``, for an unknown method and for arrays
    that do not fit the model.
    """
    arrays = {n: p.whole().astype(np.float32) for n, p in params.items() if _is_added(n)}
    require_finite(arrays, of=of)
    kind = kind_of(arrays)
    if kind == "IA3":
        if combined is not None:
            raise UserError(f"{of} has IA3's scales, to which --combine does not apply")
        return _read_scales(arrays, config, of=of)
    if kind == "MultitaskPrompts":
        return _read_tasks(arrays, config, of=of, combined=combined)
    if kind == "DeepPrompts":
        if combined is None and open_state is not None:
            combined = _combined_by_state(open_state())
        return _read_layers(arrays, config, of=of, combined=combined)
    listed = ", ".join(sorted(arrays)[:3])
    raise UserError(
        f"{of} has {listed}, which belongs to no method that is read: these are a prompt in the "
        "encoder's input, prompts of its layers, multitask prompts and IA3"
    )


def _combined_by_state(state: OptimizerState) -> Combined | None:
    """Per-layer prompts replace the first prompt if it never had a gradient; None if unknown."""
    slots = (state.get(f"param_states/{PROMPT}/{slot}") for slot in ("v", "v_row", "v_col"))
    largest = max((float(slot.whole().max()) for slot in slots if slot is not None), default=0.0)
    if largest == 0.0:
        return None
    return "replace" if largest < _NO_GRADIENT else "add"


def _read_layers(
    arrays: _Arrays, config: T5Config, *, of: str, combined: Combined | None
) -> tuple[DeepPrompts, _Arrays]:
    layers = config.num_encoder_layers
    wanted = [PROMPT, *(_LAYER.format(i) for i in range(layers))]
    _require_names(arrays, wanted, of=of, what=f"prompts of {layers} encoder layers")
    shapes = {arrays[name].shape for name in wanted}
    if len(shapes) > 1 or arrays[PROMPT].ndim != 2 or arrays[PROMPT].shape[1] != config.embed_dim:
        raise UserError(
            f"{of} has prompts of {' and '.join(str(list(s)) for s in sorted(shapes))}; all must "
            f"be [length, {config.embed_dim}]"
        )
    combined = _chosen(("replace", "add"), combined, of=of)
    before, *later = (arrays[name] for name in wanted)
    if combined == "add":
        later[0] = before + later[0]
    # With ``replace``, what is before the first layer's prompt has no effect.
    mode: Literal["replace", "add"] = "add" if combined == "add" else "replace"
    method = DeepPrompts(length=len(before), mode=mode, init="uniform")
    return method, {"method/vectors/prompts_PD": np.concatenate(later)}


def _read_tasks(
    arrays: _Arrays, config: T5Config, *, of: str, combined: Combined | None
) -> tuple[MultitaskPrompts, _Arrays]:
    _require_names(arrays, [_SHARED, _TASKS], of=of, what="multitask prompts")
    shared_PS, tasks_NA = arrays[_SHARED], arrays[_TASKS]
    width = config.embed_dim
    if shared_PS.ndim != 2 or tasks_NA.ndim != 2 or shared_PS.shape[1] > width:
        raise UserError(
            f"{of}: {_SHARED} is {list(shared_PS.shape)} and {_TASKS} {list(tasks_NA.shape)}, "
            f"which fits no model of width {width}"
        )
    (length, features), (tasks, size) = shared_PS.shape, tasks_NA.shape
    is_projection = size == (features + 1) * width
    fitting: dict[Combined, bool] = {
        "sum": features == width and size == length * width,
        # As many vectors of a task as a projection has are a coincidence, or a sum's.
        "concatenation": features == width
        and size % width == 0
        and (not is_projection or size == length * width),
        "features": features < width and size == length * (width - features),
        "projection": is_projection,
    }
    combined = _chosen([way for way, fits in fitting.items() if fits], combined, of=of)
    own_axes: dict[Combined, tuple[int, int]] = {
        "sum": (length, width),
        "concatenation": (size // width, width),
        "features": (length, width - features),
        "projection": (width, features),
    }
    paths = {"features": "method/task_NPA", "projection": "method/kernel_NDS"}
    weights_NA = tasks_NA[:, :-width] if combined == "projection" else tasks_NA
    trainable = {
        f"method/shared_{'PS' if combined in paths else 'PD'}": shared_PS,
        paths.get(combined, "method/task_NQD"): weights_NA.reshape(tasks, *own_axes[combined]),
    }
    if combined == "projection":
        trainable["method/bias_ND"] = np.ascontiguousarray(tasks_NA[:, -width:])
    method = MultitaskPrompts(
        length=length,
        combine=cast(Combine, combined),
        tasks=tasks,
        init="uniform",
        prompt_to_prompt="causal",
    )
    if combined in paths:
        method = replace(method, shared_features=features)
    if combined == "concatenation":
        method = replace(method, task_length=size // width)
    return method, trainable


def _chosen(fitting: Sequence[Combined], given: Combined | None, *, of: str) -> Combined:
    """Returns the way in which prompts are combined: the one that fits, or the given one."""
    if given is None and len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UserError(f"{of}: the shapes of its prompts fit none of the original's combinations")
    if given is None:
        raise UserError(
            f"{of} does not tell how its prompts are combined; convert it to safetensors with "
            f"--combine {' or '.join(fitting)}"
        )
    if given not in fitting:
        raise UserError(f"{of}: --combine {given} does not fit it; {' or '.join(fitting)} does")
    return given


def _read_scales(arrays: _Arrays, config: T5Config, *, of: str) -> tuple[IA3, _Arrays]:
    sizes = {"heads": config.num_heads * config.head_dim, "mlp": config.mlp_dim}
    trainable: dict[str, HostArray] = {}
    convs = set()
    for name, array in arrays.items():
        match = _SCALE.fullmatch(name)
        if match is None:
            raise UserError(f"{of} has IA3's scales and {name}; only one method is read")
        block, conv, projection = match.groups()
        convs.add(conv)
        size = sizes["heads" if projection else "mlp"]
        if array.size != size:
            raise UserError(f"{of}: {name} is {list(array.shape)}; this model needs {size} numbers")
        path, part = (
            (f"{block}/{_PROJECTIONS[projection]}", "scale_F")
            if projection
            else (f"{block}/wo", "scale_D")
        )
        trainable[f"model/{path}/adapter/{part}"] = array.reshape(-1)
    wanted = [name for conv in sorted(convs) for name in _scales(conv, config)]
    _require_names(arrays, wanted, of=of, what=f"IA3 in {', '.join(sorted(convs))}")
    names = [long for short, long in _PROJECTIONS.items() if f"{short}_conv" in convs]
    method = IA3(
        outputs=(f".*/({'|'.join(names)})",) if names else (),
        inputs=(".*/mlp/wo",) if "intermediate_conv" in convs else (),
    )
    return method, trainable


def _scales(conv: str, config: T5Config) -> list[str]:
    """Returns T5X's names of all scales that an attribute of the network adds."""
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    return [
        f"{stack}/layers_{i}/{block}/{conv}/ia3_scaling"
        for stack, count in layers.items()
        for i in range(count)
        for block in (("mlp",) if conv == "intermediate_conv" else _BLOCKS[stack])
    ]


def t5x_arrays(
    method: MethodConfig,
    trainable: Mapping[str, Array | HostArray],
    config: T5Config,
    *,
    of: str,
) -> _Arrays:
    """Returns a method's arrays by T5X's names, the inverse of ``read_method``.

    Raises UserError for a method, or an option of one, that the original does not have or that is
    not written, and for arrays that do not fit the model.
    """
    arrays = {name: np.asarray(array, np.float32) for name, array in trainable.items()}
    combined: Combined | None = None
    if isinstance(method, PromptTuning | MultitaskPrompts) and method.decoder_length:
        raise UserError(
            f"{of}: method.decoder_length is {method.decoder_length}, and prompts of the decoder "
            "are not written into T5X checkpoints"
        )
    _require_arrays(method, arrays, of=of)
    if isinstance(method, PromptTuning):
        return {PROMPT: arrays["method/prompt_PD"]}
    if isinstance(method, DeepPrompts):
        theirs, combined = _written_layers(method, arrays, config, of=of), method.mode
    elif isinstance(method, MultitaskPrompts):
        if method.combine == "low_rank":
            raise UserError(
                f"{of}: method.combine=low_rank has no counterpart in the original code; convert "
                "the prompt of each task"
            )
        theirs, combined = _written_tasks(arrays), method.combine
    elif isinstance(method, IA3):
        theirs = _written_scales(arrays, config, of=of)
    else:
        raise UserError(
            f"{of} was trained with {method_name(method)}, which the original code does not have; "
            "a T5X checkpoint holds prompt_tuning, deep_prompts, multitask_prompts or ia3"
        )
    lazy = {name: in_memory(array, where=name) for name, array in theirs.items()}
    read_method(lazy, config, of=of, combined=combined)  # checks names and shapes
    return theirs


def _require_arrays(method: MethodConfig, arrays: _Arrays, *, of: str) -> None:
    """Raises UserError if a damaged file has other arrays than its method."""
    if isinstance(method, MultitaskPrompts):
        fits = any(map(_is_shared, arrays)) or method.combine == "low_rank"
    else:
        expected = {PromptTuning: "method/prompt_PD", DeepPrompts: _LAYERED}.get(type(method))
        fits = expected is None or list(arrays) == [expected]
    if not fits:
        listed = ", ".join(sorted(arrays)[:5]) or "nothing"
        raise UserError(f"{of} holds {listed}, which are not arrays of {method_name(method)}")


def lost_settings(method: MethodConfig) -> list[str]:
    """Returns the settings that a T5X checkpoint does not store.

    ``read_method`` reads other values for them.
    """
    if not isinstance(method, PromptTuning | MultitaskPrompts):
        return []
    read = {
        "placement": "prefix",
        "prompt_to_input": True,
        "prompt_to_prompt": "causal" if isinstance(method, MultitaskPrompts) else "all",
        "input_to_prompt": True,
    }
    return [
        f"method.{name}={getattr(method, name)}"
        for name, value in read.items()
        if getattr(method, name) != value
    ]


def _written_layers(method: DeepPrompts, arrays: _Arrays, config: T5Config, *, of: str) -> _Arrays:
    layers = config.num_encoder_layers
    stored_PD = arrays[_LAYERED]
    if len(set(method.lengths)) > 1:
        raise UserError(f"{of}: in the original code the prompts of all layers have one length")
    length = method.prompt_positions()
    if len(stored_PD) != layers * length:
        raise UserError(
            f"{of} has {len(stored_PD)} vectors; this model's {layers} layers need {length} each"
        )
    prompts = np.split(stored_PD, layers)
    first = np.zeros_like(prompts[0]) if method.mode == "add" else prompts[0]
    layered = {_LAYER.format(i): prompt for i, prompt in enumerate((first, *prompts[1:]))}
    return {PROMPT: prompts[0], **layered}


def _is_shared(name: str) -> bool:
    return name.startswith("method/shared_")


def _written_tasks(arrays: _Arrays) -> _Arrays:
    shared = next(array for name, array in arrays.items() if _is_shared(name))
    order = ("method/task_NQD", "method/task_NPA", "method/kernel_NDS", "method/bias_ND")
    parts = [arrays[name] for name in order if name in arrays]
    tasks = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return {_SHARED: shared, _TASKS: tasks}


def _written_scales(arrays: _Arrays, config: T5Config, *, of: str) -> _Arrays:
    heads = (config.num_heads, config.head_dim)
    theirs, convs = {}, set()
    for name, array in arrays.items():
        path = name.removeprefix("model/").removesuffix("/scale_F").removesuffix("/scale_D")
        block, _, linear = path.removesuffix("/adapter").rpartition("/")
        short = next((s for s, long in _PROJECTIONS.items() if long == linear), "")
        behind = name.endswith("scale_F")
        if (not short or not behind) and (linear != "wo" or behind):
            raise UserError(
                f"{of}: {name} has no counterpart in the original code, whose IA3 scales queries, "
                "keys and values, and the input of mlp/wo"
            )
        conv = f"{short}_conv" if short else "intermediate_conv"
        convs.add(conv)
        fits = short and array.size == heads[0] * heads[1]
        theirs[f"{block}/{conv}/ia3_scaling"] = array.reshape(heads) if fits else array
    # There an attribute is in all layers; the others have scales of one.
    for conv in sorted(convs):
        shape = (config.mlp_dim,) if conv == "intermediate_conv" else heads
        for name in _scales(conv, config):
            theirs.setdefault(name, np.ones(shape, np.float32))
    return theirs


def stacked(arrays: Mapping[str, HostArray], *, axis: int) -> _Arrays:
    """Returns the arrays as a scan-layers model has them, layers stacked along ``axis``."""
    result: _Arrays = {}
    layers: dict[str, dict[int, HostArray]] = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.+)", name):
            layers.setdefault(f"{match[1]}/{match[1]}/{match[3]}", {})[int(match[2])] = array
        else:
            result[name] = array
    for name, each in layers.items():
        result[name] = np.stack([each[i] for i in sorted(each)], axis=axis)
    return result


def _require_names(arrays: _Arrays, wanted: list[str], *, of: str, what: str) -> None:
    if missing := [name for name in wanted if name not in arrays]:
        raise UserError(f"{of} has no {missing[0]}, which {what} need; is the copy complete?")
    if others := sorted(arrays.keys() - set(wanted)):
        raise UserError(f"{of} has {others[0]} beside {what}, which is not read")
