"""Batch systems: Slurm, Kubernetes, several nodes. An optional outer layer."""
