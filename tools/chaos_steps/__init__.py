"""Commands that are struck at a write step: see ``tools/chaos.py``."""
