"""Reads and writes PEFT's adaption prompts (LLaMA-Adapter).

The format is that of peft 0.21, tuners/adaption_prompt: for each of the top layers a prompt
``[1, P, D]`` and a gate ``[1]``, by the name of the layer's attention.
"""

import math
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.peft.modules import PREFIX, adapter_path, linear_layers
from prompt_tuning_jax.checkpoints.peft.opened import OpenedAdapter
from prompt_tuning_jax.config.methods import AdaptionPrompt
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray

ADAPTION = "ADAPTION_PROMPT"
_PROMPT, _GATE = "adaption_prompt", "adaption_gate"
# Families that PEFT has it for, and whether what it adds passes the output map there.
_PROJECTS = {"llama": True, "mistral": True, "gpt2": False}


def read_adaption(
    adapter: OpenedAdapter, config: ModelConfig
) -> tuple[AdaptionPrompt, dict[str, HostArray]]:
    """Returns the method and its arrays by path; errors are those of ``read_peft_prompts``."""
    config = _require_peft_can(config)
    length, layers = adapter.number("adapter_len"), adapter.number("adapter_layers")
    if layers > config.num_layers:
        raise UserError(
            f"{adapter.where}: adapter_layers is {layers}, but this model has {config.num_layers} "
            "layers"
        )
    modules = _modules(config, layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules.values():
        shapes[f"{PREFIX}{module}.{_PROMPT}"] = (1, length, config.embed_dim)
        shapes[f"{PREFIX}{module}.{_GATE}"] = (1,)
    theirs = adapter.tensors(shapes)
    trainable = {}
    for path, module in modules.items():
        trainable[adapter_path(path, "prompt_PD")] = theirs[f"{PREFIX}{module}.{_PROMPT}"][0]
        trainable[adapter_path(path, "gate")] = theirs[f"{PREFIX}{module}.{_GATE}"]
    project = _PROJECTS[config.model_type]
    return AdaptionPrompt(length=length, layers=layers, project=project), trainable


def written_adaption(
    method: AdaptionPrompt, arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Returns the fields and the arrays of an adapter.

    Errors are those of ``write_peft_prompts``.
    """
    config = _require_peft_can(config)
    projects = _PROJECTS[config.model_type]
    if method.project != projects:
        raise UserError(
            f"PEFT's adaption prompts of {config.model_type} need method.project="
            f"{str(projects).lower()}; this one has {str(method.project).lower()}"
        )
    layers = method.layers or config.num_layers
    modules = _modules(config, layers)
    names = [adapter_path(path, end) for path in modules for end in ("prompt_PD", "gate")]
    require_same_names(arrays, dict.fromkeys(names), of="the tuned arrays", and_of="AdaptionPrompt")
    theirs = {}
    for path, module in modules.items():
        theirs[f"{PREFIX}{module}.{_PROMPT}"] = arrays[adapter_path(path, "prompt_PD")][None]
        theirs[f"{PREFIX}{module}.{_GATE}"] = arrays[adapter_path(path, "gate")]
    fields = {
        "adapter_layers": layers,
        "adapter_len": method.length,
        "peft_type": ADAPTION,
        "target_modules": next(iter(modules.values())).rpartition(".")[2],
    }
    return fields, theirs


def _modules(config: CausalLMConfig, layers: int) -> dict[str, str]:
    """Returns transformers' names of the top layers' attentions, by our paths."""
    module_of = {
        path: name.rpartition(".")[0]
        for name, layer in linear_layers(config).items()
        for path in layer.parts
    }
    top = range(config.num_layers - layers, config.num_layers)
    paths = [f"decoder/layers_{i}/self_attention" for i in top]
    return {path: module_of[f"{path}/query"] for path in paths}


def _require_peft_can(config: ModelConfig) -> CausalLMConfig:
    """Returns the configuration; UserError for a model with which PEFT computes something else."""
    if not isinstance(config, CausalLMConfig) or config.model_type not in _PROJECTS:
        kind = getattr(config, "model_type", type(config).__name__.removesuffix("Config"))
        raise UserError(f"PEFT has adaption prompts for {', '.join(_PROJECTS)}, not for {kind}")
    heads = f"{config.num_heads} x {config.head_dim}"
    if config.num_heads * config.head_dim != config.embed_dim:
        raise UserError(
            f"PEFT's adaption prompts need heads that have the model's width, {config.embed_dim}, "
            f"together; this model's are {heads}"
        )
    if config.out_bias and _PROJECTS[config.model_type]:
        raise UserError(
            "PEFT's adaption prompts add the bias of the attention's output map a second time; "
            "this model has one"
        )
    if not math.isclose(config.query_scale, config.head_dim**-0.5, rel_tol=1e-6):
        raise UserError(
            f"PEFT's adaption prompts scale queries by 1/sqrt({config.head_dim}); this model "
            f"scales them by {config.query_scale:g}"
        )
    return config
