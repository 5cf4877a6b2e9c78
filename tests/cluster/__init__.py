"""A real Slurm cluster on one Debian machine, as root: ``python -m tests.cluster up`` (README.md)."""
