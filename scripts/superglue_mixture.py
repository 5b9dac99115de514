"""Registers mixtures of all short SuperGLUE tasks but one: ``super_glue_without_rte`` and others.

A module for ``data.module``: with this folder on PYTHONPATH, set ``data.module=superglue_mixture``
and ``data.task=super_glue_without_TASK``, where TASK is cb, copa, rte, wic or wsc.  Each task has
the same share of the examples.
"""

from prompt_tuning_jax.data.tasks.registry import get_task, register
from prompt_tuning_jax.data.tasks.task import Mixture

NAMES = ("cb", "copa", "rte", "wic", "wsc")
TASKS = {name: get_task(f"super_glue_{name}_v102") for name in NAMES}
for left_out in NAMES:
    members = tuple(task for name, task in TASKS.items() if name != left_out)
    register(
        Mixture(name=f"super_glue_without_{left_out}", tasks=members, rates=(1.0,) * len(members))
    )
