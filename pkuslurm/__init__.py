"""pkuslurm: from a base model and a small dataset to a fine-tuned model that answers, in one command."""

__version__ = "0.1.0"
