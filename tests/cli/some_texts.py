"""The same texts in records, a chat, and how a text is read as a whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opt8bit.cli.texts import find_text

TEXTS = ["one\n two", "", 'drei, "vier"\u2028', "fünf\tsix"]
JOINED = "\n\n".join(TEXTS)
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
MODEL: Any = SimpleNamespace(
    chat_template="yes",
    apply_chat_template=lambda chat, tokenize: "".join(f"<{m['role']}>{m['content']}" for m in chat),
)
RENDERED = "<user>hi<assistant>ho"


def read(path: Path | str, column: str | None = None, tokenizer: Any = MODEL) -> str:
    return "".join(find_text(str(path), column).pieces(tokenizer))


def json_lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
