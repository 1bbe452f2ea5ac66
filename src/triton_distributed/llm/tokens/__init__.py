"""Text to tokens and back: tokenizers, incremental detokenizing, stop texts, chat templates. No I/O."""

__all__: list[str] = []
