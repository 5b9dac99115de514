"""The command ``plan``: reports the memory and speed of an experiment on absent TPUs."""

from collections.abc import Iterator
from typing import Any

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.planning.plan import MeshPlan, Plan, plan, planned_config
from prompt_tuning_jax.planning.program import Program
from prompt_tuning_jax.planning.topology import GIB, Topology, parse_topology, topology_of


def plan_run(
    experiment: Experiment,
    *,
    topology: str = "",
    chips: int = 0,
    kind: str = "",
    own_mesh: bool = False,
    tries: int = 2,
    evaluate: bool = True,
) -> Plan:
    """Compiles the experiment's steps for a slice, and returns the plan.

    The slice is ``topology``, or the one of ``kind`` (v5e) with ``chips`` chips.  ``own_mesh`` uses
    the experiment's mesh; otherwise the ``tries`` most promising meshes are compiled.
    """
    if bool(topology) == bool(chips):
        raise UserError("give either --topology KIND:SHAPE, or --chips N (and --kind)")
    if topology and kind:
        raise UserError(f"--kind is for --chips; {topology} names its kind")
    on: Topology = parse_topology(topology) if topology else topology_of(kind or "v5e", chips)
    mesh = experiment.mesh if own_mesh else None
    return plan(
        experiment, planned_config(experiment), on, mesh=mesh, tries=tries, evaluate=evaluate
    )


def plan_lines(made: Plan) -> Iterator[str]:
    """Yields the lines of a readable report of the plan."""
    chip, topology = made.topology.chip, made.topology
    yield (
        f"{topology.name}: {topology.chips} chips of {chip.hbm_bytes / GIB:.2f} GiB and "
        f"{chip.flops / 1e12:.0f} TFLOP/s; {made.parameters:,} parameters"
    )
    if len(made.tried) > 1:
        yield ""
        yield "mesh                       fits   GiB a chip   estimated step   utilization"
        for each in made.tried:
            step = f"{each.roofline.step * 1e3:10.1f} ms" if each.train.fits else " " * 13
            used = f"{each.roofline.utilization:.0%}" if each.train.fits else ""
            yield (
                f"{each.name:26} {'yes' if each.train.fits else 'no':4} "
                f"{each.train.needed_bytes / GIB:12.2f}   {step:>14}   {used:>11}"
            )
    yield ""
    if made.best is not None:
        yield from _mesh_lines(made.best, made)
        return
    tried = made.tried[0]
    yield (
        f"does not fit: {tried.name} needs {tried.train.needed_bytes / GIB:.2f} GiB a chip of "
        f"{chip.hbm_bytes / GIB:.2f}.  Possible changes:"
    )
    for line in made.advice:
        yield f"  {line}"


def plan_as_dict(made: Plan) -> dict[str, Any]:
    """Returns the plan as JSON values; bytes, FLOPs and seconds are per chip and step."""
    chip, best = made.topology.chip, made.best
    return {
        "topology": made.topology.name,
        "chips": made.topology.chips,
        "hbm_bytes": chip.hbm_bytes,
        "parameters": made.parameters,
        "steps": made.steps,
        "best": best.name if best else None,
        "advice": list(made.advice),
        "meshes": [
            {
                "mesh": dict(each.mesh),
                "remat": each.remat,
                "attention": each.attention,
                "weights_bytes": each.weights_bytes,
                "tuned_bytes": each.tuned_bytes,
                "train": _program(each.train),
                "evaluation": _program(each.evaluation) if each.evaluation else None,
                "seconds": {
                    "compute": each.roofline.compute,
                    "memory": each.roofline.memory,
                    "collectives": each.roofline.collectives,
                    "floor": each.roofline.floor,
                    "step": each.roofline.step,
                },
                "utilization": each.roofline.utilization,
                "tokens_per_second": each.tokens_per_second,
            }
            for each in made.tried
        ],
    }


def _mesh_lines(each: MeshPlan, made: Plan) -> Iterator[str]:
    train, walls, limit = each.train, each.roofline, made.topology.chip.hbm_bytes
    rows = [
        ("mesh", f"{each.name}, remat {each.remat}"),
        ("attention", each.attention),
        ("frozen weights", f"{each.weights_bytes / GIB:.2f} GiB a chip"),
        ("tuned, optimizer", f"{each.tuned_bytes / 2**20:.2f} MiB"),
        ("temporaries", f"{train.temporary_bytes / GIB:.2f} GiB, including activations"),
        (
            "memory",
            f"{train.needed_bytes / GIB:.2f} of {limit / GIB:.2f} GiB; "
            f"{(limit - train.needed_bytes) / GIB:.2f} to spare",
        ),
        ("FLOPs", f"{train.flops:.3g} a chip: {walls.compute * 1e3:.1f} ms"),
        ("bytes accessed", f"{train.bytes_accessed:.3g} a chip: {walls.memory * 1e3:.1f} ms"),
    ]
    rows += [
        (
            f"{one.kind}",
            f"{one.count} over {'+'.join(one.axes)}, {one.bytes:.3g} bytes",
        )
        for one in train.collectives
    ]
    rows += [
        ("collectives", f"{walls.collectives * 1e3:.1f} ms"),
        (
            "estimated step",
            f"{walls.step * 1e3:.1f} ms, {walls.step / walls.floor:.1f} times the floor of "
            f"{walls.floor * 1e3:.1f} ms",
        ),
        ("training", _training(walls.step, made)),
        ("utilization", f"{walls.utilization:.0%} of peak FLOP/s (model FLOPs)"),
        ("speed", f"{each.tokens_per_second:,.0f} tokens/s"),
        (
            "compiled in",
            f"{train.compile_seconds:.0f} s ({train.compile_cpu_seconds:.0f} s of CPU)",
        ),
    ]
    if (evaluation := each.evaluation) is not None:
        fits = "" if evaluation.fits else "does not fit: "
        rows.append(("evaluation", f"{fits}{evaluation.needed_bytes / GIB:.2f} GiB a chip"))
    for name, value in rows:
        yield f"{name:18} {value}"


def _training(step_seconds: float, made: Plan) -> str:
    hours = step_seconds * made.steps / 3600
    return (
        f"{made.steps:,} steps in {hours:,.1f} hours, {hours * made.topology.chips:,.1f} "
        "chip-hours, without evaluation"
    )


def _program(program: Program) -> dict[str, Any]:
    return {
        "fits": program.fits,
        "needed_bytes": program.needed_bytes,
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "flops": program.flops,
        "bytes_accessed": program.bytes_accessed,
        "compile_seconds": program.compile_seconds,
        "compile_cpu_seconds": program.compile_cpu_seconds,
        "collectives": [
            {
                "kind": one.kind,
                "axes": list(one.axes),
                "group": one.group,
                "count": one.count,
                "bytes": one.bytes,
                "sent": one.sent,
            }
            for one in program.collectives
        ],
    }
