"""Settings of older command lines and of the configs that older runs saved: accepted, and translated to today's.

They are no leaves of the tree. `ALIASES` and `MOVED` are all there is to know of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pretrain_xla.errors import UserError


@dataclasses.dataclass(frozen=True)
class Alias:
    """What a switch of older command lines means. leaf, on, off: the setting, and its value with the switch on or off.

    section: where the switch, and the setting, are in a file. leaf None: the switch has no effect.
    """

    section: str
    leaf: str | None
    on: str | None = None
    off: str | None = None


ALIASES = {
    "do_test": Alias("train", "mode", "evaluate", "train"),
    "preflight_only": Alias("train", "mode", "preflight", "train"),
    "ddp": Alias("parallel", "mp_start_method", "spawn", None),
    "use_syncfree_optim": Alias("train", None),
}
"""Later ones win where two name one setting."""

MOVED = {"logging": ("wandb_", "wandb")}
"""Section → (beginning of the names of leaves that were in it, the section where they are today)."""


def translate(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """A nested dict (section → leaf → value) without old settings; those of today that have a value keep it.

    Raises:
        UserError: an old switch is neither true nor false.
    """
    new = {section: dict(values) if isinstance(values, dict) else values for section, values in tree.items()}
    made: set[str] = set()
    for name, alias in ALIASES.items():
        values = new.get(alias.section)
        if not isinstance(values, dict) or name not in values:
            continue
        if not isinstance(value := values.pop(name), bool):
            raise UserError(f"{where}: {alias.section}.{name}={value!r}: give true or false")
        if value and alias.leaf is not None and (values.get(alias.leaf) is None or alias.leaf in made):
            values[alias.leaf] = alias.on
            made.add(alias.leaf)
    for section, (prefix, target) in MOVED.items():
        values = new.get(section)
        if not isinstance(values, dict) or not isinstance(new.get(target, {}), dict):
            continue
        for leaf in [leaf for leaf in values if str(leaf).startswith(prefix)]:
            new.setdefault(target, {}).setdefault(leaf, values.pop(leaf))
    return new


def translate_flags(arguments: list[str], named: frozenset[str]) -> list[str]:
    """Arguments of a command line, with each old switch as the flag of today.

    Args:
        arguments: as they were typed.
        named: leaves of today that they name; an old switch does not override them.
    """
    spelled: dict[str, tuple[Alias, str | None]] = {}
    for name, alias in ALIASES.items():
        for dashed in {name, name.replace("_", "-")}:
            spelled |= {f"--{dashed}": (alias, alias.on), f"--no-{dashed}": (alias, alias.off)}
    new: list[str] = []
    for argument in arguments:
        if argument not in spelled:
            new.append(argument)
            continue
        alias, value = spelled[argument]
        if alias.leaf is not None and alias.leaf not in named:
            new += [f"--{alias.leaf.replace('_', '-')}", str(value)]
    return new
