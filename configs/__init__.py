"""Configurations: values only. `base.py` defines every field; the other files assign to them."""

import sys

# An installation contains this package as umv2.configs, but its files import `configs`.
sys.modules.setdefault("configs", sys.modules[__name__])
