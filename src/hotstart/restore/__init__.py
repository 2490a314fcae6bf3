"""Named bytes become a running worker."""
