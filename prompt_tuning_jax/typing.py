"""Array aliases and the glossary of dimension letters.

A name that ends in capitals carries its shape: ``prompt_PD`` is ``[prompt length, model width]``.

=  =====================  =  =====================  =  ==================
B  batch                  D  model width            V  vocabulary
T  encoder input length   H  attention heads        N  tasks (or rows)
S  target length          K  width of one head      E  ensemble members
P  prompt length          F  mlp width              L  layers
U  P + T, encoder positions                         C  candidate labels
=  =====================  =  =====================  =  ==================
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
HostArray: TypeAlias = np.ndarray
DType: TypeAlias = jax.typing.DTypeLike

# Parameters by their path, e.g. "encoder/layers_0/mlp/wi_0/kernel"; the names are T5X's.
FlatParams: TypeAlias = dict[str, Array]
# Whether each parameter trains, by path.  A method makes it; nothing else decides what trains.
Mask: TypeAlias = Mapping[str, bool]
# Token ids and weights by name; arrays of a training batch have a leading axis E.
Batch: TypeAlias = Mapping[str, Array | HostArray]
