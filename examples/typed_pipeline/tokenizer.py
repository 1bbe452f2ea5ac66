"""Turns a text into ids.

trd serve tokenizer                                  (in this folder)
"""

from contracts import TOKENIZE, Prompt, Question

import triton_distributed as trd


@trd.serve(TOKENIZE)
def tokenize(question: Question, context: trd.Context) -> Prompt:
    print(f"{context.id()} tokenize", flush=True)
    return Prompt([ord(letter) for letter in question.text])
