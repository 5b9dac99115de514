import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.inspect import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.models.t5.config import PRESETS, T5Config
from tests.devices import with_devices

CONFIG = T5Config(
    vocab_size=100,
    embed_dim=12,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


def random_params(config: T5Config) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_does_not_depend_on_how_the_model_is_held() -> None:
    import jax.numpy as jnp

    params = random_params(CONFIG)
    this = fingerprint(CONFIG, params)
    assert len(this) == 16
    assert int(this, 16) >= 0
    backwards = {name: params[name] for name in reversed(params)}
    assert fingerprint(CONFIG, backwards) == this
    rounded = {name: p.astype(ml_dtypes.bfloat16) for name, p in params.items()}
    assert fingerprint(CONFIG, rounded) == this
    assert fingerprint(CONFIG, {name: np.asfortranarray(p) for name, p in params.items()}) == this
    assert fingerprint(CONFIG, {name: jnp.asarray(p) for name, p in rounded.items()}) == this


@pytest.mark.parametrize(
    "name",
    [
        "hf/b_t5_11",
        "t5x/scan_t5x/checkpoint_7",
        "families/gpt2",
        "families/t5gemma",
        "families/vit",
    ],
)
def test_of_a_checkpoint_reads_a_part_of_it(shared: Path, name: str) -> None:
    """Fused, stacked and reshaped arrays too."""
    opened = open_source(str(shared / "fixtures" / name))
    whole = {name: array.whole() for name, array in opened.params.items()}
    wanted = fingerprint(opened.config, whole)
    read = []

    def counting(array: LazyArray) -> LazyArray:
        def part(index: Index) -> np.ndarray:
            found = array.read(index)
            read.append(found.size)
            return found

        return dataclasses.replace(array, read=part)

    params = {name: counting(array) for name, array in opened.params.items()}
    assert fingerprint_of(dataclasses.replace(opened, params=params)) == wanted
    assert sum(read) < sum(array.size for array in whole.values())


def test_notices_other_weights_names_shapes_and_configurations() -> None:
    params = random_params(CONFIG)
    seen = {fingerprint(CONFIG, params)}
    for name in params:
        seen.add(fingerprint(CONFIG, params | {name: params[name] * 1.1}))
        seen.add(fingerprint(CONFIG, params | {name: np.concatenate([params[name]] * 2)}))
        seen.add(fingerprint(CONFIG, {k: p for k, p in params.items() if k != name}))
    for change in ({"relpos_max_distance": 64}, {"layer_norm_eps": 1e-5}, {"num_heads": 3}):
        seen.add(fingerprint(dataclasses.replace(CONFIG, **change), params))
    assert len(seen) == 1 + 3 * len(params) + 3


def test_a_field_added_later_leaves_fingerprints_as_they_are() -> None:
    @dataclass(frozen=True, kw_only=True)
    class LaterConfig(T5Config):
        relpos_per_layer: bool = False

    params = random_params(CONFIG)
    later = LaterConfig(**vars(CONFIG))
    assert fingerprint(later, params) == fingerprint(CONFIG, params)
    per_layer = dataclasses.replace(later, relpos_per_layer=True)
    assert fingerprint(per_layer, params) != fingerprint(CONFIG, params)


def test_is_the_same_today_as_when_prompts_were_saved_with_it() -> None:
    counted = {
        name: (np.arange(np.prod(shape)) % 251).reshape(shape).astype(np.float32)
        for name, shape in parameter_shapes(CONFIG).items()
    }
    assert fingerprint(CONFIG, counted) == "c522a98fec9d0c40"


def test_takes_no_time() -> None:
    config = PRESETS["tiny"]
    params = random_params(config)
    fingerprint(config, params)
    start = perf_counter()
    fingerprint(config, params)
    assert perf_counter() - start < 0.2


ON_A_MESH = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from test_fingerprint import CONFIG, random_params

params = random_params(CONFIG)
mesh = jax.make_mesh((2, 2), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
for spec in (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec("model", "fsdp")):
    sharded = {
        name: jax.device_put(p, NamedSharding(mesh, PartitionSpec(*spec[: p.ndim])))
        for name, p in params.items()
    }
    print(fingerprint(CONFIG, sharded))
"""


def test_sharded_parameters() -> None:
    root = Path(__file__).parents[2]
    environment = with_devices(4, PYTHONPATH=f"{root}:{Path(__file__).parent}", JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [fingerprint(CONFIG, random_params(CONFIG))] * 3


def test_imports_are_light() -> None:
    modules = ("t5x", "hf", "prompt_file", "fingerprint", "train_state")
    heavy = {"orbax", "flax", "tensorstore", "tensorflow", "sentencepiece"}
    imports = "; ".join(f"import prompt_tuning_jax.checkpoints.{module}" for module in modules)
    code = f"import sys; {imports}; print(*{heavy} & sys.modules.keys())"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"
