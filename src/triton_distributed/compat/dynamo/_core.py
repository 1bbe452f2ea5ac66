"""The same names under Dynamo's module `_core`, which some of its programs import from."""

from triton_distributed.compat.dynamo import *  # noqa: F403
