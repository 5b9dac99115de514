"""Vocabularies: SentencePiece, bytes, Hugging Face tokenizers."""
