"""Pre-training: text objectives, corpora, initializations and probes."""
