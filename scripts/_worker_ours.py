"""A worker that runs jobs with this package (``_rivals.Worker``)."""

import os
import time
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from _rivals import answer_jobs, peak_memory, read_batches, versions

from prompt_tuning_jax.config.experiment import Experiment, Model, Optimizer, Training
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.inference.setup import attach_members, build_model, partitioner_of
from prompt_tuning_jax.methods import PROMPT, PromptTuning
from prompt_tuning_jax.models.quantization import bytes_of
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.step import step_cost


class Ours:
    """A frozen model and E prompts."""

    experiment: Experiment
    members: Any
    frozen_of_step: Any
    step: Any
    state: Any

    def load(
        self,
        *,
        model: str,
        dtype: str,
        prompt: str,
        dropout: float = 0.0,
        members: int = 1,
        batch_size: int = 16,
        prompt_to_input: bool = True,
        weights: Literal["dequantized", "quantized"] = "dequantized",
    ) -> dict[str, Any]:
        """Initializes every member with the given prompt, an .npy of ``[P, D]``."""
        start_PD = np.load(prompt, allow_pickle=False)
        self.experiment = experiment = Experiment(
            model=Model(
                name_or_path=model,
                dtype=dtype,
                param_dtype=dtype,
                dropout_rate=dropout,
                weights=weights,
            ),
            method=PromptTuning(
                length=len(start_PD), init="uniform", prompt_to_input=prompt_to_input
            ),
            optimizer=Optimizer(weight_decay=0.0),
            training=Training(seeds=tuple(range(members)), batch_size=batch_size),
        )
        loaded = build_model(experiment)
        self.members = attach_members(experiment, loaded, labels=())
        # A step that loops over layers has them stacked; ranking and generation do not.
        of_step = build.with_stacked_layers(
            experiment,
            replace(self.members, frozen=dict(self.members.frozen)),
            partitioner_of(experiment),
        )
        self.frozen_of_step = of_step.frozen
        self.state, self.step, _ = build.build_step(experiment, of_step)
        start_EPD = jnp.broadcast_to(start_PD, (members, *start_PD.shape))
        self.state = self.state.__class__(
            step=self.state.step,
            trainable={PROMPT: start_EPD + jnp.zeros_like(start_EPD)},
            opt_state=self.state.opt_state,
        )
        return {"frozen_mb": bytes_of(self.members.frozen) / 1e6}

    def train(self, *, batches: str) -> dict[str, Any]:
        """Runs a step per batch, the same for all members; returns seconds and losses."""
        pairs = [self._batch(*pair) for pair in read_batches(batches)]
        losses = []
        began, cpu = time.perf_counter(), time.process_time()
        for pair in pairs:
            self.state, metrics = self.step(self.state, self.frozen_of_step, pair)
            losses.append(metrics.loss_E)
        losses = [np.asarray(loss_E).tolist() for loss_E in losses]
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "losses": losses,
        }

    def generate(self, *, batches: str, max_length: int) -> dict[str, Any]:
        """Decodes every batch greedily."""
        inputs = [inputs_BT for inputs_BT, _ in read_batches(batches)]
        writing = DecodeConfig(strategy="greedy", max_length=max_length)
        written = []
        began = time.perf_counter()
        for tokens_BT in inputs:
            written.append(
                write(
                    self.members.graphdef,
                    writing,
                    self.state.trainable,
                    self.members.frozen,
                    tokens_BT,
                    jax.random.key(0),
                )[0]
            )
        ids = [row.tolist() for ids_EBS in written for row in np.asarray(ids_EBS)[0]]
        return {"seconds": time.perf_counter() - began, "written": ids}

    def rank(self, *, batches: str, labels: list[list[int]]) -> dict[str, Any]:
        """Chooses the most probable label for every input."""
        inputs = [inputs_BT for inputs_BT, _ in read_batches(batches)]
        labels_CS = np.asarray(labels, np.int32)
        began = time.perf_counter()
        scores = [
            label_scores(
                self.members.graphdef,
                self.state.trainable,
                self.members.frozen,
                tokens_BT,
                labels_CS,
                self.members.number,
            )
            for tokens_BT in inputs
        ]
        chosen = [int(c) for s in scores for c in np.asarray(s)[0].argmax(-1)]
        return {"seconds": time.perf_counter() - began, "chosen": chosen}

    def flops(self, *, batches: str) -> dict[str, Any]:
        """Returns the FLOPs of the products of one step on the first batch."""
        pair = self._batch(*read_batches(batches)[0])
        cost = step_cost(self.step, self.state, self.frozen_of_step, pair)
        return {"flops": cost.flops}

    def memory(self) -> dict[str, float]:
        """Returns the memory of this process, and the peak of what JAX had on a GPU, in MB."""
        stats = jax.devices()[0].memory_stats() or {}
        return {**peak_memory(), "device_peak_mb": stats.get("peak_bytes_in_use", 0) / 1e6}

    def _batch(self, inputs_BT: np.ndarray, targets_BS: np.ndarray) -> dict[str, np.ndarray]:
        pair = {"inputs": inputs_BT, "targets": targets_BS}
        return {k: np.repeat(v[None], self.members.number, axis=0) for k, v in pair.items()}

    def matmul_peak(self, *, dtype: str, size: int = 2048) -> dict[str, Any]:
        """Returns the best FLOP/s of several runs of one large matrix product."""
        return {"flops_per_second": product_rate(size, size, size, dtype)}


def product_rate(rows: int, width: int, out: int, dtype: str) -> float:
    """Returns the best FLOP/s of products ``[rows, width] x [width, out]``, summed in float32."""
    x, kernel = jnp.ones((rows, width), dtype), jnp.ones((width, out), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(x, kernel).block_until_ready()
    best = float("inf")
    for _ in range(30):  # a short pause of the machine must not pass for its peak
        began = time.perf_counter()
        product(x, kernel).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * rows * width * out / best


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    ours = Ours()
    answer_jobs(
        {
            "load": ours.load,
            "train": ours.train,
            "generate": ours.generate,
            "rank": ours.rank,
            "flops": ours.flops,
            "matmul_peak": ours.matmul_peak,
            "memory": ours.memory,
            "versions": versions,
        }
    )
