"""The training loop: steps, evaluations, checkpoints, and resuming after an interruption."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.run_folder import Best, bests_from_json, bests_to_json
from prompt_tuning_jax.checkpoints.train_state import BEST, LAST
from prompt_tuning_jax.data.tasks.metrics import Direction, is_better
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.distributed.sharding import on_host
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import PROMPT
from prompt_tuning_jax.training.logging import RunLog
from prompt_tuning_jax.training.step import StepCost, StepMetrics, TrainState, TrainStep, step_cost
from prompt_tuning_jax.typing import Batch, FlatParams, HostArray

Extra = TypeVar("Extra")


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """The last completed step, the reason why the loop ended, and the best evaluations.

    ``stopped_by`` is the number of a signal, or 0.  ``stopped_early`` is true if ``patience`` ended
    the run before its last step.
    """

    step: int
    finished: bool
    stopped_by: int
    stopped_early: bool
    best: tuple[Best | None, ...]
    best_tuned: Mapping[str, HostArray]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop of one run; ``run`` runs it.

    Attributes:
      batches: ``(start, stop)`` -> the batches of steps ``start`` to ``stop - 1``.
      evaluate: the trainable arrays -> one mapping of metrics per member.
      on_best: a function called with the members that improved, the best arrays of all members,
        and the evaluations of those that improved.
      on_start: a function called once it is known that the run in ``workdir`` can resume.
      fingerprint: the fingerprint of the frozen model.
      data: a digest of each set of examples, by the name that messages give it.
      best_by: the metric that decides which evaluation is best; NaN is worse than any number.
      direction: whether the largest or the smallest value is best.
      patience: the run ends after this many evaluations in a row without an improvement of any
        member; 0 means no limit.
      padding: ``(start, stop)`` -> the percentage of padding in the inputs of those steps.
      samples: samples of the last evaluation's predictions: title -> Markdown.
    """

    train_step: TrainStep
    frozen: FlatParams
    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[FlatParams], list[dict[str, float]]]
    on_best: Callable[[list[int], Mapping[str, HostArray], list[Best]], None]
    workdir: Path
    fingerprint: str
    data: Mapping[str, str]
    names: tuple[str, ...]
    learning_rates: Callable[[int], HostArray]
    best_by: str
    direction: Direction
    steps: int
    eval_every: int
    save_every: int
    log_every: int
    batch_size: int
    patience: int = 0
    on_start: Callable[[], None] = lambda: None
    padding: Callable[[int, int], float | None] = lambda start, stop: None
    samples: Callable[[], Mapping[str, str]] = dict
    quiet: bool = False
    _signals_received: list[int] = field(default_factory=list)

    def run(self, state: TrainState) -> LoopResult:
        """Trains from the last checkpoint, or from ``state`` if there is none.

        On SIGTERM or SIGINT, it saves and returns.  Raises UserError, which names the step, if a
        loss is not finite; that step is not saved.  With several processes, all must call it: a
        signal to one stops all after the same step, and only process 0 logs.
        """
        start, state, pending, stale, evaluated = self._restore_last(state)
        best_tree, best, improved_at, reported = self._restore_best(state, evaluated=evaluated)
        self.on_start()
        if start >= self.steps or self._out_of_patience(stale):
            return self._result(start, best, best_tree, state, stale=stale)
        step = start
        if start and not self.quiet:
            print(f"resuming from step {start:,}", flush=True)
        elif any(best) and not self.quiet:
            print(f"no state to resume from in {self.workdir / LAST}: starting again")
        log = self._open_log(start)
        signal_to_stop_by = processes.stop_agreement(self._signals_received, start=start)
        stopped_by = 0
        since = time.monotonic()
        with log or nullcontext(), self._signals():
            if not reported:
                self._report_best(best, [e for e, each in enumerate(best) if each], best_tree)
            costs: dict[tuple[int, ...], StepCost] = {}
            done: list[StepCost] = []
            for batch in self.batches(start, self.steps):
                shape = batch["inputs"].shape
                if shape not in costs:
                    began = time.monotonic()
                    since = since if costs else began
                    costs[shape] = step_cost(self.train_step, state, self.frozen, batch)
                    since += time.monotonic() - began
                done.append(costs[shape])
                state, metrics = self.train_step(state, self.frozen, batch)
                step += 1
                if log:
                    log.require_folder()
                pending.append((step, metrics))
                stopped_by, last = signal_to_stop_by(step), step == self.steps
                stopping = bool(stopped_by)
                evaluating = last or step % self.eval_every == 0
                saving = last or stopping or step % self.save_every == 0
                if evaluating or saving or step % self.log_every == 0:
                    self._require_finite(pending)
                    elapsed = max(time.monotonic() - since, 1e-9)
                    if step % self.log_every == 0 or last:
                        if log:
                            self._log_train(log, step, pending, done, elapsed)
                        since, pending, done = time.monotonic(), [], []
                if evaluating:
                    began = time.monotonic()
                    scores = self.evaluate(state.trainable)
                    if log:
                        log.log_eval(step, scores, prompt_norms_E=_prompt_norms(state.trainable))
                        log.log_samples(step, self.samples())
                    best_tree = self._keep_best(step, state, scores, best, best_tree, improved_at)
                    stale = 0 if step in improved_at else stale + 1
                    since += time.monotonic() - began
                out_of_patience = evaluating and self._out_of_patience(stale)
                if saving or out_of_patience:
                    began = time.monotonic()
                    if log:
                        log.require_folder(now=True)
                    extra = self._extra(
                        pending=_as_json(pending),
                        stale=stale,
                        evaluated=any(each and each.step <= step for each in best),
                    )
                    train_state.save(self.workdir / LAST, step, state, extra)
                    since += time.monotonic() - began
                if stopping or out_of_patience:
                    break
        return self._result(step, best, best_tree, state, stale=stale, stopped_by=stopped_by)

    def _out_of_patience(self, stale: int) -> bool:
        """Returns whether ``stale`` evaluations without an improvement end the run."""
        return 0 < self.patience <= stale

    def _open_log(self, start: int) -> RunLog | None:
        if not processes.is_primary():
            return None
        return RunLog(
            self.workdir,
            total_steps=self.steps,
            num_members=len(self.names),
            quiet=self.quiet,
            start_step=start,
            names=self.names,
            metric=self.best_by,
        )

    def _restore_last(
        self, state: TrainState
    ) -> tuple[int, TrainState, list[tuple[int, StepMetrics]], int, bool]:
        """Restores the last checkpoint: ``(step, state, pending, stale, evaluated)``.

        ``pending`` are the steps that no log line has averaged yet.  ``stale`` is the number of
        evaluations since a member last improved.  ``evaluated`` is true after any evaluation.
        """
        folder = self.workdir / LAST
        latest = train_state.restore_latest(
            folder, state, advice=f"remove {folder} to train again from the start"
        )
        if latest is None:
            return 0, state, [], 0, False
        step, state, extra = latest
        self._require_same(extra)
        self._remove_damaged(folder, step)
        return (
            step,
            state,
            *_read_extra(
                lambda: (
                    _from_json(extra["pending"]),
                    int(extra["stale"]),
                    bool(extra["evaluated"]),
                ),
                of=folder,
            ),
        )

    def _restore_best(
        self, state: TrainState, *, evaluated: bool
    ) -> tuple[Any, list[Best | None], set[int], bool]:
        """Restores each member's best state: ``(state, best, improved_at, reported)``.

        The state is on the host; without a checkpoint, it is the current one.  ``improved_at`` are
        the steps of improvements.  ``reported`` is false if ``on_best`` must be called again, since
        a kill may have come between saving the best state and that call.  It is true if the newest
        checkpoint is damaged: ``on_best`` then already received better members than the restored.
        """
        like = on_host(state)
        folder = self.workdir / BEST
        remedy = f"remove {folder.parent} to train again from the start, or use another workdir"
        latest = train_state.restore_latest(folder, like, advice=remedy)
        if latest is None:
            if evaluated:
                raise UserError(
                    f"{folder} is gone although the run has been evaluated, and with it the best "
                    f"members; put it back, or {remedy}"
                )
            return like, [None] * len(self.names), set(), False
        step, tree, extra = latest
        reported = train_state.latest_step(folder) > step
        self._require_same(extra)
        self._remove_damaged(folder, step)
        best, improved_at = _read_extra(
            lambda: (bests_from_json(extra["best"]), {int(x) for x in extra["improved_at"]}),
            of=folder,
        )
        if len(best) != len(self.names):
            raise UserError(f"{folder} has the best of {len(best)} members, not {len(self.names)}")
        return tree, best, improved_at, reported

    def _require_same(self, extra: Mapping[str, Any]) -> None:
        """Raises UserError unless the frozen model and the data are those of the checkpoint."""
        if extra.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.workdir} holds a run on another frozen model (fingerprint "
                f"{extra.get('fingerprint')}, this one has {self.fingerprint}); use another workdir"
            )
        data = extra.get("data")
        known = data if isinstance(data, Mapping) else {}
        changed = [name for name, digest in self.data.items() if known.get(name) != digest]
        if changed:
            raise UserError(
                f"{self.workdir} holds a run on other {' and '.join(changed)}: it has changed "
                "since; restore it, or use another workdir"
            )

    def _remove_damaged(self, folder: Path, step: int) -> None:
        """Removes damaged checkpoints, which would keep the run from saving their steps again."""
        processes.primary_first(
            lambda: train_state.remove_damaged(folder, restored=step),
            f"removal of what is damaged in {folder}",
        )

    def _require_finite(self, pending: list[tuple[int, StepMetrics]]) -> None:
        for step, metrics in pending:
            for name, value in zip(self.names, np.asarray(metrics.loss_E), strict=True):
                if not np.isfinite(value):
                    raise UserError(
                        f"the loss of {name} is {value} at step {step}: lower "
                        "optimizer.learning_rate, or set optimizer.gradient_clip_norm; the last "
                        f"checkpoint before it is kept in {self.workdir}"
                    )
        if pending and not np.isfinite(np.asarray(pending[-1][1].update_norm_E)).all():
            bad = int(np.argmin(np.isfinite(np.asarray(pending[-1][1].update_norm_E))))
            raise UserError(
                f"the update of {self.names[bad]} is not finite at step {pending[-1][0]}: lower "
                "optimizer.learning_rate; the last checkpoint before it is kept in "
                f"{self.workdir}"
            )

    def _log_train(
        self,
        log: RunLog,
        step: int,
        pending: list[tuple[int, StepMetrics]],
        done: list[StepCost],
        seconds: float,
    ) -> None:
        """Logs the steps since the last line; ``done`` has costs of those run since resuming."""
        recent = [metrics for _, metrics in pending]
        log.log_train(
            step,
            np.mean([np.asarray(m.loss_E) for m in recent], axis=0),
            accuracies_E=np.mean([np.asarray(m.accuracy_E) for m in recent], axis=0),
            gradient_norms_E=recent[-1].gradient_norm_E,
            learning_rate=self.learning_rates(step - 1),
            examples_per_second=len(done) / seconds * self.batch_size * len(self.names),
            tokens_per_second=sum(cost.tokens for cost in done) / seconds or None,
            flops_per_second=sum(cost.flops for cost in done) / seconds or None,
            padding=self.padding(step - len(pending), step),
        )

    def _keep_best(
        self,
        step: int,
        state: TrainState,
        scores: list[dict[str, float]],
        best: list[Best | None],
        best_tree: Any,
        improved_at: set[int],
    ) -> Any:
        """Replaces the best state of the members that have improved, saves it and returns it."""
        if any(each is not None and each.step >= step for each in best):
            return best_tree  # evaluated before an interruption: rounding may differ
        improved = [e for e, each in enumerate(scores) if self._is_better(each, best[e])]
        if not improved:
            return best_tree
        if any(math.isfinite(scores[e][self.best_by]) for e in improved):
            improved_at.add(step)
        for e in improved:
            best[e] = Best(step=step, metrics=scores[e])
        chosen_E = np.isin(np.arange(len(scores)), improved)

        def choose(new: HostArray, old: HostArray) -> HostArray:
            # Every array except the step has a leading axis E.
            return new if new.ndim == 0 else np.where(_expand_dims_like(chosen_E, new), new, old)

        best_tree = jax.tree.map(choose, on_host(state), best_tree)
        extra = self._extra(best=bests_to_json(best), improved_at=sorted(improved_at))
        train_state.save(self.workdir / BEST, step, best_tree, extra)
        self._report_best(best, improved, best_tree)
        return best_tree

    def _report_best(self, best: list[Best | None], members: list[int], best_tree: Any) -> None:
        bests = [each for each in (best[e] for e in members) if each is not None]
        if bests:
            self.on_best(members, best_tree.trainable, bests)

    def _is_better(self, scores: Mapping[str, float], best: Best | None) -> bool:
        if best is None:
            return True
        new, old = scores[self.best_by], best.metrics[self.best_by]
        # If neither has a score, keep the newer state, which has trained longer.
        neither = not math.isfinite(new) and not math.isfinite(old)
        return neither or is_better(new, old, self.direction)

    def _extra(self, **more: Any) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "data": dict(self.data), **more}

    def _result(
        self,
        step: int,
        best: list[Best | None],
        best_tree: Any,
        state: TrainState,
        *,
        stale: int,
        stopped_by: int = 0,
    ) -> LoopResult:
        trainable = best_tree.trainable if any(best) else on_host(state).trainable
        return LoopResult(
            step=step,
            finished=step >= self.steps or self._out_of_patience(stale),
            stopped_by=stopped_by,
            stopped_early=step < self.steps and self._out_of_patience(stale),
            best=tuple(best),
            best_tuned=trainable,
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGINT save and stop the loop; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._signals_received and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signals_received.append(number)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _prompt_norms(trainable: FlatParams) -> HostArray | None:
    """Returns the mean norm of the vectors of each member's prompt, if the method trains prompts.

    Returns None for arrays of which this process does not have all parts.
    """
    prompt_EPD = trainable.get(PROMPT)
    if not isinstance(prompt_EPD, jax.Array) or not (
        prompt_EPD.is_fully_replicated or prompt_EPD.is_fully_addressable
    ):
        return None
    norms_E: HostArray = np.linalg.norm(np.asarray(prompt_EPD), axis=-1).mean(axis=-1)
    return norms_E


def _read_extra(read: Callable[[], Extra], *, of: Path) -> Extra:
    """Returns ``read()``; raises UserError if a checkpoint's metadata are not those of a run."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{of} was not written by a run like this one: its metadata lacks what a run keeps "
            f"({type(error).__name__}: {error}); use another workdir"
        ) from None


def _as_json(pending: list[tuple[int, StepMetrics]]) -> list[Any]:
    return [
        [n, np.asarray(m.loss_E).tolist(), np.asarray(m.accuracy_E).tolist()] for n, m in pending
    ]


def _from_json(listed: list[Any]) -> list[tuple[int, StepMetrics]]:
    """Restores the metrics for log lines; the norms are zero, since they were already checked."""
    pending = []
    for step, losses, accuracies in listed:
        loss_E, accuracy_E = (jnp.asarray(one, jnp.float32) for one in (losses, accuracies))
        none_E = jnp.zeros_like(loss_E)
        metrics = StepMetrics(
            loss_E=loss_E, accuracy_E=accuracy_E, gradient_norm_E=none_E, update_norm_E=none_E
        )
        pending.append((step, metrics))
    return pending


def _expand_dims_like(chosen_E: HostArray, array: HostArray) -> HostArray:
    return chosen_E.reshape(-1, *[1] * (array.ndim - 1))
