"""Reads rows of parquet files, Arrow files, and folders written by ``datasets``."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import read_json, read_json_file

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 1024
_STATE = "state.json"
_SPLITS = "dataset_dict.json"

_Rows = Iterator[tuple[str, dict[str, Any]]]


def read_parquet(path: Path) -> _Rows:
    """Yields (where, row) of a parquet file."""
    import pyarrow.parquet

    with _refusing(path):
        file = pyarrow.parquet.ParquetFile(path)
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE)
        yield from _rows(batches, file.schema_arrow, path)


def read_arrow(path: Path) -> _Rows:
    """Yields (where, row) of an Arrow file or stream, as ``datasets`` writes them."""
    import pyarrow as pa

    with _refusing(path), pa.OSFile(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            file_reader = pa.ipc.open_file(source)
            batches = (file_reader.get_batch(i) for i in range(file_reader.num_record_batches))
            yield from _rows(batches, file_reader.schema, path)
            return
        yield from _rows(reader, reader.schema, path)


def read_folder(folder: Path, split: str) -> _Rows:
    """Yields (where, row) of a ``save_to_disk`` folder; ``split`` selects one of several splits."""
    files = files_of(folder, split)
    for path in files[1:]:
        yield from read_arrow(path)


def files_of(folder: Path, split: str) -> list[Path]:
    """Returns the files that determine the rows: the description, then the Arrow files in order."""
    splits = folder / _SPLITS
    if splits.is_file():
        listed = _listed(read_json_file(splits), "splits", splits)
        if split not in listed:
            raise UserError(
                f"{folder}: has no split {split!r}; there are: {', '.join(listed)} "
                "(data.train_split, data.eval_split)"
            )
        folder = folder / _plain(split, splits)
    state_file = folder / _STATE
    if not state_file.is_file():
        raise UserError(
            f"{folder}: is a folder without {_STATE} or {_SPLITS}, so it was not written by "
            "datasets' save_to_disk; name a file"
        )
    state = read_json_file(state_file)
    if isinstance(state, Mapping) and state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: its rows are chosen by an index; save it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    entries = state.get("_data_files") if isinstance(state, Mapping) else None
    filenames = [e.get("filename") for e in entries or () if isinstance(e, Mapping)]
    names = _listed({"_data_files": filenames}, "_data_files", state_file)
    return [state_file, *(folder / _plain(name, state_file) for name in names)]


def _listed(value: Any, field: str, path: Path) -> list[str]:
    names = value.get(field) if isinstance(value, Mapping) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return [str(name) for name in names]
    raise UserError(f"{path}: {field!r} is not a list of names; the file is damaged")


def _plain(name: str, path: Path) -> str:
    """Returns ``name``; UserError if it is not a plain file name within the folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{path}: {name[:60]!r} is not the name of a file in this folder")
    return name


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _rows(batches: Any, schema: "pa.Schema", path: Path) -> _Rows:
    import pyarrow as pa

    for name, count in Counter(schema.names).items():
        if count > 1:
            raise UserError(f"{path}: {count} columns are named {name!r}; rename them")
    classes = _class_names(schema, path)
    # The shortest decimals that identify a float16 or float32 number.
    short = {
        field.name: pa.types.is_float16(field.type) or pa.types.is_float32(field.type)
        for field in schema
    }
    number = 1
    for batch in batches:
        batch.validate(full=True)  # Arrow reads damaged offsets as they are
        columns = {}
        for i, name in enumerate(batch.schema.names):
            values = batch.column(i).to_pylist()
            if short[name]:
                values = [None if v is None else float(str(np.float32(v))) for v in values]
            columns[name] = [_as_json(value, classes.get(name)) for value in values]
        for i in range(batch.num_rows):
            yield f"{path}, row {number}", {name: values[i] for name, values in columns.items()}
            number += 1


def _class_names(schema: "pa.Schema", path: Path) -> dict[str, list[str]]:
    """Returns the class names of ``ClassLabel`` columns, which ``datasets`` stores as numbers."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    try:
        value = read_json(stored, of=str(path))
        features = value["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError):
        return {}


def _as_json(value: Any, names: list[str] | None = None) -> Any:
    """Converts a value to JSON, with numbers as text.

    A class number becomes the name of its class; -1 (no class) and nan become null.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        if names is None:
            return str(value)
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value)
