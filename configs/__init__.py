"""Configurations: values only. `base.py` creates every field; the others assign."""

import sys

# Installed, this package is umv2.configs, and its files import each other as configs all the same.
sys.modules.setdefault("configs", sys.modules[__name__])
