"""Makes the checks of ``check_gpu`` in a process of its own, which can be ended at any time.

python _check_gpu_worker.py JOB, where JOB is a JSON object: ``sections``, ``until`` (in seconds
since 1970: no check begins later), and ``options``.  Writes a row of JSON per line to standard
output.
"""

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

from _check_gpu_report import Options, OutOfTimeError, Report

# The modules of the sections; a model is measured under its name.
MODULES = {
    "operations": "_check_gpu_ops",
    "models": "_check_gpu_models",
    "serve": "_check_gpu_serve",
    "resume": "_check_gpu_resume",
    "peft": "_check_gpu_peer",
}


def main() -> int:
    """Runs the sections of a job; returns the exit status, which says nothing of the checks."""
    job = json.loads(sys.argv[1])
    # Whatever else is printed does not mix with the rows.
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    report = Report(lambda row: _write(rows, row), Options(**job["options"]))
    from prompt_tuning_jax.distributed.processes import leave_out_missing_tpu

    leave_out_missing_tpu()
    for section in job["sections"]:
        report.start(section, job["until"] - time.time())
        try:
            with report.guarded(section):
                _run(report, section)
        except OutOfTimeError:
            continue
    return 0


def _run(report: Report, section: str) -> None:
    speed = importlib.import_module("_check_gpu_speed")
    speed.add_presets()
    if section == "card":
        speed.measure_card(report)
    elif section in MODULES:
        importlib.import_module(MODULES[section]).run(report)
    else:
        speed.measure_model(report, section)


def _write(rows: TextIO, row: dict[str, Any]) -> None:
    rows.write(json.dumps(row) + "\n")  # at once, since threads make checks side by side
    rows.flush()


if __name__ == "__main__":
    sys.exit(main())
