"""``opt8bit evaluate --tasks``: the figures are those of the harness, on a task that is a file beside the test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small import loaded

from opt8bit.cli.main import main

TASK = """\
task: choose_next
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    documents = [{"question": f"{i} {i + 1}", "choices": ["7", "8", "9"], "answer": i % 3} for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choose_next.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own(folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from transformers import AutoTokenizer

    command = ["evaluate", str(folder / "llama"), "--tasks", "choose_next", "--task-folder", str(tasks)]
    assert main(command) == 2
    assert "has no token that begins or ends a text" in capsys.readouterr().err
    model = Path(shutil.copytree(folder / "llama", tasks.parent / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"eos_token": "95"})
    tokenizer.save_pretrained(model)
    command = ["evaluate", str(model), "--tasks", "choose_next", "--task-folder", str(tasks), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    right, network = 0, loaded(model)
    for i in range(12):
        with torch.no_grad():
            logits = network(torch.tensor([[i, i + 1]])).logits[0, -1, 7:10]
        right += int(logits.argmax()) == i % 3
    assert found["results"]["choose_next"]["acc,none"] == pytest.approx(right / 12)


@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert main(["evaluate", str(folder / "llama"), "--tasks", "no_such_task"]) == 2
    assert "knows no task 'no_such_task'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "text.txt", "--limit", "3"], "--limit is for --tasks"),
        (["--text", "text.txt", "--task-folder", "."], "--task-folder is for --tasks"),
        (["--tasks", "one", "--samples", "3"], "--samples is for --text"),
        (["--tasks", "one", "--sequence-length", "8"], "--sequence-length is for --text"),
        (["--tasks", "one", "--text-column", "a"], "--text-column is for --text"),
        (["--tasks", "one", "--bos"], "--bos is for --text"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folder / "llama"), *arguments]) == 2
    assert capsys.readouterr().err == f"opt8bit evaluate: {message}\n"
