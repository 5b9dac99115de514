"""Decoder-only language models: Llama, SmolLM2, Mistral, Qwen, Gemma, GPT-2, BLOOM and others."""
