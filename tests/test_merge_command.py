"""From the command line: a run of LoRA is trained, evaluated, and merged into its model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model, open_model
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading import load_prompts
from prompt_tuning_jax.methods import LoRA, PromptTuning
from tests import tiny_run
from tests.micro import call, shifted, token_rows

INPUTS = (token_rows([5, 3], 7), shifted(token_rows([4, 6], 6, seed=1)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members of LoRA, from the config of another method and options."""
    folder = tmp_path_factory.mktemp("lora")
    of = tiny_run.experiment(folder / "run", {"training.steps": 6, "training.eval_every": 6})
    config = tiny_run.write_config(folder / "c.py", of)
    options = "method=lora method.rank=2 method.targets=.*/query,.*/mlp/w.* method.dropout=0.1"
    options += " optimizer.learning_rate=0.05 optimizer.rates=.*/lora_b_RF=4"
    line = ["train", str(config), "--seeds", "0,1"]
    assert main(line + [part for o in options.split() for part in ("--set", o)]) == 0
    return folder / "run"


def test_eval_opens_the_run(trained: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert main(["eval", "--prompt", str(trained), "--output", str(scores)]) == 0
    found = json.loads(scores.read_text())
    results = json.loads((trained / "results.json").read_text())["best"]
    assert [one["prompt"] for one in found["per_prompt"]] == [
        f"{trained}/{name}" for name in ("seed_0", "seed_1")
    ]
    assert [one["accuracy"] for one in found["per_prompt"]] == [
        results[name]["accuracy"] for name in ("seed_0", "seed_1")
    ]


def test_merge_writes_the_model_that_was_tuned(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for member in ("seed_0", "seed_1"):
        line = ["merge", str(trained), str(tmp_path / member), "--to", "hf", "--member", member]
        assert main(line) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"wrote the merged model as a Hugging Face folder: {tmp_path}")
    models = [load_model(str(tmp_path / m)) for m in ("seed_0", "seed_1")]
    base = load_model(str(tiny_run.model_folder()))
    logits = [np.asarray(call(m, *INPUTS)) for m in (*models, base)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logits[a] - logits[b]).max() > 1e-3
    assert models[0].vocabulary is not None
    changed = {
        name
        for name, p in param_tree.split(models[0])[1].items()
        if (np.asarray(p) != np.asarray(param_tree.split(base)[1][name])).any()
    }
    assert changed == {
        name
        for name in param_tree.split(base)[1]
        if name.endswith(("query/kernel", "wi_0/kernel", "wi_1/kernel", "wo/kernel"))
    }
    # What was tuned is in there: it is not applied once more.
    again = Experiment(model=Model(name_or_path=str(tmp_path / "seed_0")))
    with pytest.raises(UserError, match="trained for another model") as refused:
        load_prompts(again, models[0], [str(trained)])
    assert "allow_other_model" not in str(refused.value)
    # Narrow on request.
    line = ["merge", str(trained), str(tmp_path / "n"), "--member", "seed_0", "--dtype", "bfloat16"]
    assert main(line) == 0
    assert {str(a.dtype) for a in open_model(str(tmp_path / "n")).params.values()} == {"bfloat16"}
    assert jax.tree.leaves(param_tree.split(models[0])[1])[0].dtype == np.float32


def test_what_cannot_be_merged_gets_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny_run.experiment(
        tmp_path / "p", {"method": PromptTuning(length=2), "training.seeds": (0, 1)}
    )
    new = tiny_run.experiment(tmp_path / "new", {"method": LoRA(rank=2)})
    narrow = tiny_run.experiment(tmp_path / "q", {"method": LoRA(), "model.quantization": "int8"})
    for of in (prompts, new, narrow):
        folder = Path(of.training.workdir)
        folder.mkdir(exist_ok=True)
        (folder / "experiment.json").write_text(to_json(of))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for source, rest, said in (
        (trained, [], "has 2 members; name one with --member: seed_0, seed_1"),
        (trained, ["--member", "seed_7"], "has no member 'seed_7'"),
        (tmp_path, [], "holds no run"),
        (tmp_path / "p", [], "is a run of prompt_tuning, which cannot be merged"),
        (tmp_path / "p", [], "that can are described_prompts, full, ia3, lora, pattern"),
        (tmp_path / "new", [], "no best checkpoint"),
        (tmp_path / "q", [], "was trained beside weights in int8"),
    ):
        assert main(["merge", str(source), str(tmp_path / "out"), *rest]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error
        assert not (tmp_path / "out").exists()
    assert main(["merge", str(trained), str(tmp_path / "full"), "--member", "seed_0"]) == 2
    assert "exists already" in capsys.readouterr().err
