"""Texts as people have them: files of many formats, folders of them and data sets, read no further than is needed."""

from opt8bit.cli.texts.choice import choose_windows, first_windows, lacks_bos
from opt8bit.cli.texts.places import Text, find_text

__all__ = ["Text", "choose_windows", "find_text", "first_windows", "lacks_bos"]
