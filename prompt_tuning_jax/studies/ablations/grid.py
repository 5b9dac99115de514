"""The grid of an ablation: its points, and the runs that train as many of them as possible."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.studies.ablations.axes import Axis, Value, require_one_setting


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trained prompt (or other method): a value of the axis, a line of the figure, a seed."""

    value: Value
    line: Value | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points that one run trains at once, as its members, on one frozen model.

    ``experiment`` has a seed for each point, and a learning rate or initialization for each where
    the axes vary these.  ``name`` is the run's folder.  ``whole`` is the group that this one is a
    part of, or None.
    """

    name: str
    experiment: Experiment
    points: tuple[Point, ...]
    whole: "Group | None" = None

    def part(self, start: int, stop: int) -> "Group":
        """Returns a group of some of the points."""
        training = self.experiment.training
        fields = {
            name: getattr(training, name)[start:stop]
            for name in ("seeds", "learning_rates", "inits")
        }
        return Group(
            name=f"{self.name}_{start}_to_{stop - 1}",
            experiment=dataclasses.replace(
                self.experiment, training=dataclasses.replace(training, **fields)
            ),
            points=self.points[start:stop],
            whole=self.whole or self,
        )

    def halves(self) -> "tuple[Group, Group]":
        """Returns two groups with the points of this one, for a device that cannot hold all."""
        middle = (len(self.points) + 1) // 2
        return self.part(0, middle), self.part(middle, len(self.points))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations of the values of one or two axes with the seeds."""

    axis: Axis
    values: tuple[Value, ...]
    line_axis: Axis | None = None
    lines: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if self.line_axis is not None and self.line_axis.name == self.axis.name:
            raise UserError(f"--lines {self.axis.name}: this is what the ablation varies already")

    @property
    def all_lines(self) -> tuple[Value | None, ...]:
        """The lines of the figure; a single None if only one setting varies."""
        return self.lines or (None,)

    def experiment(self, base: Experiment, value: Value, line: Value | None) -> Experiment:
        """Returns ``base`` with the values of both axes; raises UserError if it is invalid."""
        # The model, then the method, then the method's settings, then other fields of the config.
        order = ("size", "objective", "lm_steps", "method", "length", "init", "learning_rate")
        chosen = [(self.axis, value)]
        if self.line_axis is not None and line is not None:
            chosen.append((self.line_axis, line))
        places = {name: place for place, name in enumerate(order)}
        for axis, one in sorted(chosen, key=lambda each: places.get(each[0].name, len(order))):
            base = axis.apply(base, one)
        return base

    def groups(self, base: Experiment, seeds: Sequence[int], *, at_once: int = 0) -> list[Group]:
        """Returns the runs; ``at_once`` is the largest number of members per run, 0 for any."""
        require_one_setting(base)
        member_fields: dict[str, str] = {
            axis.member_field: axis.name
            for axis in (self.axis, self.line_axis)
            if axis is not None and axis.member_field
        }
        members_by_name: dict[str, list[tuple[Point, Experiment]]] = {}
        for value in self.values:
            for line in self.all_lines:
                of = self.experiment(base, value, line)
                members = members_by_name.setdefault(self._name(value, line), [])
                for seed in seeds:
                    members.append((Point(value=value, line=line, seed=seed), of))
        groups = [_group(name, members, member_fields) for name, members in members_by_name.items()]
        if at_once:
            groups = [
                group.part(start, min(start + at_once, len(group.points)))
                if len(group.points) > at_once
                else group
                for group in groups
                for start in range(0, len(group.points), at_once)
            ]
        for group in groups:
            validate(group.experiment)
        return groups

    def _name(self, value: Value, line: Value | None) -> str:
        """Returns the folder of a point's run, without the axes in which members may differ."""
        parts = [(self.axis, value)]
        if self.line_axis is not None and line is not None:
            parts.append((self.line_axis, line))
        named = [f"{axis.name}_{one.name}" for axis, one in parts if not axis.member_field]
        if not named:
            return "all"
        name = "_".join(named)
        plain = re.sub(r"[^\w.-]+", "_", name)
        # Paths of models that differ only in such characters are different runs.
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return plain if plain == name else f"{plain}_{digest}"


def _group(
    name: str, members: Sequence[tuple[Point, Experiment]], member_fields: dict[str, str]
) -> Group:
    first = members[0][1]
    seeds = tuple(point.seed for point, _ in members)
    training = dataclasses.replace(first.training, seeds=seeds, learning_rates=(), inits=())
    if "learning_rates" in member_fields:
        rates = tuple(of.optimizer.learning_rate for _, of in members)
        training = dataclasses.replace(training, learning_rates=rates)
    if "inits" in member_fields:
        inits = tuple(str(getattr(of.method, "init", "")) for _, of in members)
        training = dataclasses.replace(training, inits=inits)
    return Group(
        name=name,
        experiment=dataclasses.replace(first, training=training),
        points=tuple(point for point, _ in members),
    )
