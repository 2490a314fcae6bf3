"""From a pydantic model to a CustomResourceDefinition: a structural schema has no references and no null type."""

from typing import Any

from pydantic import BaseModel

from deploy.generate.models import Snapshot, SnapshotClass, WarmPool

GROUP, VERSION = "hotstart.dev", "v1alpha1"
Schema = dict[str, Any]


def column(name: str, kind: str, path: str, description: str = "", priority: int = 0) -> Schema:
    """Return a column of `kubectl get`."""
    extra = {"description": description} if description else {}
    return {"name": name, "type": kind, "jsonPath": path, "priority": priority, **extra}


AGE = column("Age", "date", ".metadata.creationTimestamp")
DEFINITIONS: list[tuple[type[BaseModel], str, list[str], str, list[Schema], Schema]] = [
    (
        Snapshot,
        "snapshots",
        ["hsnap"],
        "Namespaced",
        [
            column("Phase", "string", ".status.phase"),
            column("Node", "string", ".status.node", "where it was captured"),
            column("Memory", "integer", ".status.logicalBytes", "bytes that the worker had in memory"),
            column("Stored", "integer", ".status.storedBytes", "bytes that it added to the store", 1),
            column("Oracle", "boolean", ".status.oracle", "whether replicas' answers are compared", 1),
            column("Digest", "string", ".status.digest", "", 1),
            column("Message", "string", ".status.message", "", 1),
            AGE,
        ],
        {"status": {}},
    ),
    (
        SnapshotClass,
        "snapshotclasses",
        ["hsclass"],
        "Cluster",
        [column("Store", "string", ".spec.store.url"), column("Trust", "string", ".spec.trust.policy"), AGE],
        {},
    ),
    (
        WarmPool,
        "warmpools",
        ["hwarm"],
        "Namespaced",
        [
            column("Snapshot", "string", ".spec.snapshot"),
            column("Wanted", "integer", ".spec.replicas"),
            column("Spare", "integer", ".status.replicas", "unclaimed placeholders"),
            column("Running", "integer", ".status.readyReplicas"),
            AGE,
        ],
        {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
    ),
]


def definitions() -> list[Schema]:
    """Return the CustomResourceDefinitions."""
    return [definition(*d) for d in DEFINITIONS]


def definition(
    model: type[BaseModel], plural: str, short: list[str], scope: str, columns: list[Schema], subresources: Schema
) -> Schema:
    """Return one CustomResourceDefinition."""
    schema = model.model_json_schema()
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": structural(schema, schema.get("$defs", {}))},
        "additionalPrinterColumns": columns,
    }
    if subresources:
        version["subresources"] = subresources
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/name": "hotstart"}},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": model.__name__,
                "listKind": f"{model.__name__}List",
                "plural": plural,
                "singular": model.__name__.lower(),
                "shortNames": short,
                "categories": ["hotstart"],
            },
            "versions": [version],
        },
    }


def structural(schema: Schema, defs: dict[str, Schema]) -> Schema:
    """Return a structural schema: references put in place, `X or null` become X, free-form objects keep all their fields."""
    if "$ref" in schema:
        target = defs[schema["$ref"].rpartition("/")[2]]
        return structural({**target, **{k: v for k, v in schema.items() if k != "$ref"}}, defs)
    if "anyOf" in schema:
        (only,) = [s for s in schema["anyOf"] if s.get("type") != "null"]
        return structural({**only, **{k: v for k, v in schema.items() if k != "anyOf"}}, defs)
    made = {k: v for k, v in schema.items() if k not in ("title", "$defs", "default", "additionalProperties")}
    if schema.get("default") is not None:
        made["default"] = schema["default"]
    if "const" in made:
        made["enum"] = [made.pop("const")]
    free = schema.get("additionalProperties")
    if free is True:
        made["x-kubernetes-preserve-unknown-fields"] = True
    elif isinstance(free, dict):
        made["additionalProperties"] = structural(free, defs)
    if made.get("type") == "integer":
        made.setdefault("format", "int64")
    if "properties" in made:
        made["properties"] = {name: structural(s, defs) for name, s in made["properties"].items()}
    if "items" in made:
        made["items"] = structural(made["items"], defs)
    return made
