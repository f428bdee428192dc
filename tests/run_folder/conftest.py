"""Shared fixtures: small configs, a runtime on the CPU, and shards of random tokens."""

from tests.small_run import make_config, one_thread, runtime, tokens

__all__ = ["make_config", "one_thread", "runtime", "tokens"]
