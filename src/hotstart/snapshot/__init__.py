"""A warm worker becomes a snapshot: what it is made of (manifest), where memory goes (layout), how it is taken (capture)."""
