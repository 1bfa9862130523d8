"""``python -m opt8bit`` and ``torchrun -m opt8bit``: the ``opt8bit`` command."""

import sys

from opt8bit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
