"""Frozen encoders and decoder that all models of a family share: codec, text encoder, tokenizer, negative prompt."""
