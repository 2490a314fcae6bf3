"""CRIU, run as a separate program."""
