"""The command `mlkit`."""
