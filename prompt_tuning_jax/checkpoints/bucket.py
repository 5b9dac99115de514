"""Folders in buckets, ``gs://bucket/path`` and ``s3://bucket/path``, read through TensorStore.

Credentials are found as Google's and Amazon's own tools find them; public buckets need none.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.progress import Report, progress
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write, user_cache
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

_ADDRESS = re.compile(r"(gs|s3)://([^/]+)/*(.*?)/*", re.DOTALL)
_PART_BYTES = 1 << 26
_GENERATIONS = ".generations.json"
# Half a dozen seconds together: TensorStore's own go on for many minutes.
_RETRIES = {"max_retries": 5, "initial_delay": "200ms", "max_delay": "2s"}
_HINTS = {
    "gs": "log in where it is private (gcloud auth application-default login, or "
    "GOOGLE_APPLICATION_CREDENTIALS), or copy the folder here (gcloud storage cp -r)",
    "s3": "give credentials where it is private (aws configure, or AWS_PROFILE), or copy the "
    "folder here (aws s3 cp --recursive)",
}
# What TensorStore says first when it is not the files that are at fault.
_UNREACHABLE = re.compile(
    r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED"
    r"|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN)\b.*|.*(CURL|[Cc]redential|http_response_code='40[13]').*",
    re.DOTALL,
)


def is_address(name: str) -> bool:
    """Whether a name is an address (of whatever scheme) and no path."""
    return "://" in name


def store_of(address: str) -> dict[str, Any] | None:
    """TensorStore's spec of a folder in a bucket; None where it is no address of one.

    ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` hold for what speaks S3 and is not Amazon's.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return None
    scheme, bucket, path = found.groups()
    store = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket, "path": as_folder(path)}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return store


def as_folder(path: str) -> str:
    """A path that ends with a slash, or nothing for the top."""
    return f"{path.rstrip('/')}/" if path.rstrip("/") else ""


def retries(*, cached_bytes: int = 0) -> Any:
    """TensorStore's context in which a bucket out of reach is given up soon."""
    import tensorstore

    return tensorstore.Context(
        {
            "gcs_request_retries": _RETRIES,
            "s3_request_retries": _RETRIES,
            "cache_pool": {"total_bytes_limit": cached_bytes},
        }
    )


def unreachable(address: str, error: Exception) -> UserError | None:
    """What to say where the bucket and not the file is at fault, else None."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not _UNREACHABLE.fullmatch(str(error)):
        return None
    return UserError(
        f"{address} cannot be read: {one_line(error)}; check the network, {_HINTS[found[1]]}"
    )


def one_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.partition(" [tensorstore_spec=")[0]
    # TensorStore says first what it did and last what went wrong.
    return line if len(line) <= 240 else f"{line[:60]} ... {line[-160:]}"


class Bucket:
    """The files below an address; UserError in one line for what cannot be read."""

    def __init__(self, address: str) -> None:
        import tensorstore

        self.address = address.rstrip("/")
        self._store = self._done(
            lambda: tensorstore.KvStore.open(store_of(address), context=retries()).result()
        )

    def names(self) -> list[str]:
        """The files in the folder itself."""
        keys = self._done(lambda: self._store.list().result())
        return sorted(name for name in (key.decode() for key in keys) if "/" not in name)

    def read(self, name: str) -> bytes | None:
        """A small file, None if there is none."""
        found = self._done(lambda: self._store.read(name).result())
        return bytes(found.value) if found.state == "value" else None

    def has_changed(self, name: str, generation: str) -> bool:
        """Whether a file is another than that of the generation given."""
        known = bytes.fromhex(generation)
        # Of another file one byte is enough.
        read = self._store.read(name, if_not_equal=known, byte_range=slice(0, 1))
        return bool(self._done(read.result).state != "unspecified")

    def fetch(self, name: str, path: Path, *, report: Report) -> str:
        """Writes a file to ``path`` part by part and gives its generation."""
        generations: set[bytes] = set()
        offset = 0
        with atomic_write(path) as aside, aside.open("wb") as file:
            while part := self._part(name, offset):
                file.write(part.value)
                generations.add(part.stamp.generation)
                offset += len(part.value)
                report(name, len(part.value))
                if len(part.value) < _PART_BYTES:
                    break
        if len(generations) > 1:
            path.unlink()
            raise UserError(f"{self.address}/{name} was replaced while it was read: try again")
        return generations.pop().hex() if generations else ""

    def _part(self, name: str, offset: int) -> Any:
        """The next bytes of a file, None at its end; fewer than a part are the last ones."""
        for end in (offset + _PART_BYTES, None):
            try:
                found = self._store.read(name, byte_range=slice(offset, end)).result()
            except ValueError as error:
                if str(error).startswith("OUT_OF_RANGE"):  # it ends before the end of this part
                    continue
                raise self._failure(error) from error
            except Exception as error:
                raise self._failure(error) from error
            if found.state != "value":
                raise UserError(f"{self.address}/{name} is gone")
            return found
        return None

    def _done(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:  # each kind of store has its own
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        plain = UserError(f"{self.address} cannot be read: {one_line(error)}")
        return unreachable(self.address, error) or plain


def fetch_folder(address: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """A copy on this machine of the files that ``choose`` takes from a folder in a bucket.

    It is kept below ``$XDG_CACHE_HOME/prompt_tuning_jax/models`` (``~/.cache`` where that is not
    set), and only files that have changed since are fetched again.  Raises UserError.
    """
    bucket = Bucket(address)
    key = hashlib.sha256(bucket.address.encode()).hexdigest()[:16]
    folder = user_cache("models") / key
    wanted = choose(bucket.names())
    known = _generations(folder)
    with progress(f"fetching {bucket.address}") as report:
        for name in wanted:
            generation = known.get(name)
            there = generation and (folder / name).is_file()
            if there and not bucket.has_changed(name, known[name]):
                continue
            known[name] = bucket.fetch(name, folder / name, report=report)
            with atomic_write(folder / _GENERATIONS) as aside:
                aside.write_text(json_text(known), encoding="utf-8")
    # What is gone from the bucket must not be found here.
    for file in folder.glob("*"):
        if file.name not in wanted and not file.name.startswith("."):
            file.unlink(missing_ok=True)
    return folder


def _generations(folder: Path) -> dict[str, str]:
    try:
        known = read_json_file(folder / _GENERATIONS)
        return {str(name): bytes.fromhex(value).hex() for name, value in known.items()}
    except (UserError, ValueError, AttributeError, TypeError):
        return {}
