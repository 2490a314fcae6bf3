"""What is installed: current schemas, a chart that says what the manifests say, rights as few as they are meant to be."""

import copy

import helm_python
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.generate.__main__ import CHART, DEPLOY, generated
from deploy.generate.schemas import definitions
from hotstart.operator.manifests import AGENT_CAPABILITIES, VALUES, custom_resources, render, with_value
from hotstart.operator.yamltext import to_yaml

OBJECTS = render(VALUES, "hotstart-system", custom_resources())


def named(obj):
    return f"{obj['kind']} {obj['metadata']['name']}"


def of_kind(kind, name=None):
    return [o for o in OBJECTS if o["kind"] == kind and name in (None, o["metadata"]["name"])]


def test_what_is_committed_is_what_the_code_makes():
    old = [str(path) for path, text in generated().items() if not path.exists() or path.read_text() != text]
    assert not old, "run `make deploy`"


def test_the_package_has_the_custom_resources_of_the_models():
    assert custom_resources() == definitions()


@pytest.mark.parametrize("version", ["1.28", kubernetes_validate.latest_version()[:4]])
@pytest.mark.parametrize("obj", OBJECTS, ids=named)
def test_every_object_is_valid_for_kubernetes(obj, version):
    kubernetes_validate.validate(obj, version, strict=True)


def test_match_conditions_are_left_out_for_a_kubernetes_that_does_not_know_them():
    old = render(with_value(VALUES, "webhook.matchConditions", []), "hotstart-system", custom_resources())
    (configuration,) = (o for o in old if o["kind"] == "MutatingWebhookConfiguration")
    assert "matchConditions" not in configuration["webhooks"][0]
    assert rendered({"webhook": {"matchConditions": []}})["MutatingWebhookConfiguration hotstart"] == configuration


def test_validation_would_notice_a_wrong_field():
    broken = copy.deepcopy(of_kind("DaemonSet")[0])
    broken["spec"]["template"]["spec"]["hostPids"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_the_plain_manifests_are_those_objects():
    assert list(yaml.safe_load_all((DEPLOY / "hotstart.yaml").read_text())) == OBJECTS


def by_name(objects):
    return {named(o): o for o in objects}


def rendered(values):
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="hotstart", namespace="hotstart-system")
    texts = files.values() if isinstance(files, dict) else [files]
    return by_name(o for text in texts for o in yaml.safe_load_all(text) if o)


def test_helm_makes_of_the_chart_what_the_manifests_say():
    plain = by_name(o for o in OBJECTS if o["kind"] not in ("Namespace", "CustomResourceDefinition"))
    assert rendered({}) == plain


def test_helm_takes_the_same_values():
    values = with_value(with_value(VALUES, "networkPolicies", False), "agent.nodeSelector", {"gpu": "yes"})
    plain = render(values, "hotstart-system", [])[1:]
    assert rendered({"networkPolicies": False, "agent": {"nodeSelector": {"gpu": "yes"}}}) == by_name(plain)


def test_helm_finds_nothing_to_complain_about():
    result = helm_python.lint(str(CHART))
    assert "[ERROR]" not in str(result)


def test_the_agent_is_not_privileged_and_has_the_listed_capabilities_only():
    (agent,) = of_kind("DaemonSet")
    (container,) = agent["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["privileged"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": AGENT_CAPABILITIES}
    assert not {"ALL", "SYS_MODULE", "SYS_RAWIO", "SYS_BOOT"} & set(AGENT_CAPABILITIES)


def test_the_operator_runs_under_the_restricted_standard():
    (deployment,) = of_kind("Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert not any(key in spec for key in ("hostPID", "hostNetwork", "hostIPC"))


def rules():
    return [(o, rule) for o in OBJECTS if o["kind"] in ("Role", "ClusterRole") for rule in o["rules"]]


def test_nobody_may_do_everything_or_read_secrets_that_are_not_theirs():
    for role, rule in rules():
        words = [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
        assert "*" not in words, role
        if "secrets" in rule["resources"]:
            assert role["kind"] == "Role"
            assert rule["resourceNames"] == ["hotstart-webhook-tls"]
            assert set(rule["verbs"]) == {"get", "patch"}
        if "mutatingwebhookconfigurations" in rule["resources"]:
            assert rule["resourceNames"] == ["hotstart"]
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
        assert not {"pods/exec", "deployments", "roles", "clusterroles"} & set(rule["resources"])


def test_a_webhook_that_is_down_holds_up_nobody():
    (configuration,) = of_kind("MutatingWebhookConfiguration")
    (hook,) = configuration["webhooks"]
    assert hook["failurePolicy"] == "Ignore"
    assert hook["timeoutSeconds"] <= 5
    assert hook["sideEffects"] == "None"


DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("aA1-:#/. \n'\"~ö", max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(DATA)
def test_what_is_written_as_yaml_is_read_back(data):
    assert yaml.safe_load(to_yaml(data)) == data
