"""Sends a picture of 4 million pixels and gets smaller and smaller pictures back, all as arrays.

    pip install numpy
    python examples/numpy_arrays/client.py

Start server.py in another shell.
"""

import asyncio

import numpy as np

from triton_distributed.runtime import DistributedRuntime, triton_worker

SHADES = " .:-=+*#%@"
SIDE = 2048
DRAWN = 32  # height of the picture that is printed


def rings() -> np.ndarray:
    """Three rings on a dark ground, float32, 0 to 1."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIDE, dtype=np.float32)] * 2)
    shades: np.ndarray = np.clip(np.cos(10 * np.hypot(x, y)), 0, 1)
    return shades


def draw(image: np.ndarray) -> str:
    """Return an image as text; each pixel is two characters wide, because characters are tall."""
    return "\n".join("".join(2 * SHADES[int(value * 9.99)] for value in row) for row in image)


def describe(image: np.ndarray) -> str:
    height, width = image.shape
    return f"{height:>4} x {width:<4} {image.dtype}, {image.nbytes:>10,} bytes, mean {image.mean():.4f}"


@triton_worker()
async def worker(runtime: DistributedRuntime):
    client = await runtime.endpoint("examples.pyramid.shrink").client()
    await client.wait_for_instances()

    image = rings()
    print(f"sent      {describe(image)}")
    async for smaller in client.generate(image, annotated=False):
        print(f"received  {describe(smaller)}")
        if len(smaller) == DRAWN:
            print(draw(smaller))


if __name__ == "__main__":
    asyncio.run(worker())
