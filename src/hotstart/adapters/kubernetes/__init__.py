"""Kubernetes: what our objects are called there, and its API server."""
