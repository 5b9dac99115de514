"""A worker that runs jobs with Hugging Face PEFT on torch (``_rivals.Worker``)."""

import sys
import time
from typing import Any

import numpy as np
import torch
from _rivals import answer_jobs, peak_memory, read_batches, versions
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import Adafactor, AutoConfig, AutoModelForCausalLM, T5ForConditionalGeneration

PAD, IGNORED = 0, -100


class Rival:
    """A frozen T5, or a decoder-only model, with PEFT's prompt tuning."""

    model: Any
    optimizer: Any
    schedule: Any
    causal: bool
    device: str

    def load(
        self,
        *,
        model: str,
        dtype: str,
        prompt: str,
        dropout: float = 0.0,
        learning_rate: float = 0.3,
        decay_steps: int = 0,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """Initializes the prompt from an .npy of ``[P, D]``.

        The learning rate falls linearly to 0 in ``decay_steps`` steps; 0: it is constant.
        ``device`` is torch's name of it.
        """
        self.device = device
        start_PD = torch.from_numpy(np.load(prompt, allow_pickle=False))
        self.causal = not AutoConfig.from_pretrained(model).is_encoder_decoder
        if self.causal:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        else:
            base = T5ForConditionalGeneration.from_pretrained(
                model, dtype=getattr(torch, dtype), dropout_rate=dropout
            )
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM if self.causal else TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=len(start_PD),
            num_transformer_submodules=1,
        )
        self.model = get_peft_model(base, config).to(device)
        ((_, weight),) = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            weight.copy_(start_PD)
        self.optimizer = Adafactor(
            [weight],
            lr=learning_rate,
            scale_parameter=False,
            relative_step=False,
            weight_decay=0.0,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - step / decay_steps if decay_steps else 1.0
        )
        return {}

    def train(self, *, batches: str) -> dict[str, Any]:
        """Runs a step per batch; returns seconds and losses."""
        pairs = [
            (torch.from_numpy(a).long(), torch.from_numpy(b).long())
            for a, b in read_batches(batches)
        ]
        self.model.train()
        losses = []
        began = time.perf_counter()
        for inputs_BT, targets_BS in pairs:
            loss = self.model(**self._arguments(inputs_BT, targets_BS)).loss
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        losses = [float(loss) for loss in losses]  # which waits for the device
        return {"seconds": time.perf_counter() - began, "losses": losses}

    def rank(self, *, batches: str, labels: list[list[int]]) -> dict[str, Any]:
        """Chooses the most probable label of every input of a decoder-only model."""
        pairs = [torch.from_numpy(a).long() for a, _ in read_batches(batches)]
        self.model.eval()
        chosen: list[int] = []
        began = time.perf_counter()
        with torch.inference_mode():
            for inputs_BT in pairs:
                scores = [self._log_probs(inputs_BT, label) for label in labels]
                chosen += torch.stack(scores).argmax(0).tolist()
        return {"seconds": time.perf_counter() - began, "chosen": chosen}

    def _log_probs(self, inputs_BT: torch.Tensor, label: list[int]) -> torch.Tensor:
        targets_BS = torch.tensor(label)[None].expand(len(inputs_BT), -1)
        arguments = self._arguments(inputs_BT, targets_BS)
        labels_BU = arguments.pop("labels")
        logits_BUV = self.model(**arguments).logits[:, -labels_BU.shape[1] :].float()
        log_probs_BUV = logits_BUV[:, :-1].log_softmax(-1)
        next_BU = labels_BU[:, 1:]
        at_next_BU = log_probs_BUV.gather(-1, next_BU.clamp(min=0)[..., None])[..., 0]
        return (at_next_BU * (next_BU != IGNORED)).sum(-1)

    def memory(self) -> dict[str, float]:
        """Returns the memory of this process, and the peak of what torch had on a GPU, in MB."""
        peak = torch.cuda.max_memory_allocated() if self.device != "cpu" else 0
        return {**peak_memory(), "device_peak_mb": peak / 1e6}

    def _arguments(self, inputs_BT: torch.Tensor, targets_BS: torch.Tensor) -> dict[str, Any]:
        arguments = self._on_host(inputs_BT, targets_BS)
        return {name: array.to(self.device) for name, array in arguments.items()}

    def _on_host(self, inputs_BT: torch.Tensor, targets_BS: torch.Tensor) -> dict[str, Any]:
        if not self.causal:
            return {
                "input_ids": inputs_BT,
                "attention_mask": (inputs_BT != PAD).long(),
                "labels": targets_BS.masked_fill(targets_BS == PAD, IGNORED),
            }
        # Padding is -1, since every id may be real.  Rows are input and target, padded behind.
        rows = [(a[a >= 0], b[b >= 0]) for a, b in zip(inputs_BT, targets_BS, strict=True)]
        width = max(len(a) + len(b) for a, b in rows)
        ids_BU = torch.zeros((len(rows), width), dtype=torch.long)
        mask_BU, labels_BU = torch.zeros_like(ids_BU), torch.full_like(ids_BU, IGNORED)
        for n, (a, b) in enumerate(rows):
            ids_BU[n, : len(a) + len(b)] = torch.cat([a, b])
            mask_BU[n, : len(a) + len(b)] = 1
            labels_BU[n, len(a) : len(a) + len(b)] = b
        return {"input_ids": ids_BU, "attention_mask": mask_BU, "labels": labels_BU}

    def generate(self, *, batches: str, max_length: int) -> dict[str, Any]:
        """Decodes every batch greedily."""
        pairs = [torch.from_numpy(a).long() for a, _ in read_batches(batches)]
        self.model.eval()
        written = []
        began = time.perf_counter()
        with torch.inference_mode():
            for inputs_BT in pairs:
                ids = self.model.generate(
                    input_ids=inputs_BT.to(self.device),
                    attention_mask=(inputs_BT != PAD).long().to(self.device),
                    max_new_tokens=max_length,
                    do_sample=False,
                )
                written += ids[:, 1:].tolist()
        return {"seconds": time.perf_counter() - began, "written": written}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    rival = Rival()
    answer_jobs(
        {
            "load": rival.load,
            "train": rival.train,
            "generate": rival.generate,
            "rank": rival.rank,
            "memory": rival.memory,
            "versions": versions,
        }
    )
