"""GGUF: a model and its tokenizer in one file, often quantised, as llama.cpp reads and writes."""
