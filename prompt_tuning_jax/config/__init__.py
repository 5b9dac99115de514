"""The config of an experiment: dataclasses, overrides, validation, config files and gin."""
