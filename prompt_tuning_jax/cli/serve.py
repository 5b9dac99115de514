"""``prompt-tuning serve``."""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import mirrors, option, port
from prompt_tuning_jax.cli.experiment import OverrideOptions, import_module
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Serve(Serving, OverrideOptions):
    """Serve prompts and what other methods trained over HTTP, on one frozen model.

    Batches mix the tasks of prompts, and those of one method with equal hyper-parameters.  Texts of
    all of them are generated side by side.

    DIR is the folder of a run, or a folder of tasks.  A run is one task with its seeds as an
    ensemble; its name is that of the task it was trained on (for a file of examples the file's, or
    its folder's where that is train).  In a folder of tasks, NAME.safetensors, NAME.npy or the
    folder NAME of a PEFT adapter is task NAME; a folder NAME of several, or a run NAME, is a task
    with an ensemble.  What was trained on a mixture serves each of its tasks as NAME.TASK.

    The template that a task's prompts were trained with is applied to inputs, unless a request sets
    raw.

    Environment: with PROMPT_TUNING_TOKEN, predictions need that token.
    PROMPT_TUNING_ADMIN_TOKEN allows PUT and DELETE of /v1/tasks/NAME; the changes are stored in
    DIR/.served, and other servers of DIR follow them.
    """

    name: ClassVar[str] = "serve"
    example: ClassVar[str] = "serve --prompts runs/quickstart"

    prompts: str = option("DIR")  # folder to serve
    # Frozen model (default: the run's, or tiny).
    model: str | None = mirrors("model.name_or_path", "NAME")
    host: str = "127.0.0.1"  # address to listen on; the default accepts only this machine
    port: int = option("N", default=8000, parse=port)  # port to listen on; 0: any free port
    # Sizes of the mesh axes.
    mesh: str | None = option("data=2,model=4", default=None)

    def run(self) -> None:
        from prompt_tuning_jax.serving.launch import default_experiment, serve

        if not Path(self.prompts).exists():
            raise UserError(f"--prompts {self.prompts}: no such folder")
        from prompt_tuning_jax.compilation import keep_compiled_programs
        from prompt_tuning_jax.config.no_effect import require_effect
        from prompt_tuning_jax.config.overrides import apply_overrides
        from prompt_tuning_jax.config.validation import validate
        from prompt_tuning_jax.serving.malloc_trim import keep_freed_memory

        keep_freed_memory()
        keep_compiled_programs()
        experiment = apply_overrides(default_experiment(self.prompts), self.all_overrides())
        experiment = validate(experiment)
        require_effect(self.set_fields(), experiment, command=self.name)
        # Only a module named here is imported: default_experiment drops that of a run.
        import_module(experiment.data.module)
        serving = Serving(**{field.name: getattr(self, field.name) for field in fields(Serving)})
        serve(experiment, self.prompts, host=self.host, port=self.port, serving=serving)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # otherwise Python waits for programs that are still being compiled or run
