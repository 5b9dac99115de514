"""Prompts from PEFT give PEFT's logits here, and prompts from here give the same in PEFT."""

import functools
import warnings

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.adapter_file import read_peft, write_peft
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, save_prompt
from prompt_tuning_jax.models.losses import token_sums

MODELS = ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"]


@pytest.fixture(scope="module")
def hf(shared):
    return shared / "fixtures/hf"


@functools.cache
def load(folder):
    return param_tree.split(load_model(str(folder)))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, source, decoder_input, prompt_PD):
    model = param_tree.merge(graphdef, params)
    encoded = model.encode(source, prompt_PD)
    return model.decode(decoder_input, encoded), encoded.hidden_BUD


@pytest.mark.parametrize("kind", ["prompt_sub1", "prompt_sub2"])
@pytest.mark.parametrize("name", MODELS)
def test_imported_prompts_give_the_recorded_numbers(hf, tmp_path, name, kind):
    folder = hf / "peft" / name / kind
    want, inputs = np.load(folder / "cases.npz"), np.load(hf / name / "cases.npz")
    save_prompt(tmp_path / "p.safetensors", load_prompt(folder))
    prompt_PD = load_prompt(tmp_path / "p.safetensors")
    source = inputs["input_ids"] * inputs["attention_mask"]
    logits, hidden = forward(*load(hf / name), source, inputs["decoder_input_ids"], prompt_PD)
    real = inputs["labels"] != -100
    np.testing.assert_allclose(logits[real], want["logits"][real], atol=2e-4)
    sums = token_sums(logits, np.where(real, inputs["labels"], 0))
    np.testing.assert_allclose(sums.loss / sums.tokens, want["loss"], rtol=1e-5)
    seen = np.pad(source != 0, ((0, 0), (len(prompt_PD), 0)), constant_values=True)
    # PEFT's own encoder sees one copy, whichever number is stored.
    np.testing.assert_allclose(hidden[seen], want["encoder_last_hidden_state"][seen], atol=2e-4)


@pytest.fixture(scope="module")
def libraries():
    reason = "PyTorch, transformers or PEFT is not installed (extra: parity)"
    names = ("torch", "transformers", "peft")
    return tuple(pytest.importorskip(name, reason=reason) for name in names)


def in_peft(libraries, model_folder, adapter, inputs):
    torch, transformers, peft = libraries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(model_folder)
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        names = ("input_ids", "attention_mask", "decoder_input_ids", "labels", "task_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        if "decoder_input_ids" in given:  # labels of recorded cases are for the loss alone
            given.pop("labels", None)
        tensors = {name: torch.tensor(array.astype(np.int64)) for name, array in given.items()}
        with torch.no_grad():
            return model(**tensors).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_exported_prompts_give_the_recorded_logits_in_peft(libraries, hf, tmp_path, name):
    folder = hf / "peft" / name / "prompt_sub2"
    want, inputs = np.load(folder / "cases.npz"), np.load(hf / name / "cases.npz")
    write_peft(tmp_path / "a", load_prompt(folder), base_model_name_or_path=str(hf / name))
    got = in_peft(libraries, hf / name, tmp_path / "a", inputs)
    # Padded targets, too: it is the same program, on another machine perhaps.
    np.testing.assert_allclose(got, want["logits"], atol=2e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["t5_1_0", "t5_1_1"])
def test_a_new_model_and_prompt_both_ways(libraries, tmp_path, gated):
    torch, transformers, peft = libraries
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "m")
    settings = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "theirs")

    rng = np.random.default_rng(0)
    mask = np.arange(9) < np.array([9, 5, 2])[:, None]
    source = rng.integers(2, 50, (3, 9)) * mask
    decoder_input = np.pad(rng.integers(2, 50, (3, 4)), ((0, 0), (1, 0)))
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": decoder_input}

    adapter = read_peft(tmp_path / "theirs")
    assert adapter.prompt_PD.shape == (7, 24)
    write_peft(
        tmp_path / "ours",
        adapter.prompt_PD,
        base_model_name_or_path=str(tmp_path / "m"),
        num_layers=3,
        num_attention_heads=4,
    )
    theirs = in_peft(libraries, tmp_path / "m", tmp_path / "theirs", inputs)
    ours = in_peft(libraries, tmp_path / "m", tmp_path / "ours", inputs)
    np.testing.assert_array_equal(ours, theirs)
    here, _ = forward(*load(tmp_path / "m"), source, decoder_input, adapter.prompt_PD)
    np.testing.assert_allclose(here, theirs, atol=2e-4)
    without, _ = forward(*load(tmp_path / "m"), source, decoder_input, adapter.prompt_PD * 0)
    assert np.abs(without - here).max() > 1e-2  # the prompt matters to what is compared
