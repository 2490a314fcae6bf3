"""What we call things on a cluster: labels, annotations, phases. Pure; operator and agent must not differ in them."""

from __future__ import annotations

from hotstart.errors import Refused

GROUP = "hotstart.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# Annotations of pods.
RESTORE_FROM = f"{GROUP}/restore-from"  # a Snapshot in the pod's namespace; the only one that a user writes
CONTAINER = f"{GROUP}/container"  # which container is the worker; else the first
RECEIPT = f"{GROUP}/receipt"  # short JSON: what the restore took

# Labels of pods. The first is on every pod that is ours in any way, so that one watch finds them all.
SNAPSHOT = f"{GROUP}/snapshot"
PLACEHOLDER = f"{GROUP}/placeholder"
SOURCE_OF = f"{GROUP}/source-of"
WARM_POOL = f"{GROUP}/warmpool"
CLAIMED = f"{GROUP}/claimed"  # any value: whoever set it has the pod
ENDING = f"{GROUP}/ending"  # the pool is about to delete it

# Labels of nodes.
NODE_FINGERPRINT = f"{GROUP}/fingerprint"
NODE_AGENT = f"{GROUP}/agent"

RESTORED = f"{GROUP}/restored"  # condition and readiness gate of pods
FINALIZER = f"{GROUP}/bytes"

# Phases of a Snapshot.
PENDING, CAPTURING, READY, FAILED, DELETING = "Pending", "Capturing", "Ready", "Failed", "Deleting"

_LONGEST_STORE_NAME = 64


def agent_lease(node: str) -> str:
    """Return the name of the Lease, in our own namespace, by which the agent of a node says that it lives."""
    return f"hotstart-agent-{node}"


def store_name(namespace: str, name: str) -> str:
    """Return what a Snapshot is called in the stores of nodes. Raises Refused if that is too long for them."""
    stored = f"k8s.{namespace}.{name}"
    if len(stored) > _LONGEST_STORE_NAME:
        raise Refused(
            f"namespace and name have {len(namespace) + len(name)} characters together, stores take "
            f"{_LONGEST_STORE_NAME - 5}: give the Snapshot a shorter name"
        )
    return stored
