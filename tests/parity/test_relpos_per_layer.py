"""A bias per layer against T5X's recorded numbers, and against transformers' UMT5 itself."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.config import model_type_of
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.inference.api import generate
from prompt_tuning_jax.models.t5.model import T5

EOS = 1
RELPOS = "SelfAttention.relative_attention_bias.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


@pytest.mark.parametrize("variant", ["scan_t5x", "orbax/scan"])
def test_scanned_t5x(shared: Path, variant: str) -> None:
    folder = shared / "fixtures" / "t5x"
    want = np.load(folder / "scan_logits.npz")
    model = load_model(str(folder / variant / "checkpoint_7"))
    assert model.config.relpos_per_layer
    source, target = want["scan_encoder_input_tokens"], want["scan_decoder_target_tokens"]
    logits, hidden = forward(model, source, want["scan_decoder_input_tokens"])
    real = target > 0
    np.testing.assert_allclose(logits[real], want["scan_logits"][real], atol=2e-4)
    np.testing.assert_allclose(
        hidden[source > 0], want["scan_encoder_output"][source > 0], atol=2e-4
    )


def forward(model: T5, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    @jax.jit
    def run(params: Any) -> Any:
        of = param_tree.merge(graphdef, params)
        encoded = of.encode(source)
        return of.decode(target, encoded), encoded.hidden_BUD

    graphdef, params = param_tree.split(model)
    logits, hidden = run(params)
    return np.asarray(logits), np.asarray(hidden)


@pytest.fixture(scope="module", params=["tied", "untied", "relu"])
def umt5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with random weights, and the folder to which transformers has saved it."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return made("UMT5", tmp_path_factory.mktemp(request.param), form=request.param)


def made(family: str, folder: Path, *, form: str) -> tuple[Any, Path]:
    import torch
    import transformers

    untied = form == "untied"
    config = getattr(transformers, f"{family}Config")(
        **SIZES,
        tie_word_embeddings=not untied,
        feed_forward_proj="relu" if form == "relu" else "gated-gelu",
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.zeros(96, 24))
        for name, weight in model.named_parameters():
            scale = 0.7 if RELPOS in name else 0.2 if "lm_head" in name else 0.3
            weight.copy_(torch.randn_like(weight) * scale + ("layer_norm" in name))
        if not untied:  # scaled down before the logits
            model.shared.weight.mul_(8)
    model.save_pretrained(folder)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == untied
    as_it_should_be(model, untied=untied)
    return model, folder


def as_it_should_be(model: Any, *, untied: bool) -> None:
    """transformers 5 scales the output before a UMT5's own head, which 4 does not."""
    model.config.tie_word_embeddings = not untied


def tokens(lengths: list[int], width: int, *, left: bool = False) -> np.ndarray:
    random = np.random.default_rng(len(lengths) + width)
    rows = np.zeros((len(lengths), width), np.int64)
    for row, length in zip(rows, lengths, strict=True):
        at = slice(width - length, None) if left else slice(length)
        row[at] = [*random.integers(2, 96, length - 1), EOS]
    return rows


CASES = {
    "short": (tokens([7, 4, 2], 7), 5),
    "longer than the largest distance": (tokens([60, 33], 60), 40),
    "padding on the left": (tokens([7, 4, 2], 9, left=True), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_umt5_logits_and_encoder_output(umt5: Any, case: str) -> None:
    import torch

    theirs, folder = umt5
    source, length = CASES[case]
    target = np.random.default_rng(0).integers(2, 96, (len(source), length))
    target[:, 0] = 0
    ids = torch.tensor(source)
    with torch.no_grad():
        want = theirs(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            decoder_input_ids=torch.tensor(target),
        )
    model = load_model(str(folder))
    assert model.config.relpos_per_layer
    logits, hidden = forward(model, source, target)
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=2e-4)
    real = source != 0
    np.testing.assert_allclose(
        hidden[real], want.encoder_last_hidden_state.numpy()[real], atol=2e-4
    )


def test_umt5_greedy_and_beams(umt5: Any) -> None:
    import torch

    theirs, folder = umt5
    model = load_model(str(folder))
    source = CASES["short"][0]
    ids = torch.tensor(source)
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 10}
    with torch.no_grad():
        greedy = theirs.generate(**given, do_sample=False, num_beams=1).numpy()
    assert_same_ids(generate(model, source, max_length=10).ids, greedy)
    for penalty in (0.6, 1.0):
        with torch.no_grad():
            want = theirs.generate(
                **given,
                do_sample=False,
                num_beams=4,
                num_return_sequences=4,
                length_penalty=penalty,
                early_stopping=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
        beams = generate(
            model, source, None, "beam", max_length=10, length_penalty=penalty, beam_rule="hf"
        )
        assert_same_ids(beams.ids, want.sequences.numpy().reshape(3, 4, -1))
        scores = want.sequences_scores.numpy().reshape(3, 4)
        np.testing.assert_allclose(beams.scores, scores, atol=1e-3)


def assert_same_ids(ids: np.ndarray, theirs: np.ndarray) -> None:
    """Theirs begin with the start token and end with the longest."""
    expected = np.zeros(ids.shape, np.int32)
    expected[..., : theirs.shape[-1] - 1] = theirs[..., 1:]
    ends_before = np.cumsum(expected == EOS, axis=-1) - (expected == EOS)
    np.testing.assert_array_equal(ids, np.where(ends_before > 0, 0, expected))


def test_umt5_there_and_back(umt5: Any, tmp_path: Path) -> None:
    theirs, folder = umt5
    untied = not theirs.config.tie_word_embeddings
    require_same_model("UMT5", theirs, folder, tmp_path, untied=untied)


def test_mt5_there_and_back(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    theirs, folder = made("MT5", tmp_path / "theirs", form="untied")
    require_same_model("MT5", theirs, folder, tmp_path, untied=True)


def require_same_model(
    family: str, theirs: Any, folder: Path, scratch: Path, *, untied: bool
) -> None:
    """What is read and written here is bit for bit what transformers wrote, and loads the same."""
    import torch
    import transformers

    config, params, _ = open_hf(folder)
    ours = scratch / "ours"
    write_hf(ours, config, params, dtype="stored", model_type=model_type_of(folder))
    assert model_type_of(ours) == family.lower()
    before, after = load_file(folder / "model.safetensors"), load_file(ours / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes()
    again, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(ours, output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    as_it_should_be(again, untied=untied)
    ids = torch.tensor(CASES["short"][0])
    with torch.no_grad():
        one, other = (
            m.eval()(input_ids=ids, decoder_input_ids=ids[:, :3]).logits for m in (theirs, again)
        )
    assert torch.equal(one, other)
