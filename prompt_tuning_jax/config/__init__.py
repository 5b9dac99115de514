"""What an experiment is: dataclasses, overrides, validation, config files and gin."""
