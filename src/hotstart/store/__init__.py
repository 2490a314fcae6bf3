"""A snapshot becomes named, verified bytes."""
