"""Tuning of model parameters selected by regex (BitFit, Ben Zaken et al. 2022)."""

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import PatternTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import Array
from prompt_tuning_jax.untrusted_input import shown


class PatternModule(TuningModule[PatternTuning]):
    """Adds no parameters; the trained parameters belong to the model."""

    @classmethod
    def attach(
        cls, config: PatternTuning, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        params = param_tree.split(model)[1]
        for pattern in config.patterns:
            if not any(param_tree.matching(params, pattern, of="method.patterns").values()):
                raise UserError(
                    f"method.patterns: {shown(pattern)} matches no parameter; a "
                    f"pattern must match a whole path, for instance {next(iter(params))}"
                )
        return TunedModel(model, cls(config))
