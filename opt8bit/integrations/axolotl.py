"""axolotl: a plugin under which ``optimizer: adamw_8bit`` and its like run on opt8bit."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]

from opt8bit.integrations.bitsandbytes import install


class Opt8bitPlugin(BasePlugin):
    """Puts opt8bit's optimizers in the place of bitsandbytes' when axolotl reads its configuration.

    In the configuration::

        plugins:
          - opt8bit.integrations.axolotl.Opt8bitPlugin
        optimizer: adamw_8bit  # or any other that bitsandbytes has
    """

    def register(self, cfg: dict) -> None:
        """Is called by axolotl before anything is loaded."""
        install()
