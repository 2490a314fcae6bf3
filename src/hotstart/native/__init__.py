"""The C that the kernel leaves no choice about; compiled into bin/ by the package's build (build_native.py)."""
