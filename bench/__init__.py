"""What is measured, and what is made of it: `make bench-restore`, `make bench-store` (docs/benchmarks.md)."""
