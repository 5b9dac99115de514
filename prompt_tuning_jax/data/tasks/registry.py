"""Tasks and mixtures by name: built-in ones, those that users register, and SeqIO's."""

import difflib
import functools
import importlib
import sys
from collections.abc import Mapping

from prompt_tuning_jax.data.tasks.task import Mixture, Task, as_mixture
from prompt_tuning_jax.errors import UserError, suggest

# Each of these modules has a tuple TASKS, and may have ALIASES (name -> name); they are imported
# when a task is first asked for.
_BUILTIN_MODULES = (
    "prompt_tuning_jax.data.tasks.word_valence",
    "prompt_tuning_jax.data.tasks.t5_tasks.registry",
    "prompt_tuning_jax.data.tasks.t5_tasks.spot",
    "prompt_tuning_jax.data.tasks.t5_tasks.recycling",
)
# In the 2021 code, tasks for other models' vocabularies; here the model brings its vocabulary.
_MODEL_PREFIXES = ("", "mt5_", "byt5_")
_registered: dict[str, Task | Mixture] = {}


def register(task: Task | Mixture, *, replace: bool = False) -> None:
    """Registers a task or mixture under its name; UserError if the name is taken."""
    if not replace and task.name in _known():
        raise UserError(f"task {task.name!r} is registered already; choose another name")
    _registered[task.name] = task


def task_names() -> tuple[str, ...]:
    """Returns the names of built-in and registered tasks and mixtures, sorted, without aliases.

    They include SeqIO's once a module that registers some has been imported.
    """
    return tuple(sorted({*_known(), *seqio_names()}))


def get_mixture(name: str) -> Mixture:
    """Returns the mixture of that name, or the task of that name as a mixture of one.

    Looks among built-in tasks, registered tasks and SeqIO's, in this order.  UserError suggests the
    nearest name for an unknown one.
    """
    task = _find(name)
    if task is None and name in seqio_names():
        from prompt_tuning_jax.data.tasks.from_seqio import from_seqio

        task = from_seqio(name)
    if task is None:
        names = task_names()
        # A remembered part of a name, such as rte, is not similar to the whole name.
        likely = [known_name for known_name in names if name and name in known_name]
        likely = likely or difflib.get_close_matches(name, [*names, *aliases()], n=4)
        raise UserError(
            f"unknown task {name!r}: {suggest(name, likely or names)} (`prompt-tuning tasks` lists "
            "all; import the module that registers a custom or SeqIO task first)"
        )
    return task if isinstance(task, Mixture) else as_mixture(task)


def tasks_known_as(name: str) -> tuple[Task, ...]:
    """Returns the task of this name or alias, or the trained members of the mixture.

    Returns () for an unknown name.  Imports neither SeqIO nor modules that register tasks: SeqIO's
    tasks are found only if it is imported already.
    """
    task = _find(name)
    if task is None and name in seqio_names():
        task = get_mixture(name)
    if isinstance(task, Mixture):
        return task.tasks
    return () if task is None else (task,)


def get_task(name: str) -> Task:
    """Returns the one task of that name; UserError for an unknown one and for a mixture."""
    mixture = get_mixture(name)
    members = (*mixture.tasks, *mixture.evaluated)
    if len(members) > 1 or members[0].name != mixture.name:
        listed = ", ".join(task.name for task in members)
        raise UserError(f"{name!r} is a mixture; name one of its tasks: {listed}")
    return mixture.tasks[0]


@functools.cache
def _builtin() -> Mapping[str, Task | Mixture]:
    modules = [importlib.import_module(name) for name in _BUILTIN_MODULES]
    return {task.name: task for module in modules for task in module.TASKS}


@functools.cache
def aliases() -> Mapping[str, str]:
    """Returns the full name of each alias of a built-in task or mixture."""
    modules = [importlib.import_module(name) for name in _BUILTIN_MODULES]
    return {a: n for module in modules for a, n in getattr(module, "ALIASES", {}).items()}


def _find(name: str) -> Task | Mixture | None:
    """Returns the built-in or registered task of this name, of an alias, or of a model's prefix."""
    known = _known()
    for prefix in _MODEL_PREFIXES:
        bare = name.removeprefix(prefix)
        task = known.get(bare) or known.get(aliases().get(bare, ""))
        # Tasks of other origins have no such names.
        if task is not None and (not prefix or bare in _builtin() or bare in aliases()):
            return task
    return None


def _known() -> dict[str, Task | Mixture]:
    return {**_builtin(), **_registered}


def seqio_names() -> tuple[str, ...]:
    """Returns the names of SeqIO's tasks and mixtures that this package did not register."""
    # SeqIO tasks exist only if SeqIO has been imported, so this never imports TensorFlow itself.
    if "seqio" not in sys.modules:
        return ()
    from prompt_tuning_jax.data.tasks.from_seqio import names_in_seqio

    return tuple(name for name in names_in_seqio() if name not in {*_builtin(), *aliases()})
