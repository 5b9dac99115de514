import pytest

from prompt_tuning_jax.config.experiment import Evaluation, Experiment, Training
from prompt_tuning_jax.config.overrides import apply_overrides
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import METHODS, WARP


@pytest.mark.parametrize("method", METHODS)
def test_defaults_make_sense(method: str) -> None:
    experiment = apply_overrides(Experiment(), [f"method={method}"])
    assert validate(experiment) == experiment


@pytest.mark.parametrize(
    "overrides",
    [
        "training.batch_size=6 training.gradient_accumulation=3",
        "training.seeds=1,2 training.learning_rates=0.1,0.3 training.inits=uniform,class_labels",
        "training.seeds=1,1 training.learning_rates=0.1,0.3",
        "training.seeds=1,1 training.inits=uniform,class_labels",
        "training.seeds=1,1,1 training.inits=uniform,file=a.npy,file=b.npy",
        "optimizer.schedule=cosine optimizer.warmup_steps=5 optimizer.decay_steps=6",
        "optimizer.warmup_steps=99999",
        "mesh.data=2 mesh.fsdp=-1",
        "model.dropout_rate=0",
        "data.task= data.train=a.jsonl",
        "optimizer.decay_rate=1",
    ],
)
def test_unusual_values_that_make_sense(overrides: str) -> None:
    validate(apply_overrides(Experiment(), overrides.split(" ")))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("training.steps=0", ["training.steps is 0", "at least 1"]),
        ("training.batch_size=0", ["training.batch_size is 0", "at least 1"]),
        (
            "training.batch_size=32 training.gradient_accumulation=5",
            ["training.batch_size is 32", "training.gradient_accumulation, which is 5"],
        ),
        ("training.gradient_accumulation=-4", ["training.gradient_accumulation is -4"]),
        ("training.eval_every=0", ["training.eval_every is 0", "at least 1"]),
        ("training.save_every=0", ["training.save_every is 0"]),
        ("training.log_every=-3", ["training.log_every is -3"]),
        ("training.seeds=", ["training.seeds is empty"]),
        ("training.seeds=-1", ["training.seeds", "-1"]),
        ("training.seeds=0,2147483648", ["training.seeds", "2147483648"]),
        ("training.seeds=3,4,3", ["training.seeds", "3 twice"]),
        (
            "training.seeds=3,3 training.learning_rates=0.1,0.1 training.inits=uniform,uniform",
            ["training.seeds", "3 twice"],
        ),
        ("training.seeds=0,1 training.learning_rates=0.1", ["learning_rates has 1", "seeds has 2"]),
        ("training.inits=uniform,uniform", ["training.inits has 2 entries", "has 1"]),
        ("training.inits=unifrom", ["training.inits", "'uniform'"]),
        ("training.inits=string=a.npy", ["training.inits", "'string=a.npy'"]),
        ("method=full training.inits=uniform", ["training.inits", "FullTuning has no init"]),
        ("training.learning_rates=-0.1", ["training.learning_rates", "-0.1"]),
        ("training.z_loss=-1", ["training.z_loss is -1"]),
        ("optimizer.learning_rate=-0.3", ["optimizer.learning_rate is -0.3"]),
        ("optimizer.weight_decay=-1", ["optimizer.weight_decay"]),
        ("optimizer.initial_step=-1", ["optimizer.initial_step"]),
        ("optimizer.warmup_steps=-1", ["optimizer.warmup_steps"]),
        ("optimizer.decay_rate=1.1", ["optimizer.decay_rate is 1.1", "from 0 to 1"]),
        ("optimizer.beta2=1", ["optimizer.beta2 is 1.0", "below 1"]),
        (
            "optimizer.schedule=linear optimizer.warmup_steps=10 training.steps=10",
            ["optimizer.warmup_steps is 10", "linear", "step 10"],
        ),
        ("method=lora method.rank=0", ["method.rank is 0", "at least 1"]),
        ("method=lora method.dropout=1", ["method.dropout is 1.0", "below 1"]),
        ("method=lora method.targets=", ["method.targets is empty"]),
        ("method=lora method.targets=x(", ["method.targets", "'x('", "regular expression"]),
        ("method=ia3 method.outputs= method.inputs=", ["method.outputs and method.inputs"]),
        ("method=ia3 method.inputs=)", ["method.inputs", "')'", "regular expression"]),
        ("method=adapters method.width=0", ["method.width is 0", "at least 1"]),
        ("method=pattern method.patterns=", ["method.patterns is empty"]),
        ("method=pattern method.patterns=*", ["method.patterns", "'*'", "regular expression"]),
        ("optimizer.rates=.*", ["optimizer.rates", "'.*'", "REGEX=FACTOR"]),
        ("optimizer.rates=.*=-1", ["optimizer.rates", "REGEX=FACTOR"]),
        ("optimizer.rates=.*=nan", ["optimizer.rates", "REGEX=FACTOR"]),
        ("optimizer.rates=(=2", ["optimizer.rates", "'('", "regular expression"]),
        ("model.dropout_rate=1", ["model.dropout_rate is 1.0", "below 1"]),
        ("model.dropout_rate=-0.1", ["model.dropout_rate is -0.1"]),
        ("model.name_or_path=", ["model.name_or_path is empty"]),
        ("data.inputs_length=0", ["data.inputs_length is 0", "at least 1"]),
        ("data.buckets=some", ["data.buckets is 'some'", "auto"]),
        ("data.buckets=64,256", ["data.buckets has 256", "data.inputs_length is 128"]),
        ("data.targets_length=0", ["data.targets_length is 0"]),
        ("data.max_eval_examples=-1", ["data.max_eval_examples"]),
        ("data.labels=a,b,a", ["data.labels", "'a' twice"]),
        ("data.task=", ["data.task is empty"]),
        ("data.objectives=prefix_lm", ["data.objectives", "data.train"]),
        ("data.objective_weights=1,2", ["data.objective_weights has 2", "data.objectives has 0"]),
        (
            "data.train=d data.objectives=prefix_lm data.objective_weights=0",
            ["data.objective_weights has 0.0", "above 0"],
        ),
        ("data.noise_density=0", ["data.noise_density is 0.0", "above 0"]),
        ("data.noise_density=1", ["data.noise_density is 1.0", "below 1"]),
        ("data.mean_span_length=0.5", ["data.mean_span_length is 0.5", "at least 1"]),
        ("method.length=0", ["method.length is 0", "at least 1"]),
        ("method.init_population=-1", ["method.init_population"]),
        ("evaluation.batch_size=0", ["evaluation.batch_size"]),
        ("evaluation.num_beams=0", ["evaluation.num_beams"]),
        ("evaluation.num_beams=8", ["evaluation.num_beams", "beam"]),
        ("evaluation.min_length=2", ["evaluation.min_length", "greedy or beam"]),
        ("evaluation.repetition_penalty=0", ["evaluation.repetition_penalty", "above 0"]),
        ("evaluation.no_repeat_ngram_size=-1", ["evaluation.no_repeat_ngram_size"]),
        ("mesh.model=0", ["mesh", "model=0"]),
        ("mesh.model=-1", ["mesh", "on one of them"]),
    ],
)
def test_values_that_make_no_sense(overrides: str, parts: list[str]) -> None:
    experiment = apply_overrides(Experiment(), overrides.split(" "))
    with pytest.raises(UserError) as error:
        validate(experiment)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_types_are_looked_at_first() -> None:
    with pytest.raises(UserError, match=r"training\.steps: expected a whole number, got '5'"):
        validate(Experiment(training=Training(steps="5")))  # type: ignore[arg-type]


def test_a_method_that_scores_labels_itself_has_no_tokens_to_average() -> None:
    experiment = Experiment(method=WARP(), evaluation=Evaluation(normalize_length=True))
    with pytest.raises(UserError, match=r"evaluation\.normalize_length is true, but WARP"):
        validate(experiment)
