"""``opt8bit evaluate --tasks``: a language model on tasks of lm-eval, run by its own harness."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.ptq.report import valid_json


def report(
    model: str,
    tasks: Sequence[str],
    *,
    task_folder: Path | None,
    limit: int | None,
    as_json: bool,
    trust_remote_code: bool,
) -> str:
    """Returns what ``opt8bit evaluate --tasks`` prints: each figure as the harness reports it.

    Args:
        model: folder or id of the hub.
        tasks: names of tasks or groups.
        task_folder: with task files besides the harness's own; None for none.
        limit: documents of each task; None for all.
        as_json: whether to return one line of JSON.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        CommandError: lm-eval is not installed, a task is not known or fails, or the model cannot be loaded.
    """
    harness: Any = _module("lm_eval")
    manager = _module("lm_eval.tasks").TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise CommandError(f"lm-eval {harness.__version__} knows no task {unknown[0]!r}: lm-eval ls tasks lists them")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CommandError(f"the tokenizer of {model!r} has no token that begins or ends a text, which lm-eval needs")
    network = load(model, trust_remote_code=trust_remote_code)
    wrapped = _module("lm_eval.models.huggingface").HFLM(pretrained=network, tokenizer=tokenizer)
    try:
        found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit)
    except Exception as error:  # whatever tasks and their data sets raise
        raise CommandError(f"lm-eval: {error}") from error
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    if as_json:
        about = {"model": model, "lm_eval": harness.__version__, "limit": limit}
        return valid_json({**about, "results": {name: _figures(result) for name, result in results.items()}})
    documents = "all documents" if limit is None else f"{limit} documents of each task"
    return "\n".join([f"{model}, by lm-eval {harness.__version__}, {documents}", *_lines(results)])


def _lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, result in results.items():
        for metric, value in _figures(result).items():
            yield f"  {name}  {metric}  {value:.4f}"


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a task, under the harness's names of them."""
    return {name: value for name, value in result.items() if isinstance(value, float) and "," in name}


def _module(name: str) -> Any:
    """
    Raises:
        CommandError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CommandError(f"{error.name or name} is missing: pip install 'opt8bit[eval]'") from error
