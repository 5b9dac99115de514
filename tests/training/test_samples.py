from types import SimpleNamespace
from typing import Any

from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.inference.predictor import Predictions
from prompt_tuning_jax.training.samples import sample_texts

TASK = Task(
    name="numbers",
    source=Source(splits=(), rows=lambda s, d: (), fingerprint=lambda s, d: ""),
    metrics=(get_metric("accuracy"),),
)


def samples(answers: list[str], inputs: str = "number {}") -> dict[str, str]:
    examples = [{"inputs": inputs.format(i), "targets": str(i)} for i in range(len(answers))]
    spelled = {"TEN": "10"}  # as if the vocabulary wrote 10 so
    evaluation: Any = {
        "numbers": SimpleNamespace(
            texts=examples, task=TASK, as_written=lambda texts: [spelled.get(t, t) for t in texts]
        )
    }
    predictions = Predictions(texts_EN=[answers], log_probs_EN=[[{} for _ in answers]])
    return sample_texts(evaluation, {"numbers": predictions})


def test_samples_spread_over_the_examples_and_wrong_ones_apart() -> None:
    answers = [str(i) for i in range(80)]
    answers[13] = "x"
    answers[10] = "TEN"
    found = samples(answers)
    blocks = found["numbers samples"].split("\n\n---\n\n")
    assert len(blocks) == 8
    assert blocks[1] == "    input: number 10\n    target: 10\n    prediction: 10"
    assert found["numbers wrong samples"] == (
        "    input: number 13\n    target: 13\n    prediction: x"
    )
    assert found == samples(answers)  # the same at each evaluation


def test_few_and_long_and_broken_texts() -> None:
    found = samples(["0"], inputs="a\n# title\n" + "w" * 3000)
    assert list(found) == ["numbers samples"]
    assert found["numbers samples"].startswith("    input: a # title www")
    assert len(found["numbers samples"]) < 2100
