"""The runtime's metrics by name. docs/metrics.md has the same list, with what to watch."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One metric: all lines with its name.

    Attributes:
        name: as on the page of Prometheus' text format; the lines of a histogram add `_bucket`, `_count`, `_sum`.
        kind: `counter`, `gauge` or `histogram`.
        labels: the labels of each line. The program's `metrics_labels` follow where `endpoint` is one that it serves.
        text: what it counts.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


SERVED = ("endpoint",)  # With the program's own labels.
CALLED = ("endpoint",)

REQUESTS = Family("triton_requests_total", "counter", (*SERVED, "outcome"), "Requests that have ended here.")
REQUEST_DURATION = Family(
    "triton_request_duration_seconds", "histogram", SERVED, "From a request's arrival to its end, if its handler began."
)
REQUEST_FIRST_ITEM = Family(
    "triton_request_first_item_seconds", "histogram", SERVED, "From a request's arrival to its first item."
)
REQUEST_QUEUE = Family(
    "triton_request_queue_seconds",
    "histogram",
    SERVED,
    "From a request's arrival to its admission.",
)
REQUEST_LOOP_WAIT = Family(
    "triton_request_loop_wait_seconds",
    "histogram",
    SERVED,
    "From a request's admission to the first step of its handler: its wait for the event loop.",
)
IN_FLIGHT = Family("triton_requests_in_flight", "gauge", SERVED, "Requests that were admitted and have not ended.")
QUEUED = Family("triton_requests_queued", "gauge", SERVED, "Requests that wait for a place.")
LIMIT = Family("triton_requests_limit", "gauge", SERVED, "The limit of requests in flight: max_inflight.")
SERVING = Family(
    "triton_endpoint_serving", "gauge", SERVED, "1 if the endpoint takes requests and discovery lists it, else 0."
)
ITEMS = Family("triton_items_sent_total", "counter", SERVED, "Items of handlers that ended well.")

CALLS = Family("triton_calls_total", "counter", (*CALLED, "outcome"), "Calls that have ended in this process.")
CALL_DURATION = Family("triton_call_duration_seconds", "histogram", CALLED, "From the start of a call to its end.")
CALL_FIRST_ITEM = Family(
    "triton_call_first_item_seconds", "histogram", CALLED, "From a streaming call to the arrival of its first item."
)
CALLS_IN_FLIGHT = Family("triton_calls_in_flight", "gauge", CALLED, "Calls under way.")
RETRIES = Family("triton_call_retries_total", "counter", CALLED, "Requests sent again, from the beginning.")
RESUMES = Family("triton_call_resumes_total", "counter", CALLED, "Streams continued by another instance.")
HEDGES = Family("triton_call_hedges_total", "counter", CALLED, "Second attempts beside a slow first one.")
INSTANCES = Family("triton_instances", "gauge", (*CALLED, "state"), "Instances of a called endpoint.")
EJECTIONS = Family("triton_ejections_total", "counter", CALLED, "Instances that were left out because they failed.")

SESSIONS = Family("triton_sessions", "gauge", ("role",), "Open sessions with other runtimes.")
BYTES = Family("triton_session_bytes_total", "counter", ("direction",), "Bytes of all sessions.")
STREAMS = Family("triton_streams", "gauge", (), "Open streams of all sessions.")
BLOCKED = Family(
    "triton_streams_blocked", "gauge", (), "Streams that may not send until their reader at the other end reads."
)
HELD = Family("triton_held_bytes", "gauge", (), "Memory for the data of clients, without small requests.")
HELD_LIMIT = Family("triton_held_limit_bytes", "gauge", (), "The limit of that memory, TRD_MAX_HELD_BYTES.")
SHARED = Family("triton_shared_memory_bytes", "gauge", (), "Shared memory for the arrays that this process sends.")
SHARED_LIMIT = Family(
    "triton_shared_memory_limit_bytes", "gauge", (), "The limit of that memory, TRD_SHARED_MEMORY_BYTES; 0 for none."
)
LAG = Family("triton_loop_lag_seconds", "histogram", (), "How late timers of the event loop ran.")
STALLS = Family(
    "triton_loop_stalls_total", "counter", (), "Number of stalls: the event loop was stuck for TRD_WATCHDOG_S."
)
STALLED = Family("triton_loop_stalled_seconds_total", "counter", (), "Duration of all stalls.")
STUCK = Family(
    "triton_loop_stuck_seconds", "gauge", (), "For how long the event loop has been stuck now; 0 while it turns."
)
THREADS = Family("triton_handler_threads", "gauge", ("state",), "Plain handlers by the state of their threads.")
THREADS_LIMIT = Family(
    "triton_handler_threads_limit", "gauge", (), "The limit of plain handlers that run, TRD_THREADS."
)
DISCOVERY_UP = Family(
    "triton_discovery_up", "gauge", ("backend",), "1 if discovery answered when it was last asked, else 0."
)
DISCOVERY_AGE = Family("triton_discovery_age_seconds", "gauge", ("backend",), "Seconds since discovery last answered.")
NATS_UP = Family("triton_nats_connected", "gauge", (), "1 while connected to NATS, else 0; absent if NATS is not used.")
NATS_RECONNECTIONS = Family(
    "triton_nats_reconnections_total", "counter", (), "Lost connections to NATS that were made again."
)
CERTIFICATES = Family(
    "triton_certificate_end_timestamp_seconds",
    "gauge",
    ("setting",),
    "The earliest expiry of a certificate in the file that the setting names, in seconds since 1970.",
)
DRAINING = Family("triton_draining", "gauge", (), "1 while the process shuts down, else 0.")
INFO = Family("triton_runtime_info", "gauge", ("version", "build", "instance_id"), "Always 1.")
LEFT_OUT = Family(
    "triton_metrics_left_out", "gauge", (), "The program's own metrics that are not on this page; the log says why."
)

FAMILIES: tuple[Family, ...] = tuple(each for each in list(globals().values()) if isinstance(each, Family))
"""All metrics, in the order of the page."""

BY_NAME = {each.name: each for each in FAMILIES}
