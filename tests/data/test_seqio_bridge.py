"""All in one file: importing SeqIO takes seconds, and its registry belongs to the process."""

import functools

import numpy as np
import pytest

from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.from_seqio import from_seqio
from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task, seqio_names, task_names
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.to_seqio import register_in_seqio
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError

LENGTHS = {"inputs": 12, "targets": 4}
ROWS = [
    {"inputs": "how are you", "targets": "bad", "idx": 4, "answers": ["a", "ü"], "group": [1, 2]},
    {"inputs": "a text of many words, more than fit into the length", "targets": "good", "idx": 5},
    {"inputs": "naïve ☃", "targets": "bad", "idx": 6},
]
CLASSES = ["bad", "good"]
seen_by_postprocessor: list = []


def to_class(text, example=None, is_target=False, label_classes=()):
    seen_by_postprocessor.append((text, example, is_target))
    return label_classes.index(text) if text in label_classes else -1


def accuracy_and_counts(targets, predictions):
    import seqio

    right = [t == p for t, p in zip(targets, predictions, strict=True)]
    return {
        "accuracy": 100 * np.mean(right),
        "number": seqio.metrics.Scalar(len(right)),
        "table": seqio.metrics.Text("not a number"),
    }


def of_scores(targets, scores):
    return {"mean": float(np.mean(scores))}


def dataset_fn(split, shuffle_files=False):
    import tensorflow as tf

    rows = [{"answers": [], "group": [0], **row} for row in ROWS if split == "train"] or [ROWS[0]]
    signature = {
        "inputs": tf.TensorSpec((), tf.string),
        "targets": tf.TensorSpec((), tf.string),
        "idx": tf.TensorSpec((), tf.int32),
        "answers": tf.TensorSpec((None,), tf.string),
        "group": tf.TensorSpec((None,), tf.int32),
    }
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)


@pytest.fixture(scope="module")
def vocabulary(tiny_model_dir):
    return Vocabulary(tiny_model_dir / "spiece.model")


@pytest.fixture(scope="module")
def seqio(vocabulary):
    import seqio

    features = {
        key: seqio.Feature(seqio.SentencePieceVocabulary(str(vocabulary.path)), add_eos=True)
        for key in LENGTHS
    }

    def add(name, *, copy=True, **fields):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset_fn, splits=("train", "validation")),
            preprocessors=[
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=copy),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=features,
            **fields,
        )

    add(
        "theirs",
        postprocess_fn=functools.partial(to_class, label_classes=CLASSES),
        metric_fns=[accuracy_and_counts, of_scores],
    )
    add("ids_only", copy=False)
    seqio.MixtureRegistry.add("inner", [("ids_only", 2.0)])
    seqio.MixtureRegistry.add("both", [("theirs", 3.0), ("inner", 1.0)])
    yield seqio
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()


def test_texts_and_other_features_come_through(seqio):
    examples = list(from_seqio("theirs").load("train"))
    assert examples[0] == ROWS[0]
    assert examples[1] == {**ROWS[1], "answers": [], "group": [0]}
    assert len(list(from_seqio("theirs").load("validation"))) == 1


def test_tokens_are_those_that_seqio_makes(seqio, vocabulary, tmp_path):
    # Where SeqIO gives ids alone, a character that the vocabulary lacks is lost on the way.
    for name, number in (("theirs", 3), ("ids_only", 2)):
        examples = tokenize(
            from_seqio(name),
            "train",
            vocabulary,
            inputs_length=LENGTHS["inputs"],
            targets_length=LENGTHS["targets"],
            cache_dir=tmp_path,
        )
        assert examples.num_inputs_cut == 1
        assert_same_ids(
            seqio.get_mixture_or_task(name), "train", examples.select(np.arange(number))
        )


def assert_same_ids(seqio_task, split, examples):
    lengths = {"inputs": examples.inputs_length, "targets": examples.targets_length}
    dataset = seqio_task.get_dataset(sequence_length=lengths, split=split, shuffle=False)
    dataset = dataset.take(len(examples))
    everything = np.arange(len(examples))
    inputs = examples.inputs.padded(everything, examples.inputs_length)
    targets = examples.targets.padded(everything, examples.targets_length)
    count = 0
    for example, own_inputs, own_targets in zip(
        dataset.as_numpy_iterator(), inputs, targets, strict=True
    ):
        for theirs, own in ((example["inputs"], own_inputs), (example["targets"], own_targets)):
            assert theirs.tolist() == own[own > 0].tolist()
        count += 1
    assert count == len(examples)


def test_scores_are_computed_from_decoded_predictions(seqio):
    task = from_seqio("theirs")
    assert task.labels == ("bad", "good")
    seen_by_postprocessor.clear()
    scores = task.score(list(task.load("train")), ["bad", "neither", "good"])
    assert scores == {
        "accuracy": pytest.approx(100 / 3),
        "number": 3.0,
        "invalid": pytest.approx(100 / 3),
    }
    text, example, is_target = seen_by_postprocessor[0]
    assert (text, is_target) == ("bad", True)
    # As SeqIO's evaluator shows it: bytes and numpy arrays.
    assert example["targets_pretokenized"] == b"bad"
    assert example["idx"] == 4 and example["idx"].dtype.kind == "i"
    assert list(example["answers"]) == [b"a", "ü".encode()]
    assert example["group"].tolist() == [1, 2]


def test_mixtures_bring_their_rates(seqio):
    mixture = from_seqio("both")
    rates = {task.name: rate for task, rate in zip(mixture.tasks, mixture.rates, strict=True)}
    assert rates == {"theirs": 3.0, "ids_only": 1.0}


def test_seqio_names_are_task_names(seqio):
    assert {"theirs", "ids_only", "inner", "both"} <= set(seqio_names())
    assert {"theirs", "both", "word_valence"} <= set(task_names())
    assert get_task("theirs").name == "theirs"
    assert get_mixture("both").rates == from_seqio("both").rates
    for look_up in (get_task, from_seqio):
        with pytest.raises(UserError, match="did you mean 'theirs'"):
            look_up("their")


def test_the_fingerprint_knows_split_task_and_code(seqio):
    prints = [from_seqio("theirs").fingerprint(split) for split in ("train", "validation")]
    prints.append(from_seqio("ids_only").fingerprint("train"))
    assert len(set(prints)) == 3
    assert from_seqio("theirs").fingerprint("train") == prints[0]


def test_our_tasks_in_seqio_give_the_same_ids_and_scores(seqio, vocabulary, tmp_path):
    register_in_seqio(vocabulary)
    assert "word_valence" not in seqio_names()  # ours stays ours
    theirs = seqio.get_mixture_or_task("word_valence")
    task = get_task("word_valence")
    examples = tokenize(
        task,
        "test",
        vocabulary,
        inputs_length=6,
        targets_length=LENGTHS["targets"],
        cache_dir=tmp_path,
    )
    assert examples.num_inputs_cut > 0
    assert_same_ids(theirs, "test", examples)
    truth = [row["targets"] for row in examples.texts]
    guesses = ["positive", "maybe"] * (len(truth) // 2) + ["negative"] * (len(truth) % 2)
    found = {}
    for metric in theirs.metric_fns:
        found.update(metric(truth, guesses))
    own = task.score(examples.texts, guesses)
    assert found == {name: own[name] for name in ("accuracy", "f1_macro")}


def test_seqios_evaluator_takes_our_tasks(seqio, vocabulary):
    """The predictions of an oracle score 100 there."""
    if "word_valence" not in seqio.TaskRegistry.names():
        register_in_seqio(vocabulary)
    evaluator = seqio.Evaluator(
        mixture_or_task_name="word_valence",
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="test",
        sequence_length=LENGTHS,
    )

    def oracle(dataset, model_feature_shapes=None):
        return [
            (int(index), features["decoder_target_tokens"].tolist())
            for index, features in dataset.as_numpy_iterator()
        ]

    results, _ = evaluator.evaluate(
        compute_metrics=True, predict_fn=oracle, score_fn=lambda *_, **__: []
    )
    assert results.result()["word_valence"] == {"accuracy": 100, "f1_macro": 100}


@pytest.mark.parametrize("name", ["my_anli:1.0.0", "super_glue/rte:1.0.2"])
def test_a_task_whose_data_are_missing(name, tmp_path, monkeypatch):
    """TFDS tells it in many ways, none of them one line."""
    import seqio

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    task = f"missing_{name.partition(':')[0].replace('/', '_')}"
    seqio.TaskRegistry.add(
        task,
        source=seqio.TfdsDataSource(tfds_name=name, tfds_data_dir=str(tmp_path)),
        preprocessors=[],
        output_features={},
    )
    try:
        for call in (lambda: get_mixture(task), lambda: list(get_task(task).load("train"))):
            with pytest.raises(UserError, match=f"{task}.*--data_dir.*tfds build") as error:
                call()
            assert "\n" not in str(error.value)
    finally:
        seqio.TaskRegistry.remove(task)


def test_the_fingerprint_knows_which_part_of_which_data_a_split_is(monkeypatch):
    import seqio

    fingerprints = set()
    for part, size in (("train", 10), ("train[:5]", 10), ("train", 11)):
        monkeypatch.setattr(seqio.LazyTfdsLoader, "size", lambda self, split, size=size: size)
        source = seqio.TfdsDataSource(tfds_name="a/b:1.0.0", splits={"train": part})
        seqio.TaskRegistry.add("part", source=source, preprocessors=[], output_features={})
        try:
            fingerprints.add(get_task("part").source.fingerprint("train", ""))
        finally:
            seqio.TaskRegistry.remove("part")
    assert len(fingerprints) == 3


def test_each_folder_has_its_own_data():
    import seqio

    source = seqio.TfdsDataSource(tfds_name="a/b:1.0.0", splits={"train": "train"})
    seqio.TaskRegistry.add("folders", source=source, preprocessors=[], output_features={})
    try:
        task = get_task("folders")
        for folder in ("one", "two"):
            with pytest.raises(UserError, match=f"not prepared in {folder}"):
                list(task.load("train", folder))
    finally:
        seqio.TaskRegistry.remove("folders")


def test_a_task_finds_its_data_in_the_folder_that_is_named(monkeypatch):
    import seqio

    seen = []
    monkeypatch.setattr(seqio, "set_tfds_data_dir_override", seen.append)
    build_mixture(Data(task="word_valence", data_dir="DIR"))
    build_mixture(Data(task="word_valence"))
    assert seen == ["DIR"]
