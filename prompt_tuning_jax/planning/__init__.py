"""What a step costs on chips that are not here: compiled for them, read from the program."""
