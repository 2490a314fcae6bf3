"""Running workers answer requests: gateway, activator, pool, autoscaler, dashboard."""
