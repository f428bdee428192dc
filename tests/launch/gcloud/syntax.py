"""gcloud's published syntax, for the commands that launching uses, and a reader of command lines that holds to it.

Each command's flags are those of its reference page (cloud.google.com/sdk/gcloud/reference), which gcloud also ships as a
table; `test_syntax.py` compares the two where the SDK is installed. An unknown flag, a missing value or argument, and flags
that exclude each other are refused with gcloud's words and status 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .texts import SEARCH_HELP, Failed

VALUE, SWITCH, LISTED = "value", "switch", "listed"
"""How often a flag may be given, and with what: once with a value, without one, often with a value."""


def _flags(values: str = "", switches: str = "", listed: str = "") -> dict[str, str]:
    kinds = ((VALUE, values), (SWITCH, switches), (LISTED, listed))
    return {f"--{name}": kind for kind, names in kinds for name in names.split()}


WIDE = _flags(
    "access-token-file account billing-project configuration flags-file flatten format impersonate-service-account project "
    "trace-token verbosity",
    "help log-http quiet user-output-enabled version",
)
_SORTED = _flags("filter limit sort-by")
_LIST = _SORTED | _flags("page-size")
_ZONE = _flags("zone")
_CREATE = _ZONE | _flags(
    "accelerator-type data-disk description labels metadata metadata-from-file network node-count node-id node-prefix range "
    "reservation-host-folder reservation-host-organization reservation-host-project runtime-version scopes service-account "
    "subnetwork tags topology type valid-after-duration valid-after-time valid-until-duration valid-until-time",
    "async guaranteed internal-ips reserved shielded-secure-boot spot",
)
_CREATE_ALPHA = _CREATE | _flags(
    "boot-disk max-run-duration network-config provisioning-model reservation workload-type",
    "autocheckpoint-enabled best-effort",
)
_KEYS = _flags(
    "ssh-key-expiration ssh-key-expire-after ssh-key-file", "dry-run force-key-file-overwrite internal-ip plain"
)
_REMOTE = _ZONE | _KEYS | _flags("strict-host-key-checking worker")
_STORAGE = _flags("additional-headers")
_UPLOAD = _STORAGE | _flags(
    "cache-control canned-acl content-disposition content-encoding content-language content-md5 content-type custom-metadata "
    "custom-time decryption-keys encryption-key gzip-in-flight if-generation-match if-metageneration-match predefined-acl "
    "remove-custom-metadata update-custom-metadata",
    "clear-custom-metadata continue-on-error gzip-in-flight-all ignore-symlinks include-managed-folders no-clobber "
    "preserve-posix recursive skip-unsupported",
)


@dataclasses.dataclass(frozen=True)
class Syntax:
    """What a command takes."""

    flags: dict[str, str]
    positionals: tuple[str, ...] = ()
    several: bool = False
    """Whether the first positional may be given more than once."""
    required: tuple[str, ...] = ()
    exactly_one_of: tuple[tuple[tuple[str, ...], ...], ...] = ()
    """Groups of flags; each group is a choice between bundles, and exactly one bundle must be given, whole."""
    remainder: bool = False
    """Whether anything may follow after `--`."""


_CREATED = {
    "positionals": ("QUEUED_RESOURCE",),
    "required": ("--runtime-version",),
    "exactly_one_of": (
        (("--accelerator-type",), ("--topology", "--type")),
        (("--node-id",), ("--node-count",)),
    ),
}
_NODE = ("TPU",)
_QUOTA = _flags("folder organization service")

COMMANDS: dict[str, Syntax] = {
    "auth list": Syntax(_LIST | _flags("filter-account")),
    "config get-value": Syntax({}, ("SECTION/PROPERTY",)),
    "config list": Syntax(_SORTED | _flags("", "all"), ("SECTION/PROPERTY",), required=()),
    "beta quotas info describe": Syntax(_QUOTA, ("QUOTA_ID",), required=("--service",)),
    "beta quotas info list": Syntax(_QUOTA | _LIST | _flags("", "uri"), required=("--service",)),
    "compute tpus locations list": Syntax(_LIST),
    "compute tpus accelerator-types list": Syntax(_LIST | _ZONE),
    "compute tpus accelerator-types describe": Syntax(_ZONE, ("ACCELERATOR_TYPE",)),
    "compute tpus tpu-vm accelerator-types list": Syntax(_LIST | _ZONE),
    "compute tpus tpu-vm accelerator-types describe": Syntax(_ZONE, ("ACCELERATOR_TYPE",)),
    "compute tpus tpu-vm versions list": Syntax(_LIST | _ZONE),
    "compute tpus tpu-vm versions describe": Syntax(_ZONE, ("VERSION",)),
    "compute tpus queued-resources create": Syntax(_CREATE, **_CREATED),  # type: ignore[arg-type]
    "alpha compute tpus queued-resources create": Syntax(_CREATE_ALPHA, **_CREATED),  # type: ignore[arg-type]
    "compute tpus queued-resources describe": Syntax(_ZONE, ("QUEUED_RESOURCE",)),
    "compute tpus queued-resources list": Syntax(_LIST | _ZONE | _flags("", "uri")),
    "compute tpus queued-resources delete": Syntax(_ZONE | _flags("", "async force"), ("QUEUED_RESOURCE",)),
    "compute tpus tpu-vm describe": Syntax(_ZONE, _NODE),
    "compute tpus tpu-vm list": Syntax(_LIST | _ZONE | _flags("", "uri")),
    "compute tpus tpu-vm delete": Syntax(_ZONE | _flags("", "async"), _NODE),
    "compute tpus tpu-vm ssh": Syntax(
        _REMOTE | _flags("command output-directory", "", "ssh-flag"), ("[USER@]TPU",), remainder=True
    ),
    "compute tpus tpu-vm scp": Syntax(
        _REMOTE | _flags("", "compress recurse", "scp-flag"), ("[[USER@]TPU:]SRC", "[[USER@]TPU:]DEST"), several=True
    ),
    "storage buckets describe": Syntax(_STORAGE | _flags("", "raw"), ("URL",)),
    "storage cat": Syntax(_STORAGE | _flags("decryption-keys range", "display-url"), ("URL",), several=True),
    "storage cp": Syntax(
        _UPLOAD
        | _flags(
            "gzip-local manifest-path retain-until retention-mode storage-class",
            "all-versions daisy-chain do-not-decompress gzip-local-all preserve-acl preserve-symlinks print-created-message "
            "read-paths-from-stdin",
        ),
        ("SOURCE", "DESTINATION"),
        several=True,
    ),
    "storage rsync": Syntax(
        _UPLOAD
        | _flags("exclude", "checksums-only delete-unmatched-destination-objects dry-run skip-if-dest-has-newer-mtime"),
        ("SOURCE", "DESTINATION"),
    ),
}
_OPTIONAL_POSITIONAL = {"config list"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A command line that agrees with the syntax."""

    command: str
    """Words of the command, as `compute tpus tpu-vm list`."""
    positionals: tuple[str, ...]
    values: dict[str, str]
    switches: frozenset[str]
    listed: dict[str, tuple[str, ...]]
    remainder: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The command without its release track."""
        return self.command.removeprefix("alpha ").removeprefix("beta ")


class Misused(Failed):
    """A command line that gcloud refuses; `command` is as far as it was understood."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__(text, 2)
        self.command = command


def read(arguments: Sequence[str]) -> Call:
    """Read a command line, without `gcloud`.

    Raises:
        Misused: gcloud would refuse it.
    """
    words, rest = _command(arguments)
    syntax = COMMANDS[words]
    known = WIDE | syntax.flags
    positionals: list[str] = []
    values: dict[str, str] = {}
    switches: set[str] = set()
    listed: dict[str, list[str]] = {}
    unknown: list[str] = []
    while rest:
        token = rest.pop(0)
        if token == "--" and syntax.remainder:
            break
        if not token.startswith("--") or token == "--":
            (unknown if len(positionals) >= len(syntax.positionals) and not syntax.several else positionals).append(
                token
            )
            continue
        name, equals, value = token.partition("=")
        kind = known.get(name) or (SWITCH if known.get("--" + name.removeprefix("--no-")) == SWITCH else None)
        if kind is None:
            unknown.append(token)
        elif kind == SWITCH:
            if equals:
                raise Misused(words, f"argument {name}: ignored explicit argument {value!r}")
            switches.add(name)
        else:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise Misused(words, f"argument {name}: expected one argument")
                value = rest.pop(0)
            if kind == LISTED:
                listed.setdefault(name, []).append(value)
            else:
                values[name] = value
    _refuse_unknown(words, unknown)
    _refuse_missing(words, syntax, positionals, {*values, *switches})
    return Call(
        words,
        tuple(positionals),
        values,
        frozenset(switches),
        {name: tuple(found) for name, found in listed.items()},
        tuple(rest),
    )


def _command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The words of the command, and what follows. Flags may stand before and between the words, as in gcloud."""
    rest, words, early = list(arguments), "", []
    while words not in COMMANDS:
        while rest and rest[0].startswith("--"):
            early.append(rest.pop(0))
            if "=" not in early[-1] and WIDE.get(early[-1]) == VALUE and rest:
                early.append(rest.pop(0))
        if not rest:
            raise Misused(words.replace(" ", "."), "Command name argument expected.")
        longer = f"{words} {rest[0]}".strip()
        if not any(f"{one} ".startswith(f"{longer} ") for one in COMMANDS):
            raise Misused(words, f"Invalid choice: {rest[0]!r}.{SEARCH_HELP}")
        words = longer
        rest.pop(0)
    return words, early + rest


def _refuse_unknown(words: str, unknown: Sequence[str]) -> None:
    if not unknown:
        return
    tracks = [f"{track} {words}" for track in ("alpha", "beta") if f"{track} {words}" in COMMANDS]
    for flag in (token.partition("=")[0] for token in unknown if token.startswith("--")):
        for other in tracks:
            if flag in COMMANDS[other].flags:
                hint = f" {flag} flag is available in one or more alternate release tracks. Try:\n\n  gcloud {other} {flag}\n"
                raise Misused(words, "unrecognized arguments:\n  \n" + "\n  ".join([hint, *unknown]) + SEARCH_HELP)
    listing = f" {unknown[0]} " if len(unknown) == 1 else "\n  " + "\n  ".join(unknown)
    raise Misused(words, f"unrecognized arguments:{listing}{SEARCH_HELP}")


def _refuse_missing(words: str, syntax: Syntax, positionals: Sequence[str], given: set[str]) -> None:
    needed = () if words in _OPTIONAL_POSITIONAL else syntax.positionals
    if len(positionals) < len(needed):
        raise Misused(words, f"argument {needed[len(positionals)]}: Must be specified.")
    for name in syntax.required:
        if name not in given:
            raise Misused(words, f"argument {name}: Must be specified.")
    for choice in syntax.exactly_one_of:
        chosen = [bundle for bundle in choice if given & {*bundle}]
        if len(chosen) != 1 or not {*chosen[0]} <= given:
            bundles = " | ".join(" ".join(bundle) for bundle in choice)
            raise Misused(words, f"Exactly one of ({bundles}) must be specified.")
