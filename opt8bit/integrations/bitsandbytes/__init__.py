"""Puts opt8bit's optimizers where ``bitsandbytes.optim`` is looked up; see :func:`install`."""

from opt8bit.integrations.bitsandbytes.installing import install, uninstall

__all__ = ["install", "uninstall"]
