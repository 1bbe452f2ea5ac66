"""The KV caches of engines: what they tell about them, and which blocks of prompts they hold. Only ZeroMQ does I/O."""

__all__: list[str] = []
