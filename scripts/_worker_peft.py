"""A worker that runs jobs with Hugging Face PEFT on torch (``_rivals.Worker``)."""

import sys
import time
from typing import Any

import numpy as np
import torch
from _rivals import answer_jobs, peak_memory, read_batches
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import Adafactor, T5ForConditionalGeneration

PAD, IGNORED = 0, -100


class Rival:
    """A frozen T5 with PEFT's prompt tuning."""

    model: Any
    optimizer: Any

    def load(self, *, model: str, dtype: str, prompt: str, dropout: float = 0.0) -> dict[str, Any]:
        """Initializes the prompt from an .npy of ``[P, D]``."""
        start_PD = torch.from_numpy(np.load(prompt, allow_pickle=False))
        base = T5ForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), dropout_rate=dropout
        )
        config = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=len(start_PD),
            num_transformer_submodules=1,
        )
        self.model = get_peft_model(base, config)
        ((_, weight),) = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            weight.copy_(start_PD)
        self.optimizer = Adafactor(
            [weight],
            lr=0.3,
            scale_parameter=False,
            relative_step=False,
            weight_decay=0.0,
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
            labels_BS = targets_BS.masked_fill(targets_BS == PAD, IGNORED)
            loss = self.model(
                input_ids=inputs_BT, attention_mask=(inputs_BT != PAD).long(), labels=labels_BS
            ).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return {"seconds": time.perf_counter() - began, "losses": losses}

    def generate(self, *, batches: str, max_length: int) -> dict[str, Any]:
        """Decodes every batch greedily."""
        pairs = [torch.from_numpy(a).long() for a, _ in read_batches(batches)]
        self.model.eval()
        written = []
        began = time.perf_counter()
        with torch.inference_mode():
            for inputs_BT in pairs:
                ids = self.model.generate(
                    input_ids=inputs_BT,
                    attention_mask=(inputs_BT != PAD).long(),
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
            "memory": peak_memory,
        }
    )
