"""The OpenAI API as an ASGI app: `pip install 'triton-distributed[llm]'`. See docs/llm/openai-api.md.

async with Models(connection) as models:
    app.mount("/llm", openai_app(models))
"""

from triton_distributed.llm.http.app import OpenAIApp, openai_app

__all__ = ["OpenAIApp", "openai_app"]
