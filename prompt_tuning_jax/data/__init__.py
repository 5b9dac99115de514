"""Examples as text, as tokens and as batches; importing this imports no TensorFlow and no JAX."""
