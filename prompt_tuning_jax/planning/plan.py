"""Chooses a mesh for an experiment on a slice, and estimates its memory and speed."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import abstract_model, open_model
from prompt_tuning_jax.config.experiment import Experiment, Mesh
from prompt_tuning_jax.data.batching.window import fit_window
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.registry import find_preset, preset
from prompt_tuning_jax.planning.program import (
    Abstract,
    Program,
    abstract_experiment,
    compile_eval,
    compile_train,
)
from prompt_tuning_jax.planning.topology import GIB, Chip, Topology
from prompt_tuning_jax.training import build


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The seconds per step that each resource needs by itself, at its published peak.

    Collectives use a ring along one axis of the torus; a small slice has no link to close the ring,
    and is slower.  ``step`` assumes that arithmetic and memory overlap fully, and that collectives
    overlap with neither.  ``floor`` is the time of the model's matrix products at the chip's peak,
    a lower bound for any program.
    """

    compute: float
    memory: float
    collectives: float
    floor: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.collectives

    @property
    def utilization(self) -> float:
        """The model FLOPs utilization: ``floor`` divided by ``step``."""
        return self.floor / self.step if self.step else 0.0


def roofline(program: Program, chip: Chip, *, model_flops: float, chips: int) -> Roofline:
    """Returns the roofline of a compiled program on the given number of chips."""
    return Roofline(
        compute=program.flops / chip.flops,
        memory=program.bytes_accessed / chip.hbm_bandwidth,
        collectives=sum(c.sent for c in program.collectives) / chip.ring_bandwidth,
        floor=model_flops / chips / chip.flops,
    )


REMATS = ("none", "dots", "full")  # from the fastest to the smallest


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A mesh, the training step's program and roofline, and the evaluation step's program."""

    mesh: Mapping[str, int]
    remat: str
    weights_bytes: int  # frozen weights, on one chip
    tuned_bytes: int  # trainable arrays and optimizer state, on one chip
    train: Program
    roofline: Roofline
    evaluation: Program | None
    tokens_per_second: float
    attention: str  # how the input is attended to, and why

    @property
    def name(self) -> str:
        return mesh_name(self.mesh)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The meshes that were compiled for a slice, the best first, and advice if none fits.

    ``steps`` are those of the experiment's training.
    """

    topology: Topology
    parameters: int
    steps: int
    tried: tuple[MeshPlan, ...]
    advice: tuple[str, ...]

    @property
    def best(self) -> MeshPlan | None:
        """The fastest mesh that fits, or None."""
        return next((each for each in self.tried if each.train.fits), None)


def planned_config(experiment: Experiment) -> ModelConfig:
    """Returns the model's config: of a published model, or read from file headers."""
    name = experiment.model.name_or_path
    size = name.removeprefix("t5_1_1_lm100k_").removeprefix("t5_1_1_")
    if experiment.model.random_weights:
        return preset(size)
    return find_preset(size) or open_model(name, vocabulary=False).config


def plan(
    experiment: Experiment,
    config: ModelConfig,
    topology: Topology,
    *,
    mesh: Mesh | None = None,
    tries: int = 2,
    evaluate: bool = True,
) -> Plan:
    """Compiles the experiment for the slice, on ``mesh`` or on the ``tries`` most promising meshes.

    Inputs have the length that the model's window leaves them.  Raises UserError if ``mesh`` does
    not fit the slice, if no mesh does, or if the window has no room for an input.
    """
    if config.reads_images:
        raise UserError("plan is for models that read text, and this one reads images")
    experiment = fit_window(experiment, config.max_positions)
    names = [mesh] if mesh is not None else candidates(experiment, config, topology)[:tries]
    devices = topology.devices()
    tried = [
        _tried(experiment, config, topology, sizes=each, devices=devices, evaluate=evaluate)
        for each in names
    ]
    tried.sort(key=lambda one: (not one.train.fits, one.roofline.step, one.train.needed_bytes))
    parameters = _parameters(config)
    advice: tuple[str, ...] = ()
    if not any(one.train.fits for one in tried):
        advice = tuple(_advice(experiment, tried[0], topology))
    return Plan(
        topology=topology,
        parameters=parameters,
        steps=experiment.training.steps,
        tried=tuple(tried),
        advice=advice,
    )


def candidates(experiment: Experiment, config: ModelConfig, topology: Topology) -> list[Mesh]:
    """Returns the meshes that divide the heads and the batch, the most promising first.

    A rough estimate of communication orders them.  Meshes estimated to exceed the memory come last.
    Raises UserError if no mesh divides both.
    """
    training, chip = experiment.training, topology.chip
    rows = training.batch_size // max(training.gradient_accumulation, 1)
    positions = experiment.data.inputs_length + experiment.method.prompt_positions()
    bits = {"int8": 8, "int4": 4}.get(experiment.model.quantization)
    dtype = "float32" if experiment.method.trains_model else experiment.model.param_dtype
    bits = bits or jax.dtypes.itemsize_bits(dtype)
    weights = _parameters(config) * bits / 8
    layers = config.num_reading_layers
    guesses = []
    for model in _divisors(topology.chips):
        for fsdp in _divisors(topology.chips // model):
            data = topology.chips // model // fsdp
            if config.num_heads % model or rows % (data * fsdp):
                continue
            share = weights / model / fsdp
            residual = rows / (data * fsdp) * positions * config.embed_dim * 2
            # Per layer, two sums over activations forward and two backward; all weights twice.
            sent = 2 * 4 * layers * residual * (model - 1) / model
            sent += 2 * weights / model * (fsdp - 1) / fsdp
            kept = layers * residual * {"none": 20, "dots": 6, "full": 1}[training.remat]
            too_large = share + kept > 0.9 * chip.hbm_bytes
            mesh = dataclasses.replace(experiment.mesh, data=data, fsdp=fsdp, model=model)
            guesses.append(((too_large, sent, fsdp), mesh))
    if not guesses:
        raise UserError(
            f"no mesh of {topology.chips} chips divides {config.num_heads} heads and batches of "
            f"{rows}; change training.batch_size, or give --mesh"
        )
    return [mesh for _, mesh in sorted(guesses, key=lambda guess: guess[0])]


def mesh_name(mesh: Mapping[str, int]) -> str:
    """Formats the axes that have more than one device, as in ``data=4,model=4``."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "one chip"


def _tried(
    experiment: Experiment,
    config: ModelConfig,
    topology: Topology,
    *,
    sizes: Mesh,
    devices: Any,
    evaluate: bool,
) -> MeshPlan:
    training = experiment.training
    on_mesh = dataclasses.replace(experiment, mesh=sizes)
    partitioner = build.train_partitioner(on_mesh, devices=devices)
    mesh = partitioner.mesh
    abstract = abstract_experiment(experiment, config, partitioner)
    train = compile_train(experiment, abstract)
    examples = training.batch_size * len(training.seeds)
    data, prompt = experiment.data, experiment.method.prompt_positions()
    forward = config.forward_flops(
        rows=examples,
        prompt_length=prompt,
        inputs_length=data.inputs_length,
        targets_length=data.targets_length,
    )
    # The forward pass, the gradients of the activations and, if they train, those of the weights.
    flops = forward * (3 if experiment.method.trains_model else 2)
    walls = roofline(train, topology.chip, model_flops=flops, chips=topology.chips)
    tokens = examples * (data.inputs_length + data.targets_length)
    return MeshPlan(
        mesh=dict(mesh.shape),
        remat=training.remat,
        weights_bytes=_on_a_chip(abstract.members.frozen),
        tuned_bytes=_on_a_chip((abstract.state.trainable, abstract.state.opt_state)),
        train=train,
        roofline=walls,
        evaluation=_evaluation(experiment, abstract) if evaluate and train.fits else None,
        tokens_per_second=tokens / walls.step if walls.step else 0.0,
        attention=str(abstract.attention),
    )


def _evaluation(experiment: Experiment, abstract: Abstract) -> Program | None:
    return None if experiment.data.objectives else compile_eval(experiment, abstract)


def _advice(experiment: Experiment, tried: MeshPlan, topology: Topology) -> Iterator[str]:
    """Yields changes that may make the step fit, the cheapest first; these are only estimates."""
    limit, training = topology.chip.hbm_bytes, experiment.training
    if training.remat != "full":
        smaller = REMATS[REMATS.index(training.remat) + 1 :]
        yield f"recompute more in the backward pass: --set training.remat={' or '.join(smaller)}"
    weights, rest = tried.weights_bytes, max(tried.train.needed_bytes - tried.weights_bytes, 0)
    model = experiment.model
    wide = model.param_dtype == "float32"
    if model.quantization == "none" and not experiment.method.trains_model:
        narrower = "model.param_dtype=bfloat16" if wide else "model.quantization=int8"
        yield (
            f"frozen weights in half the memory ({weights / 2 / GIB:.1f} GiB a chip): "
            f"--set {narrower}"
        )
    if weights < limit and rest:
        parts = math.ceil(rest / (limit - weights))
        batch = training.batch_size // parts
        if batch:
            parts = next(
                n for n in range(parts, training.batch_size + 1) if training.batch_size % n == 0
            )
            yield (
                f"a smaller batch: about --set training.batch_size={batch}, or "
                f"training.gradient_accumulation={parts}"
            )
    factor = max(2, 2 ** math.ceil(math.log2(max(tried.train.needed_bytes / limit, 1))))
    yield f"more chips: about {topology.chips * factor} of {topology.chip.kind}"


def _parameters(config: ModelConfig) -> int:
    model = abstract_model(config, dtype="bfloat16", param_dtype="bfloat16")
    return sum(math.prod(p.shape) for p in param_tree.split(model)[1].values())


def _on_a_chip(arrays: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(arrays)
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
