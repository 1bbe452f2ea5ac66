"""`python -m tests.guards.settings` prints the rows of docs/settings.md, which has them in three tables."""

from __future__ import annotations

from triton_distributed.config import environment_reference


def rows() -> list[str]:
    """One Markdown row a setting: variable, default, meaning."""
    return [
        f"| `{variable}` | {f'`{default}`' if default and ' ' not in default else default or 'none'} | {meaning} |"
        for variable, default, meaning in environment_reference()
    ]


def table() -> str:
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows()])


if __name__ == "__main__":
    print(table())
