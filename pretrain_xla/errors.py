"""Errors that the user can fix.

Every such error (a wrong key, a missing folder, a mesh that does not fit) is raised as `UserError`. The command-line interface
prints its message in one line and exits with status 2. Any other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pretrain_xla.redact import redacted
from pretrain_xla.system_faults import memory_fault, raise_file_limit, system_fault

# Package that may not be installed → how to install it.
_PACKAGES = {
    **dict.fromkeys(("torch_xla", "libtpu", "jax", "jaxlib"), "pip install -r requirements-xla_tpu.txt"),
    **dict.fromkeys(("lm_eval", "wandb"), ""),
    **dict.fromkeys(
        """torch numpy datasets tiktoken tokenizers sentencepiece pyarrow zstandard tensorboard fsspec gcsfs s3fs aiohttp
        pydantic tyro yaml safetensors huggingface_hub rich matplotlib""".split(),
        "pip install -r requirements.txt",
    ),
}


class UserError(Exception):
    """An error that the user can fix. The message says in one line what is wrong, where, and how to fix it.

    Passwords and tokens in its URLs are hidden, because the message ends up in logs.
    """

    def __init__(self, text: str) -> None:
        super().__init__(redacted(text))


class Interrupted(Exception):
    """A signal stopped the run, and its state is saved. The command-line interface exits with 128 + `signal`."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


LOST = 75
"""Exit status after another process of the run was lost (EX_TEMPFAIL of sysexits.h): the same command can succeed again."""


class AnotherFailed(Exception):
    """Another process of the run failed or was lost, and this one ends with it. The command line exits with `status`.

    printed: whether the user has seen the message.
    """

    printed = False

    def __init__(self, message: str, status: int) -> None:
        super().__init__(redacted(message))
        self.status = status


def missing_package(error: ImportError) -> str | None:
    """What to install, in one line. None means that this is not a package that we require."""
    package = (error.name or "").split(".")[0]
    if package not in _PACKAGES:
        return None
    how = _PACKAGES[package] or f"pip install {package.replace('_', '-')}"
    return f"the package {package} is not installed: {how}"


@contextlib.contextmanager
def out_of_memory(fix: str) -> Iterator[None]:
    """Turn an out-of-memory error of a device or the host into a `UserError` that says how to fix it.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (fault := memory_fault(error)) is None:
            raise
        raise UserError(f"{fault}: {fix}") from error


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn `UserError` into one line on stderr and exit status 2, and `Interrupted` into exit status 128 + signal.

    So are packages that are not installed and resources that ran out. A closed stdout (`| head`) is not an error.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> None:
        raise_file_limit()
        try:
            function(*arguments, **keywords)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except AnotherFailed as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            error.printed = True
            raise SystemExit(error.status) from None
        except ModuleNotFoundError as error:
            if (line := missing_package(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except BrokenPipeError:
            # Python flushes stdout again at exit, which would fail on the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except Interrupted as error:
            if str(error):
                print(str(error), file=sys.stderr, flush=True)
            raise SystemExit(128 + error.signal) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as error:
            if (line := system_fault(error)) is None:
                raise
            print(f"error: {redacted(line)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None

    return run
