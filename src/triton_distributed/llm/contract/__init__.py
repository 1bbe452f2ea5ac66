"""The engine contract: what an engine gets, what it answers, and how its model is described. No I/O."""

__all__: list[str] = []  # Programs import these names from `triton_distributed.llm`.
