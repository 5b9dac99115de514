import json
import shutil
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import hub, location
from prompt_tuning_jax.checkpoints.hub import T5X_VOCABULARY, hf_folder
from prompt_tuning_jax.checkpoints.load import load_model, open_model
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.config.paths import T5X_MODELS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.inference.loading import attach
from tests.checkpoints.test_t5x_methods import trained_arrays


class Store:
    """Objects by ``bucket/key``, given out as Google's and Amazon's servers do."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.status = 200
        self.sent: list[tuple[str, int]] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                code, body, headers = store.answer(self.path, self.headers)
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, address: str, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                key = f"{address.partition('://')[2]}/{file.relative_to(folder).as_posix()}"
                self.objects[key] = file.read_bytes()

    def answer(self, url: str, headers: Message) -> tuple[int, bytes, dict[str, str]]:
        if self.status != 200:
            return self.status, b"", {}
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if path.startswith("/storage/v1/b/"):
            name, _, key = path.removeprefix("/storage/v1/b/").partition("/o")
            key = key.removeprefix("/")
        else:
            name, _, key = path.removeprefix("/").partition("/")
        if not key:
            return 200, self.listing(name, query), {}
        data = self.objects.get(f"{name}/{key}")
        if data is None:
            return 404, b"", {}
        version = str(1 + hash(data) % 10**9)
        tags = {"x-goog-generation": version, "ETag": f'"{version}"'}
        unwanted = (query.get("ifGenerationNotMatch"), headers.get("If-None-Match"))
        if unwanted[0] == version or unwanted[1] == f'"{version}"':
            return 304, b"", tags
        code = 200
        if wanted := headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return 416, b"", tags
            size, code = len(data), 206
            data = data[int(first) : int(last) + 1 if last else None]
            tags["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{size}"
        self.sent.append((key, len(data)))
        return code, data, tags

    def listing(self, name: str, query: dict[str, str]) -> bytes:
        first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        prefix = query.get("prefix", "")
        keys = [key.removeprefix(f"{name}/") for key in self.objects if key.startswith(f"{name}/")]
        keys = sorted(k for k in keys if k.startswith(prefix) and first <= k < last)
        if "list-type" not in query:
            return json.dumps({"items": [{"name": key} for key in keys]}).encode()
        found = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
        return (
            "<ListBucketResult><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(keys)}</KeyCount>{found}</ListBucketResult>"
        ).encode()


@pytest.fixture(scope="module")
def server() -> Store:
    return Store()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(location, "_RETRIES", {"max_retries": 1, "initial_delay": "1ms"})
    server.objects.clear()
    server.sent.clear()
    server.status = 200
    yield server


def assert_same(model: Any, other: Any) -> None:
    assert model.config == other.config
    assert_same_params(model, other)


def assert_same_params(model: Any, other: Any) -> None:
    params, others = param_tree.split(model)[1], param_tree.split(other)[1]
    assert params.keys() == others.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, others[name])


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("layout", ["tiny_t5x/checkpoint_3", "orbax/tiny/checkpoint_3"])
def test_t5x_checkpoints_in_buckets(store: Store, shared: Path, scheme: str, layout: str) -> None:
    folder = shared / "fixtures" / "t5x" / layout
    address = f"{scheme}://some-bucket/deep/down"
    store.put(address, folder)
    assert_same(load_model(f"{address}/"), load_model(str(folder)))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_hugging_face_folders_in_buckets(
    store: Store, tiny_model_dir: Path, tmp_path: Path, scheme: str
) -> None:
    address = f"{scheme}://some-bucket/tiny"
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    (folder / "huge.bin").write_bytes(b"not of the model")
    store.put(address, folder)
    model = load_model(address)
    assert_same(model, load_model(str(folder)))
    assert model.vocabulary is not None
    assert not [key for key, _ in store.sent if "huge" in key]
    # What is here already is not sent again.
    store.sent.clear()
    assert load_model(address).vocabulary == model.vocabulary
    assert sum(size for _, size in store.sent) < 10
    # What has changed is, and what is gone is gone.
    store.objects["some-bucket/tiny/config.json"] += b" "
    store.objects.pop("some-bucket/tiny/spiece.model", None)
    assert load_model(address).vocabulary is None
    assert (hf_folder(address) / "config.json").read_bytes().endswith(b" ")


def test_files_come_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_PART_BYTES", 100)
    sizes = [0, 1, 99, 100, 101, 200, 250]
    for size in sizes:
        store.objects[f"some-bucket/m/{size}"] = bytes(i % 251 for i in range(size))
    folder = hub.fetch_folder("gs://some-bucket/m", list)
    for size in sizes:
        assert (folder / str(size)).read_bytes() == store.objects[f"some-bucket/m/{size}"]
    assert max(size for _, size in store.sent) <= 100


def test_a_file_that_changes_while_it_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is kept, and an earlier copy stays."""
    monkeypatch.setattr(location, "_PART_BYTES", 100)
    key, path = "some-bucket/m/file", tmp_path / "file"
    store.objects[key] = bytes(250)
    path.write_bytes(b"as it was")

    def replace(name: str, size: int) -> None:
        store.objects[key] = bytes([1] * 250)

    with pytest.raises(UserError, match="m/file was replaced while it was being read"):
        location.Bucket("gs://some-bucket/m").fetch("file", path, report=replace)
    assert path.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [path]


def test_a_published_checkpoint_comes_with_its_vocabulary(store: Store, shared: Path) -> None:
    folder = shared / "fixtures" / "t5x" / "tiny_t5x" / "checkpoint_3"
    store.put(T5X_MODELS["t5_1_1_lm100k_base"], folder)
    key = f"{T5X_VOCABULARY.removeprefix('gs://')}/sentencepiece.model"
    store.objects[key] = b"the pieces"
    opened = open_model("t5_1_1_lm100k_base")
    assert opened.vocabulary_file is not None
    assert opened.vocabulary_file.read_bytes() == b"the pieces"
    del store.objects[key]
    with pytest.raises(UserError, match=r"^gs://t5-data/vocabs.* has no sentencepiece.model"):
        open_model("t5_1_1_lm100k_base")
    # Another is asked for.
    assert open_model("t5_1_1_lm100k_base", vocabulary=False).vocabulary_file is None


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_prompts_and_methods_in_buckets(
    store: Store, shared: Path, tmp_path: Path, scheme: str
) -> None:
    source = shared / "fixtures" / "t5x" / "tiny_t5x" / "checkpoint_3"
    model = load_model(str(source))
    prompt = {PROMPT: np.full((3, model.config.embed_dim), 0.5, np.float32)}
    for name, trained in {"prompt": prompt, "ia3": trained_arrays("ia3")}.items():
        folder = write_t5x(tmp_path / name, open_t5x(source).stored, step=3, trained=trained)
        address = f"{scheme}://some-bucket/{name}"
        store.put(address, folder)
        assert_same_params(attach(model, address), attach(model, folder))
        file = convert(address, tmp_path / f"{name}.safetensors").path
        assert_same_params(attach(model, file), attach(model, folder))


def test_a_bucket_out_of_reach(store: Store) -> None:
    for status in (503, 403):
        store.status = status
        for address, hint in (("gs://some-bucket/m", "gcloud"), ("s3://some-bucket/m", "aws")):
            with pytest.raises(UserError, match=rf"^{address} cannot be read: .*{hint}") as caught:
                load_model(address)
            assert "\n" not in str(caught.value)


def test_nothing_in_the_bucket(store: Store) -> None:
    with pytest.raises(UserError, match=r"^gs://some-bucket/m has no model"):
        load_model("gs://some-bucket/m")


def test_a_chunk_that_is_missing_or_cannot_be_had(store: Store, shared: Path) -> None:
    folder = shared / "fixtures" / "t5x" / "tiny_t5x" / "checkpoint_3"
    store.put("gs://some-bucket/m", folder)
    array = open_model("gs://some-bucket/m").params["encoder/layers_0/mlp/wo/kernel"]
    store.status = 503
    with pytest.raises(UserError, match=r"^gs://some-bucket/m.* cannot be read: .*gcloud"):
        array.whole()
    store.status = 200
    chunk = next(
        k for k in store.objects if k.endswith("target.encoder.layers_0.mlp.wo.kernel/0.0")
    )
    del store.objects[chunk]
    with pytest.raises(UserError, match="damaged or incomplete"):
        array.whole()
    assert read_t5x(folder).keys()
