"""L2: the networks: Wan DiT, its cache, text encoder, codecs."""
