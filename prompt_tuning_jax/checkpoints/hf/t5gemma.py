"""Reads and writes T5Gemma and the text part of T5Gemma 2 as Hugging Face folders."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.causal_parameters import (
    DECODER_EMBEDDING,
    EMBEDDING,
    t5gemma_parameter_shapes,
)
from prompt_tuning_jax.checkpoints.hf.causal import (
    TOKEN_IDS,
    drop_copied_head,
    one_or_all,
    read_params,
    require_layers,
    require_same_config,
    with_prefix,
)
from prompt_tuning_jax.checkpoints.hf.config_files import (
    CONFIG,
    GENERATION_CONFIG,
    read_generation_config,
)
from prompt_tuning_jax.checkpoints.hf.config_reader import ConfigReader
from prompt_tuning_jax.checkpoints.hf.config_writer import ConfigWriter
from prompt_tuning_jax.checkpoints.hf.families import T5GEMMA_FAMILIES
from prompt_tuning_jax.checkpoints.hf.index import HfModel, with_dtype
from prompt_tuning_jax.checkpoints.hf.names import NameTable
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, equal_bits
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig

_log = logging.getLogger(__name__)
_START = "decoder_start_token_id"
_EOI, _IMAGE = "eoi_token_index", "image_token_index"
# transformers cannot leave out what reads images: a written config describes a tiny one.
_VISION = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 4,
}


def t5gemma_config(raw: Mapping[str, Any], path: Path) -> T5GemmaConfig:
    """Returns the configuration of ``raw``.

    ``path`` holds it beside its generation_config.json.
    """
    kind = raw["model_type"]
    family, merged = T5GEMMA_FAMILIES[kind], kind == "t5gemma2"
    if raw.get("is_encoder_decoder", True) is not True:
        raise UserError(
            f"{path}: is_encoder_decoder is {raw['is_encoder_decoder']!r}: an encoder alone is not "
            "supported"
        )
    generation = read_generation_config(path)
    encoder_raw = _part(raw, "encoder", path=path)
    text_raw, where = encoder_raw, "encoder"
    if merged:
        text_raw, where = (
            _part(encoder_raw, "text_config", path=path, of="encoder."),
            "encoder.text_config",
        )
    decoder_raw = _part(raw, "decoder", path=path)

    def reader(of: Mapping[str, Any], model_type: str, part: str) -> ConfigReader:
        actual = of.get("model_type", model_type)
        if actual != model_type:
            raise UserError(
                f"{path}: {part}.model_type is {repr(actual)[:80]}; a {kind} has "
                f"{model_type!r} there"
            )
        described = {**of, "model_type": model_type}
        return ConfigReader(described, generation=generation, path=path, part=part)

    readers = (
        reader(text_raw, family.encoder_type, where),
        reader(decoder_raw, family.decoder_type, "decoder"),
    )
    for each in readers:
        family.describe(each)
    tied = raw.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings is {tied!r} and must be true or false")
    encoder = readers[0].config()
    decoder = dataclasses.replace(readers[1].config(), tie_embeddings=tied)
    if encoder.vocab_size != decoder.vocab_size:
        raise UserError(
            f"{path}: {where}.vocab_size is {encoder.vocab_size} and decoder.vocab_size "
            f"{decoder.vocab_size}: stacks with different vocabularies are not supported"
        )
    if merged and encoder.embed_dim != decoder.embed_dim:
        raise UserError(
            f"{path}: {where}.hidden_size is {encoder.embed_dim} and decoder.hidden_size "
            f"{decoder.embed_dim}: the stacks of a t5gemma2 have one width"
        )
    ids = _token_ids(raw, decoder_raw, generation, readers[1], path=path)
    end = -1
    if merged:
        end = encoder_raw.get(_EOI, encoder_raw.get("eoi_token_id", 256_000))
        image = raw.get(_IMAGE, raw.get("image_token_id", 256_001))
        for key, value in ((f"encoder.{_EOI}", end), (_IMAGE, image)):
            if type(value) is not int or not 0 <= value < 2**31:
                raise UserError(f"{path}: {key} is {repr(value)[:80]}; it must be a token's id")
        ids = dataclasses.replace(ids, image=image)
    return T5GemmaConfig(
        model_type=kind,
        encoder=encoder,
        decoder=decoder,
        token_ids=ids,
        eoi=end,
    )


def _part(raw: Mapping[str, Any], key: str, *, path: Path, of: str = "") -> dict[str, Any]:
    part = raw.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: {of}{key} is {repr(part)[:80]}; it must describe a stack")
    return part


def _token_ids(
    raw: Mapping[str, Any],
    decoder: Mapping[str, Any],
    generation: Mapping[str, Any],
    reader: ConfigReader,
    *,
    path: Path,
) -> TokenIds:
    """Returns the special token ids.

    They are those of generation_config.json, else of the model, else of its decoder.
    """

    def ids(key: str, default: int) -> list[int]:
        return reader.ids(key, None, of=raw) or reader.ids(key, default, of=decoder)

    here = ids("eos_token_id", 1)
    beside = path.with_name(GENERATION_CONFIG)
    ends = reader.ids("eos_token_id", None, of=generation, file=beside) or here
    if not ends:
        raise UserError(f"{path}: there is no eos_token_id: add the id that ends a text")
    first = here[0] if here and here[0] in ends else ends[0]
    pads = reader.ids("pad_token_id", None, of=generation, file=beside) or ids("pad_token_id", 0)
    # transformers trains with the decoder's beginning of sequence as the first input.
    begins = reader.ids("bos_token_id", 2, of=decoder)
    if not begins:
        raise UserError(f"{path}: decoder.bos_token_id is null: add the id that starts a target")
    for file, of in ((path, raw), (beside, generation)):
        chosen = reader.ids(_START, None, of=of, file=file)
        if chosen and chosen[0] != begins[0]:
            raise UserError(
                f"{file}: {_START} is {chosen[0]}, but decoder.bos_token_id is {begins[0]} in "
                f"{path.name}: transformers would train with one and generate with the other; make "
                "them equal"
            )
    return TokenIds(
        pad=pads[0] if pads else first,
        eos=first,
        start=begins[0],
        more_eos=tuple(dict.fromkeys(i for i in ends if i != first)),
        inputs_have_eos=False,
    )


def open_t5gemma(
    folder: Path, raw: Mapping[str, Any]
) -> tuple[T5GemmaConfig, dict[str, LazyArray]]:
    """Returns a model as (configuration, parameters by our name in the stored dtype).

    Of a T5Gemma 2, what reads images is left unread.  If ``config.json`` ties the tables, copies
    of them are dropped; an output head that differs is kept, and the model is not tied.  See
    ``open_hf`` for the errors.
    """
    config = t5gemma_config(raw, folder / CONFIG)
    table = T5GEMMA_FAMILIES[config.model_type].names
    unread: list[str] = []

    def is_unused(name: str) -> bool:
        unused = table.is_unused(name)
        if unused:
            unread.append(name)
        return unused

    path, stored = open_weights(folder, is_unused=is_unused, flax=False)
    tensors = with_prefix(table, stored, path=path)
    embedding = EMBEDDING if config.shares_table else DECODER_EMBEDDING
    keeps_head = config.tie_embeddings and not drop_copied_head(table, tensors, of=embedding)
    if config.tie_embeddings:
        _check_copies(table, tensors, keep=keeps_head, path=path)
    if keeps_head:
        untied = dataclasses.replace(config.decoder, tie_embeddings=False)
        config = dataclasses.replace(config, decoder=untied)
    numbers = {"encoder": config.encoder.num_layers, "decoder": config.decoder.num_layers}
    require_layers(table, tensors, numbers, path=path)
    shapes = t5gemma_parameter_shapes(config)
    params = read_params(table, tensors, shapes, head_dim=config.head_dim, path=path)
    if unread:
        _log.info("%s: only text is read; the parts for images are left out", folder)
    return config, params


def _check_copies(
    table: NameTable, tensors: dict[str, LazyArray], *, keep: bool, path: Path
) -> None:
    """Requires that copies in the file are copies; leaves them out, or ``keep`` has all of them."""
    for copy, original in table.copies.items():
        whole, of = table.prefixes[0] + copy, table.prefixes[0] + original
        if of not in tensors:
            continue
        if whole in tensors and not equal_bits(tensors[whole], tensors[of]):
            raise UserError(f"{path}: {copy} is not a copy of {original}")
        tensors.pop(whole, None)
        if keep:
            tensors[whole] = tensors[of]


def t5gemma_as_hf(config: T5GemmaConfig, params: Mapping[str, LazyArray]) -> HfModel:
    """Returns a model as transformers has it.

    Raises UserError if config.json would describe another model.
    """
    described, generation = described_t5gemma(config)
    return HfModel(
        arrays=T5GEMMA_FAMILIES[config.model_type].names.write(params, config.head_dim),
        describe=with_dtype(described),
        files={GENERATION_CONFIG: generation},
    )


def described_t5gemma(config: T5GemmaConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json, without the dtype of the weights, and generation_config.json."""
    family, ids = T5GEMMA_FAMILIES[config.model_type], config.token_ids
    special = dict(zip(TOKEN_IDS, (ids.start, ids.eos, ids.pad), strict=True))
    stacks: list[dict[str, Any]] = []
    for part, stack, kind in (
        ("encoder.", config.encoder, family.encoder_type),
        ("decoder.", config.decoder, family.decoder_type),
    ):
        writer = ConfigWriter(dataclasses.replace(stack, model_type=kind))
        family.describe(writer)
        reader = ConfigReader(writer.raw, generation={}, path=Path(CONFIG))
        family.describe(reader)
        # What no key of the stack says.
        again = dataclasses.replace(reader.config(), tie_embeddings=stack.tie_embeddings)
        require_same_config(again, dataclasses.replace(stack, model_type=kind), part=part)
        stacks.append({**writer.raw, **special, "dropout_rate": 0.0, "attention_dropout": 0.0})
    encoder, decoder = stacks
    described: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "is_encoder_decoder": True,
        **special,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.decoder.vocab_size,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
        "encoder": {**encoder, "is_decoder": False},
        "decoder": {**decoder, "is_decoder": True},
    }
    if config.merged:
        images = {_EOI: config.eoi, _IMAGE: ids.image}
        parts = {"model_type": "t5gemma2_encoder", "text_config": encoder, **_VISION, **images}
        described |= {"encoder": parts, "decoder": decoder, **images}
    else:
        described["decoder"]["cross_attention_hidden_size"] = config.encoder.embed_dim
    generation = {**special, "eos_token_id": one_or_all(ids.all_eos), _START: ids.start}
    return described, generation
