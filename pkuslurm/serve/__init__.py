"""The door before a run's models: one address with a key, behind it an engine for each model. Standard library only."""
