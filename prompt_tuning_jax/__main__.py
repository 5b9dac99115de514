"""``python -m prompt_tuning_jax`` is ``prompt-tuning``."""

import sys

from prompt_tuning_jax.cli import main

sys.exit(main())
