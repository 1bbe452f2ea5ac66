"""Calls the tokenizer and then the model. Deadline, cancellation and request id reach both by themselves.

trd serve frontend                                  (in this folder)
"""

from collections.abc import AsyncIterator

from contracts import ASK, GENERATE, TOKENIZE, Piece, Question

import triton_distributed as trd


@trd.serve(ASK)
async def ask(question: Question, context: trd.Context) -> AsyncIterator[Piece]:
    print(f"{context.id()} ask", flush=True)
    prompt = await trd.call(TOKENIZE, question)
    async for token in trd.stream(GENERATE, prompt):
        yield Piece(chr(token.id))
