"""The config tree as a YAML file, with one mapping of keys per section."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

import yaml

from pretrain_xla.config import RunConfig
from pretrain_xla.config.run import SECTION_OF_KEY
from pretrain_xla.errors import UserError
from pretrain_xla.redact import redacted_tree


class _Loader(yaml.SafeLoader):
    """YAML 1.1, with two changes: `3e-4` is a number (the standard requires a dot), and duplicate keys are an error (PyYAML
    silently takes the last one).
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping without duplicate keys.

        Raises:
            ConstructorError: a key is duplicated.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list as a key: rejected below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as such a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_yaml(path: str) -> dict[str, Any]:
    """Read a YAML config as a nested dict, not yet validated.

    Raises:
        UserError: no such file, not YAML, or not a mapping of sections.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)
    except FileNotFoundError:
        stem = os.path.basename(path).removesuffix(".yaml").removesuffix(".yml")
        known = [name.removesuffix(".yaml") for name in (os.listdir("configs") if os.path.isdir("configs") else ())]
        near = difflib.get_close_matches(stem, known, n=1)
        hint = f"did you mean configs/{near[0]}.yaml?" if near else "the configs of this package are in configs/"
        raise UserError(f"--config {path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deep to be read") from None
    except ValueError as error:  # an impossible date, or a number with thousands of digits
        raise UserError(f"--config {path}: invalid value: {str(error).partition(';')[0]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(value, dict | None) for value in tree.values()):
        flat = next((key for key in tree if key in SECTION_OF_KEY), None) if isinstance(tree, dict) else None
        hint = f"; {flat!r} belongs under {SECTION_OF_KEY[flat]!r}" if flat else ""
        raise UserError(
            f"--config {path}: expected sections ({', '.join(RunConfig.model_fields)}), each with its keys{hint}"
        )
    return {section: value or {} for section, value in tree.items()}


def to_yaml(config: RunConfig) -> str:
    """The resolved tree as YAML. Reading it back gives an equal config, except for passwords and tokens in URLs."""
    return yaml.dump(redacted_tree(config.model_dump(mode="json")), Dumper=_Dumper, sort_keys=False)
