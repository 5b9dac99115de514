"""In a process of its own: importing the module fills SeqIO's registries."""

import json
import os
import subprocess
import sys

import pytest

from prompt_tuning_jax.cli.task_listing import dump

CODE = """
import json, sys
import seqio
import prompt_tuning_jax.seqio_tasks
from prompt_tuning_jax.data.tasks.registry import get_mixture, seqio_names

out = {"tasks": sorted(seqio.TaskRegistry.names()), "seqio_names": list(seqio_names())}
out["mixtures"] = sorted(seqio.MixtureRegistry.names())
out["ids"] = {}
for name in sys.argv[1:]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, "validation", shuffle=False)
    rows = list(dataset.as_numpy_iterator())
    sides = ("inputs", "targets")
    out["ids"][name] = [[row[side].tolist() for side in sides] for row in rows]
mixture = seqio.MixtureRegistry.get("task_index_super_glue_with_dpr_v102_examples_proportional")
out["rates"] = {task.name: mixture.get_rate(task) for task in mixture.tasks}
task = seqio.TaskRegistry.get("super_glue_rte_v102_examples")
cut = task.get_dataset({"inputs": 8, "targets": 2}, "validation", shuffle=False)
out["cut"] = next(cut.as_numpy_iterator())["inputs"].tolist()
values = [task.postprocess_fn(text, example={"example_json": b"{}"}, is_target=False)
          for text in ("not_entailment", "x")]
out["values"] = values
out["metrics"] = task.metric_fns[0]([1, 0], values)
seqio.MixtureRegistry.add("users_own", [("super_glue_rte_v102", 1)])
seqio.MixtureRegistry.add("zero", [("super_glue_rte_v102", 1), ("super_glue_axb_v102", 0.0)])
out["seqio_names_then"] = list(seqio_names())
out["evaluated"] = [task.name for task in get_mixture("zero").evaluated]
print(json.dumps(out))
"""
NAMES = (
    "super_glue_rte_v102",
    "taskless_super_glue_cb_v102",
    "task_index_super_glue_copa_v102_examples",
    "super_glue_wsc_v102_simple_eval_examples",
)


@pytest.fixture(scope="module")
def seen(shared):
    environment = {
        **os.environ,
        "PROMPT_TUNING_JAX_DATA_DIR": str(shared / "superglue"),
        "PROMPT_TUNING_JAX_VOCABULARY": str(shared / "fixtures" / "t5_vocab.model"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, *NAMES], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_ours(seen, shared, tmp_path, name):
    dump(
        name,
        str(tmp_path / "d.jsonl"),
        split="validation",
        vocabulary=str(shared / "fixtures" / "t5_vocab.model"),
        data_dir=str(shared / "superglue"),
    )
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert seen["ids"][name] == [[line["inputs_ids"], line["targets_ids"]] for line in lines]
    assert len(lines) > 50


@pytest.mark.slow
def test_task_index_is_the_recorded_token(seen, cases):
    offset = cases["task_index"]["super_glue"]["copa"]
    rows = seen["ids"]["task_index_super_glue_copa_v102_examples"]
    assert {inputs[0] for inputs, _ in rows} == {32100 - (offset + 1)}


@pytest.mark.slow
def test_names_rates_cut_and_metrics(seen, registry):
    known = {*seen["tasks"], *seen["mixtures"]}
    assert {"super_glue_rte_v102", "taskless_glue_sst2_v002_examples"} <= set(seen["tasks"])
    assert {"super_glue_v102_proportional", "squad_to_mrqa_examples"} <= set(seen["mixtures"])
    assert len(known) > 350
    name = "task_index_super_glue_with_dpr_v102_examples_proportional"
    recorded = registry["mixtures"][name]["tasks"]
    assert seen["rates"] == {task.replace("_examples", ""): rate for task, rate in recorded}
    assert len(seen["cut"]) == 8 and seen["cut"][-1] == 1
    assert seen["values"] == [1, -1]
    assert seen["metrics"] == {"accuracy": 50.0}


@pytest.mark.slow
def test_ours_are_not_taken_for_seqios(seen):
    assert seen["seqio_names"] == []
    assert seen["seqio_names_then"] == ["users_own", "zero"]
    assert seen["evaluated"] == ["super_glue_axb_v102"]
