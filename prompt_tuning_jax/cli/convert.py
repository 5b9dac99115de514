"""``prompt-tuning convert`` and ``prompt-tuning merge``: other formats of what was trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prompt_tuning_jax.cli.arguments import (
    Command,
    non_negative,
    option,
    positional,
    positive,
    size,
)
from prompt_tuning_jax.cli.console import print_notes, readable_size
from prompt_tuning_jax.errors import printable

if TYPE_CHECKING:
    from prompt_tuning_jax.checkpoints.convert_model import Converted


@dataclass(frozen=True, kw_only=True)
class _FormatOptions(Command):
    """What both commands take."""

    # Dtype of the numbers that are written (default: stored, which keeps them).
    dtype: Literal["stored", "float32", "bfloat16"] | None = None
    # Size of the largest file, and of what is held in memory at once, for example 500MB (default:
    # 2GB).
    max_shard_bytes: int | None = option("SIZE", flag="--max_shard_size", default=None, parse=size)
    overwrite: bool = False  # replace an existing destination, once the new one is complete


@dataclass(frozen=True, kw_only=True)
class Convert(_FormatOptions):
    """Convert a model, a prompt, or what another method trained, to another format."""

    name: ClassVar[str] = "convert"
    example: ClassVar[str] = "convert runs/quickstart prompts_for_peft --to peft"

    source: str = positional("SOURCE")  # folder or name of a model, prompt, adapter, or run
    destination: str = positional("DESTINATION")  # new file or folder; .npy and so on imply --to
    # Format.  Models: hf, or t5x (native, version 3); prompts and other methods: npy, safetensors
    # or peft.
    to: Literal["hf", "t5x", "npy", "safetensors", "peft"] | None = None
    # With --to t5x: trained prompt, or file of another method, to include in the checkpoint.
    prompt: str | None = option("PATH", default=None)
    # With --to t5x: step of the checkpoint (default: the source's, or 0).
    step: int | None = option("N", default=None, parse=non_negative)
    unscan: bool = False  # with --to t5x: write each layer of a scanned source by name
    # Vocabulary of the model, instead of the source's; bytes for ByT5's.
    vocabulary: str | None = option("FILE", default=None)
    # With --to hf: largest distance of the relative positions of a T5X source, which does not store
    # it (default: 128 for 32 buckets).
    relpos_max_distance: int | None = option("N", default=None, parse=positive)
    # Frozen model of a prompt or adapter: peft stores its name, and adapters need its shapes.
    model: str | None = option("NAME", default=None)
    # How multitask or per-layer prompts in a T5X checkpoint are combined, if it does not tell.
    combine: Literal["replace", "add", "sum", "concatenation", "features", "projection"] | None = (
        None
    )
    # Allow a model of the same width that the prompt was not trained on.
    allow_other_model: bool = False

    def run(self) -> None:
        from prompt_tuning_jax.inference.conversion import convert

        options = self.given(
            *("to", "dtype", "prompt", "step", "unscan", "vocabulary", "relpos_max_distance"),
            *("max_shard_bytes", "model", "combine", "allow_other_model", "overwrite"),
        )
        _print_written(convert(self.source, self.destination, **options))


@dataclass(frozen=True, kw_only=True)
class Merge(_FormatOptions):
    """Write the model of a run, with the trained parameters merged into its weights."""

    name: ClassVar[str] = "merge"
    example: ClassVar[str] = "merge runs/lora merged --to hf"

    source: str = positional("RUN")  # folder of a run of lora, ia3, full or pattern
    destination: str = positional("FOLDER")  # new folder
    to: Literal["hf"] = "hf"  # format
    member: str | None = option("NAME", default=None)  # one of several, for example seed_0

    def run(self) -> None:
        from prompt_tuning_jax.inference.conversion import merge

        options = self.given("member", "dtype", "max_shard_bytes", "overwrite")
        _print_written(merge(self.source, self.destination, **options))


def _print_written(converted: "Converted") -> None:
    path = converted.path
    # Of a folder with several prompts or adapters, each of them.
    adapters = sorted(p.parent for p in path.glob("*/adapter_config.json"))
    first, *others = adapters or sorted(path.glob("*.npy")) or [path]
    where = ", ".join([str(first), *(other.name for other in others)])
    files = f" in {converted.files} files" if converted.files > 1 else ""
    print(printable(f"wrote {converted.what}: {where} ({readable_size(converted.bytes)}{files})"))
    print_notes(converted.notes)
