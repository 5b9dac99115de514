"""Methods in T5X checkpoints: the original's logits, both ways, and what does not tell itself.

``original_methods.npz`` has logits of the original code (prompt_tuning 72285ee on Flaxformer) for
the tiny checkpoint in ../shared, its batch of ``logits_noprompt.npz``, and the arrays of
``trained_arrays``: ``[4, 6, 4]`` of every 8192nd token.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.t5x.methods import COMBINED, read_method, t5x_arrays
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.checkpoints.tuned_checkpoint import (
    TunedCheckpoint,
    method_of,
    read_tuned,
    save_tuned,
)
from prompt_tuning_jax.config.methods import (
    IA3,
    DeepPrompts,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PromptTuning,
)
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.inference.inspection import describe
from prompt_tuning_jax.inference.loading_methods import attach_stored
from prompt_tuning_jax.inference.t5x_methods import t5x_method
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.t5.config import T5Config

TINY = "fixtures/t5x/tiny_t5x/checkpoint_3"
LOGITS = Path(__file__).with_name("original_methods.npz")
P, D, H, K, F = 5, 4, 2, 2, 8
CONFIG = T5Config(
    vocab_size=16,
    embed_dim=D,
    num_heads=H,
    head_dim=K,
    mlp_dim=F,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
SHARED = "encoder/prompt/prompt/shared_prompt"
TASKS = "encoder/prompt/prompt/task_prompts/embedding"
BLOCKS = ("encoder:attention", "decoder:self_attention", "decoder:encoder_decoder_attention")


def scales(*convs: str) -> dict[str, tuple[int, ...]]:
    """The shapes of IA3's scales; ``i`` is the MLP's."""
    found: dict[str, tuple[int, ...]] = {}
    for block in (*BLOCKS, "encoder:mlp", "decoder:mlp"):
        stack, name = block.split(":")
        for layer in range(2):
            for conv in convs:
                if (conv == "i") != (name == "mlp"):
                    continue
                attribute, shape = ("intermediate", (F,)) if conv == "i" else (conv, (H, K))
                found[f"{stack}/layers_{layer}/{name}/{attribute}_conv/ia3_scaling"] = shape
    return found


LAYERS = {PROMPT: (P, D), **{f"encoder/layers_{i}/prompt/prompt/prompt": (P, D) for i in (0, 1)}}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "ia3": scales("k", "v", "i"),
    "ia3_qk": scales("q", "k"),
    "layers_replace": LAYERS,
    "layers_add": LAYERS,
    "tasks_sum": {SHARED: (3, D), TASKS: (3, 3 * D)},
    "tasks_concatenation": {SHARED: (3, D), TASKS: (3, 2 * D)},
    "tasks_features": {SHARED: (3, 1), TASKS: (3, 3 * (D - 1))},
    "tasks_projection": {SHARED: (3, 2), TASKS: (3, (2 + 1) * D)},
}


def trained_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays with which the logits were recorded."""
    random = np.random.RandomState(len(name))
    found = {}
    for path, shape in sorted(SHAPES[name].items()):
        array = random.normal(size=shape).astype(np.float32)
        found[path] = (1 + 0.3 * array).astype(np.float32) if "ia3" in path else array
    return found


def told(name: str) -> Any:
    way = name.partition("_")[2]
    return way if way in COMBINED else None


@pytest.fixture(scope="module")
def model(shared: Path) -> Model:
    return load_model(str(shared / TINY))


@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_of_the_original(shared: Path, tmp_path: Path, model: Model, name: str) -> None:
    source = shared / TINY
    trained = trained_arrays(name)
    folder = write_t5x(tmp_path, open_t5x(source).stored, step=3, trained=trained)
    stored = t5x_method(folder, model.config, combined=told(name))
    assert stored is not None
    method = method_of(stored, folder)
    shapes = {path: array.shape for path, array in stored.trainable.items()}
    attached = attach_stored(method, model, shapes, labels=(), tasks=1, of="it")
    graphdef, params = param_tree.split(attached)
    with np.load(shared / "fixtures/t5x/logits_noprompt.npz") as batch:
        inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    tasks = np.asarray([2, 0, 2, 1], np.int32) if method.has_tasks else None
    run = jax.jit(lambda own: param_tree.merge(graphdef, own)(inputs, targets, task_B=tasks))
    logits = np.asarray(run({**params, **stored.trainable}))[..., ::8192]
    with np.load(LOGITS) as recorded:
        np.testing.assert_allclose(logits[targets > 0], recorded[name][targets > 0], atol=5e-6)
    # Back under the original's names; what has no effect there starts from the first layer's.
    again = t5x_arrays(method, stored.trainable, CONFIG, of="it")
    assert again.keys() == trained.keys()
    one = read_method(open_t5x(folder).params, CONFIG, of="it", combined=told(name))
    other = read_method(
        open_t5x(write_t5x(tmp_path / "again", again, step=3)).params,
        CONFIG,
        of="it",
        combined=told(name),
    )
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    if not name.startswith("layers"):
        jax.tree.map(np.testing.assert_array_equal, dict(trained), again)


@pytest.mark.parametrize("method", [PromptTuning(), DeepPrompts(), MultitaskPrompts(combine="sum")])
def test_arrays_of_another_method_are_refused(method: MethodConfig) -> None:
    with pytest.raises(UserError, match="it holds method/other, which are not arrays of"):
        t5x_arrays(method, {"method/other": np.zeros((2, D))}, CONFIG, of="it")


def test_commands_on_such_checkpoints(shared: Path, tmp_path: Path) -> None:
    source, trained = shared / TINY, trained_arrays("ia3")
    folder = write_t5x(tmp_path, open_t5x(source).stored, step=3, trained=trained)
    described = describe(str(folder), with_fingerprint=False)
    assert (described["method"], len(described["trained"])) == ("IA3", len(trained))
    file = convert(folder, tmp_path / "ia3.safetensors").path
    assert method_of(read_tuned(file, CONFIG), file) == IA3()
    back = convert(source, tmp_path / "back", to="t5x", prompt=file)
    assert back.what == f"a model with {len(trained)} trained arrays as a T5X checkpoint of step 3"
    params = read_t5x(back.path)
    jax.tree.map(np.testing.assert_array_equal, {n: params[n] for n in trained}, trained)
    slots = open_t5x(back.path).open_state()
    name = "encoder/layers_0/attention/k_conv/ia3_scaling"
    assert [slots[f"param_states/{name}/{slot}"] is not None for slot in ("m", "v", "v_row")]
    # The model is converted without it, and a checkpoint to another as it is.
    hf = convert(folder, tmp_path / "hf", to="hf")
    assert "trained arrays there are left out" in hf.notes[-1]
    same = convert(folder, tmp_path / "same", to="t5x")
    assert read_t5x(same.path).keys() == params.keys()
    with pytest.raises(UserError, match="--combine does not apply"):
        convert(folder, tmp_path / "no.safetensors", combine="sum")
    with pytest.raises(UserError, match=r"--combine sum is about .*checkpoint_3 holds none"):
        convert(source, tmp_path / "no.safetensors", combine="sum")


def test_scanned_layers(shared: Path, tmp_path: Path) -> None:
    """What a method trained is put among layers that are one array, and found there."""
    scanned = shared / "fixtures/t5x/scan_t5x/checkpoint_7"
    config = load_model(str(scanned)).config
    random = np.random.default_rng(0)
    method = DeepPrompts(length=3, mode="add", init="uniform")
    arrays = {"method/vectors/prompts_PD": random.normal(size=(3 * 3, 8)).astype(np.float32)}
    file = tmp_path / "deep.safetensors"
    save_tuned(
        file,
        TunedCheckpoint(trainable=arrays, method=method_to_json(method), metadata=PromptMetadata()),
    )
    folder = convert(scanned, tmp_path / "scan", to="t5x", prompt=file).path
    assert open_t5x(folder).stored["encoder/encoder/prompt/prompt/prompt"].shape == (3, 3, 8)
    stored = t5x_method(folder, config, combined="add")
    assert stored is not None
    jax.tree.map(np.testing.assert_array_equal, dict(stored.trainable), arrays)


def test_files_of_the_originals_checkpointer(shared: Path, tmp_path: Path) -> None:
    for name, array in trained_arrays("layers_add").items():
        with (tmp_path / name.replace("/", ".")).open("wb") as file:
            np.save(file, array)
    first = tmp_path / PROMPT.replace("/", ".")
    with pytest.raises(UserError, match="one of several arrays of a method: give their folder"):
        convert(first, tmp_path.with_suffix(".npy"))
    out, model = tmp_path.with_suffix(".safetensors"), str(shared / TINY)
    with pytest.raises(UserError, match=r"does not tell how .* --combine replace or add"):
        convert(tmp_path, out, model=model)
    convert(tmp_path, out, model=model, combine="add")
    stored = read_tuned(out, CONFIG)
    assert method_of(stored, out) == DeepPrompts(length=P, mode="add", init="uniform")
    assert describe(str(tmp_path))["method"] == "DeepPrompts"


@pytest.mark.parametrize(("largest", "mode"), [(4e-30, "replace"), (3e-9, "add"), (0.0, "")])
def test_the_optimizers_state_tells_what_replaced_the_first_prompt(
    tmp_path: Path, largest: float, mode: str
) -> None:
    state = {f"param_states/{PROMPT}/v": np.full((P, D), largest, np.float32)}
    folder = write_t5x(tmp_path, trained_arrays("layers_add"), step=3, state=state)
    if mode:
        stored = t5x_method(folder, CONFIG)
        assert stored is not None
        assert getattr(method_of(stored, folder), "mode", "") == mode
        return
    with pytest.raises(UserError, match="--combine replace or add"):
        t5x_method(folder, CONFIG)


WRONG: list[tuple[dict[str, tuple[int, ...]], str, str]] = [
    ({PROMPT: (P, D), "encoder/layers_0/prompt/prompt/prompt": (P, D)}, "no encoder/layers_1", ""),
    ({**LAYERS, PROMPT: (P + 1, D)}, r"\[5, 4\] and \[6, 4\]; all must be", ""),
    ({**LAYERS, SHARED: (3, D)}, "no encoder/prompt/prompt/task_prompts", ""),
    ({SHARED: (3, D), TASKS: (3, 3 * D)}, "--combine sum or concatenation$", ""),
    # The sizes of a projection are those of a sum if P is D + 1.
    ({SHARED: (P, D), TASKS: (3, P * D)}, "sum or concatenation or projection$", ""),
    ({SHARED: (3, D), TASKS: (3, 2 * D)}, "--combine sum does not fit it", "sum"),
    ({SHARED: (3, D), TASKS: (3, 2 * D + 1)}, "fit none of the original's", ""),
    ({SHARED: (3, D + 1), TASKS: (3, 2)}, "fits no model of width 4", ""),
    ({**scales("k"), PROMPT: (P, D)}, f"IA3's scales and {PROMPT}", ""),
    ({"encoder/layers_0/attention/k_conv/ia3_scaling": (H, K)}, "no encoder/layers_1/att", ""),
    ({n: (H, K + 1) for n in scales("k")}, r"is \[2, 3\]; this model needs 4", ""),
    ({"decoder/prompts/odd": (P, D)}, "belongs to no method that is read", ""),
]


@pytest.mark.parametrize(("shapes", "message", "combined"), WRONG)
def test_arrays_that_do_not_fit(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str, combined: Any
) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    folder = write_t5x(tmp_path, arrays, step=1)
    with pytest.raises(UserError, match=message):
        t5x_method(folder, CONFIG, combined=combined or None)


def test_what_the_original_does_not_have() -> None:
    low_rank = MultitaskPrompts(combine="low_rank")
    for method, arrays, message in (
        (low_rank, {}, "low_rank has no counterpart"),
        (LoRA(), {}, "lora, which the original code does not have"),
        (DeepPrompts(lengths=(2, 1)), {"method/vectors/prompts_PD": (3, D)}, "have one length"),
        (IA3(), {"model/encoder/layers_0/mlp/wi_0/adapter/scale_F": (F,)}, "no counterpart in the"),
    ):
        made = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
        with pytest.raises(UserError, match=message):
            t5x_arrays(method, made, CONFIG, of="it")


@pytest.mark.parametrize(
    ("method", "arrays", "message"),
    [
        (IA3(), {"model/encoder/layers_0/attention/key/adapter/scale_F": (H * K + 1,)}, "needs 4"),
        (IA3(), {"model/encoder/layers_2/attention/key/adapter/scale_F": (H * K,)}, "layers_2"),
        (DeepPrompts(length=3), {"method/vectors/prompts_PD": (7, D)}, "7 vectors; .* need 3 each"),
        (DeepPrompts(length=3), {"method/vectors/prompts_PD": (6, D + 1)}, r"be \[length, 4\]"),
        (
            MultitaskPrompts(length=3, combine="sum", tasks=2),
            {"method/shared_PD": (3, D + 1), "method/task_NQD": (2, 3, D + 1)},
            "fits no model of width 4",
        ),
        (
            MultitaskPrompts(length=3, decoder_length=2, combine="sum", tasks=2),
            {"method/shared_PD": (5, D), "method/task_NQD": (2, 5, D)},
            "decoder_length is 2, and prompts of the decoder are not written",
        ),
        (
            PromptTuning(length=3, decoder_length=2),
            {"method/prompt_PD": (3, D), "method/decoder_prompt_PD": (2, D)},
            "decoder_length is 2, and prompts of the decoder are not written",
        ),
    ],
)
def test_methods_that_the_models_checkpoint_cannot_hold(
    method: MethodConfig, arrays: dict[str, tuple[int, ...]], message: str
) -> None:
    made = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    with pytest.raises(UserError, match=f"^it.*{message}"):
        t5x_arrays(method, made, CONFIG, of="it")


def test_what_a_checkpoint_does_not_say(shared: Path, tmp_path: Path) -> None:
    """The attention between a prompt's positions, and where it is; another model is named first."""
    arrays = {"method/shared_PD": (3, D), "method/task_NQD": (2, 3, D)}
    made = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    file = tmp_path / "tasks.safetensors"

    def converted(method: MethodConfig, **known: Any) -> str:
        stored = TunedCheckpoint(
            trainable=made, method=method_to_json(method), metadata=PromptMetadata(**known)
        )
        save_tuned(file, stored)
        done = convert(shared / TINY, tmp_path / "out", to="t5x", prompt=file, overwrite=True)
        return " ".join(done.notes)

    tasks = MultitaskPrompts(length=3, combine="sum", tasks=2)
    assert "does not say method.prompt_to_prompt=all" in converted(tasks)
    causal = replace(tasks, prompt_to_prompt="causal")
    assert "does not say" not in converted(causal)
    assert "method.placement=before_eos" in converted(replace(causal, placement="before_eos"))
    with pytest.raises(UserError, match="was trained for another model"):
        converted(IA3(), model_fingerprint="0123456789abcdef")


def test_a_checkpoint_that_is_one_file(shared: Path, tmp_path: Path) -> None:
    """Older checkpoints are an index with all arrays inside; names and bits are the folder's."""
    was = open_t5x(shared / TINY)
    every = {f"target/{name}" for name in was.stored}
    folder = write_t5x(tmp_path, was.stored, step=3, inline=every)
    (tmp_path / "model").mkdir()
    file = (folder / "checkpoint").rename(tmp_path / "model" / "checkpoint_3")
    now = open_t5x(file)
    assert (now.step, now.params.keys()) == (3, was.params.keys())
    for name, array in was.params.items():
        np.testing.assert_array_equal(now.params[name].whole(), array.whole())
    assert describe(str(file), with_fingerprint=False)["parameters"] == 257_856
    # The last of a folder, as for folders; converted, it is a folder again.
    again = convert(file.parent, tmp_path / "again", to="t5x").path
    assert read_t5x(again).keys() == was.params.keys()
    assert len(list(again.iterdir())) > len(was.stored)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"checkpoint_3.* is damaged, or not a T5X index"):
        open_t5x(file)
