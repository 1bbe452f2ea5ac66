"""A mock engine: simulates the time, the KV cache and the batches of an engine, and answers by rule."""

__all__: list[str] = []  # `engine.MockEngine` is the engine.
