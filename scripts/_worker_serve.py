"""Serves a folder of prompts for ``bench_serve``; with ``apart``, a batch has a single task.

python _worker_serve.py MODEL PROMPTS DTYPE LENGTHS NEW_TOKENS APART
"""

import sys
from collections.abc import Callable

from fastapi import FastAPI

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.serving.app import make_app
from prompt_tuning_jax.serving.launch import open_service
from prompt_tuning_jax.serving.malloc_trim import keep_freed_memory
from prompt_tuning_jax.serving.server import address_of, bound, serve


def main() -> None:
    """Prints the address on one line, and ``ready`` on the next once all programs are compiled."""
    name, prompts, dtype, lengths, new_tokens, apart = sys.argv[1:]
    keep_freed_memory()
    keep_compiled_programs()
    experiment = Experiment(
        model=Model(name_or_path=name, dtype=dtype, param_dtype=dtype)  # type: ignore[arg-type]
    )
    serving = Serving(
        lengths=tuple(map(int, lengths.split(","))),
        modes=("label", "generate"),
        max_new_tokens=int(new_tokens),
        max_queue=256,
    )
    service = open_service(experiment, prompts, serving=serving, apart=apart == "apart")

    # The benchmark measures a server that has compiled all programs.
    service.on_compiled = lambda: print("ready", flush=True)

    def make(stop: Callable[[BaseException | None], None]) -> FastAPI:
        return make_app(service, on_started=stop)

    sockets = bound("127.0.0.1", 0)
    print(address_of(sockets), flush=True)
    serve(make, sockets, drain_seconds=5)


if __name__ == "__main__":
    main()
