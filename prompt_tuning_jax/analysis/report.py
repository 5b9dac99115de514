"""Writes an analysis of prompts as one HTML page, with its figures also as PNG files, and JSON."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from prompt_tuning_jax.analysis import figures
from prompt_tuning_jax.analysis.prompts import KEPT, Analysis, PromptAnalysis, Start
from prompt_tuning_jax.analysis.words import NearestWords
from prompt_tuning_jax.checkpoints.run_folder import write_json
from prompt_tuning_jax.storage import atomic_write

_PAGE, _JSON = "report.html", "analysis.json"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b2b; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
th, td { padding: 0.25em 0.7em; border-bottom: 1px solid #e4e4e4; text-align: left;
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.note, caption { color: #6a6a6a; text-align: left; }
.label { background: #fbe3d8; border-radius: 3px; padding: 0 0.3em; }
.cluster { color: #2f6db3; }
"""
_EXPLANATION = """
<p>Words are the vocabulary entries whose embeddings are nearest to a position of the prompt.
A position's words are a <b>cluster</b> if they are more similar to each other than the nearest
words of 95 % of random directions: <b>lexical</b> if most are forms of one word, otherwise
<b>related</b>. A position that still is near the word that it started from has that word's
neighbors, so clusters tell something about training only where the start is not a word.
<b>Kept</b> means that what a position started from is still among its 5 nearest
words. The <b>effective rank</b> is the number of directions that the positions use. A position is
<b>left out</b> by shortening the prompt; the loss is the cross entropy of the right label among
all labels.</p>
"""


@dataclass(frozen=True, kw_only=True)
class _Figure:
    name: str
    text: str
    png: bytes


def write_report(analysis: Analysis, folder: Path) -> tuple[Path, ...]:
    """Writes ``report.html``, ``analysis.json`` and the figures; returns their paths."""
    shared = _shared_figures(analysis)
    of_prompt = {prompt.path: _figures_of(prompt) for prompt in analysis.prompts}
    written = []
    for figure in (*shared, *(one for each in of_prompt.values() for one in each)):
        path = folder / f"{figure.name}.png"
        with atomic_write(path) as aside:
            aside.write_bytes(figure.png)
        written.append(path)
    page = "\n".join(_page(analysis, shared, of_prompt))
    with atomic_write(folder / _PAGE) as aside:
        aside.write_text(page, encoding="utf-8")
    write_json(folder / _JSON, as_json(analysis))
    return (folder / _PAGE, folder / _JSON, *written)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Returns all numbers of an analysis as JSON values."""
    return {
        "model": analysis.model,
        "prompts": [_prompt_as_json(prompt) for prompt in analysis.prompts],
        "similarities": {by: m.tolist() for by, m in analysis.similarities.items()},
        "notes": list(analysis.notes),
    }


def summary_rows(analysis: Analysis) -> list[list[str]]:
    """Returns a table with a row per prompt, the headings first."""
    rows = [
        [
            *("prompt", "positions", "clusters", "labels kept", "words kept", "with a label"),
            *("mean |cosine|", "effective rank", "mean norm", "most important position"),
        ]
    ]
    for prompt in analysis.prompts:
        clusters = [kind for kind in prompt.cosine.clusters if kind]
        mean = prompt.redundancy.mean
        rows.append(
            [
                prompt.name,
                str(prompt.length),
                f"{len(clusters)} ({clusters.count('lexical')} lexical)",
                _kept(prompt.start, labels=True),
                _kept(prompt.start, labels=False),
                str(prompt.with_labels) if prompt.stored.metadata.labels else "-",
                "-" if mean is None else f"{mean:.2f}",
                f"{prompt.redundancy.effective_rank:.1f}",
                f"{prompt.norms_P.mean():.3g}",
                _most_important(prompt),
            ]
        )
    return rows


def _kept(start: Start | None, *, labels: bool) -> str:
    if start is None:
        return "-"
    kept, number = start.kept(labels=labels)
    return f"{kept} of {number}" if number else "-"


def _most_important(prompt: PromptAnalysis) -> str:
    effects = prompt.effects
    if effects is None:
        return "-"
    values = effects.changed_P if effects.loss_P is None else effects.loss_P
    position = int(values.argmax())
    return f"{position} ({effects.changed_P[position]:.1f} % of answers change)"


def _shared_figures(analysis: Analysis) -> list[_Figure]:
    drawn = []
    if len(analysis.prompts) > 1:
        drawn.append(
            _Figure(
                name="similarity",
                text="Similarity of all prompts",
                png=figures.similarity_figure(analysis),
            )
        )
    if png := figures.norms_figure(analysis.prompts):
        drawn.append(_Figure(name="norms", text="Norms through training", png=png))
    return drawn


def _figures_of(prompt: PromptAnalysis) -> list[_Figure]:
    name = re.sub(r"[^\w.-]+", "_", prompt.name)
    drawn = [
        _Figure(
            name=f"{name}_positions",
            text=f"Effects and norms of the positions of {prompt.name}",
            png=figures.positions_figure(prompt),
        )
    ]
    if prompt.length > 1:
        drawn.append(
            _Figure(
                name=f"{name}_cosines",
                text=f"Cosines between the positions of {prompt.name}",
                png=figures.redundancy_figure(prompt),
            )
        )
    return drawn


def _page(
    analysis: Analysis, shared: Sequence[_Figure], of_prompt: Mapping[str, Sequence[_Figure]]
) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>Prompts</title>'
    yield f"<style>{_STYLE}</style></head><body>"
    number = len(analysis.prompts)
    yield f"<h1>{number} prompt{'s' * (number != 1)} for {escape(analysis.model)}</h1>"
    yield _EXPLANATION
    yield _table(summary_rows(analysis))
    for note in analysis.notes:
        yield f'<p class="note">{escape(note)}</p>'
    yield from map(_image, shared)
    for prompt in analysis.prompts:
        yield f"<h2>{escape(prompt.name)}</h2>"
        yield f'<p class="note">{escape(_about(prompt))}</p>'
        yield from map(_image, of_prompt[prompt.path])
        yield _words_table(prompt)
    yield "</body></html>"


def _about(prompt: PromptAnalysis) -> str:
    known = prompt.stored.metadata
    parts = [f"task {known.task}" if known.task else "", f"init {known.init}" if known.init else ""]
    parts.append("" if known.seed is None else f"seed {known.seed}")
    if known.score is not None:
        parts.append(f"best {known.metric} {known.score:.2f} at step {known.steps}")
    effects = prompt.effects
    if effects is not None:
        parts.append(
            f"whole prompt: {effects.metric} {effects.score:.1f} on {effects.examples:,} examples"
        )
    copies = prompt.redundancy.copies
    parts.append(f"{copies} positions have a cosine above 0.9 to an earlier one")
    return "; ".join(part for part in parts if part)


def _words_table(prompt: PromptAnalysis) -> str:
    start, effects = prompt.start, prompt.effects
    labels = {label.strip().casefold() for label in prompt.stored.metadata.labels}
    heads = ["", "nearest by cosine", "cluster", "nearest by Euclidean distance"]
    heads += ["started from", "rank now"] if start is not None else []
    heads += ["norm"]
    heads += ["% changed without it"] if effects is not None else []
    lines = ['<div class="scroll"><table><tr>']
    lines += [f"<th>{escape(head)}</th>" for head in heads]
    lines.append("</tr>")
    for position in range(prompt.length):
        cells = [str(position), _words(prompt.cosine, position, labels)]
        cells.append(f'<span class="cluster">{prompt.cosine.clusters[position]}</span>')
        cells.append(_words(prompt.euclidean, position, labels))
        if start is not None:
            text = start.texts[position]
            shown = f'<span class="label">{escape(text)}</span>'
            cells.append(shown if start.are_labels[position] else escape(text))
            cells.append(str(start.ranks[position]) if text else "")
        cells.append(f"{prompt.norms_P[position]:.3g}")
        if effects is not None:
            cells.append(f"{effects.changed_P[position]:.1f}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    lines.append("</table></div>")
    return "".join(lines)


def _words(nearest: NearestWords, position: int, labels: set[str]) -> str:
    shown = []
    for word, value in nearest.words[position]:
        text = f"{escape(word)}&nbsp;<small>{value:.2f}</small>"
        is_label = word.strip().casefold() in labels
        shown.append(f'<span class="label">{text}</span>' if is_label else text)
    return ", ".join(shown)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _image(figure: _Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    return f'<p><img alt="{escape(figure.text)}" src="data:image/png;base64,{data}"></p>'


def _prompt_as_json(prompt: PromptAnalysis) -> dict[str, Any]:
    start, effects, known = prompt.start, prompt.effects, prompt.stored.metadata
    return {
        "name": prompt.name,
        "path": prompt.path,
        "task": known.task,
        "init": known.init,
        "seed": known.seed,
        "labels": list(known.labels),
        "score": known.score,
        "positions_with_a_label": prompt.with_labels,
        "mean_absolute_cosine": prompt.redundancy.mean,
        "effective_rank": prompt.redundancy.effective_rank,
        "copies": prompt.redundancy.copies,
        "norms_through_training": [list(pair) for pair in prompt.norms],
        "kept_in_top": KEPT,
        "labels_kept": None if start is None else list(start.kept(labels=True)),
        "words_kept": None if start is None else list(start.kept(labels=False)),
        "effects": None
        if effects is None
        else {"examples": effects.examples, "metric": effects.metric, "score": effects.score},
        "positions": [_position_as_json(prompt, number) for number in range(prompt.length)],
    }


def _position_as_json(prompt: PromptAnalysis, position: int) -> dict[str, Any]:
    start, effects = prompt.start, prompt.effects
    fields: dict[str, Any] = {
        "cosine": [list(pair) for pair in prompt.cosine.words[position]],
        "euclidean": [list(pair) for pair in prompt.euclidean.words[position]],
        "cluster": prompt.cosine.clusters[position],
        "tightness": float(prompt.cosine.tightness_P[position]),
        "norm": float(prompt.norms_P[position]),
    }
    if start is not None:
        fields["start"] = {
            "text": start.texts[position],
            "is_label": start.are_labels[position],
            "rank": start.ranks[position],
            "norm": float(start.norms_P[position]),
            "cosine": float(start.moved_P[position]),
        }
    if effects is not None:
        fields["left_out"] = {
            "score": float(effects.scores_P[position]),
            "changed": float(effects.changed_P[position]),
            "loss_rise": None if effects.loss_P is None else float(effects.loss_P[position]),
        }
    return fields
