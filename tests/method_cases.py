"""The table of methods that the contract is tested on, and a short training of any of them.

A new method adds a line to ``CASES``: its config for the micro model, and the closed form of its
docstring with the micro model's sizes put in.  ``LM_CASES`` are the same for a decoder-only model.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.config.experiment import Experiment, Mesh, Model, Optimizer, Training
from prompt_tuning_jax.inference.setup import Members, attach_members, partitioner_of
from prompt_tuning_jax.methods import (
    CPT,
    IA3,
    WARP,
    Adapters,
    AdaptionPrompt,
    ADePT,
    Cartridge,
    DeepPrompts,
    DePT,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PatternTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    ResidualPrompt,
    SuperPosPrompt,
)
from prompt_tuning_jax.models.base import Model as BaseModel
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.optim import make_optimizer
from prompt_tuning_jax.training.step import TrainStep, init_state
from prompt_tuning_jax.typing import HostArray
from tests.micro import EOS, ONE_LAYER, D, V, Words, make_batch, make_t5
from tests.tiny_lm import make_lm

LABELS = ("alpha", "beta", "gamma")
STEPS, ROWS = 3, 8
H_K = ONE_LAYER.num_heads * ONE_LAYER.head_dim
F, BUCKETS = ONE_LAYER.mlp_dim, ONE_LAYER.relpos_num_buckets
# One layer in the encoder, and one in the decoder that has two attentions.
ATTENTIONS = 1 + 2 * 1
# An attention has four maps, a gated mlp three; the table and the logits' kernel; norms and biases.
WHOLE = (
    ATTENTIONS * 4 * D * H_K
    + 2 * 3 * D * F
    + 2 * V * D
    + (2 + 3 + 2) * D
    + 2 * ONE_LAYER.num_heads * BUCKETS
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method's config, and how many parameters it trains on the micro model."""

    method: MethodConfig
    count: int
    lm: bool = False


CASES: dict[str, Case] = {
    "prompt_tuning": Case(method=PromptTuning(length=5, init_population=0), count=5 * D),
    "prompt_in_decoder": Case(
        method=PromptTuning(length=0, decoder_length=3, init_population=0), count=3 * D
    ),
    "full": Case(method=FullTuning(), count=WHOLE),
    "lora": Case(
        method=LoRA(rank=2, alpha=4, dropout=0.1),
        count=2 * 2 * (D + H_K) * ATTENTIONS,
    ),
    "lora_stabilized_everywhere": Case(
        method=LoRA(rank=4, rank_stabilized=True, targets=(".*",)),
        count=4 * (ATTENTIONS * 4 * (D + H_K) + 2 * 3 * (D + F) + D + V),
    ),
    "lora_of_more": Case(
        method=LoRA(
            rank=2,
            ranks=(".*/embed_tokens=1", "encoder/.*=3"),
            alphas=("encoder/.*=2",),
            dora=True,
            embeddings=(".*/embed_tokens",),
            parameters=("decoder/logits_dense/kernel",),
        ),
        # The attention of the encoder, the two of the decoder, two uses of the table, and the head.
        count=2 * (3 * (D + H_K) + H_K) + 4 * (2 * (D + H_K) + H_K) + 2 * (V + D + D) + D * V,
    ),
    "lora_copies": Case(
        method=LoRA(rank=2, targets=(".*/query",), copies=("decoder/embed_tokens",)),
        count=2 * (D + H_K) * ATTENTIONS + V * D,
    ),
    "ia3": Case(method=IA3(), count=2 * H_K * ATTENTIONS + 2 * F),
    "adapters_houlsby": Case(method=Adapters(width=4), count=(2 + 3) * (2 * D * 4 + 4 + D)),
    "adapters_pfeiffer": Case(
        method=Adapters(kind="pfeiffer", width=3, activation="gelu", biases=False),
        count=2 * 2 * D * 3,
    ),
    "pattern": Case(
        method=PatternTuning(), count=(2 + 3 + 2) * D + 2 * ONE_LAYER.num_heads * BUCKETS
    ),
}

CASES |= {
    "prefix_tuning": Case(
        method=PrefixTuning(length=3, init_population=0), count=2 * 3 * H_K * ATTENTIONS
    ),
    "prefix_tuning_mlp": Case(
        method=PrefixTuning(length=3, hidden=6, encoder=False, before=True),
        count=2 * (3 * D + (D + 1) * 6 + (6 + 1) * 2 * H_K),
    ),
    "cartridge": Case(
        method=Cartridge(length=3, init_population=0), count=2 * 3 * H_K * ATTENTIONS
    ),
    "p_tuning_lstm": Case(
        method=PTuning(length=3, hidden=4, dropout=0.1, template="{prompt} it {prompt:1} {input}"),
        count=4 * D + 10 * 4 * D + 36 * 4**2 + 34 * 4 + D,
    ),
    "p_tuning_mlp": Case(
        method=PTuning(
            length=2, hidden=4, encoder="mlp", template="{prompt} a {input:2} b {input}"
        ),
        count=2 * D + (D + 1) * 4 + (4 + 1) * 4 + (4 + 1) * D,
    ),
    "residual_prompt": Case(
        method=ResidualPrompt(length=3, hidden=4, dropout=0.1, init_population=0),
        count=3 * D + (2 * D + 1) * 4 + 3 * D,
    ),
    "residual_prompt_separate": Case(
        method=ResidualPrompt(
            length=3, network="separate", hidden=4, layer_norm=False, init_population=0
        ),
        count=3 * D + 3 * ((2 * D + 1) * 4 + D),
    ),
    "superpos_prompt": Case(method=SuperPosPrompt(length=3, num_tokens=7), count=3 * 7),
    "superpos_prompt_trained": Case(
        method=SuperPosPrompt(length=3, num_tokens=2, trains_embeddings=True), count=(3 + D) * 2
    ),
    "dept": Case(
        method=DePT(length=3, rank=2, max_length=5, init_population=0),
        count=3 * D + 2 * (5 + D),
    ),
    "adept": Case(
        method=ADePT(length=3, hidden=4, init_population=0),
        count=3 * D + (2 * D + 1) * 4 + D,
    ),
    "deep_prompts": Case(method=DeepPrompts(length=3, init_population=0), count=3 * D),
    "deep_prompts_mlp": Case(
        method=DeepPrompts(lengths=(3,), hidden=5), count=3 * D + (D + 1) * 5 + (5 + 1) * D
    ),
    "warp": Case(method=WARP(length=2, init_population=0), count=(2 + len(LABELS)) * D),
    "multitask_low_rank": Case(
        method=MultitaskPrompts(length=3, rank=2, init_population=0), count=3 * D + 2 * (3 + D)
    ),
    "multitask_in_decoder": Case(
        method=MultitaskPrompts(length=3, decoder_length=2, rank=2, init_population=0),
        count=5 * D + 2 * (5 + D),
    ),
    "multitask_sum": Case(
        method=MultitaskPrompts(length=3, combine="sum", init_population=0), count=2 * 3 * D
    ),
    "multitask_concatenation": Case(
        method=MultitaskPrompts(
            length=3, combine="concatenation", task_length=2, init_population=0
        ),
        count=(3 + 2) * D,
    ),
    "multitask_features": Case(
        method=MultitaskPrompts(length=3, combine="features", shared_features=5, init_population=0),
        count=3 * 5 + 3 * (D - 5),
    ),
    "multitask_projection": Case(
        method=MultitaskPrompts(
            length=3,
            combine="projection",
            shared_features=2,
            init_population=0,
            prompt_to_prompt="causal",
        ),
        count=3 * 2 + (2 + 1) * D,
    ),
}


# The decoder-only model: one layer, biases on queries, keys and values, its own output head.
LM_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "embed_dim": D,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": F,
    "num_layers": 1,
    "qkv_bias": True,
    "token_ids": TokenIds(pad=0, eos=EOS, start=-1),
}
H_K_LM, G_K = 4 * 4, 2 * 4
LM_BIASES_AND_NORMS = H_K_LM + 2 * G_K + 3 * D
LM_CASES: dict[str, Case] = {
    name: Case(method=CASES[name].method, count=CASES[name].count, lm=True)
    for name in (
        *("prompt_tuning", "p_tuning_lstm", "p_tuning_mlp", "deep_prompts", "deep_prompts_mlp"),
        *("residual_prompt", "residual_prompt_separate", "superpos_prompt", "dept", "adept"),
        "superpos_prompt_trained",
        *("warp", "multitask_low_rank", "multitask_sum", "multitask_concatenation"),
        *("multitask_features", "multitask_projection"),
    )
} | {
    name: Case(method=CASES[name].method, count=count, lm=True)
    for name, count in {
        "full": 2 * V * D + 2 * D * H_K_LM + 2 * D * G_K + 3 * D * F + LM_BIASES_AND_NORMS,
        "lora": 2 * (2 * D + H_K_LM + G_K),
        "lora_stabilized_everywhere": 4 * (2 * (D + H_K_LM) + 2 * (D + G_K) + 3 * (D + F) + D + V),
        "ia3": 2 * G_K + F,
        "adapters_houlsby": 2 * (2 * D * 4 + 4 + D),
        "adapters_pfeiffer": 2 * D * 3,
        "pattern": LM_BIASES_AND_NORMS,
        "prefix_tuning": 2 * 3 * G_K,
        "prefix_tuning_mlp": 3 * D + (D + 1) * 6 + (6 + 1) * 2 * G_K,
        "cartridge": 2 * 3 * G_K,
    }.items()
}
# Two examples: the inputs' three words and the template's two change, and no answer does.
LM_CASES["cpt"] = Case(
    method=CPT(
        examples=("a bb", "alpha", "ccc", "beta"),
        demonstration="{inputs} : {targets}",
        epsilon=9.0,
        format_epsilon=9.0,
    ),
    count=5 * D,
    lm=True,
)

LM_CASES["adaption_prompt"] = Case(method=AdaptionPrompt(length=3), count=3 * D + 1, lm=True)

# Trained for the contract: each is seconds of compiling, and one of each method shows it.
ONE_OF_EACH = tuple({type(case.method): name for name, case in reversed(CASES.items())}.values())
# The model's dropout is the step's and no method's, and half of what a step takes to compile.
WITH_DROPOUT = ("lora",)
# Those whose arrays have axes that others do not have.
ON_A_MESH = tuple(
    [
        *("full", "lora", "ia3", "adapters_houlsby", "prefix_tuning", "warp"),
        *("multitask_low_rank", "dept", "adept"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Members after a few steps: as attached, tuned arrays before and after, losses by step."""

    of: Experiment
    members: Members
    step: TrainStep
    before: dict[str, HostArray]
    after: dict[str, HostArray]
    losses: HostArray
    fill: int


@functools.cache
def model(dropout_rate: float = 0.1, *, lm: bool = False) -> BaseModel:
    """The micro model that methods are attached to; attaching leaves it as it is."""
    made: BaseModel = make_t5(ONE_LAYER, dropout_rate=dropout_rate)
    if lm:
        made = make_lm("llama", dropout_rate=dropout_rate, **LM_SIZES)
    made.vocabulary = Words(made.token_ids)
    return made


def experiment(
    method: MethodConfig,
    *,
    seeds: tuple[int, ...] = (0, 1),
    mesh: Mesh | None = None,
    dropout_rate: float = 0.1,
) -> Experiment:
    return Experiment(
        model=Model(dropout_rate=dropout_rate),
        method=method,
        optimizer=Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0),
        training=Training(seeds=seeds, batch_size=ROWS, steps=STEPS, gradient_accumulation=1),
        mesh=mesh or Mesh(),
    )


@functools.cache
def trained(
    name: str, seeds: tuple[int, ...] = (0, 1), mesh: Mesh | None = None, *, lm: bool = False
) -> Trained:
    """A few steps of the real step, each member with the batches of its seed."""
    rate = 0.1 if name in WITH_DROPOUT and not lm else 0.0
    case = (LM_CASES if lm else CASES)[name]
    of = experiment(case.method, seeds=seeds, mesh=mesh, dropout_rate=rate)
    members = attach_members(of, model(rate, lm=lm), labels=LABELS)
    state, step, _ = build.build_step(of, members)
    before = {key: np.array(array) for key, array in state.trainable.items()}
    fill = model(rate, lm=lm).token_ids.fill
    done = Trained(
        of=of,
        members=members,
        step=step,
        before=before,
        after={},
        losses=np.zeros(0),
        fill=fill,
    )
    after, losses = steps_from(done, before)
    return dataclasses.replace(done, after=after, losses=losses)


def steps_from(
    done: Trained, trainable: dict[str, HostArray], *, first_batch: int = 0
) -> tuple[dict[str, HostArray], HostArray]:
    """Tuned arrays and losses after a few steps from these; member 0 starts at another batch."""
    of, members = done.of, done.members
    partitioner = partitioner_of(of)
    like = members.trainable
    start = {key: jax.device_put(array, like[key].sharding) for key, array in trainable.items()}
    state = init_state(start, make_optimizer(of.optimizer, members.mask), partitioner=partitioner)
    losses = []
    for at in range(STEPS):
        batches = [make_batch(2, ROWS, seed=at + first_batch), make_batch(2, ROWS, seed=at)]
        batch = {
            key: np.stack([batches[seed][key][seed] for seed in of.training.seeds])
            for key in batches[0]
        }
        if of.method.scores_labels:  # on targets that are labels
            batch["targets"] = label_targets(batch["targets"])
        batch = {key: np.where(rows == 0, done.fill, rows) for key, rows in batch.items()}
        if not partitioner.is_single_device:
            batch = dict(partitioner.shard_batch(batch, ("ensemble", "batch", "length")))
        state, metrics = done.step(state, members.frozen, batch)
        losses.append(np.asarray(metrics.loss_E))
    return {key: np.array(array) for key, array in state.trainable.items()}, np.stack(losses)


def label_targets(targets_EBS: HostArray) -> HostArray:
    """Targets of this shape that are labels, in turns."""
    rows = [[*Words().encode(label), EOS] for label in LABELS]
    targets = np.zeros_like(targets_EBS)
    for place in np.ndindex(targets.shape[:2]):
        row = rows[(place[0] + targets_EBS[place][0]) % len(rows)]
        targets[place][: len(row)] = row
    return targets
