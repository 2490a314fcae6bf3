"""Tests that need what only .k8s has: pydantic, lightkube, Helm, the schemas of Kubernetes. `make test` runs them there."""
