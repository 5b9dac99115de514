"""The tokenizer of a GGUF file as the files that transformers reads."""

import json
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.gguf_tokenizer import gguf_spec
from prompt_tuning_jax.data.vocabularies.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG


def gguf_tokenizer_files(path: Path) -> dict[str, dict[str, Any]]:
    """``tokenizer.json`` and ``tokenizer_config.json``, as JSON by name.

    An input that begins with ``bos_token`` does so by the post-processor, as in files on the hub.
    Raises UserError as ``load_vocabulary`` does.
    """
    spec = gguf_spec(path)
    tokenizer = json.loads(spec.tokenizer.to_str())
    bos = spec.special.get("bos_token")
    if spec.add_bos and bos is not None:
        added = _begins_with(bos, spec.tokenizer.token_to_id(bos))
        kept = tokenizer.get("post_processor")
        both = {"type": "Sequence", "processors": [kept, added]}
        tokenizer["post_processor"] = added if kept is None else both
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **spec.special,
        "add_bos_token": bool(spec.add_bos),
        "clean_up_tokenization_spaces": False,
    }
    if spec.chat_template:
        config["chat_template"] = spec.chat_template
    return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: config}


def _begins_with(token: str, token_id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
