"""What tests of ``convert`` and ``inspect`` share: models and prompts of every format, small."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.parameters import PROMPT, parameter_shapes
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.models.t5.config import T5Config
from tests import tiny_run

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = tiny_run.CONFIG
WIDTH = CONFIG.embed_dim


def prompt(length: int = 5, *, width: int = WIDTH, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=(length, width)).astype(dtype)


def params(config: T5Config = CONFIG, *, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    shapes = parameter_shapes(config)
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def hf_model(folder: Path, config: T5Config = CONFIG, *, dtype: Any = np.float32) -> Path:
    words = tiny_run.vocabulary_file()
    write_hf(folder, config, params(config, dtype=dtype), vocabulary_file=words, dtype="stored")
    return folder


def t5x_model(folder: Path, *, with_prompt: bool = False, step: int = 9) -> Path:
    """One that T5X has trained on: with the optimizer's state, and small leaves in the index."""
    found = params()
    state: dict[str, Any] = {f"param_states/{name}/v": np.ones(3, np.float32) for name in found}
    inline = [f"target/{name}" for name in found if name.endswith("/scale")]
    if with_prompt:
        found = {**found, PROMPT: prompt()}
    return write_t5x(folder, found, step=step, state=state, inline=inline)


def orbax_model(folder: Path, arrays: dict[str, np.ndarray], *, use_ocdbt: bool) -> Path:
    """As T5X writes today, by Orbax itself; step 5."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {"target": {}, "state": {"step": np.int32(5)}}
    for name, array in arrays.items():
        *parents, last = ("target", *name.split("/"))
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = array
    tree["state"]["param_states"] = {"prompt": {"v": np.ones(3, np.float32)}, "none": None}
    written = folder / "checkpoint_5"
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt))
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
    ocp.Checkpointer(handler).save(written.resolve(), items)
    return written


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; folders as empty entries."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


class Program:
    """``prompt-tuning`` with captured output; a failure must be one line and leave no trace."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys = capsys
        self.folder = folder

    def __call__(self, *words: object) -> str:
        """What it prints, notes included."""
        self.capsys.readouterr()
        assert main([str(word) for word in words]) == 0, self.capsys.readouterr().err
        out, err = self.capsys.readouterr()
        return out + err

    def refused(self, *words: object) -> str:
        """The message; nothing may have changed in the test's folder."""
        before = tree_bytes(self.folder)
        self.capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        out, err = self.capsys.readouterr()
        assert status == 2 and out == ""
        assert tree_bytes(self.folder) == before
        lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
        assert len(lines) == 1 and "error: " in lines[0], err
        return lines[0].split("error: ", 1)[1]
