import sys
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.checkpoints.hub import ASSETS, model_location
from prompt_tuning_jax.config.paths import T5X_MODELS
from prompt_tuning_jax.errors import UserError

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


class FakeHub:
    """snapshot_download over a dict of files; ``fetched`` are the names that it has given out."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.fetched: set[str] = set()

    def __call__(self, name: str, *, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        for file in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            path = self.folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.fetched.add(file)
        return str(self.folder / name)


OTHERS = ["tf_model.h5", "README.md", "onnx/model.safetensors", "model.fp16.safetensors"]
TOKENS = ["config.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weights", "unwanted"),
    [
        (["model.safetensors"], ["flax_model.msgpack", "pytorch_model.bin"]),
        ([INDEX, *SHARDS], ["flax_model.msgpack", "pytorch_model-00001-of-00002.bin"]),
        (["flax_model.msgpack"], ["pytorch_model.bin", "rust_model.ot"]),
        (["pytorch_model.bin"], []),
    ],
)
def test_only_what_is_needed_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], unwanted: list[str]
) -> None:
    hub = FakeHub(tmp_path, [*OTHERS, *TOKENS, *weights, *unwanted])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    name = "google/flan-t5-small"
    assert model_location(name) == str(tmp_path / name)
    assert hub.fetched == {*TOKENS, *weights}


def test_a_repository_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path, ["README.md", "config.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(UserError, match=r"org/name: no model\.safetensors"):
        model_location("org/name")
    hub.files = ["model.safetensors"]
    with pytest.raises(UserError, match=r"org/other: no config\.json"):
        model_location("org/other")


def cached(home: Path, name: str, files: list[str]) -> Path:
    """The hub's cache as its library lays it out."""
    root = home / ("models--" + name.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in files:
        (root / "blobs" / file).touch()
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "weights", ["model.safetensors", INDEX, "flax_model.msgpack", "pytorch_model.bin"]
)
def test_offline_from_the_cache(offline: Path, weights: str) -> None:
    snapshot = cached(offline, "google/mt5-small", ["config.json", weights])
    assert model_location("google/mt5-small") == str(snapshot)


def test_offline_and_not_in_the_cache(offline: Path) -> None:
    with pytest.raises(UserError, match=r"google/byt5-small: not complete in the hub's cache"):
        model_location("google/byt5-small")
    cached(offline, "google/byt5-small", ["config.json"])
    with pytest.raises(UserError, match=r"google/byt5-small: no(t wholly| model\.safetensors)"):
        model_location("google/byt5-small")


def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def fails(error: type[Exception], message: str) -> None:
        def snapshot_download(*args: Any, **kwargs: Any) -> str:
            # Those of HTTP want a response; what is caught is the class.
            raise error.__new__(error, message)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    for error, message in (
        (errors.RepositoryNotFoundError, "neither a folder nor a public model"),
        (errors.HFValidationError, "neither a folder nor a public model"),
        (errors.GatedRepoError, "accept its license"),
        (errors.LocalEntryNotFoundError, "HF_HUB_OFFLINE is set"),
        (RuntimeError, "fetching it from huggingface.co failed: two"),
    ):
        fails(error, "two\nlines")
        with pytest.raises(UserError, match=rf"^org/name: .*{message}") as caught:
            model_location("org/name")
        assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"there is no folder .* install huggingface_hub"):
        model_location("org/name")


def test_the_last_of_the_checkpoints_in_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint_900.tmp-1").mkdir()
    assert model_location(str(tmp_path)) == str(tmp_path)
    (tmp_path / "checkpoint_90").mkdir()
    assert model_location(str(tmp_path)) == str(tmp_path / "checkpoint_90") and not caplog.text
    (tmp_path / "checkpoint_100").mkdir()
    assert model_location(str(tmp_path)) == str(tmp_path / "checkpoint_100")
    assert "checkpoints of steps 90, 100: using the last" in caplog.text
    (tmp_path / "config.json").touch()  # Hugging Face's trainer leaves such folders, too
    assert model_location(str(tmp_path)) == str(tmp_path)


def test_names_folders_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = "gs://t5-data/pretrained_models/t5x"
    for size in ("small", "base", "large", "xl", "xxl"):
        name = f"t5_1_1_lm100k_{size}"
        assert model_location(name) == f"{bucket}/{name}/checkpoint_1100000"
    assert len(T5X_MODELS) == 5
    assert model_location("s3://bucket/model") == "s3://bucket/model"
    assert model_location("tiny") == str(ASSETS / "tiny")
    for elsewhere in ("https://host/model", "gs://", "file:///model"):
        with pytest.raises(UserError, match="gs://BUCKET/PATH and s3://BUCKET/PATH"):
            model_location(elsewhere)
    for wrong in ("t5_1_1_lm100k_huge", "no/such/folder", "/absent", "../x", "org/", "org/.x"):
        with pytest.raises(UserError, match="is neither a folder"):
            model_location(wrong)
    with pytest.raises(UserError, match="did you mean 't5_1_1_lm100k_base'"):
        model_location("t5_1_1_lm100k_bse")
    # A folder of such a name goes before the hub.
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_location("org/name") == "org/name"
