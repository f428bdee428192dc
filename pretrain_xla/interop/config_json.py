"""Our `ModelConfig` ↔ a `config.json` of `transformers`, by the table in `families.py`.

A config.json that we wrote also carries our own config (`OWN_CONFIG_KEY`). It holds what an architecture cannot say, such as
that all biases are absent where GPT-2 has zeros; it is used only if the rest of the file still agrees with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pretrain_xla.config import ModelConfig, build_config
from pretrain_xla.errors import UserError
from pretrain_xla.interop.architecture_options import PLAIN, allowed, architecture_options
from pretrain_xla.interop.config_keys import DERIVED
from pretrain_xla.interop.families import FAMILIES, Family

OWN_CONFIG_KEY = "pretrain_xla"
# Distance of an architecture that differs in one of these options; any other option counts 1.
FUNDAMENTAL = {"norm": 4, "positions": 4, "gated": 2}


def choose_family(config: ModelConfig) -> Family:
    """The architecture that computes exactly what this model does.

    Raises:
        UserError: there is none; names the options in the way, and the architecture that would fit without them.
    """
    exported = [family for family in FAMILIES if family.exported]
    fitting = next((family for family in exported if not _obstacles(family, config)), None)
    if fitting is not None:
        return fitting
    possible = [fix for family in exported if (fix := _fix(family, config)) is not None]
    changes, changed = min(possible, key=lambda fix: sum(FUNDAMENTAL.get(name, 1) for name in fix[0]))
    nearest = choose_family(changed)
    in_the_way = " and ".join(f"{name}={getattr(config, name)}" for name in changes)
    fixes = " and ".join(f"{name} {_in_words(name, value)}" for name, value in changes.items())
    raise UserError(
        f"no architecture of transformers computes this model: {in_the_way} {'stand' if len(changes) > 1 else 'stands'} in "
        f"the way; with {fixes} it would be {nearest.model_type} ({nearest.architecture})"
    )


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, to which the exporter adds its special tokens and data type."""
    tree: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    tree |= {theirs: key.write(_value(config, key.option)) for theirs, key in family.keys.items()}
    return {**tree, **family.required, **family.extra(config), OWN_CONFIG_KEY: config.model_dump(mode="json")}


def read_config(raw: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The architecture and our config of a config.json.

    A sliding window has no effect on texts no longer than the window, so `seq_length` is limited to it.

    Raises:
        UserError: an unknown architecture, or a setting under which it computes what our model cannot.
    """
    family = _family(raw, where)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise UserError(
            f"{where}: quantised weights ({method or 'quantization_config'}): name the model that they were made from"
        )
    raw = _with_defaults(raw, family)
    try:
        options = _options(family, raw)
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]!r} is missing") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where}: a value in it is invalid ({type(error).__name__}: {error})") from None
    for key, wanted in family.required.items():
        if raw.get(key, wanted) != wanted:
            raise UserError(f"{where}: {key}={raw[key]}, and our model computes {family.model_type} only with {wanted}")
    config = build_config({"model": options}, where).model
    return family, _embedded_config(family, raw, config, where) or config


def _obstacles(family: Family, config: ModelConfig) -> list[str]:
    """The options whose values the architecture does not have."""
    have = architecture_options(config)
    return [name for name, value in have.items() if not allowed(family.options.get(name, PLAIN[name]), value)]


def _fix(family: Family, config: ModelConfig) -> tuple[dict[str, Any], ModelConfig] | None:
    """Options to change, with their new values, and the config after it, which the architecture computes.

    None means that such a config would not be valid.
    """
    divisors = [count for count in range(1, 2 * config.num_heads) if config.d_model % count == 0]
    for num_heads in sorted(divisors, key=lambda count: abs(count - config.num_heads)):
        changes: dict[str, Any] = {}
        changed: ModelConfig | None = config
        # One change can be the reason for another: the default of query_scale depends on head_dim.
        while changed is not None and (obstacles := _obstacles(family, changed)):
            before = dict(changes)
            changes.update(_change(family, config, name, num_heads) for name in obstacles)
            changed = _changed(config, changes) if changes != before else None
        if changed is not None:
            return changes, changed
    return None


def _change(family: Family, config: ModelConfig, name: str, num_heads: int) -> tuple[str, Any]:
    """An option, and its value closest to the config's that the architecture has. num_heads: the value for that option."""
    accepted = family.options.get(name, PLAIN[name])
    if name == "num_heads":
        return name, num_heads
    if name == "heads_dim":
        return "head_dim", config.heads_dim + 1
    if callable(accepted):  # of query_scale: the only other predicate that refuses a value
        return name, max(1, round((config.query_scale or 1.0) ** -2)) ** -0.5
    return name, accepted[0]


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig | None:
    """The config with changes. None means that they are impossible together."""
    try:
        return ModelConfig.model_validate({**config.model_dump(), **changes})
    except ValidationError:
        return None


def _in_words(name: str, value: Any) -> str:
    if name == "query_scale" and value is not None:
        return "1 / sqrt of a whole number"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "left at its default" if value is None else str(value)


def _value(config: ModelConfig, option: str) -> Any:
    return DERIVED[option](config) if option in DERIVED else getattr(config, option)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    name = raw.get("model_type")
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where}: model_type={name!r} is not one that our model computes: {known}")


def _with_defaults(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """With the values that transformers uses for omitted keys. For a window, null means that there is none."""
    said = {key for key, value in raw.items() if value is not None or key == "sliding_window"}
    return {**raw, **{key: value for key, value in family.omitted.items() if key not in said}}


def _options(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of `ModelConfig`: those that the architecture implies, and those that the file states."""
    fixed = {name: family.options.get(name, values) for name, values in PLAIN.items()}
    options = {name: values[0] for name, values in fixed.items() if not callable(values) and values[0] is not None}
    options["bias"] = family.bias(raw)
    for theirs, key in family.keys.items():
        value = raw.get(theirs, key.default)
        if value is None or callable(value):
            value = key.default(raw) if callable(key.default) else None
        if value is not None:
            if isinstance(value, str) and key.option != "activation":
                raise UserError(f"{theirs} is text, {value!r}, where a number is expected: write it without quotes")
            options[key.option] = key.read(value)
        elif theirs not in ("num_key_value_heads", "head_dim") and not theirs.endswith("softcapping"):
            raise KeyError(theirs)
    options["seq_length"] = min(options["seq_length"], _window(raw) or options["seq_length"])
    if options["positions"] != "learned":
        options["rope_theta"] = _theta(raw)
    return _to_options(options)


def _to_options(options: dict[str, Any]) -> dict[str, Any]:
    """Converts derived quantities back to options, and leaves out those that are the default."""
    head_dim = options.pop("heads_dim", None) or options["d_model"] // options["num_heads"]
    if head_dim * options["num_heads"] != options["d_model"]:
        options["head_dim"] = head_dim
    kv_heads = options.pop("kv_heads", None)
    if kv_heads not in (None, options["num_heads"]):
        options["num_kv_heads"] = kv_heads
    scale = options.pop("scale", None)
    if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-9):
        options["query_scale"] = scale
    factor = options.pop("embedding_scale", None)
    if factor is not None:
        options["scale_embeddings"] = factor != 1
        if factor != 1 and not math.isclose(factor, math.sqrt(options["d_model"]), rel_tol=1e-6):
            raise UserError(f"embedding_multiplier={factor}: our model multiplies by sqrt(d_model) or not at all")
    layers = options.pop("positions_by_layer", None)
    if layers is not None:
        if len(set(layers)) > 1:
            raise UserError(f"no_rope_layers={layers}: our model has rotary positions in every layer or in none")
        options["positions"] = "rotary" if layers[0] else "none"
    return options


def _window(raw: Mapping[str, Any]) -> int | None:
    """Length of the sliding window in tokens; None means that no layer has one."""
    types = raw.get("layer_types")
    if not raw.get("use_sliding_window", True) or (types is not None and "sliding_attention" not in types):
        return None
    window: int | None = raw.get("sliding_window")
    return window


def _theta(raw: Mapping[str, Any]) -> float:
    """Base of the rotary wavelengths, from the places where transformers has kept it.

    Raises:
        UserError: they are scaled, only a part of each head is rotated, or layers differ.
    """
    parts = _rotary_parts(raw)
    thetas = {float(part.get("rope_theta") or raw.get("rope_theta") or 10_000.0) for part in parts}
    if len(thetas) > 1:
        raise UserError(f"rope_theta differs between layers ({sorted(thetas)}), and our model has one for all")
    for part in parts:
        kind = part.get("rope_type", part.get("type", "default"))
        turned = part.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
        if kind not in (None, "default") or turned != 1:
            raise UserError(
                f"rotary positions of type {kind!r}, turning {turned:g} of a head: our model turns all, unscaled"
            )
    return thetas.pop()


def _rotary_parts(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary settings of each kind of layer in the model."""
    rope, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if "rope_local_base_freq" not in raw:
        rope = scaling or rope
        kinds = set(raw.get("layer_types") or ()) & set(rope)
        return [rope[kind] for kind in sorted(kinds)] or [rope]
    # Gemma 3 has two bases; if layer_types is omitted, every sixth layer has full attention.
    count, pattern = int(raw["num_hidden_layers"]), int(raw["sliding_window_pattern"])
    repeated = ["full_attention"] * (count >= pattern) + ["sliding_attention"] * (pattern > 1)
    parts = {
        "full_attention": {"rope_theta": raw["rope_theta"]} | (rope.get("full_attention") or {}) | scaling,
        "sliding_attention": {"rope_theta": raw["rope_local_base_freq"]} | (rope.get("sliding_attention") or {}),
    }
    return [parts[kind] for kind in sorted(set(raw.get("layer_types") or repeated))]


def _embedded_config(family: Family, raw: Mapping[str, Any], config: ModelConfig, where: str) -> ModelConfig | None:
    """Our own config, if the file holds it and the rest of the file agrees with it."""
    embedded = raw.get(OWN_CONFIG_KEY)
    if not isinstance(embedded, dict):
        return None
    own = build_config({"model": embedded}, f"{where}: {OWN_CONFIG_KEY}").model
    written = write_config(family, own) if not _obstacles(family, own) else {}
    same = all(written.get(key) == raw.get(key) for key in family.keys)
    turned = own.positions != "rotary" or math.isclose(own.rope_theta, config.rope_theta)
    return own if same and turned else None
