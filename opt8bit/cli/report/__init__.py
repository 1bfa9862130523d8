"""``opt8bit report``: one HTML page on a model that ``opt8bit compress`` has written."""

from opt8bit.cli.report.page import run

__all__ = ["run"]
