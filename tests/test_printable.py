"""What files hold cannot steer the terminal that it is shown on."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.errors import printable, printable_json
from tests import tiny_run

# Set the title, clear the screen, a C1 control sequence, text from right to left, a bell.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\r\nx\u2028\x7f"


def steering(text: str) -> set[str]:
    kinds = {c: unicodedata.category(c) for c in text}
    left = {c for c, kind in kinds.items() if kind in ("Cc", "Zl", "Zp", "Cs")}
    return (left | ({*text} & {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"})) - {"\n"}


def test_what_steers_is_written_out() -> None:
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"
    assert printable("a\nb\u202ec") == "a\\nb\\u202ec"
    assert printable("naïve 日本語 🙂\tx") == "naïve 日本語 🙂\tx"
    assert not steering(printable("".join(map(chr, range(0x10000))).replace("\t", "")))


def test_json_means_the_same() -> None:
    value = {"a": [EVIL, "ü"]}
    shown = printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(shown) == value
    assert not steering(shown)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt with metadata of somebody who means no good, in a file of such a name."""
    folder = tmp_path_factory.mktemp("evil")
    metadata = PromptMetadata(
        model_name=EVIL, task=EVIL, init=EVIL, metric=EVIL, origin=EVIL, labels=(EVIL, "b")
    )
    prompt_PD = np.random.default_rng(0).normal(size=(5, tiny_run.CONFIG.embed_dim))
    save_prompt(folder / "p.safetensors", prompt_PD, metadata=metadata)
    save_prompt(folder / "\x1b[2Jq.safetensors", prompt_PD + 1, metadata=metadata)
    (folder / "\x1b[2J.npy").write_bytes(b"none")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "inspect {0}/p.safetensors",
        "inspect {0}/p.safetensors --json",
        "inspect {0}/\x1b[2Jq.safetensors",
        "inspect {0}/\x1b[2J.npy",
        "similar {0}/p.safetensors --among {0}/\x1b[2Jq.safetensors",
        "similar {0}/p.safetensors --among {0}/\x1b[2Jq.safetensors --json",
        "convert {0}/p.safetensors {0}/\x1b[3J.npy",
        "convert {0}/p.safetensors {0}/x --to peft",
        "eval --model {1} --prompt {0}/p.safetensors --eval_data {2}",
        "predict --prompt {0}/p.safetensors --model {1} --set evaluation.strategy=rank x",
        "predict --prompt {0}/p.safetensors --model {1} --set evaluation.strategy=rank x --json",
        "train \x1b[2J.py",
        "train --\x1b[2J",
        "\x1b[2J",
        "recycle {0}/p.safetensors --from \x1b[2J --to tiny --output {0}/r.npy",
    ],
)
def test_no_command_prints_it(folder: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(line.format(folder, tiny_run.model_folder(), tiny_run.eval_file()).split(" "))
    captured = capsys.readouterr()
    assert captured.out or captured.err
    assert not steering(captured.out) and not steering(captured.err)
