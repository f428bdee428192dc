"""What was measured on a chip, in `calibration/<chip>.json`: `doctor` writes it, and preflight scales its estimate by it.

The file names no host, path, project or user. Anyone may send it to us or to others, so it is read as a stranger's: every value
is checked, and none is run.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain_xla.errors import UserError
from pretrain_xla.storage.checked_json import is_intact, parse_json_object, with_checksum

FOLDER = "calibration"
"""Below the current folder, unless `--calibration` names another."""

AGAIN = "run `python -m pretrain_xla doctor` there again, or remove the file"
LARGEST_FILE = 2**20

Rate = Annotated[float, Field(gt=0, lt=1e18, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, lt=1e7, allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class _Part(BaseModel):
    """A part of the file. Unknown keys are those of a later writer, and are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CollectiveRate(_Part):
    """One kind of collective. bytes: of the larger side on one device. table_seconds: by preflight's rule; None: no table."""

    devices: int
    bytes: int
    seconds: Seconds
    table_seconds: Seconds | None


class Estimated(_Part):
    """What preflight estimated for the measured step, in seconds, and with which compiler."""

    libtpu: Word
    optimistic_seconds: Seconds
    conservative_seconds: Seconds
    hbm_bytes: int


class MeasuredStep(_Part):
    """Steps of the trainer on this chip.

    measured: when, UTC. config: the settings that determine memory and time, by name. ratio: step_seconds over the conservative
    estimate; None where there is no estimate for this chip.
    """

    measured: datetime.datetime
    topology: Word | None
    devices: int
    mesh: dict[Word, int]
    config: dict[Word, Any]
    parameters: int
    tokens_per_step: int
    compile_seconds: float
    step_seconds: Seconds
    tokens_per_second: Rate
    mfu: float | None
    memory_bytes: int
    estimate: Estimated | None
    ratio: Annotated[float, Field(gt=0.01, lt=1000, allow_inf_nan=False)] | None


class Calibration(_Part):
    """The whole file. chip: its name in the table of chips, or `cpu`, or a GPU's. measured: when, UTC. Rates: of one device."""

    format: Literal["pretrain_xla calibration"] = "pretrain_xla calibration"
    version: Literal[1] = 1
    measured: datetime.datetime
    chip: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
    device: Word
    devices: int
    hosts: int
    software: dict[Word, Word]
    matmul_flops_per_second: Rate | None
    matmul_dtype: Word | None
    stream_bytes_per_second: Rate | None
    collectives: dict[Word, CollectiveRate]
    step: MeasuredStep | None


def chip_file(name: str) -> str:
    """A device's name as a file's: `v5e`, `cpu`, `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "unknown"


def calibration_path(folder: str | os.PathLike[str], chip: str) -> Path:
    """Where a chip's file is."""
    return Path(folder) / f"{chip_file(chip)}.json"


def read_calibration(folder: str | os.PathLike[str], chip: str) -> Calibration | None:
    """What was measured on a chip. None means that there is no file.

    Raises:
        UserError: the file is damaged, of another version, or of another chip.
    """
    path = calibration_path(folder, chip)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: too large to be a calibration: {AGAIN}")
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from None
    try:
        tree = parse_json_object(content)
        if not is_intact(tree):  # other line ends are no damage: the file is sent by mail and kept in git
            raise ValueError("it is not what was written: its checksum differs, or is missing")
        found = Calibration.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}: {AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}: {AGAIN}") from None
    if found.chip != chip_file(chip):
        raise UserError(f"{path}: it is of {found.chip}, and not of {chip}: {AGAIN}")
    return found


def write_calibration(folder: str | os.PathLike[str], found: Calibration) -> Path:
    """Write a chip's file, in place of an older one; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    path = calibration_path(folder, found.chip)
    temporary = path.with_suffix(".tmp")
    tree: Mapping[str, Any] = found.model_dump(mode="json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(with_checksum(dict(tree)) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}): name another folder with --calibration"
        ) from None
    return path
