"""`python -m deploy.generate [--check]`: writes the custom resources, the plain manifests and the Helm chart, or says which are old.

The chart is made of the same objects: where they have a place for a value it has `{{ toJson .Values.path }}`, and JSON is YAML.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from deploy.generate.schemas import definitions
from hotstart import __version__
from hotstart.operator import manifests
from hotstart.operator.yamltext import to_yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart" / "hotstart"
RESOURCES = ROOT / "src" / "hotstart" / "operator" / "custom_resources.json"
NOTE = "# Made by `make deploy`: change src/hotstart/operator/manifests.py or deploy/generate instead.\n"

# A field that is left out where its value is empty: older API servers may not know it.
OPTIONAL = re.compile(r"^( *)(\w+): \{\{ optional (\S+) \}\}$", re.MULTILINE)
LEFT_OUT = r"{{- with .Values.\3 }}\n\1\2: {{ toJson . }}\n{{- end }}"


def expression(node: Any) -> str:
    """Return what Helm fills in."""
    if isinstance(node, manifests.Value):
        return ("{{ optional " if node.optional else "{{ toJson .Values.") + node.path + " }}"
    if isinstance(node, manifests.Namespace):
        return "{{ .Release.Namespace }}"
    raise TypeError(node)


def documents(objects: list[Any]) -> str:
    """Return several objects as one file."""
    return NOTE + "".join(f"---\n{to_yaml(o)}" for o in objects)


def chart() -> dict[Path, str]:
    """Return the chart's files."""
    description = "Freeze a warm AI inference worker once, start replicas of it in milliseconds"
    head = {"apiVersion": "v2", "name": "hotstart", "description": description, "type": "application"}
    made = {
        CHART / "Chart.yaml": NOTE + to_yaml({**head, "version": __version__, "appVersion": __version__}),
        CHART / "values.yaml": NOTE + to_yaml(manifests.VALUES),
        CHART / "crds" / "hotstart.yaml": documents(definitions()),
    }
    templates: dict[str, str] = {}
    for m in manifests.manifests():
        text = f"---\n{OPTIONAL.sub(LEFT_OUT, to_yaml(m.obj, expression))}"
        if m.only_if:
            text = "{{- if .Values." + m.only_if + " }}\n" + text + "{{- end }}\n"
        templates[m.file] = templates.get(m.file, NOTE) + text
    return made | {CHART / "templates" / name: text for name, text in templates.items()}


def generated() -> dict[Path, str]:
    """Return every file that is made, with its contents."""
    custom = definitions()
    plain = documents(manifests.render(manifests.VALUES, manifests.NAMESPACE, custom))
    return {RESOURCES: json.dumps(custom, indent=1) + "\n", DEPLOY / "hotstart.yaml": plain} | chart()


def main() -> int:
    """Write what has changed, or complain about it."""
    check = "--check" in sys.argv[1:]
    made = generated()
    old = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in old:
        print(f"{'is old' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path])
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
