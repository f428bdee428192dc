"""The one exception that users are meant to read.

Every fault that a user can fix (a wrong key, a missing folder, a mesh that does not fit) is raised as `UserError`. The
command line prints its text as one line and exits with status 2; anything else is a defect of ours and keeps its trace.
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

# Packages that a command may need and an environment may lack → how to get them.
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
    """A fault in what was asked for: the text says what is wrong, where, and how to fix it, in one line.

    Passwords and tokens of URLs in it are hidden: the line ends up in logs.
    """

    def __init__(self, text: str) -> None:
        super().__init__(redacted(text))


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved its state; the command line exits with 128 + `signal`."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def missing_package(error: ImportError) -> str | None:
    """What to install, in a line. None means it is no package that we ask for."""
    package = (error.name or "").split(".")[0]
    if package not in _PACKAGES:
        return None
    how = _PACKAGES[package] or f"pip install {package.replace('_', '-')}"
    return f"the package {package} is not installed: {how}"


@contextlib.contextmanager
def out_of_memory(fix: str) -> Iterator[None]:
    """While it is open, memory that runs out, a device's or the host's, is one line with what would help.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (fault := memory_fault(error)) is None:
            raise
        raise UserError(f"{fault}: {fix}") from error


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn `UserError` into one line on stderr and exit status 2, and a stop by signal into 128 + signal.

    A package that is not installed is a line, too, and so is what the machine has run out of; and what reads our output may
    stop before its end (`| head`).
    """

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> None:
        raise_file_limit()
        try:
            function(*arguments, **keywords)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except ModuleNotFoundError as error:
            if (line := missing_package(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except BrokenPipeError:
            # Python flushes stdout once more at its end, into the closed pipe: into nothing instead.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except Interrupted as error:
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
