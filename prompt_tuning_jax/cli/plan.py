"""``prompt-tuning plan``."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import mirrors, option, positional
from prompt_tuning_jax.cli.experiment import ConfigOptions
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text


@dataclass(frozen=True, kw_only=True)
class Plan(ConfigOptions):
    """Estimate the memory and the speed of a run on TPUs, without any attached."""

    name: ClassVar[str] = "plan"
    example: ClassVar[str] = "plan configs/paper.py --model t5_1_1_xxl --topology v5e:4x4"

    config: str | None = positional("CONFIG.py", default=None)  # Python file with get_config()
    # TPU generation (v4, v5e, v5p or v6e) and shape, for example v5e:4x4 or v5p:2x2x2.
    topology: str | None = option("KIND:SHAPE", default=None)
    chips: int | None = option("N", default=None)  # number of chips, instead of --topology
    # TPU generation for --chips (default: v5e).
    kind: str | None = option("KIND", default=None)
    # Mesh (default: the fastest that fits, of those tried).
    mesh: str | None = option("data=2,model=8", default=None)
    tries: int | None = option("N", default=None)  # number of meshes to compile for (default: 2)
    train_only: bool = False  # leave out the evaluation step
    json: bool = False  # print everything as JSON
    model: str | None = mirrors("model.name_or_path", "NAME")

    def run(self) -> None:
        if self.mesh is not None and self.tries is not None:
            raise UserError("--tries compares meshes, and --mesh names one; give one of them")
        experiment = self.experiment()
        from prompt_tuning_jax.planning.report import plan_as_dict, plan_lines, plan_run

        plan = plan_run(
            experiment,
            own_mesh=self.mesh is not None,
            evaluate=not self.train_only,
            **self.given("topology", "chips", "kind", "tries"),
        )
        if self.json:
            print(json_text(plan_as_dict(plan), indent=2))
            return
        for line in plan_lines(plan):
            print(line)
