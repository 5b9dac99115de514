"""The recorded examples of the original, and the same rows through the tables' preprocessors."""

import functools
import json

from prompt_tuning_jax.data.tasks.t5_tasks.registry import preprocess_in_form
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS

NAMES = {
    **{
        short: f"super_glue_{short}_v102"
        for short in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "axb", "axg")
    },
    **{f"glue_{short}": f"glue_{short}_v002" for short in ("sst2", "mrpc", "rte")},
}


def task_of(short, split):
    if short == "wsc":
        return T5_TASKS[f"super_glue_wsc_v102_simple_{'train' if split == 'train' else 'eval'}"]
    return T5_TASKS[NAMES.get(short, f"{short}_v002")]


@functools.cache
def recorded(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def tfds_rows(line):
    """All TFDS rows of a recorded line, made from the official row where only two are recorded."""
    if len(line["tfds"]) == len(line["examples"]) or "tfds_note" not in line:
        return line["tfds"]
    if line["task"] == "multirc":
        passage = line["raw"]["passage"]
        return [
            {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer.get("label", -1),
                "idx": {
                    "paragraph": line["raw"]["idx"],
                    "question": question["idx"],
                    "answer": answer["idx"],
                },
            }
            for question in passage["questions"]
            for answer in question["answers"]
        ]
    passage = line["raw"]["passage"]
    text = passage["text"]

    def spans(entities):
        return sorted({text[e["start"] : e["end"] + 1] for e in entities})

    return [
        {
            "passage": text,
            "query": query["query"],
            "entities": spans(passage["entities"]),
            "answers": sorted({answer["text"] for answer in query.get("answers", ())}),
            "idx": {"passage": line["raw"]["idx"], "query": query["idx"]},
        }
        for query in line["raw"]["qas"]
    ]


def examples_of(line, form):
    task = task_of(line["task"], line["split"])
    preprocess = preprocess_in_form(
        task.preprocess, form, has_task_word=task.has_task_word, index=task.index
    )
    return [example for row in tfds_rows(line) for example in preprocess(row)]
