"""L2: networks: Wan DiT, its KV cache, text encoder, codecs."""
