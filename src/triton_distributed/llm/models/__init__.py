"""The models as callers see them: which there are, their prompts, and answers that go on at another worker."""

__all__: list[str] = []
