"""The settings of a command, from the environment and its options, and its log."""

from __future__ import annotations

import logging
from typing import Any

from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.observe.log_context import log_requests
from triton_distributed.observe.log_format import log_formatter

LEVELS = ("debug", "info", "warning", "error")


def settings(**overrides: Any) -> Config:
    """The settings of a command that may run next to a worker, whose status port it must not take.

    Args, raises: see `worker_settings`.
    """
    return worker_settings(**{"status_port": -1, **overrides})


def worker_settings(**overrides: Any) -> Config:
    """Read the settings and send the log to standard error.

    Args:
        overrides: fields of `Config`; they take precedence over the environment.

    Raises:
        ConfigError: a setting is invalid, or cannot be used by a command.
    """
    config = Config.from_env(**overrides)
    if (refused := log_level_problem(config)) is not None:
        raise refused
    if config.backend.reach == "process":
        raise ConfigError(
            "TRD_DISCOVERY", config.discovery, "processes do not share memory: use file or static with trd"
        )
    logging.basicConfig(level=config.log_level.upper())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(log_formatter(config.log_format))
    log_requests()
    return config


def log_level_problem(config: Config) -> ConfigError | None:
    """The error about a log level that does not exist; None if it does."""
    if config.log_level.lower() in LEVELS:
        return None
    return ConfigError("TRD_LOG", config.log_level, f"one of {', '.join(LEVELS)}")
