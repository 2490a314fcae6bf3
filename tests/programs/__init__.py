"""Real programs, each snapshotted and restored round after round: no byte of any of them may be wrong."""
