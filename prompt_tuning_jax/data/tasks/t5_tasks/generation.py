"""Articles and their summaries as text."""

from prompt_tuning_jax.data.tasks.task import Example, Row


def summarize(row: Row, *, article: str, summary: str) -> list[Example]:
    """``article`` and ``summary`` name the row's fields -> "summarize: ..." and the summary."""
    return [{"inputs": f"summarize: {row[article]}", "targets": row[summary]}]
