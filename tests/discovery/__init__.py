"""Tests of triton_distributed.discovery."""
