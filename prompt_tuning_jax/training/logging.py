"""The log of a run: a progress bar, metrics.jsonl and TensorBoard scalars."""

import errno
import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write, remove_leftovers
from prompt_tuning_jax.untrusted_input import json_text, read_json, require_whole

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
LOOK_SECONDS = 1.0  # between two checks that the working directory still exists
PLAIN_SECONDS = 10.0  # between two lines if stdout is not a terminal


class RunLog:
    """Writes every measurement of a run to ``workdir`` and shows the latest on stdout.

    ``start_step`` is the step that a resumed run starts from.  Later lines, left by a run that was
    killed, are removed, and a step that is already in the file is not written again.  The resulting
    file equals that of an uninterrupted run, except for speeds such as ``examples_per_second``.
    ``names`` are the names of the E members in TensorBoard (default: ``seed_0``, ...).
    ``metric`` is the evaluation metric to show (default: the first).  ``quiet`` turns off printing.
    Raises UserError if ``workdir`` cannot be written or another process is training in it.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        num_members: int,
        quiet: bool = False,
        start_step: int = 0,
        names: Sequence[str] = (),
        metric: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_members = num_members
        self._names = tuple(names) or tuple(f"seed_{i}" for i in range(num_members))
        if len(self._names) != num_members:
            raise ValueError(f"{len(self._names)} names for {num_members} members")
        self._metric = metric
        self._metric_text = ""
        self._clock = clock
        self._total_steps = total_steps
        # Step and time of the first log; the time left is measured from it, to exclude compilation.
        self._since: tuple[int, float] | None = None
        self._screen: _Bar | _Lines | None = None
        folder = Path(workdir)
        with ExitStack() as stack:
            self._folder, self._looked_at = folder, clock()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = _lock(folder, stack)
                # No other process trains here now, so leftovers belong to runs that were killed.
                remove_leftovers(folder, *(path for path in folder.iterdir() if path.is_dir()))
                self._file = _MetricsFile(folder / METRICS_FILE, last_step=start_step)
            except OSError as error:
                raise UserError(
                    f"working directory {folder} cannot be written ({error.strerror}): "
                    "choose another one with --workdir"
                ) from error
            stack.callback(self._file.close)
            self._tensorboard = _TensorBoard(folder / TENSORBOARD_FOLDER, first_step=start_step + 1)
            stack.callback(self._tensorboard.close)
            if not quiet and sys.stdout.isatty():
                self._screen = _Bar(total_steps, start_step)
                stack.callback(self._screen.close)
            elif not quiet:
                self._screen = _Lines(total_steps, clock)
            self._files = stack.pop_all()

    def log_train(
        self,
        step: int,
        losses_E: ArrayLike,
        *,
        accuracies_E: ArrayLike,
        gradient_norms_E: ArrayLike,
        learning_rate: ArrayLike,
        examples_per_second: float,
        tokens_per_second: float | None = None,
        flops_per_second: float | None = None,
        padding: float | None = None,
    ) -> None:
        """Records training metrics at ``step``.

        ``gradient_norms_E`` are those of this step, before clipping.  ``learning_rate`` is one
        number, or one per member.  Tokens count the positions of inputs and targets, including
        padding.  FLOPs are those of the step's matrix products.  ``padding`` is the percentage of
        the inputs' positions that is padding.
        """
        losses = self._members(losses_E)
        accuracies = self._members(accuracies_E)
        norms = self._members(gradient_norms_E)
        rates = np.asarray(learning_rate)
        record = {
            "kind": "train",
            "step": int(step),
            "loss": losses,
            "accuracy": accuracies,
            "gradient_norm": norms,
            "learning_rate": [_number(r) for r in rates] if rates.ndim else _number(rates[()]),
        }
        if padding is not None:
            record["padding_percent"] = round(float(padding), 2)
        speeds = {
            "examples_per_second": examples_per_second,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops_per_second,
        }
        known = {name: round(float(x), 1) for name, x in speeds.items() if x is not None}
        record |= known
        if self._file.append(record):
            scalars = {f"train/{name}": value for name, value in known.items()}
            if padding is not None:
                scalars["train/padding_percent"] = float(padding)
            shared_rates = np.broadcast_to(rates, (self._num_members,))
            for i, name in enumerate(self._names):
                scalars[f"train/loss/{name}"] = losses[i]
                scalars[f"train/accuracy/{name}"] = accuracies[i]
                scalars[f"train/gradient_norm/{name}"] = norms[i]
                scalars[f"train/learning_rate/{name}"] = float(shared_rates[i])
            self._tensorboard.write(int(step), scalars)
        fields = {
            "loss": f"loss {np.mean(losses):.4f}",
            # Computed with teacher forcing, so it is not comparable to an evaluation's accuracy.
            "accuracy": f"train exact match {100 * np.mean(accuracies):.1f} %",
            "metric": self._metric_text,
            "speed": _speed_text(**known),
            "padding": "" if padding is None else f"{padding:.0f} % padding",
            "left": self._time_left(step),
        }
        if self._screen:
            self._screen.show(step, fields)

    def log_eval(
        self,
        step: int,
        metrics: Sequence[Mapping[str, ArrayLike]],
        *,
        prompt_norms_E: ArrayLike | None = None,
    ) -> None:
        """Records an evaluation at ``step``; ``metrics`` has one mapping of values per member.

        ``prompt_norms_E`` are the mean norms of the vectors of each member's prompt.
        """
        if len(metrics) != self._num_members:
            raise ValueError(f"{len(metrics)} evaluations for {self._num_members} members")
        values = [{name: _number(value) for name, value in one.items()} for one in metrics]
        record: dict[str, Any] = {"kind": "eval", "step": int(step), "metrics": values}
        if prompt_norms_E is not None:
            record["prompt_norm"] = self._members(prompt_norms_E)
        if self._file.append(record):
            pairs = zip(self._names, values, strict=True)
            self._tensorboard.write(
                int(step), {f"eval/{m}/{name}": v for name, one in pairs for m, v in one.items()}
            )
        if not values[0]:
            return
        shown = self._metric if self._metric in values[0] else next(iter(values[0]))
        numbers = [one[shown] for one in values if math.isfinite(one[shown])]
        mean = np.mean(numbers) if numbers else math.nan
        self._metric_text = f"eval {shown} {mean:.4g}"
        if self._screen:
            order = [shown, *(metric for metric in values[0] if metric != shown)]
            text = ", ".join(_spread(metric, values) for metric in order)
            many = f"  (mean [lowest, highest] of {len(values)})" if len(values) > 1 else ""
            self._screen.note(f"step {step}: {text}{many}")
            if not any(math.isfinite(one[shown]) for one in values):
                self._screen.note(
                    f"note: {shown} at step {step} is not a number (nan), which is never the best; "
                    "correlations are nan while all predictions are the same"
                )

    def log_samples(self, step: int, samples: Mapping[str, str]) -> None:
        """Shows texts of an evaluation, title -> Markdown, in TensorBoard alone."""
        if samples:
            self._tensorboard.write(int(step), {}, texts=samples)

    def require_folder(self, *, now: bool = False) -> None:
        """Raises UserError if the working directory has been removed or renamed.

        Checks at most once per second, unless ``now`` is true.
        """
        if not now and self._clock() < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        try:
            there = os.path.samestat(os.stat(self._folder), os.fstat(self._descriptor))
        except OSError:
            there = False
        if not there:
            raise UserError(
                f"the working directory {self._folder} has been removed or renamed while training: "
                "nothing can be saved any more; put it back, and the same command resumes from its "
                "last checkpoint"
            )

    def close(self) -> None:
        """Ends the progress bar and closes the files; calling it twice is safe."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _members(self, values_E: ArrayLike) -> list[float]:
        array_E = np.asarray(values_E)
        if array_E.shape != (self._num_members,):
            raise ValueError(f"expected {self._num_members} members, got shape {array_E.shape}")
        return [_number(value) for value in array_E]

    def _time_left(self, step: int) -> str:
        now = self._clock()
        if self._since is None:
            self._since = (step, now)
        first_step, first_time = self._since
        if step <= first_step:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._total_steps - step)
        minutes, seconds = divmod(max(round(seconds), 0), 60)
        hours, minutes = divmod(minutes, 60)
        return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds:02} left"


def _speed_text(
    examples_per_second: float, tokens_per_second: float = 0.0, flops_per_second: float = 0.0
) -> str:
    text = f"{examples_per_second:,.0f} ex/s"
    if tokens_per_second:
        text += f" {tokens_per_second:,.0f} tok/s"
    if flops_per_second:
        text += f" {flops_per_second / 1e9:,.0f} GFLOP/s"
    return text


def _lock(folder: Path, stack: ExitStack) -> int:
    """Locks the folder against other training processes, and returns a descriptor of it.

    The lock ends with the process, even if that is killed.  Raises UserError if another process
    holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is training in {folder}: wait until it ends, or choose another "
            "working directory with --workdir"
        ) from error
    except OSError:
        pass  # the file system does not support locks
    return descriptor


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, oldest first.

    A record is ``{"kind": "train", "step", "loss": [E], "accuracy": [E], "learning_rate",
    "examples_per_second", ...}`` or ``{"kind": "eval", "step", "metrics": [E mappings]}``.  A null
    in the file becomes NaN.  An incomplete last line, left by a kill, is skipped.
    Raises UserError if the file is missing or damaged.
    """
    return [record for record, _ in _read_lines(Path(path))]


def _read_lines(path: Path) -> Iterable[tuple[dict[str, Any], bytes]]:
    require_whole(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = read_json(line, of=f"line {number}") if line else None
            if record is not None:
                int(record["step"]), record["kind"]
        except (UserError, ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return
            raise UserError(
                f"line {number} of {path} is not a measurement: repair or remove it"
            ) from error
        if record is not None:
            yield _replace_floats(record, _from_json), line


class _MetricsFile:
    """Appends one JSON object per line, after removing the records later than ``last_step``."""

    def __init__(self, path: Path, *, last_step: int):
        kept = list(_read_lines(path)) if path.exists() else []
        kept = [(record, line) for record, line in kept if record["step"] <= last_step]
        self._written = {(record["kind"], record["step"]) for record, _ in kept}
        with atomic_write(path) as aside:
            aside.write_bytes(b"".join(line + b"\n" for _, line in kept))
        self._path = path
        # Unbuffered: after a failed write, closing would write the rest of a buffer and fail again.
        self._stream = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> bool:
        """Writes the record, and returns False if one of its kind and step already exists."""
        key = (record["kind"], record["step"])
        if key in self._written:
            return False
        line = f"{json_text(record)}\n".encode()
        try:
            if self._stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write the measurements to {self._path}: {error.strerror or error}; the "
                "same command resumes from the last checkpoint"
            ) from None
        self._written.add(key)
        return True

    def close(self) -> None:
        self._stream.close()


class _TensorBoard:
    """Writes scalars to a new event file, which the first ``write`` opens.

    It uses TensorBoard's record writer directly, since an event is a single protocol buffer.
    TensorBoard's EventFileWriter imports TensorFlow if it is installed, which takes seconds and
    logs to the terminal.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self._folder = folder
        self._first_step = first_step
        self._records: Any = None
        self._broken = False

    def write(
        self, step: int, scalars: Mapping[str, float], *, texts: Mapping[str, str] | None = None
    ) -> None:
        if self._broken:
            return
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception as error:  # an incompatible protobuf does not raise ImportError
            self._broken = True
            print(f"no TensorBoard events: {error}", file=sys.stderr)
            return
        now = time.time()
        try:
            if self._records is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = self._folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
                self._records = RecordWriter(file.open("ab"))
                # START makes TensorBoard discard a killed run's events of this and later steps.
                start = SessionLog(status=SessionLog.START)
                for event in (
                    Event(wall_time=now, file_version="brain.Event:2"),
                    Event(wall_time=now, step=self._first_step, session_log=start),
                ):
                    self._records.write(event.SerializeToString())
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            values += [_text_value(tag, text) for tag, text in (texts or {}).items()]
            event = Event(wall_time=now, step=step, summary=Summary(value=values))
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:  # training does not depend on it
            self._broken = True
            self.close()
            print(f"no more TensorBoard events: {error.strerror or error}", file=sys.stderr)

    def close(self) -> None:
        if self._records is not None and not self._records.closed:
            with suppress(OSError):
                self._records.close()


def _text_value(tag: str, text: str) -> Any:
    """Returns a text in the form that TensorBoard's text plugin reads."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(
        tag=f"{tag}/text_summary",
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]),
    )


class _Lines:
    """Prints a line every ``PLAIN_SECONDS``, for files and pipes."""

    def __init__(self, total_steps: int, clock: Callable[[], float]):
        self._total_steps = total_steps
        self._clock = clock
        self._next = -math.inf

    def show(self, step: int, fields: Mapping[str, str]) -> None:
        if self._clock() < self._next and step < self._total_steps:
            return
        self._next = self._clock() + PLAIN_SECONDS
        words = [f"step {step}/{self._total_steps}", *(f for f in fields.values() if f)]
        self.note("  ".join(words))

    def note(self, line: str) -> None:
        print(line, flush=True)


class _Bar:
    """A progress bar at the bottom of the terminal; notes scroll above it."""

    def __init__(self, total_steps: int, start_step: int):
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        fields = dict.fromkeys(("loss", "accuracy", "metric", "speed", "padding", "left"), "")
        texts = [
            TextColumn(text, markup=False, table_column=Column(no_wrap=True))
            for text in (
                "{task.completed}/{task.total}",
                *(f"{{task.fields[{f}]}}" for f in fields),
            )
        ]
        self._progress = Progress(BarColumn(bar_width=None), *texts)
        fields["loss"] = "compiling"
        self._task = self._progress.add_task(
            "", total=total_steps, completed=start_step, **dict[str, Any](fields)
        )
        self._progress.start()

    def show(self, step: int, fields: Mapping[str, str]) -> None:
        self._progress.tasks[0].fields.update(fields)
        self._progress.update(self._task, completed=step, refresh=True)

    def note(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _spread(metric: str, values: Sequence[Mapping[str, float]]) -> str:
    numbers = [one[metric] for one in values if math.isfinite(one[metric])]
    if not numbers:
        return f"{metric} nan"
    text = f"{metric} {np.mean(numbers):.4g}"
    if len(values) == 1:
        return text
    without = f", nan for {len(values) - len(numbers)}" if len(numbers) < len(values) else ""
    return f"{text} [{min(numbers):.4g}, {max(numbers):.4g}{without}]"


def _number(value: Any) -> float:
    """Converts to the float with the shortest text, e.g. 0.3 and not 0.30000001192092896."""
    array = np.asarray(value)
    return float(str(array[()])) if array.dtype == np.float32 else float(array)


def _replace_floats(value: Any, by: Callable[[float | None], float | None]) -> Any:
    """Applies ``by`` to every float and null in a JSON value."""
    if isinstance(value, Mapping):
        return {key: _replace_floats(one, by) for key, one in value.items()}
    if isinstance(value, list):
        return [_replace_floats(one, by) for one in value]
    return by(value) if value is None or isinstance(value, float) else value


def _from_json(number: float | None) -> float:
    return math.nan if number is None else number
