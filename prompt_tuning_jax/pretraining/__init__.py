"""Making models: text objectives, corpora, initialisation and probes."""
