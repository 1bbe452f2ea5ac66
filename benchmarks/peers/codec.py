"""msgpack for the peers without a codec. A float32 array is an extension of its raw bytes.

NumPy is imported when an array comes, so that hello world does not pay for it.
"""

from __future__ import annotations

from typing import Any

import msgspec

_FLOAT32 = 1


def _pack(value: Any) -> msgspec.msgpack.Ext:
    import numpy as np

    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return msgspec.msgpack.Ext(_FLOAT32, value.data.cast("B"))
    raise TypeError(f"{type(value).__name__} does not travel here")


def _unpack(code: int, data: memoryview) -> Any:
    import numpy as np

    if code != _FLOAT32:
        raise ValueError(f"unknown extension {code}")
    return np.frombuffer(data, np.float32)


encode = msgspec.msgpack.Encoder(enc_hook=_pack).encode
decode = msgspec.msgpack.Decoder(ext_hook=_unpack).decode
