"""The command line: ``prompt-tuning COMMAND``."""
