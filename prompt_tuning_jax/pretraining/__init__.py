"""Pre-training: text objectives, corpora, initialisations and probes."""
