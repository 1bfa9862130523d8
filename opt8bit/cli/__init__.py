"""The ``opt8bit`` command."""
