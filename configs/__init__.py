"""Configurations: values only. `base.py` creates every field; the others assign."""
