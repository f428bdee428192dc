"""Settings of older command lines and saved configs, which are still accepted and translated to the current ones.

They are not leaves of the tree. `SWITCHES` and `MOVED` are the whole list.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pretrain_xla.errors import UserError


@dataclasses.dataclass(frozen=True)
class Switch:
    """An old true/false setting.

    Attributes:
        section: section of the switch, and of the leaf that replaces it.
        leaf: the leaf that replaces it. None means that the switch has no effect.
        value: what the switch sets the leaf to.
        otherwise: what a flag that turns the switch off sets the leaf to.
        only_if_unset: the switch sets the leaf only if it is None, and does not reset it.
    """

    section: str
    leaf: str | None = None
    value: str | None = None
    otherwise: str | None = None
    only_if_unset: bool = False


SWITCHES = {
    "do_test": Switch("train", "mode", "evaluate", "train"),
    "preflight_only": Switch("train", "mode", "preflight", "train"),
    "ddp": Switch("parallel", "mp_start_method", "spawn", only_if_unset=True),
    "use_syncfree_optim": Switch("train"),
}
"""Old name → its meaning. If two set the same leaf, the last one in this table wins."""

MOVED = {"logging": ("wandb_", "wandb")}
"""Section → (prefix of the leaves that moved out of it, their current section)."""

Tree = dict[str, Any]


def translate(tree: Tree, where: str) -> Tree:
    """A copy of a config (section → leaf → value) without old settings.

    Raises:
        UserError: an old switch is neither true nor false.
    """
    new, switches = without_old_settings(tree, where)
    apply(switches, new)
    return new


def without_old_settings(tree: Tree, where: str) -> tuple[Tree, dict[str, bool]]:
    """A copy of a config with moved leaves in their current section and without old switches; and the switches that are on.

    A leaf that is in both its old and its current section keeps the value of the current one.

    Raises:
        UserError: an old switch is neither true nor false.
    """
    new = {section: dict(leaves) if isinstance(leaves, dict) else leaves for section, leaves in tree.items()}
    switches: dict[str, bool] = {}
    for name, switch in SWITCHES.items():
        leaves = new.get(switch.section)
        if isinstance(leaves, dict) and name in leaves:
            value = leaves.pop(name)
            try:
                is_on = TypeAdapter(bool).validate_python(value)
            except ValidationError:
                raise UserError(f"{where}: {switch.section}.{name}={reprlib.repr(value)}: give true or false") from None
            switches |= {name: True} if is_on else {}
    for section, (prefix, target) in MOVED.items():
        leaves = new.get(section)
        if not isinstance(leaves, dict) or not isinstance(new.get(target, {}), dict):
            continue
        for leaf in [leaf for leaf in leaves if str(leaf).startswith(prefix)]:
            new.setdefault(target, {}).setdefault(leaf, leaves.pop(leaf))
    return new, switches


def without_old_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
    """A command line without the flags of old switches; and these switches, which `no` before the name turns off."""
    spelled = {
        f"--{no}{name}".replace("_", "-"): (name, not no) for name in SWITCHES for no in ("", "no-")
    }  # dashes and underscores mean the same
    rest: list[str] = []
    switches: dict[str, bool] = {}
    for argument in arguments:
        if (found := spelled.get(argument.replace("_", "-"))) is None:
            rest.append(argument)
        else:
            name, is_on = found
            switches[name] = is_on
    return rest, switches


def apply(switches: dict[str, bool], tree: Tree, named: frozenset[str] = frozenset()) -> None:
    """Set the leaves of old switches, in place. `named` leaves have flags of their own, which win."""
    for name, switch in SWITCHES.items():
        if switch.leaf is None or name not in switches:
            continue
        leaves = tree.setdefault(switch.section, {})
        had = leaves.get(switch.leaf)
        if switch.only_if_unset:
            if switches[name] and had is None:
                leaves[switch.leaf] = switch.value
        elif switch.leaf not in named and (switches[name] or had == switch.value):
            leaves[switch.leaf] = switch.value if switches[name] else switch.otherwise
