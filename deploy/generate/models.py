"""The custom resources. Their OpenAPI schemas, and so what `kubectl explain` says, come from here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WholeSeconds = Annotated[int, Field(ge=1, le=10 * 365 * 86400)]


class Model(BaseModel):
    """Fields are written in camelCase, as Kubernetes does; unknown ones are pruned by the API server."""

    model_config = ConfigDict(extra="forbid")


class Retention(Model):
    """How long a Snapshot is kept; without it, until somebody deletes it."""

    expireAfterSeconds: WholeSeconds | None = Field(None, description="Delete it so long after it was captured.")
    unusedAfterSeconds: WholeSeconds | None = Field(None, description="Delete it when no pod has named it for so long.")


class PodSource(Model):
    """A pod that runs already; it goes on after the capture."""

    name: str = Field(min_length=1, max_length=253, description="A pod in the Snapshot's namespace.")
    container: str | None = Field(
        None, max_length=63, description="Which container is the worker; the first, if not given."
    )


class Source(Model):
    """Where the Snapshot comes from: either pod or template."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"oneOf": [{"required": ["pod"]}, {"required": ["template"]}]}
    )

    pod: PodSource | None = Field(None, description="A pod that runs already; it goes on after the capture.")
    template: dict[str, Any] | None = Field(
        None,
        description="A pod template (metadata, spec): a pod is started of it, warmed up, captured and deleted.",
    )
    container: str | None = Field(None, max_length=63, description="With template: which container is the worker.")


class WarmupRequest(Model):
    """A request that is sent to the worker before it is captured."""

    method: str = Field("GET", max_length=16)
    path: str = Field(min_length=1, max_length=2048)
    headers: dict[str, str] | None = None
    body: str | None = None


class Worker(Model):
    """How the worker is asked."""

    port: int | None = Field(
        None, ge=1, le=65535, description="What it listens on; the container's first port, if not given."
    )
    readyPath: str | None = Field(None, max_length=2048, description="Answers 2xx once it is ready.")
    warmup: list[WarmupRequest] | None = Field(
        None, max_length=1000, description="Sent in order; the last answer is what every replica has to answer, too."
    )
    oracleIgnore: list[str] | None = Field(
        None, max_length=100, description="JSON fields that are dropped before answers are compared."
    )


class SnapshotSpec(Model):
    """What is to be captured, and how long it is kept."""

    source: Source
    className: str = Field(
        "default", max_length=253, description="A SnapshotClass; none of that name: the node's own store."
    )
    worker: Worker | None = None
    readyTimeoutSeconds: WholeSeconds = Field(600, description="How long to wait for the source to be ready.")
    captureTimeoutSeconds: WholeSeconds = Field(900, description="How long the node's agent may take.")
    retention: Retention | None = None
    deletionPolicy: Literal["Delete", "Retain"] = Field(
        "Delete", description="Whether the class's store keeps the bytes when the Snapshot is deleted."
    )


class Condition(Model):
    """As in metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    lastTransitionTime: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    observedGeneration: int | None = None


Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class SnapshotStatus(Model):
    """What became of it."""

    phase: Literal["Pending", "Capturing", "Ready", "Failed", "Deleting"] | None = None
    message: str | None = Field(None, description="What it waits for, or why it failed.")
    since: Time | None = Field(None, description="When this phase began.")
    observedGeneration: int | None = None
    node: str | None = Field(None, description="Where it is or was captured.")
    pod: str | None = None
    podUID: str | None = None
    container: str | None = None
    capturedAt: Time | None = None
    lastUsed: Time | None = Field(None, description="When a pod last named it, to ten minutes.")
    digest: str | None = Field(None, description="BLAKE3 of the manifest: the snapshot's name for good.")
    logicalBytes: int | None = Field(None, ge=0, description="What the worker had in memory.")
    storedBytes: int | None = Field(None, ge=0, description="What it added to the store.")
    oracle: bool | None = Field(None, description="Whether replicas are compared with the captured worker's answer.")
    fingerprint: str | None = Field(None, description="The label of nodes that it can be restored on.")
    nodes: list[str] | None = Field(None, description="Nodes that hold its bytes.")
    conditions: list[Condition] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )


class Snapshot(Model):
    """A warm worker, frozen: pods with the annotation hotstart.dev/restore-from are restored from it."""

    spec: SnapshotSpec
    status: SnapshotStatus | None = None


class Store(Model):
    """Where snapshots are pushed to, beside the node's own store."""

    url: str | None = Field(None, max_length=2048, description="s3://..., gs://..., az://..., as in docs/stores.md.")


class Trust(Model):
    """Which signatures are asked for."""

    policy: Literal["required", "optional"] = "required"
    keys: list[str] | None = Field(None, max_length=100, description="Public keys, as `hotstart keys new` prints them.")


class SnapshotClassSpec(Model):
    """What Snapshots of this class have in common."""

    store: Store | None = None
    trust: Trust | None = None
    retention: Retention | None = Field(None, description="For Snapshots that say nothing else.")


class SnapshotClass(Model):
    """What Snapshots have in common: store, trust, retention."""

    spec: SnapshotClassSpec


class WarmPoolSpec(Model):
    """Which placeholders are kept."""

    snapshot: str = Field(min_length=1, max_length=63, description="A Snapshot in the same namespace.")
    replicas: int = Field(1, ge=0, le=10000, description="How many unclaimed placeholders to keep.")
    template: dict[str, Any] = Field(
        description="The pod template of the placeholders: image and resources of the worker."
    )


class WarmPoolStatus(Model):
    """How many there are."""

    replicas: int | None = Field(None, ge=0, description="Unclaimed placeholders.")
    readyReplicas: int | None = Field(None, ge=0, description="Those of them that run.")
    selector: str | None = Field(None, description="Finds them; what a scaler needs.")
    observedGeneration: int | None = None
    conditions: list[Condition] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )


class WarmPool(Model):
    """Placeholders that run and wait: one that is claimed becomes a replica in tens of milliseconds."""

    spec: WarmPoolSpec
    status: WarmPoolStatus | None = None
