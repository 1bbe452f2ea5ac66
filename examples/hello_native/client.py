"""Calls the worker and prints each word as it arrives.

python examples/hello_native/client.py
"""

from worker import HELLO

import triton_distributed as trd

with trd.connect_sync() as here:
    for word in here.stream(HELLO, "remote feels local"):
        print(word)
