"""Which method a file's arrays were tuned by, as its metadata says."""

from pathlib import Path

from prompt_tuning_jax.checkpoints.mapped_safetensors import read_header
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import read_json

METHOD = "method"  # the metadata's key; below it the method's config as JSON


def tuned_by(path: Path) -> str | None:
    """The class of the method that a ``.safetensors`` file's arrays belong to.

    None for what is no such file, or cannot be read; "" where the method has no name.
    """
    if not path.is_file():
        return None
    try:
        text = read_header(path)[1].get("__metadata__", {}).get(METHOD)
    except (UserError, OSError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    try:
        described = read_json(text, of="the method")
    except UserError:
        return ""
    name = described.get("class") if isinstance(described, dict) else None
    return name if isinstance(name, str) else ""
