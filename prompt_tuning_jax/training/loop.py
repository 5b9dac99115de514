"""The training loop: steps, evaluations, checkpoints, and going on after any interruption."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import distributed
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.train_state import BEST, LAST
from prompt_tuning_jax.division import UNDIVIDED, Division
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.sharding import on_host
from prompt_tuning_jax.training.logging import RunLog
from prompt_tuning_jax.training.step import (
    Batch,
    StepCost,
    StepMetrics,
    TrainState,
    TrainStep,
    step_cost,
)
from prompt_tuning_jax.typing import FlatParams, HostArray


@dataclass(frozen=True, kw_only=True)
class Best:
    """A member's best evaluation so far: its step, and all its metrics."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How far the run came (stopped by the signal with that number, or 0), and the bests."""

    step: int
    finished: bool
    stopped_by: int
    best: tuple[Best | None, ...]
    best_tuned: Mapping[str, HostArray]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that a run needs, put together; ``run`` does it.

    ``batches(start, stop)`` yields those of steps start to stop - 1; ``evaluate(tuned)`` gives one
    mapping of metrics per member, of which ``best_by`` decides (the larger the better, but for a
    loss).  ``padding(start, stop)`` is the percent of padding in the inputs of those steps.
    ``on_best(members, tuned, bests)`` is told of members that have improved.
    """

    train_step: TrainStep
    frozen: FlatParams
    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[FlatParams], list[dict[str, float]]]
    on_best: Callable[[list[int], Mapping[str, HostArray], list[Best]], None]
    workdir: Path
    fingerprint: str
    names: tuple[str, ...]
    learning_rates: Callable[[int], HostArray]
    best_by: str
    steps: int
    eval_every: int
    save_every: int
    log_every: int
    batch_size: int
    division: Division = UNDIVIDED
    padding: Callable[[int, int], float] | None = None
    quiet: bool = False
    _signals_received: list[int] = field(default_factory=list)

    def run(self, state: TrainState) -> LoopResult:
        """Trains from ``state``, or from the last checkpoint where there is one.

        SIGTERM and SIGINT save and return.  Raises UserError when a loss is not finite, naming the
        step; nothing of that step is saved.  Of several processes all must call: a signal to one
        stops all after the same step, and the first one alone logs.
        """
        start, state, pending = self._restore_last(state)
        best_tree, best = self._restore_best(state)
        if start >= self.steps:
            return self._result(start, best, best_tree, state)
        step = start
        if start and not self.quiet:
            print(f"goes on from step {start:,}", flush=True)
        log = self._open_log(start)
        signal_to_stop_by = distributed.stop_agreement(self._signals_received, start=start)
        stopped_by = 0
        since = time.monotonic()
        with log or nullcontext(), self._signals():
            # A kill may have come between saving the best state and telling of it.
            self._tell_of(best, [e for e, own in enumerate(best) if own], best_tree)
            costs: dict[tuple[int, ...], StepCost] = {}
            done: list[StepCost] = []
            for batch in self.batches(start, self.steps):
                shape = batch["encoder_input_tokens"].shape
                if shape not in costs:
                    began = time.monotonic()
                    since = since if costs else began
                    costs[shape] = step_cost(
                        self.train_step,
                        state,
                        self.frozen,
                        batch,
                        rounds=self.division.rounds(*shape),
                    )
                    since += time.monotonic() - began
                done.append(costs[shape])
                state, metrics = self.train_step(state, self.frozen, batch)
                step += 1
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
                    scores = self.evaluate(state.tuned)
                    if log:
                        log.log_eval(step, scores)
                    best_tree = self._keep_best(step, state, scores, best, best_tree)
                    since += time.monotonic() - began
                if saving:
                    began = time.monotonic()
                    extra = self._extra(pending=_as_json(pending))
                    train_state.save(self.workdir / LAST, step, state, extra, keep=1)
                    since += time.monotonic() - began
                if stopping:
                    break
        return self._result(step, best, best_tree, state, stopped_by)

    def _open_log(self, start: int) -> RunLog | None:
        if not distributed.is_primary():
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
    ) -> tuple[int, TrainState, list[tuple[int, StepMetrics]]]:
        """Step and state, and the steps before it that no log line has averaged yet."""
        found = train_state.restore_latest(self.workdir / LAST, state)
        if found is None:
            return 0, state, []
        step, state, extra = found
        self._require_same_model(extra)
        return step, state, _from_json(extra["pending"])

    def _restore_best(self, state: TrainState) -> tuple[Any, list[Best | None]]:
        """Each member's best state on the host, and the scores; nothing yet: the present state."""
        like = on_host(state)
        found = train_state.restore_latest(self.workdir / BEST, like)
        if found is None:
            return like, [None] * len(self.names)
        _, tree, extra = found
        self._require_same_model(extra)
        return tree, [Best(**best) if best else None for best in extra["best"]]

    def _require_same_model(self, extra: Mapping[str, Any]) -> None:
        if extra["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{self.workdir} holds a run on another frozen model (fingerprint "
                f"{extra['fingerprint']}, this one has {self.fingerprint}); use another workdir"
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
        """``pending`` since the last line, of which this process has ``done`` some itself."""
        recent = [metrics for _, metrics in pending]
        padding = self.padding(step - len(pending), step) if self.padding else None
        log.log_train(
            step,
            np.mean([np.asarray(m.loss_E) for m in recent], axis=0),
            accuracies_E=np.mean([np.asarray(m.accuracy_E) for m in recent], axis=0),
            learning_rate=self.learning_rates(step - 1),
            examples_per_second=len(done) / seconds * self.batch_size * len(self.names),
            tokens_per_second=sum(cost.tokens for cost in done) / seconds,
            flops_per_second=sum(cost.flops for cost in done) / seconds or None,
            padding=padding,
        )

    def _keep_best(
        self,
        step: int,
        state: TrainState,
        scores: list[dict[str, float]],
        best: list[Best | None],
        best_tree: Any,
    ) -> Any:
        """Replaces the best state of the members that have improved, and saves it."""
        if any(own is not None and own.step >= step for own in best):
            return best_tree  # judged before an interruption, whatever the last digits are now
        improved = [e for e, own in enumerate(scores) if self._is_better(own, best[e])]
        if not improved:
            return best_tree
        for e in improved:
            best[e] = Best(step=step, metrics=scores[e])
        chosen_E = np.isin(np.arange(len(scores)), improved)

        def choose(new: HostArray, old: HostArray) -> HostArray:
            # All but the step has a leading axis E.
            return new if new.ndim == 0 else np.where(_like(chosen_E, new), new, old)

        best_tree = jax.tree.map(choose, on_host(state), best_tree)
        listed = [own and {"step": own.step, "metrics": dict(own.metrics)} for own in best]
        train_state.save(self.workdir / BEST, step, best_tree, self._extra(best=listed), keep=1)
        self._tell_of(best, improved, best_tree)
        return best_tree

    def _tell_of(self, best: list[Best | None], members: list[int], best_tree: Any) -> None:
        bests = [own for own in (best[e] for e in members) if own is not None]
        if bests:
            self.on_best(members, best_tree.tuned, bests)

    def _is_better(self, scores: Mapping[str, float], best: Best | None) -> bool:
        if best is None:
            return True
        sign = -1 if self.best_by.split("/")[-1] == "loss" else 1
        return sign * scores[self.best_by] > sign * best.metrics[self.best_by]

    def _extra(self, **more: Any) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, **more}

    def _result(
        self,
        step: int,
        best: list[Best | None],
        best_tree: Any,
        state: TrainState,
        stopped_by: int = 0,
    ) -> LoopResult:
        tuned = best_tree.tuned if any(best) else on_host(state).tuned
        return LoopResult(
            step=step,
            finished=step >= self.steps,
            stopped_by=stopped_by,
            best=tuple(best),
            best_tuned=tuned,
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT interrupts at once."""
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


def _as_json(pending: list[tuple[int, StepMetrics]]) -> list[Any]:
    return [
        [n, np.asarray(m.loss_E).tolist(), np.asarray(m.accuracy_E).tolist()] for n, m in pending
    ]


def _from_json(listed: list[Any]) -> list[tuple[int, StepMetrics]]:
    """What log lines need; the norms have been looked at already."""
    pending = []
    for step, losses, accuracies in listed:
        loss_E, accuracy_E = (jnp.asarray(one, jnp.float32) for one in (losses, accuracies))
        none_E = jnp.zeros_like(loss_E)
        metrics = StepMetrics(
            loss_E=loss_E, accuracy_E=accuracy_E, gradient_norm_E=none_E, update_norm_E=none_E
        )
        pending.append((step, metrics))
    return pending


def _like(chosen_E: HostArray, array: HostArray) -> HostArray:
    return chosen_E.reshape(-1, *[1] * (array.ndim - 1))
