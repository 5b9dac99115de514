"""The files that describe a model in a Hugging Face folder."""

from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import read_json_file

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MOST_CONFIG_BYTES = 2**20  # transformers' files have a thousand


def read_generation_config(path: Path) -> dict[str, Any]:
    """Returns the generation_config.json beside ``config.json``; empty if there is none."""
    beside = path.with_name(GENERATION_CONFIG)
    if not beside.is_file():
        return {}
    generation = read_json_file(beside, max_bytes=MOST_CONFIG_BYTES)
    if not isinstance(generation, dict):
        raise UserError(f"{beside} is a {type(generation).__name__} and not a JSON object")
    return generation
