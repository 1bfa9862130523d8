"""Records as texts: a column of text, or a chat that the model's own template renders."""

from __future__ import annotations

from typing import Any

from opt8bit.cli.errors import CommandError

COLUMNS = ("text", "messages", "conversations")
ROLES = {  # in chats of ShareGPT's form, and what templates call them
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ALLOWED = "text (a string), messages (a list of role and content) or conversations (a list of from and value)"


def text_of(record: Any, where: str, column: str | None, tokenizer: Any) -> str:
    """Returns the text of a record.

    Args:
        record: a string, or an object with one of ``COLUMNS``.
        where: file and line, for messages.
        column: the one to take, if not the one of ``COLUMNS`` that is there.
        tokenizer: of the model; it renders chats.

    Raises:
        CommandError: it is not clear what the text is, or it cannot be rendered.
    """
    value = _value(record, where, column)
    if isinstance(value, list):
        value = _rendered(value, where, tokenizer)
    if not isinstance(value, str):
        raise CommandError(f"{where}: the text must be a string or a chat, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"{where}: the text has half of a surrogate pair, which no UTF-8 has") from error
    return value


def is_message(value: Any) -> bool:
    """Tells whether this is a message of a chat, in either form."""
    return isinstance(value, dict) and (value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"})


def _value(record: Any, where: str, column: str | None) -> Any:
    """Returns what a record has in its column of text."""
    if isinstance(record, str) and column is None:
        return record
    if not isinstance(record, dict):
        raise CommandError(f"{where}: a record must be an object with columns, got {_short(record)}")
    there = ", ".join(map(str, record)) or "none"
    if column is not None:
        if column not in record:
            raise CommandError(f"{where}: no column {column!r}, it has {there}")
        return record[column]
    found = [name for name in COLUMNS if record.get(name) is not None]
    if not found:
        raise CommandError(f"{where}: the columns are {there}; allowed is {ALLOWED}, or --text-column NAME")
    if len(found) > 1:
        raise CommandError(f"{where}: {' and '.join(found)} are both there: say which by --text-column NAME")
    return record[found[0]]


def _rendered(chat: list[Any], where: str, tokenizer: Any) -> str:
    messages = [_message(message, where) for message in chat]
    if not getattr(tokenizer, "chat_template", None):
        raise CommandError(f"{where}: a chat, but the model's tokenizer has no chat template to render it with")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is the model's own program
        raise CommandError(f"{where}: the model's chat template refuses it: {error}") from error
    return str(text)


def _message(message: Any, where: str) -> dict[str, Any]:
    """Returns a message in the form that templates know."""
    if not is_message(message):
        raise CommandError(f"{where}: a message has role and content, or from and value, got {_short(message)}")
    if "role" in message:
        # Tables fill columns that a message lacks with nulls, for which templates do not look.
        return {name: value for name, value in message.items() if value is not None or name == "content"}
    if message["from"] not in ROLES:
        raise CommandError(f"{where}: a message is from one of {', '.join(ROLES)}, got {_short(message['from'])}")
    return {"role": ROLES[message["from"]], "content": message["value"]}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
