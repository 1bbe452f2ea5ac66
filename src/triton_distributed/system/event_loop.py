"""The event loop of programs that leave the choice to this package: uvloop's where it is installed."""

try:
    from uvloop import new_event_loop as new_event_loop
except ImportError:  # uvloop has no wheel for this platform.
    from asyncio import new_event_loop as new_event_loop  # type: ignore[assignment]
