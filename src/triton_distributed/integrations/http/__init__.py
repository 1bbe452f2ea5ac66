"""The HTTP kit that `triton_distributed.starlette` and `triton_distributed.fastapi` offer.

`app.py` opens and closes the connection, `request.py` ties calls to their HTTP request, `errors.py` answers errors,
`items.py` answers with a stream, and `text.py` writes its bytes.
"""

__all__: list[str] = []
