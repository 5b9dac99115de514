"""A worker that answers requests with PEFT, one adapter at a time (``_rivals.Worker``).

There is no network: arrivals are a list.  A batch consists of the request that has waited longest
and others for the same adapter.
"""

import sys
import time
from typing import Any

import numpy as np
import torch
from _rivals import answer_jobs
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import T5ForConditionalGeneration

MAX_BATCH = 16  # rows in a batch


class Rival:
    """A frozen T5 with an adapter for each task."""

    model: Any

    def load(self, *, model: str, dtype: str, prompts: list[str]) -> dict[str, Any]:
        """Adds an adapter for each file, an .npy of ``[P, D]``."""
        base = T5ForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
        for number, file in enumerate(prompts):
            start_PD = torch.from_numpy(np.load(file, allow_pickle=False))
            config = PromptTuningConfig(
                task_type=TaskType.SEQ_2_SEQ_LM,
                num_virtual_tokens=len(start_PD),
                num_transformer_submodules=1,
            )
            if number == 0:
                self.model = get_peft_model(base, config, adapter_name="task_0")
            else:
                self.model.add_adapter(f"task_{number}", config)
            with torch.no_grad():
                self.model.prompt_encoder[f"task_{number}"].embedding.weight.copy_(start_PD)
        self.model.eval()
        return {}

    def answer(
        self, *, at: list[float], task: list[int], ids: list[list[int]], max_length: list[int]
    ) -> dict[str, Any]:
        """Returns the seconds from each arrival (``at``, ascending) to its response."""
        began = time.perf_counter()
        waiting: list[int] = []
        latencies = [0.0] * len(at)
        coming = 0
        with torch.inference_mode():
            while waiting or coming < len(at):
                now = time.perf_counter() - began
                while coming < len(at) and at[coming] <= now:
                    waiting.append(coming)
                    coming += 1
                if not waiting:
                    time.sleep(max(0.0, at[coming] - now))
                    continue
                adapter = task[waiting[0]]
                batch = [one for one in waiting if task[one] == adapter][:MAX_BATCH]
                waiting = [one for one in waiting if one not in batch]
                rows, longest = [ids[i] for i in batch], max(max_length[i] for i in batch)
                self._answer_batch(adapter, rows, longest)
                now = time.perf_counter() - began
                for one in batch:
                    latencies[one] = now - at[one]
        return {"latencies": latencies}

    def _answer_batch(self, task: int, rows: list[list[int]], max_length: int) -> None:
        longest = max(map(len, rows))
        inputs_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.model.set_adapter(f"task_{task}")
        self.model.generate(
            input_ids=inputs_BT,
            attention_mask=(inputs_BT != 0).long(),
            max_new_tokens=max_length,
            do_sample=False,
        )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    rival = Rival()
    answer_jobs({"load": rival.load, "answer": rival.answer})
