"""Samples of predictions as text, for TensorBoard."""

from collections.abc import Mapping, Sequence

from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.task import Example
from prompt_tuning_jax.inference.predictor import Predictions

_SAMPLES = 8
_LONGEST = 2000  # characters of a text


def sample_texts(
    evaluation: Mapping[str, TokenizedExamples], predictions: Mapping[str, Predictions]
) -> dict[str, str]:
    """Returns Markdown with predictions of the first member: title -> text.

    For each task ``samples``, evenly spread over the examples and the same at each evaluation, and
    ``wrong samples``, likewise of the examples that the task's metrics count as wrong.
    """
    texts: dict[str, str] = {}
    for name, predicted in predictions.items():
        examples, task = evaluation[name].texts, evaluation[name].task
        answers = evaluation[name].as_written(predicted.texts_EN[0])
        pairs = list(zip(examples, answers, strict=True))
        texts[f"{name} samples"] = _shown(_spread(pairs))
        wrong = [pair for pair in pairs if not task.is_correct(*pair)]
        if wrong:
            texts[f"{name} wrong samples"] = _shown(_spread(wrong))
    return texts


def _spread(pairs: Sequence[tuple[Example, str]]) -> list[tuple[Example, str]]:
    number = min(_SAMPLES, len(pairs))
    return [pairs[i * len(pairs) // number] for i in range(number)]


def _shown(pairs: Sequence[tuple[Example, str]]) -> str:
    """Returns one block for each pair, as code, so that no sign of a text is read as Markdown."""
    blocks = []
    for example, answer in pairs:
        lines = (
            ("input", example["inputs"]),
            ("target", example["targets"]),
            ("prediction", answer),
        )
        # Indented by four blanks, each line is code.
        blocks.append("\n".join(f"    {name}: {_one_line(text)}" for name, text in lines))
    return "\n\n---\n\n".join(blocks)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
