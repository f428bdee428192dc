"""Do the installed versions of Python, torch, torch_xla, libtpu and jax fit together?

Read from the packages' metadata: nothing is imported, because a pair that does not fit crashes on import. The table has
what was seen to work, and why nothing else is accepted.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata

from pretrain_xla import __version__
from pretrain_xla.doctor.check import Check, Figures, failed

PACKAGES = ("torch", "torch_xla", "libtpu", "jax", "jaxlib", "numpy", "torch_tpu")
INSTALL = "pip install -r requirements-xla_tpu.txt"
PYTHONS = ((3, 11), (3, 13))
"""First and last. torch_xla 2.9 has wheels for 3.10 to 3.13, jax 0.7.1 needs 3.11."""


@dataclasses.dataclass(frozen=True)
class Known:
    """Versions that were seen to work together: prefixes, so `2.9` admits 2.9.1."""

    torch_xla: str
    torch: str
    libtpu: str
    jax: str


KNOWN = (Known(torch_xla="2.9.0", torch="2.9", libtpu="0.0.21", jax="0.7.1"),)
"""torch_xla 2.9.0 is the last release. Its extras pin libtpu 0.0.21 (`tpu`) and jax 0.7.1 (`pallas`)."""

COMPILES = ((0, 0, 24), (0, 0, 52))
"""First and last newer libtpu that was seen to compile our step under jax 0.7.1, in preflight. None was run on a TPU."""

WHY = {
    "torch": "torch_xla is built against one torch: with another, its import ends with an undefined symbol",
    "libtpu": "a libtpu of another time than torch_xla may refuse its programs or kernels, or crash",
    "jax": "the kernels use the interface of one jax, and a newer one writes kernels that this libtpu refuses",
    "jaxlib": "jax and jaxlib of different versions refuse each other",
    "torch_tpu": "torch_tpu needs torch 2.11 or later, and torch_xla needs 2.9: they cannot share an environment",
}
"""What goes wrong where a pair does not fit."""


def software() -> dict[str, str]:
    """The version of Python, of this package and of each installed package that matters, by name."""
    found = {"pretrain_xla": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions(found: Mapping[str, str], runtime: str) -> Check:
    """Whether the versions fit together.

    Args:
        found: from `software`.
        runtime: `xla`, or `torch`, which needs neither torch_xla nor jax.
    """
    faults = [*_python_faults(found), *(_xla_faults(found) if runtime == "xla" else _torch_faults(found))]
    shown = ", ".join(f"{name} {found[name]}" for name in ("python", *PACKAGES) if name in found and name != "numpy")
    figures: Figures = {"versions": dict(found), "faults": faults}
    if faults:
        return failed("versions", f"{shown}: {'; '.join(faults)}", _fix(found, runtime), **figures)
    return Check("versions", "ok", f"{shown}{_notes(found)}", "fit together", figures=figures)


def _python_faults(found: Mapping[str, str]) -> list[str]:
    first, last = PYTHONS
    if first <= numbers(found["python"])[:2] <= last:
        return []
    span = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return [f"Python {found['python']} is not one of {span}, which torch_xla and jax need"]


def _torch_faults(found: Mapping[str, str]) -> list[str]:
    if "torch" not in found:
        return ["torch is not installed"]
    return [] if (2, 9) <= numbers(found["torch"]) < (3,) else [f"torch {found['torch']} is not 2.9 or a later 2"]


def _xla_faults(found: Mapping[str, str]) -> list[str]:
    missing = [f"{name} is not installed" for name in ("torch", "torch_xla") if name not in found]
    if missing:
        return missing
    known = next((one for one in KNOWN if is_version(found["torch_xla"], one.torch_xla)), None)
    if known is None:
        wanted = " or ".join(one.torch_xla for one in KNOWN)
        return [f"torch_xla {found['torch_xla']} is not {wanted}, the version that this package is written for"]
    faults = []
    for name, wanted in (("torch", known.torch), ("libtpu", known.libtpu), ("jax", known.jax)):
        fits = name not in found or is_version(found[name], wanted)
        if name == "libtpu" and name in found:
            fits = fits or COMPILES[0] <= numbers(found[name]) <= COMPILES[1]
        if not fits:
            faults.append(f"torch_xla {found['torch_xla']} needs {name} {wanted} and not {found[name]} ({WHY[name]})")
    if found.get("jax") != found.get("jaxlib"):
        faults.append(f"jax {found.get('jax')} with jaxlib {found.get('jaxlib')} ({WHY['jaxlib']})")
    if "torch_tpu" in found:
        faults.append(f"torch_tpu {found['torch_tpu']} is installed, too ({WHY['torch_tpu']})")
    return faults


def _notes(found: Mapping[str, str]) -> str:
    """What fits, but should be known."""
    notes = []
    if "torch_xla" in found:
        notes += [f"without {name}: {lost}" for name, lost in _LOST.items() if name not in found]
    if "libtpu" in found and COMPILES[0] <= numbers(found["libtpu"]) <= COMPILES[1]:
        notes.append(f"libtpu {found['libtpu']} was seen to compile, and not to run")
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        notes.append(f"TPU_LIBRARY_PATH replaces libtpu by {os.path.basename(path)}, whose version is not known")
    return "".join(f"; {note}" for note in notes)


_LOST = {"libtpu": "no TPU and no preflight", "jax": "no kernels and no preflight"}


def _fix(found: Mapping[str, str], runtime: str) -> str:
    first = PYTHONS[0]
    if _python_faults(found):
        version = f"{first[0]}.{first[1]}"
        return f"make an environment with another Python: uv venv --python {version}, then uv {INSTALL}"
    if runtime == "torch":
        return "pip install -r requirements.txt"
    remove = "pip uninstall torch_tpu, then " if "torch_tpu" in found else ""
    return f"{remove}{INSTALL} into an environment of its own"


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version as numbers: `2.9.0+cpu` is (2, 9, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def is_version(version: str, wanted: str) -> bool:
    """Whether a version is `wanted`, or one of its releases."""
    prefix = numbers(wanted)
    return numbers(version)[: len(prefix)] == prefix
