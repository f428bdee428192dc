"""Find the TPU of this host without opening it. Under SPMD, PyTorch/XLA's devices do not name their generation.

The PCI bus of Google Cloud VMs, Kaggle and Colab shows the generation, but v2 and v3 look alike. For these, and for the size of
the slice, the accelerator type is needed (`v5litepod-16`). GKE, Kaggle and Colab set it as TPU_ACCELERATOR_TYPE. On other
Google Cloud VMs the metadata server has it. Without a TPU on the bus, the network is not used.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import yaml

from pretrain_xla.errors import UserError
from pretrain_xla.runtime.chips import CHIPS, generation
from pretrain_xla.runtime.metadata_server import instance_value

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
PCI_NAMES = {"0x0027": "", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "v7x"}
"""PCI device id → generation, from JAX's `hardware_utils`. Empty means v2 or v3."""

DESCRIBE = (
    "without one, set TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-8 (or its type) TPU_WORKER_ID=0 "
    "TPU_WORKER_HOSTNAMES=localhost"
)


@dataclasses.dataclass(frozen=True)
class FoundChip:
    """chip: generation, if it is in `CHIPS`. name: for display. warnings: for the user, one line each."""

    chip: str | None
    name: str
    warnings: tuple[str, ...] = ()


def pci_chips() -> list[str]:
    """Generation of each TPU chip on this host's PCI bus; empty means v2 or v3."""
    found = []
    for folder in sorted(PCI_DEVICES.glob("*")):
        try:
            vendor, device = ((folder / leaf).read_text().strip() for leaf in ("vendor", "device"))
        except OSError:  # a device that has just been removed
            continue
        if vendor == GOOGLE and device in PCI_NAMES:
            found.append(PCI_NAMES[device])
    return found


def accelerator_type() -> str | None:
    """The accelerator type of this host's slice, such as `v5litepod-16`. None means no TPU, or an unknown type."""
    named = os.environ.get("TPU_ACCELERATOR_TYPE")
    if named or os.environ.get("TPU_SKIP_MDS_QUERY") or not pci_chips():
        return named or None
    return _type_in(instance_value("attributes/tpu-env")) or instance_value("attributes/accelerator-type")


def find_chip(device_kind: str | None = None) -> FoundChip:
    """The TPU of this host, which must have one.

    Args:
        device_kind: the name of PyTorch/XLA's device (`TPU v5 lite`), if it is known.
    """
    on_bus = next(iter(pci_chips()), None)
    named = os.environ.get("TPU_ACCELERATOR_TYPE") if on_bus else accelerator_type()
    warnings = []
    if on_bus and named and generation(named) != on_bus:
        warnings.append(f"TPU_ACCELERATOR_TYPE={named}, but the chips of this host are {on_bus}: {on_bus} is used")
        named = None
    name = on_bus or named or device_kind or ""
    chip = generation(name)
    if chip in CHIPS:
        return FoundChip(chip, f"TPU {chip}" + (f" ({named})" if named else ""), tuple(warnings))
    called = f"{name} is not in the table of chips" if name else "of this host does not report its generation"
    fix = "" if name else " (set TPU_ACCELERATOR_TYPE, for example to v5litepod-8)"
    warnings.append(f"the TPU {called}{fix}: attention runs without the kernels, and no utilisation is shown")
    return FoundChip(None, f"TPU {name}".strip(), tuple(warnings))


def check_description() -> str | None:
    """A warning if torch_xla, once imported on a TPU host, will wait for a metadata server that does not answer.

    Raises:
        UserError: the environment says not to ask the metadata server, and does not describe the TPU itself.
    """
    if not pci_chips():
        return None
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        if not os.environ.get("TPU_ACCELERATOR_TYPE"):
            raise UserError(
                "TPU_SKIP_MDS_QUERY is set, so this TPU must be described: set TPU_ACCELERATOR_TYPE, for example to v5litepod-8"
            )
        return None
    if instance_value("attributes/tpu-env") is None:
        return f"this TPU's metadata server does not answer, and PyTorch/XLA will wait for it, perhaps for minutes: {DESCRIBE}"
    return None


def _type_in(tpu_env: str | None) -> str | None:
    """ACCELERATOR_TYPE in the attribute `tpu-env`, which is YAML."""
    try:
        tree = yaml.safe_load(tpu_env or "")
    except yaml.YAMLError:
        return None
    named = tree.get("ACCELERATOR_TYPE") if isinstance(tree, dict) else None
    return str(named) if named else None
