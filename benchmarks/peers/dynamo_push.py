"""Dynamo with handlers that push their items into a `response_sender`; see dynamo.py."""

from benchmarks.peers.dynamo import Pushed

make = Pushed
