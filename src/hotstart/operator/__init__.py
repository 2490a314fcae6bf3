"""The Kubernetes controllers and the admission webhook: decisions are pure functions, `running` acts on them."""
