"""Tasks: T5's own, SeqIO's, and files of examples."""
