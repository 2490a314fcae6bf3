"""The node daemon: restores pods' workers in place, captures them, and tells the cluster what it did."""
