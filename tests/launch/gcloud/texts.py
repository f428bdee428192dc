"""What gcloud prints when something fails, and with which exit status.

"SDK" is the text of Google Cloud SDK 528 itself, seen by running it without an account. Other comments name the report that a
text follows; names, zones and numbers are put in.
"""

from __future__ import annotations

import json


class Failed(Exception):
    """The call ends with this text on stderr, after `ERROR: (gcloud.COMMAND) `."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.text, self.status = text, status


SEARCH_HELP = "\n\nTo search the help text of gcloud commands, run:\n  gcloud help -- SEARCH_TERMS"

# SDK.
NOT_LOGGED_IN = (
    "You do not currently have an active account selected.\n"
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n\n"
    "If you have already logged in with a different account, run:\n\n  $ gcloud config set account ACCOUNT\n\n"
    "to select an already authenticated account to use."
)

# SDK, core/credentials/exceptions.py: a login that has run out.
REAUTHENTICATE = (
    "There was a problem refreshing your current auth tokens: Reauthentication failed. cannot prompt during "
    "non-interactive execution.\nPlease run:\n\n  $ gcloud auth login\n\nto obtain new credentials."
)


def missing_attribute(resource: str, attribute: str, property_: str) -> Failed:
    """SDK."""
    return Failed(
        f"Error parsing [{resource}].\nThe [{resource}] resource is not properly specified.\n"
        f"Failed to find attribute [{attribute}]. The attribute can be set in the following ways: \n"
        f"- provide the argument `{resource}` on the command line with a fully specified name\n"
        f"- provide the argument `--{attribute}` on the command line\n- set the property `{property_}`"
    )


def not_found(resource: str, account: str) -> Failed:
    """marin-community/marin issue 3404."""
    return Failed(
        f"NOT_FOUND: Resource '{resource}' was not found. This command is authenticated as {account} which is the active "
        "account specified by the [core/account] property\n"
        f"- '@type': type.googleapis.com/google.rpc.ResourceInfo\n  resourceName: {resource}"
    )


def already_exists(resource: str) -> Failed:
    """skypilot-org/skypilot issue 129."""
    return Failed(
        f"ALREADY_EXISTS: Resource '{resource}' already exists\n"
        f"- '@type': type.googleapis.com/google.rpc.ResourceInfo\n  resourceName: {resource}"
    )


def no_such_type(kind: str, zone: str) -> Failed:
    """skypilot-org/skypilot issue 3840, and users' notes on queued resources by zone."""
    return Failed(
        "INVALID_ARGUMENT: Cloud TPU received a bad request. The requested accelerator configuration for accelerator type, "
        f'"{kind}", could not be found in the zonal accelerator configurations for "{zone}".; the accelerator {kind} was not '
        f"found in zone {zone} [EID: 0x5be9ca996f9773a4]"
    )


def no_such_zone(zone: str) -> Failed:
    """Users' notes on queued resources by zone."""
    return Failed(
        f'INVALID_ARGUMENT: Cloud TPU received a bad request. The requested zone "{zone}" is not supported. '
        "[EID: 0x1994f24467802754]"
    )


def zone_denied(zone: str, account: str) -> Failed:
    """Users' notes on TPU VMs: a zone that the organization does not allow."""
    said = f"Permission denied on 'locations/{zone}' (or it may not exist)."
    return Failed(
        f"PERMISSION_DENIED: {said} This command is authenticated as {account} which is the active account specified by the "
        f"[core/account] property.\n{said}\n- '@type': type.googleapis.com/google.rpc.ErrorInfo\n"
        f"  domain: googleapis.com\n  metadata:\n    location: {zone}\n    service: tpu.googleapis.com\n"
        "  reason: LOCATION_POLICY_VIOLATED"
    )


def quota_exceeded(quota: str, limit: int, zone: str) -> Failed:
    """marin-community/marin pull request 1612."""
    return Failed(f"RESOURCE_EXHAUSTED: Quota limit '{quota}' has been exceeded. Limit: {limit} in zone {zone}.")


def quota_exhausted(quota: str, limit: int, zone: str) -> dict[str, object]:
    """marin-community/marin issue 87: a request that was accepted, and fails on the quota."""
    return {"code": 8, "message": f"Quota '{quota}' exhausted. Limit {limit} in zone {zone}"}


def no_capacity(zone: str) -> dict[str, object]:
    """hashicorp/terraform-provider-google issue 21243: "Error code 8, message: …"."""
    return {
        "code": 8,
        "message": f'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are '
        "offered (see https://cloud.google.com/tpu/docs/regions) [EID: 0x9f48947a7d57c8d]",
    }


def no_reserved_capacity() -> dict[str, object]:
    """skypilot-org/skypilot issue 4579."""
    return {
        "code": 8,
        "message": "Insufficient reserved capacity. Contact customer support to increase your reservation. "
        "[EID: 0x7adf6d58c08b0aa4]",
    }


def no_flex_start(kind: str, zone: str) -> dict[str, object]:
    """Users' notes on queued resources by zone."""
    return {
        "code": 3,
        "message": f'FLEX_START provisioning model is not supported for accelerator type "{kind}" in location "{zone}"',
    }


def expired() -> dict[str, object]:
    """Google's page on queued resources: a request whose "valid until" has passed is FAILED. The words are ours."""
    return {"code": 4, "message": "The request was not fulfilled within its valid interval."}


def operation_failed(error: dict[str, object]) -> Failed:
    """An operation that was begun and failed: users' notes on queued resources by zone. gcloud prints the error as JSON."""
    return Failed(json.dumps(error, indent=2))


def unusable(state: str) -> Failed:
    """SDK, of `ssh` and `scp`."""
    if state in ("PREEMPTED", "TERMINATED"):
        return Failed(f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    return Failed(f'This TPU has state "{state}", so it cannot be currently connected to.')


def has_nodes(resource: str) -> Failed:
    """The reference of queuedResources.delete: without `force` the nodes must be gone, or the request ACCEPTED, FAILED or
    SUSPENDED. The words are ours."""
    return Failed(f"FAILED_PRECONDITION: Resource '{resource}' has nodes; delete them first, or use force.")


# SDK, of the `ssh` program below gcloud.
TIMED_OUT = "ssh: connect to host {address} port 22: Connection timed out"
BROKEN = "client_loop: send disconnect: Broken pipe"
RETRYING = "Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255]."
EXITED = "[/usr/bin/ssh] exited with return code [255]."
