"""Takes an image and streams it back at half the size, a quarter, an eighth: arrays in, arrays out.

    pip install numpy
    python examples/numpy_arrays/server.py

Then run client.py in another shell.
"""

from collections.abc import Iterator

import numpy as np
import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker


class Pyramid:
    """A plain generator: it runs in a thread, and the event loop stays free while it computes."""

    def shrink(self, image: np.ndarray) -> Iterator[np.ndarray]:
        while min(image.shape) > 1:
            height, width = (side // 2 for side in image.shape)
            image = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
            yield image


@triton_worker()
async def worker(runtime: DistributedRuntime):
    await runtime.endpoint("examples.pyramid.shrink").serve_endpoint(Pyramid().shrink)


if __name__ == "__main__":
    uvloop.run(worker())
