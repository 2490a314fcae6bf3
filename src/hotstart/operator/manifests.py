"""All that is installed on a cluster, with places for values: the one source of the plain manifests and of the Helm chart. Pure."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from msgspec import Struct, json

from hotstart.adapters.kubernetes.names import GROUP
from hotstart.adapters.kubernetes.objects import Object
from hotstart.errors import BadUsage
from hotstart.operator.controller import WEBHOOK_NAME, WEBHOOK_SECRET, WEBHOOK_SERVICE
from hotstart.operator.running import LEASE

# What containerd gives by default (chroot, ids, files, kill), and what capture and restore need beyond it.
AGENT_CAPABILITIES = [
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_RAW", "SYS_CHROOT"),
    *("MKNOD", "AUDIT_WRITE", "SETFCAP", "NET_BIND_SERVICE"),
    *("SYS_ADMIN", "SYS_PTRACE", "SYS_TIME", "NET_ADMIN", "SYS_RESOURCE"),
]

# What may be set, with defaults; docs/kubernetes.md explains each.
VALUES: Object = {
    "imagePullPolicy": "IfNotPresent",
    "imagePullSecrets": [],
    "operator": {
        "image": "hotstart/operator:0.1.0",
        "replicas": 2,
        "resources": {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"memory": "512Mi"}},
        "nodeSelector": {},
        "tolerations": [],
        "priorityClassName": "",
        "egress": [{"port": 443, "protocol": "TCP"}, {"port": 6443, "protocol": "TCP"}],
    },
    "agent": {
        "image": "hotstart/agent:0.1.0",
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        "nodeSelector": {},
        "tolerations": [{"operator": "Exists"}],
        "priorityClassName": "",
        "podAnnotations": {"container.apparmor.security.beta.kubernetes.io/agent": "unconfined"},
        "capabilities": AGENT_CAPABILITIES,
        "home": "/var/lib/hotstart",
        "containerdFolder": "/run/containerd",
        "containerdSocket": "/run/containerd/containerd.sock",
        "storeSecret": "hotstart-store",
    },
    "webhook": {
        "timeoutSeconds": 3,
        "namespaceSelector": {
            "matchExpressions": [
                {
                    "key": "kubernetes.io/metadata.name",
                    "operator": "NotIn",
                    "values": ["kube-system", "hotstart-system"],
                }
            ]
        },
        "matchConditions": [
            {
                "name": "asks-for-a-snapshot",
                "expression": f"has(object.metadata.annotations) && '{GROUP}/restore-from' in object.metadata.annotations",
            }
        ],
    },
    "networkPolicies": True,
}

NAMESPACE = "hotstart-system"
_LABELS = {"app.kubernetes.io/name": "hotstart"}
_RBAC = "rbac.authorization.k8s.io"


class Value(Struct, frozen=True):
    """A place that a value fills, named by its path in the values: 'agent.image'. An optional field is left out where the value is empty."""

    path: str
    optional: bool = False


class Namespace(Struct, frozen=True):
    """A place that the namespace fills."""


class Manifest(Struct, frozen=True):
    """One object, the file that the chart has it in, and the value that must be true for it to be there."""

    file: str
    obj: Object
    only_if: str | None = None


def custom_resources() -> list[Object]:
    """Return the CustomResourceDefinitions, which deploy/generate makes of its models."""
    data: list[Object] = json.decode(files("hotstart.operator").joinpath("custom_resources.json").read_bytes())
    return data


def render(values: Object, namespace: str, resources: list[Object]) -> list[Object]:
    """Return all objects for these values, the namespace and the custom resources first."""
    labels = {**_LABELS, "pod-security.kubernetes.io/enforce": "privileged"}  # the agent's pods
    first = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    wanted = [m.obj for m in manifests() if m.only_if is None or value_at(values, m.only_if)]
    return [first, *resources, *(_filled(obj, values, namespace) for obj in wanted)]


def value_at(values: Object, path: str) -> Any:
    """Return a value by its path. Raises BadUsage if there is none."""
    value: Any = values
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise BadUsage(f"there is no value {path}: docs/kubernetes.md lists them")
        value = value[key]
    return value


def with_value(values: Object, path: str, value: Any) -> Object:
    """Return the values with one changed. Raises BadUsage if there is none of that path, or it is of another type."""
    before = value_at(values, path)
    if type(before) is not type(value):
        raise BadUsage(f"{path} takes something like {json.encode(before).decode()[:80]}")
    changed = copy.deepcopy(values)
    *folders, last = path.split(".")
    (value_at(changed, ".".join(folders)) if folders else changed)[last] = value
    return changed


def manifests() -> list[Manifest]:
    """Return all that is installed but namespace and custom resources."""
    return [
        *_accounts(),
        *_operator(),
        *_agent(),
        *_webhook(),
        *_network(),
    ]


def _filled(node: Any, values: Object, namespace: str) -> Any:
    if isinstance(node, Value):
        return copy.deepcopy(value_at(values, node.path))
    if isinstance(node, Namespace):
        return namespace
    if isinstance(node, dict):
        return {
            key: _filled(value, values, namespace)
            for key, value in node.items()
            if not (isinstance(value, Value) and value.optional and not value_at(values, value.path))
        }
    if isinstance(node, list):
        return [_filled(value, values, namespace) for value in node]
    return node


def _obj(api: str, kind: str, name: str, *, cluster: bool = False, **rest: Any) -> Object:
    metadata: Object = {"name": name, "labels": _LABELS}
    if not cluster:
        metadata["namespace"] = Namespace()
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _rule(group: str, resources: list[str], verbs: list[str], names: list[str] | None = None) -> Object:
    rule: Object = {"apiGroups": [group], "resources": resources, "verbs": verbs}
    return rule if names is None else {**rule, "resourceNames": names}


def _accounts() -> list[Manifest]:
    """Who may do what. Nobody may read Secrets but the operator its own; nobody may make or change workloads but pods."""
    watch = ["get", "list", "watch"]
    everywhere = {
        "hotstart-operator": [
            _rule(GROUP, ["snapshots"], [*watch, "patch", "delete"]),
            _rule(GROUP, ["warmpools", "snapshotclasses"], watch),
            _rule(GROUP, ["snapshots/status", "warmpools/status"], ["patch"]),
            _rule(GROUP, ["snapshots/finalizers", "warmpools/finalizers"], ["update"]),
            _rule("", ["pods"], [*watch, "create", "patch", "delete"]),
            _rule("", ["pods/status"], ["patch"]),
            _rule("", ["nodes"], ["get"]),
            _rule("", ["events"], ["create"]),
            _rule("admissionregistration.k8s.io", ["mutatingwebhookconfigurations"], ["get", "patch"], [WEBHOOK_NAME]),
        ],
        "hotstart-agent": [
            _rule(GROUP, ["snapshots", "snapshotclasses"], watch),
            _rule(GROUP, ["snapshots/status"], ["patch"]),
            _rule("", ["pods"], [*watch, "patch"]),
            _rule("", ["pods/status"], ["patch"]),
            _rule("", ["nodes"], ["get", "patch"]),
            _rule("", ["events"], ["create", "patch"]),
        ],
    }
    here = {
        "hotstart-operator": [
            _rule("coordination.k8s.io", ["leases"], ["list", "watch"]),
            _rule("coordination.k8s.io", ["leases"], ["get", "patch"], [LEASE]),
            _rule("", ["secrets"], ["get", "patch"], [WEBHOOK_SECRET]),
        ],
        "hotstart-agent": [_rule("coordination.k8s.io", ["leases"], ["create", "get", "patch"])],
    }
    made = []
    for name, rules in everywhere.items():
        subject = [{"kind": "ServiceAccount", "name": name, "namespace": Namespace()}]
        role = {"apiGroup": _RBAC, "name": name}
        made += [
            _obj("v1", "ServiceAccount", name, imagePullSecrets=Value("imagePullSecrets")),
            _obj(f"{_RBAC}/v1", "ClusterRole", name, cluster=True, rules=rules),
            _obj(
                f"{_RBAC}/v1",
                "ClusterRoleBinding",
                name,
                cluster=True,
                roleRef={**role, "kind": "ClusterRole"},
                subjects=subject,
            ),
            _obj(f"{_RBAC}/v1", "Role", name, rules=here[name]),
            _obj(f"{_RBAC}/v1", "RoleBinding", name, roleRef={**role, "kind": "Role"}, subjects=subject),
        ]
    # These are made here so that the operator need not be allowed to make any.
    made += [
        _obj("coordination.k8s.io/v1", "Lease", LEASE, spec={}),
        _obj("v1", "Secret", WEBHOOK_SECRET, type="Opaque"),
    ]
    return [Manifest("rbac.yaml" if "Secret" != o["kind"] != "Lease" else "operator.yaml", o) for o in made]


def _env(name: str, field: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def _operator() -> list[Manifest]:
    labels = {**_LABELS, "app.kubernetes.io/component": "operator"}
    container = {
        "name": "operator",
        "image": Value("operator.image"),
        "imagePullPolicy": Value("imagePullPolicy"),
        "args": ["operator"],
        "env": [_env("POD_NAMESPACE", "metadata.namespace"), _env("POD_NAME", "metadata.name")],
        "ports": [
            # Server-side apply of older API servers asks for every key of a list, defaults too.
            {"name": "webhook", "containerPort": 9443, "protocol": "TCP"},
            {"name": "health", "containerPort": 8081, "protocol": "TCP"},
        ],
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "health"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/healthz", "port": "health"}, "initialDelaySeconds": 10},
        "resources": Value("operator.resources"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    apart = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    spec = {
        "serviceAccountName": "hotstart-operator",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
            }
        },
        "nodeSelector": Value("operator.nodeSelector"),
        "tolerations": Value("operator.tolerations"),
        "priorityClassName": Value("operator.priorityClassName"),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    }
    deployment = _obj(
        "apps/v1",
        "Deployment",
        "hotstart-operator",
        spec={
            "replicas": Value("operator.replicas"),
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    )
    return [Manifest("operator.yaml", deployment)]


def _agent() -> list[Manifest]:
    labels = {**_LABELS, "app.kubernetes.io/component": "agent"}
    mounts = {"home": Value("agent.home"), "run": "/run/hotstart", "containerd": Value("agent.containerdFolder")}
    container = {
        "name": "agent",
        "image": Value("agent.image"),
        "imagePullPolicy": Value("imagePullPolicy"),
        "args": ["agent", "--node", "$(NODE_NAME)", "--containerd", Value("agent.containerdSocket")],
        "env": [
            _env("NODE_NAME", "spec.nodeName"),
            _env("POD_NAMESPACE", "metadata.namespace"),
            {"name": "HOTSTART_HOME", "value": Value("agent.home")},
            {"name": "HOTSTART_RUN", "value": "/run/hotstart"},
        ],
        "envFrom": [{"secretRef": {"name": Value("agent.storeSecret"), "optional": True}}],
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "host": "127.0.0.1", "port": 9466},
            "initialDelaySeconds": 15,
            "failureThreshold": 6,
        },
        "resources": Value("agent.resources"),
        "securityContext": {
            "privileged": False,
            "runAsUser": 0,
            "capabilities": {"drop": ["ALL"], "add": Value("agent.capabilities")},
            "seccompProfile": {"type": "Unconfined"},
        },
        "volumeMounts": [
            *({"name": name, "mountPath": where} for name, where in mounts.items()),
            {"name": "cgroup", "mountPath": "/sys/fs/cgroup"},
        ],
    }
    spec = {
        "serviceAccountName": "hotstart-agent",
        "hostPID": True,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": Value("agent.nodeSelector"),
        "tolerations": Value("agent.tolerations"),
        "priorityClassName": Value("agent.priorityClassName"),
        "containers": [container],
        "volumes": [
            {"name": "home", "hostPath": {"path": Value("agent.home"), "type": "DirectoryOrCreate"}},
            {"name": "run", "hostPath": {"path": "/run/hotstart", "type": "DirectoryOrCreate"}},
            {"name": "containerd", "hostPath": {"path": Value("agent.containerdFolder"), "type": "Directory"}},
            {"name": "cgroup", "hostPath": {"path": "/sys/fs/cgroup", "type": "Directory"}},
        ],
    }
    daemon_set = _obj(
        "apps/v1",
        "DaemonSet",
        "hotstart-agent",
        spec={
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": labels, "annotations": Value("agent.podAnnotations")},
                "spec": spec,
            },
        },
    )
    return [Manifest("agent.yaml", daemon_set)]


def _webhook() -> list[Manifest]:
    labels = {**_LABELS, "app.kubernetes.io/component": "operator"}
    service = _obj(
        "v1",
        "Service",
        WEBHOOK_SERVICE,
        spec={
            "selector": labels,
            "ports": [{"name": "webhook", "port": 443, "targetPort": "webhook", "protocol": "TCP"}],
        },
    )
    hook = {
        "name": f"placeholders.{GROUP}",
        "clientConfig": {
            "service": {"name": WEBHOOK_SERVICE, "namespace": Namespace(), "path": "/placeholders", "port": 443}
        },
        "rules": [
            {
                "apiGroups": [""],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": ["pods"],
                "scope": "Namespaced",
            }
        ],
        "failurePolicy": "Ignore",
        "sideEffects": "None",
        "reinvocationPolicy": "IfNeeded",
        "matchPolicy": "Equivalent",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": Value("webhook.timeoutSeconds"),
        "namespaceSelector": Value("webhook.namespaceSelector"),
        "matchConditions": Value("webhook.matchConditions", optional=True),
    }
    configuration = _obj(
        "admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration", WEBHOOK_NAME, cluster=True, webhooks=[hook]
    )
    return [Manifest("webhook.yaml", service), Manifest("webhook.yaml", configuration)]


def _network() -> list[Manifest]:
    """The operator is reached by the API server and by probes, and reaches the API server and DNS. The agent is on its node's network."""
    policy = _obj(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "hotstart-operator",
        spec={
            "podSelector": {"matchLabels": {**_LABELS, "app.kubernetes.io/component": "operator"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": [{"port": 9443, "protocol": "TCP"}, {"port": 8081, "protocol": "TCP"}]}],
            "egress": [
                {"ports": Value("operator.egress")},
                {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
            ],
        },
    )
    return [Manifest("networkpolicy.yaml", policy, "networkPolicies")]
