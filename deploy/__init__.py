"""What is installed on a cluster, and what makes it."""
