"""GGUF: a model and its tokenizer in one file, often quantized, as llama.cpp reads and writes."""
