"""The layers and tensors of transformers' models, by whose names PEFT saves adapters."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.pretrained import COPIES_OF_SHARED, TRANSPOSED, hf_name
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING, LOGITS, parameter_shapes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import matching
from prompt_tuning_jax.typing import HostArray

PREFIX = "base_model.model."  # begins the name of every array
KERNEL = "/kernel"
_HEAD = "lm_head"
_LANGUAGE_MODEL = "language_model."  # in the names of a model that reads images, too
# Our uses of the embedding table in a decoder: for the tokens before, and as the output head.
EMBED_TOKENS, TIED_HEAD = "decoder/embed_tokens", "decoder/tied_logits"


@dataclass(frozen=True, kw_only=True)
class TheirLinear:
    """A linear layer of transformers' model, which may hold several of ours, or an embedding.

    Attributes:
      name: its name in their model, such as ``model.layers.0.self_attn.q_proj``.
      inputs: the number of its inputs.
      outputs: the number of its outputs.
      parts: the paths of our layers in it, and the numbers of their outputs among its own.
      embeds: whether it is an embedding, whose inputs are tokens.
    """

    name: str
    inputs: int
    outputs: int
    parts: Mapping[str, HostArray]
    embeds: bool = False

    def array(self, end: str) -> str:
        """Returns the name of the adapter's array with this last part."""
        return f"{PREFIX}{self.name}.{end}"


def linear_layers(config: ModelConfig) -> dict[str, TheirLinear]:
    """Returns every linear layer of transformers' model, by its name there.

    Raises UserError for a family whose adapters are not supported.
    """
    shapes = linear_shapes(config)
    layers: dict[str, TheirLinear] = {}
    for path in shapes:
        kernel = path + KERNEL
        if isinstance(config, CausalLMConfig):
            table = FAMILIES[config.model_type].names
            name, parts = _tensor(config, kernel), table.parts(kernel)
            paths = [part.removesuffix(KERNEL) for part in parts]
            orders = [np.arange(shapes[path][1])]
            if len(paths) > 1:
                orders = table.order([shapes[each][1] for each in paths], config.head_dim)
        else:
            name, paths, orders = hf_name(kernel), [path], [np.arange(shapes[path][1])]
        name = name.removesuffix(".weight")
        layers[name] = TheirLinear(
            name=name,
            inputs=shapes[path][0],
            outputs=sum(map(len, orders)),
            parts=dict(zip(paths, orders, strict=True)),
        )
    return layers


def paths_of(layers: Mapping[str, TheirLinear], *, embeddings: bool = False) -> list[str]:
    """Returns the paths of all our linear maps in theirs, or of our uses of the embedding table."""
    uses = (f"/{EMBED_TOKENS.rpartition('/')[2]}", f"/{TIED_HEAD.rpartition('/')[2]}")
    paths = (path for layer in layers.values() for path in layer.parts)
    return [path for path in paths if path.endswith(uses) == embeddings]


def require_parts(
    layer: TheirLinear,
    parts: Mapping[str, HostArray],
    shapes: Mapping[str, tuple[int, ...]],
    file: Path,
) -> None:
    """Raises UserError unless the arrays of a layer, by the end of their names, are as expected."""
    for end in sorted(parts.keys() | shapes.keys()):
        name = layer.array(end)
        if end not in shapes:
            raise UserError(f"{file} contains {name}, which belongs to another type of adapter")
        if end not in parts:
            raise UserError(f"{file} has no {name}: the copy is incomplete")
        if parts[end].shape != shapes[end]:
            raise UserError(
                f"{file}: {name} is {list(parts[end].shape)}, but this model and config require "
                f"{list(shapes[end])}"
            )


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the input and output sizes of every linear layer of ours, by path."""
    return {
        name.removesuffix(KERNEL): (shape[0], shape[1])
        for name, shape in parameter_shapes(require_family(config)).items()
        if name.endswith(KERNEL)
    }


def require_family(config: ModelConfig) -> T5Config | CausalLMConfig:
    """Returns the configuration; UserError for a family whose adapters are not supported."""
    if isinstance(config, T5Config) or (
        isinstance(config, CausalLMConfig) and config.model_type in FAMILIES
    ):
        return config
    kind = getattr(config, "model_type", type(config).__name__.removesuffix("Config"))
    raise UserError(
        f"PEFT adapters of {kind} are not supported; those of T5 and of {', '.join(FAMILIES)} are"
    )


def task_type(config: ModelConfig) -> str:
    """Returns PEFT's name of what a language model does."""
    return "CAUSAL_LM" if isinstance(config, CausalLMConfig) else "SEQ_2_SEQ_LM"


def stores_kernels_as_here(config: ModelConfig) -> bool:
    """Returns whether transformers' kernels are ``[in, out]``, as GPT-2's are."""
    return isinstance(config, CausalLMConfig) and FAMILIES[config.model_type].names.kernels_as_here


def embedding_layers(config: ModelConfig) -> dict[str, TheirLinear]:
    """Returns every use of the embedding table that PEFT adapts, by transformers' name.

    A head that is the embedding table is a linear layer.  A T5's ``shared`` is none of them: its
    encoder and its decoder have embeddings of their own, and what PEFT adds to ``shared`` has no
    effect.
    """
    config = require_family(config)
    rows, width = config.vocab_size, config.embed_dim
    names = {name.removesuffix(".weight"): use for name, use in _embedding_names(config).items()}
    layers = {
        name: TheirLinear(
            name=name, inputs=rows, outputs=width, parts={use: np.arange(width)}, embeds=True
        )
        for name, use in names.items()
    }
    if config.tie_embeddings:
        head = _head(config).removesuffix(".weight")
        parts = {TIED_HEAD: np.arange(rows)}
        layers[head] = TheirLinear(name=head, inputs=width, outputs=rows, parts=parts)
    return layers


def _embedding_names(config: T5Config | CausalLMConfig) -> dict[str, str]:
    """Returns the tensors that embed tokens in transformers, and our uses of the table."""
    if isinstance(config, T5Config):
        return {name: name.removesuffix(".weight").replace(".", "/") for name in COPIES_OF_SHARED}
    return {FAMILIES[config.model_type].names.tensor(EMBEDDING): EMBED_TOKENS}


@dataclass(frozen=True, kw_only=True)
class TheirTensor:
    """A tensor of transformers' model, which may hold several parameters of ours.

    Attributes:
      parts: the paths of our parameters in it, and the numbers of their entries on its axis of
        outputs; None is all of them.
      transposed: whether ours are transposed.
      use: the use of the embedding table that a changed tensor is for; empty if it is for its part.
      unused: whether transformers uses another tensor in its place.
    """

    parts: Mapping[str, HostArray | None]
    transposed: bool
    use: str = ""
    unused: bool = False

    def ours(self, array: HostArray) -> dict[str, HostArray]:
        """Returns our parameters in this tensor, by path."""
        array = array.T if self.transposed else array
        return {
            path: array if entries is None else array[..., entries]
            for path, entries in self.parts.items()
        }

    def theirs(self, params: Mapping[str, HostArray]) -> HostArray:
        """Returns the tensor with all of its parameters."""
        arrays = [params[path] for path in self.parts]
        array = np.concatenate(arrays, axis=-1)
        orders = [entries for entries in self.parts.values() if entries is not None]
        if orders:
            array = array[..., np.argsort(np.concatenate(orders))]
        return array.T if self.transposed else array


def their_tensors(config: ModelConfig) -> dict[str, TheirTensor]:
    """Returns all tensors of transformers' model that hold parameters, by name."""
    config = require_family(config)
    shapes = parameter_shapes(config)
    theirs: dict[str, TheirTensor] = {}
    for path in shapes:
        if isinstance(config, T5Config):
            unused = path == EMBEDDING
            transposed = path.endswith(TRANSPOSED)
            theirs[hf_name(path)] = TheirTensor(
                parts={path: None}, transposed=transposed, unused=unused
            )
            continue
        table = FAMILIES[config.model_type].names
        parts: dict[str, HostArray | None] = dict.fromkeys(table.parts(path))
        if len(parts) > 1:
            orders = table.order([shapes[part][-1] for part in parts], config.head_dim)
            parts = dict(zip(parts, orders, strict=True))
        transposed = table.is_transposed(path)
        theirs[_tensor(config, path)] = TheirTensor(parts=parts, transposed=transposed)
    uses = _embedding_names(config)
    if config.tie_embeddings:
        uses[_head(config)] = TIED_HEAD
    for name, use in uses.items():
        theirs[name] = TheirTensor(parts={EMBEDDING: None}, transposed=False, use=use)
    return theirs


def _head(config: T5Config | CausalLMConfig) -> str:
    if isinstance(config, T5Config):
        return hf_name(LOGITS)
    return _tensor(config, LOGITS)


def _tensor(config: CausalLMConfig, path: str) -> str:
    """Returns the name of a parameter in transformers' model.

    Every output head is ``lm_head`` there.
    """
    return renamed_head(FAMILIES[config.model_type].names.tensor(path), config)


def as_base_model(config: ModelConfig, model_type: str) -> ModelConfig:
    """Returns the configuration whose modules have the names of a base model of this type.

    The language model of one that reads images has other names there than alone.
    """
    family = FAMILIES.get(model_type)
    if family and isinstance(config, CausalLMConfig) and family.text_type == config.model_type:
        return dataclasses.replace(config, model_type=model_type)
    return config


def of_language_model(
    arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, HostArray], ModelConfig]:
    """Returns the language model's arrays, and the configuration with its names in the adapter.

    In an adapter of a model that reads images, too, those of its other parts are left out: they
    change nothing about texts.  Names of transformers before 4.52 become today's.
    """
    for kind, family in FAMILIES.items():
        inside = as_base_model(config, kind)
        if inside is config:
            continue
        names = family.names
        of_texts = [f"{PREFIX}{prefix}" for prefix in names.prefixes if _LANGUAGE_MODEL in prefix]
        if any(name.startswith(tuple(of_texts)) for name in arrays):
            language_arrays = {}
            for name, array in arrays.items():
                prefix = next((each for each in of_texts if name.startswith(each)), "")
                if prefix:
                    name = of_texts[0] + name.removeprefix(prefix)
                if not names.is_unused(name.removeprefix(PREFIX)):
                    language_arrays[name] = array
            return language_arrays, inside
    return dict(arrays), config


def other_modules(config: ModelConfig) -> str | None:
    """Returns a regular expression for modules beside the language model.

    They may have the same names.
    """
    family = FAMILIES.get(config.model_type) if isinstance(config, CausalLMConfig) else None
    return f".*{family.names.unused}" if family and family.text_type else None


def renamed_head(name: str, config: ModelConfig) -> str:
    """Returns the name in transformers 5 of a module, tensor or array.

    GPT-NeoX had ``embed_out`` before.

    Files of the model still have the older name, and so have adapters of older versions.
    """
    if not isinstance(config, CausalLMConfig):
        return name
    prefix = PREFIX if name.startswith(PREFIX) else ""
    first, dot, rest = name.removeprefix(prefix).partition(".")
    is_head = first == FAMILIES[config.model_type].names.head
    return f"{prefix}{_HEAD}{dot}{rest}" if is_head else name


def adapter_path(name: str, part: str) -> str:
    """Returns the path of an adapter's array in a ``TunedModel``."""
    return f"model/{name}/adapter/{part}"


def matching_layers(patterns: Collection[str], shapes: Iterable[str]) -> list[str]:
    """Returns the linear layers whose whole path matches one of the patterns."""
    names = dict.fromkeys(shapes)
    masks = [matching(names, pattern) for pattern in patterns]
    return [name for name in names if any(mask[name] for mask in masks)]


def patterns_for(
    names: Collection[str], shapes: Iterable[str], *, usual: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns regular expressions that match exactly these layers, preferably short ones."""
    if not names:
        return ()
    # Names by their last part, or their last two.
    ends = [sorted({"/".join(name.split("/")[-depth:]) for name in names}) for depth in (1, 2)]
    for short in (usual, *((f".*/({'|'.join(kinds)})",) for kinds in ends)):
        if set(matching_layers(short, shapes)) == set(names):
            return short
    return tuple(re.escape(name) for name in sorted(names))


def module_names(names: Collection[str], layers: Iterable[str]) -> list[str]:
    """Returns PEFT's names for these layers.

    They are the last parts where these suffice, and otherwise full names.

    ``layers`` are all layers of the model, by their names there.
    """
    others = {name.rpartition(".")[2] for name in layers if name not in names}
    ends = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if end in others else end for name, end in ends.items()})
