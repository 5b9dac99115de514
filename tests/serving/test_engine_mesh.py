"""The engine on eight devices computes what it computes on one, quantized models too."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import with_devices
from tests.tiny_run import ROOT, model_folder

CODE = """
import sys
from dataclasses import replace
from pathlib import Path
import jax, numpy as np
from prompt_tuning_jax.inference.setup import build_model, partitioner_of
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.serving.loading import MethodLoader
from prompt_tuning_jax.config.experiment import Experiment, Mesh, Model
from prompt_tuning_jax.methods import LoRA, PrefixTuning
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.shapes import Row
from prompt_tuning_jax.serving.shapes import Shapes, Targets
from prompt_tuning_jax.serving.tasks import PromptValidator
from tests.serving.serving_methods import write_method
from tests.serving.serving_micro import made_prompt

assert len(jax.devices()) == 8
shapes = Shapes(
    lengths=(8,), batch_sizes=(4,), prompt_lengths=(5,), targets=(Targets(number=2, length=2),),
    max_new_tokens=4, slots=4,
)
rows = [
    Row(
        ids=(*range(3, 4 + n), 1), prompt=made_prompt(1 + n, seed=n) if n else None,
        targets=((7, 1), (9, 1)), limit=4,
    )
    for n in range(4)
]
trainable = [Path(sys.argv[2]) / f"{name}.safetensors" for name in ("lora", "prefix")]
for file, method in zip(trainable, (LoRA(rank=2), PrefixTuning(length=3))):
    write_method(file, method, model_fingerprint="")


def answers(model, partitioner, trainable, modes):
    validator = PromptValidator(
        embed_dim=16, fingerprint="", dtype="float32", vocabulary=model.vocabulary
    )
    opened = MethodLoader(model, validator)
    methods = [opened(file)[0].served for file in trainable]
    engine = Engine(
        model, shapes=replace(shapes, modes=modes), cache_rows=4, partitioner=partitioner,
        methods=methods,
    )
    engine.compile()
    scores = []
    if "score" in modes:
        scores += engine.score(rows, engine.program_for("score", rows, 4))
        for method in methods:
            own = [Row(ids=r.ids, prompt=method, targets=r.targets, limit=4) for r in rows]
            scores += engine.score(own, engine.program_for("score", own, 4))
    # Prompts and methods are decoded side by side.
    beside = [Row(ids=rows[3].ids, prompt=method, limit=4) for method in methods]
    decoding = dict(zip((2, 0, 3, 1), [*rows[: 4 - len(beside)], *beside]))
    for slot, row in decoding.items():
        engine.prefill([row], [slot], engine.program_for("generate", [row], 4))
    output = engine.decode(decoding)
    assert (output.position_M > 0).all()
    return np.array(scores), output


# Quantized weights are all read to generate.
for quantization, modes in (("none", ("score", "generate")), ("int8", ("generate",))):
    options = {"quantization": quantization, "dtype": "float32"}
    model = Model(name_or_path=sys.argv[1], dropout_rate=0.0, **options)
    experiment = Experiment(model=model, mesh=Mesh(data=2, fsdp=2, model=2))
    partitioner = partitioner_of(experiment)
    model = build_model(experiment, partitioner=partitioner)
    scores, written = answers(model, partitioner, trainable, modes)
    one, one_written = answers(load_model(sys.argv[1], **options), None, trainable, modes)
    np.testing.assert_allclose(scores, one, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(written, one_written):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    print(quantization)
    trainable = []  # once is enough
"""


@pytest.mark.slow
def test_eight_devices_answer_as_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(model_folder()), str(tmp_path)],
        cwd=ROOT,
        env=with_devices(8),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["none", "int8"]
