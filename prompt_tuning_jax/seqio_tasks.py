"""Importing this module registers the tasks and mixtures of the 2021 code in SeqIO, for T5X.

``--gin.MIXTURE_OR_TASK_MODULE="'prompt_tuning_jax.seqio_tasks'"``: the strings and ids are those of
this library.  Two environment variables, read at import, say what the names do not:

  PROMPT_TUNING_JAX_DATA_DIR    official files or data that TFDS prepared, see
                                ``data.tasks.t5_tasks.official_files`` (default: TFDS's own folder)
  PROMPT_TUNING_JAX_VOCABULARY  a SentencePiece file, or ``bytes`` for ByT5's vocabulary (default:
                                T5's, gs://t5-data/vocabs/cc_all.32000.100extra/...)

A name that SeqIO has already, from the t5 package for instance, stays as it is.
"""

import os

from prompt_tuning_jax.data.tasks.t5_tasks.registry import ALIASES, TASKS
from prompt_tuning_jax.data.tasks.to_seqio import register_with_seqio_vocabulary, seqio_vocabulary

T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"

register_with_seqio_vocabulary(
    seqio_vocabulary(os.environ.get("PROMPT_TUNING_JAX_VOCABULARY") or T5_VOCABULARY),
    names=(*(task.name for task in TASKS), *ALIASES),
    data_dir=os.environ.get("PROMPT_TUNING_JAX_DATA_DIR", ""),
    skip_known=True,
)
