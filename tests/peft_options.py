"""Adapters with PEFT's options that PEFT wrote with random values, and its logits with each.

``tests/checkpoints/peft_options`` holds a folder for each of ``CASES``.  With the extra ``parity``,
``python -m tests.peft_options`` writes them again.
"""

import functools
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.models.base import Model
from tests.micro import ONE_LAYER, make_t5, token_rows
from tests.tiny_lm import make_lm

RECORDED = Path(__file__).parent / "checkpoints/peft_options"
LOGITS = "logits.npy"
SOURCE, TARGET = token_rows([5, 3], 5), token_rows([3, 2], 3, seed=1)
ROWS = np.asarray([[5, 9, 4, 11, 7], [3, 8, 2, 6, 13]])  # for decoder-only models


@dataclass(frozen=True, kw_only=True)
class Case:
    """The options of an adapter, and the method that it is read as.  ``family`` is its model's."""

    family: str
    options: dict[str, Any]
    method: LoRA

    @property
    def is_t5(self) -> bool:
        return self.family.startswith("t5")

    def model(self) -> Model:
        return _model(self.family)


@functools.cache
def _model(family: str) -> Model:
    if family == "gpt2":
        sizes = {"num_heads": 3, "num_kv_heads": 3, "mlp_dim": 48, "position_offset": 0}
        return make_lm("gpt2", model_type="gpt2", num_layers=1, **sizes)
    if family == "llama":
        return make_lm("llama", tie_embeddings=True)
    return make_t5(replace(ONE_LAYER, tie_embeddings=family == "t5_tied"))


CASES = {
    "t5": Case(
        family="t5",
        options={
            "target_modules": ["q", "embed_tokens"],
            "modules_to_save": ["lm_head", "final_layer_norm"],
            "rank_pattern": {"embed_tokens": 1, r".*decoder.*\.q": 3},
            "alpha_pattern": {"encoder.embed_tokens": 5},
            "use_rslora": True,
            "use_dora": True,
        },
        method=LoRA(
            rank=3,
            alpha=3.0,
            ranks=(".*/(embed_tokens)=1", ".*/(attention/query)=2"),
            alphas=("encoder/embed_tokens=5",),
            rank_stabilized=True,
            dora=True,
            targets=(".*/(query)",),
            embeddings=(".*/(embed_tokens)",),
            parameters=(".*/(decoder_norm/scale|encoder_norm/scale|logits_dense/kernel)",),
        ),
    ),
    "t5_tied": Case(
        family="t5_tied",
        options={
            "target_modules": ["wo", "lm_head"],
            "modules_to_save": ["embed_tokens"],
            "bias": "lora_only",
        },
        method=LoRA(
            rank=2,
            alpha=3.0,
            targets=(".*/(wo)",),
            embeddings=(".*/(tied_logits)",),
            copies=(".*/(embed_tokens)",),
        ),
    ),
    "gpt2": Case(
        family="gpt2",
        options={
            "target_modules": ["c_attn", "wte"],
            "modules_to_save": ["lm_head", "ln_f"],
            "bias": "all",
            "use_dora": True,
        },
        method=LoRA(
            rank=2,
            alpha=3.0,
            dora=True,
            targets=(".*/(key|query|value)",),
            embeddings=(".*/(embed_tokens)",),
            copies=(".*/(tied_logits)",),
            parameters=(
                ".*/(decoder_norm/bias|decoder_norm/scale|key/bias|out/bias|"
                "pre_mlp_layer_norm/bias|pre_self_attention_layer_norm/bias|query/bias|"
                "value/bias|wi/bias|wo/bias)",
            ),
        ),
    ),
    "llama": Case(
        family="llama",
        options={
            "target_modules": ["q_proj", "down_proj", "lm_head"],
            "modules_to_save": ["embed_tokens"],
            "rank_pattern": {r"model\.layers\.1\..*": 1},
            "alpha_pattern": {"down_proj|lm_head": 4.5},
        },
        method=LoRA(
            rank=2,
            alpha=4.5,
            ranks=("decoder/layers_1/mlp/wo=1", "decoder/layers_1/self_attention/query=1"),
            alphas=(".*/(query)=3",),
            targets=(".*/(query|wo)",),
            embeddings=(".*/(tied_logits)",),
            copies=(".*/(embed_tokens)",),
        ),
    ),
}


def logits_in_peft(libraries: Any, case: Case, adapter: Any, folder: Path) -> np.ndarray:
    """PEFT's logits; ``adapter`` is a config or a folder, and one from a config is written there.

    The values of the latter are moved at random.
    """
    torch, transformers, peft = libraries
    with tempfile.TemporaryDirectory() as base, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = case.model()
        write_hf(base, model.config, param_tree.split(model)[1], dtype="float32")
        kind = (
            transformers.AutoModelForSeq2SeqLM if case.is_t5 else transformers.AutoModelForCausalLM
        )
        theirs = kind.from_pretrained(base, attn_implementation="eager")
        if isinstance(adapter, Path):
            theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        else:
            theirs = peft.get_peft_model(theirs, adapter).eval()
            torch.manual_seed(0)
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            theirs.peft_config["default"].base_model_name_or_path = case.family
            theirs.save_pretrained(folder)
        if case.is_t5:
            starts = np.pad(TARGET, ((0, 0), (1, 0)))[:, :-1]
            given = {
                "input_ids": SOURCE,
                "attention_mask": SOURCE != 0,
                "decoder_input_ids": starts,
            }
        else:
            given = {"input_ids": ROWS}
        tensors = {name: torch.tensor(array.astype(np.int64)) for name, array in given.items()}
        made: np.ndarray = theirs(**tensors).logits.numpy()
        return made


def main() -> None:
    """Records all cases."""
    import peft
    import torch
    import transformers

    for name, case in CASES.items():
        task = "SEQ_2_SEQ_LM" if case.is_t5 else "CAUSAL_LM"
        config = peft.LoraConfig(r=2, lora_alpha=3, task_type=task, **case.options)
        folder = RECORDED / name
        logits = logits_in_peft((torch, transformers, peft), case, config, folder)
        np.save(folder / LOGITS, logits)
        (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
