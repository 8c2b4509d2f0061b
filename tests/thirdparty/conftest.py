"""Distributions of others: `e2e/test_thirdparty.py` installs them and runs their tests there."""

collect_ignore = ["acme_cythera"]
