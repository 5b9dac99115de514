"""The picture shows every member, the mean, the best point and the baselines."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.training.curves import plot_curves
from prompt_tuning_jax.training.logging import RunLog


def run(workdir: Path, losses_ER: np.ndarray, evals_ER: np.ndarray, metric: str = "f1") -> Path:
    """A finished run: a train line every 10 steps, an evaluation every 20."""
    with RunLog(workdir, total_steps=1000, num_members=len(losses_ER), quiet=True) as log:
        for i, losses_E in enumerate(losses_ER.T, start=1):
            log.log_train(
                10 * i,
                losses_E,
                accuracies_E=losses_E,
                gradient_norms_E=losses_E,
                learning_rate=1,
                examples_per_second=1,
            )
        for i, values_E in enumerate(evals_ER.T, start=1):
            log.log_eval(20 * i, [{metric: value, "other": 0.5} for value in values_E])
    return workdir / "metrics.jsonl"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look at what it holds."""
    saved: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def curves(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_members_mean_best_and_baseline_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    losses_ER = np.array([[3.0, 2.0, 1.0], [5.0, 4.0, 1.5]])
    evals_ER = np.array([[60.0, 90.0, 80.0], [50.0, 55.0, 85.0]])
    metrics = run(tmp_path, losses_ER, evals_ER)
    png = tmp_path / "curves.png"
    plot_curves(metrics, png, metrics=["f1"], baselines={"majority class": 51.5})

    assert png.read_bytes().startswith(b"\x89PNG")
    loss, f1 = figures[0].axes
    steps = [10, 20, 30]
    assert curves(loss) == [
        (steps, [3.0, 2.0, 1.0]),
        (steps, [5.0, 4.0, 1.5]),
        (steps, [4.0, 3.0, 1.25]),
    ]
    steps = [20, 40, 60]
    assert curves(f1)[:3] == [
        (steps, [60.0, 90.0, 80.0]),
        (steps, [50.0, 55.0, 85.0]),
        (steps, [55.0, 72.5, 82.5]),
    ]
    assert curves(f1)[3] == ([40], [90.0])
    assert curves(f1)[4][1] == [51.5, 51.5]
    assert f1.texts[0].get_text() == "majority class 51.5"
    labels = [text.get_text() for text in f1.get_legend().get_texts()]
    assert labels == ["mean of 2", "best: 90 at 40 (seed_0)"]
    (members,) = figures[0].legends
    assert [text.get_text() for text in members.get_texts()] == ["seed_0", "seed_1"]
    drawn = [line.get_color() for line in members.get_lines()]
    assert drawn == [line.get_color() for line in f1.get_lines()[:2]] and drawn[0] != drawn[1]


@pytest.mark.parametrize("metric", ["loss", "perplexity", "invalid_share"])
def test_best_is_lowest_where_lower_is_better(
    tmp_path: Path, figures: list[Figure], metric: str
) -> None:
    evals_ER = np.array([[3.0, np.nan, 2.0]])
    metrics = run(tmp_path, evals_ER, evals_ER, metric)
    plot_curves(metrics, tmp_path / "curves.png")
    assert ([60], [2.0]) in curves(figures[0].axes[1])


def test_a_member_that_diverged_ends_the_mean(tmp_path: Path, figures: list[Figure]) -> None:
    losses_ER = np.array([[3.0, np.nan], [2.0, 1.0]])
    metrics = run(tmp_path, losses_ER, np.zeros((2, 0)))
    plot_curves(metrics, tmp_path / "curves.png")
    (loss,) = figures[0].axes  # no evaluation, no panel
    np.testing.assert_array_equal(curves(loss)[-1][1], [2.5, np.nan])
    assert curves(loss)[1][1] == [2.0, 1.0]


def test_a_loss_that_falls_far_is_drawn_on_a_log_scale(
    tmp_path: Path, figures: list[Figure]
) -> None:
    for i, last in enumerate((1.0, 0.01)):
        metrics = run(tmp_path / str(i), np.array([[9.0, last]]), np.zeros((1, 0)))
        plot_curves(metrics, tmp_path / "curves.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "log"]


@pytest.mark.parametrize("losses", [[], [np.nan, np.nan]])
def test_nothing_to_draw_is_said(tmp_path: Path, figures: list[Figure], losses: list) -> None:
    metrics = run(tmp_path, np.array([losses]), np.zeros((1, 0)))
    plot_curves(metrics, tmp_path / "curves.png")
    assert figures[0].axes[0].texts[0].get_text() == "nothing was logged"


def test_a_picture_is_replaced_whole_and_errors_are_named(tmp_path: Path) -> None:
    metrics = run(tmp_path, np.array([[2.0, 1.0]]), np.array([[50.0]]))
    png = tmp_path / "curves.png"
    png.write_bytes(b"old")
    plot_curves(metrics, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot_curves(metrics / "nowhere", png)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png"):
        plot_curves(metrics, tmp_path / "folder.png")
