"""Engines that fit the contract: one file or folder for each."""

__all__: list[str] = []
