"""The notebook and the script of launch/examples run: cell by cell in this process, and headless in a kernel of its own."""

import csv
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
SHORT = {
    "TEXTS, STEPS = 64, 40": "TEXTS, STEPS = 24, 2",
    'common = {"training.max_steps"': 'common = {"memory.strategy": "plain", "training.max_steps"',
}


def notebook(short: bool) -> nbformat.NotebookNode:
    made = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    for old, new in SHORT.items() if short else ():
        (cell,) = [cell for cell in made.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    return made


def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {}
    for cell in notebook(short=True).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "first_steps.ipynb", "exec"), names)
    assert [run.result.state.step for run in names["runs"].values()] == [2, 2]
    assert len(names["curves"]) == 3
    assert list(names["answers"].index) == ["Monday", "Tuesday", "Wednesday"]


@pytest.mark.slow  # a kernel of its own imports everything anew, and trains for as long as the notebook says
def test_the_notebook_runs_headless_and_shows_its_progress_and_results(tmp_path):
    made = NotebookClient(notebook(short=False), timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
    shown = [o.data for o in outputs if o.output_type in ("execute_result", "display_data")]
    assert sum("text/html" in data for data in shown) == 3  # the data, the metrics, the answers
    assert sum("image/png" in data for data in shown) == 1
    told = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert told.count("training local: 40 steps") == 2
    assert "ipywidgets" not in told


def test_the_script_makes_a_table_of_answers(tmp_path, monkeypatch, capsys):
    """Of thirty rows with two labels of their owner's names."""
    table, texts = tmp_path / "table.csv", ("I forgot to call her.", "We danced all night.", "I should have told him.")
    rows = [(f"{texts[i % 3]} Day {i}.", (i % 3 != 1) * 0.8, (i % 3 == 1) * 0.9) for i in range(30)]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("body", "sorry", "happy"), *rows])
    words = [str(table), "body", "sorry=regret", "happy=emotion.joy", "--out", str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["own_texts.py", *words])
    runpy.run_path(str(EXAMPLES / "own_texts.py"), run_name="__main__")
    with (tmp_path / "out" / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert [answer["text"] for answer in answers] == [text for text, *_ in rows[:10]]
    labelled = {"regret", "emotion.joy"}
    assert all(0 <= float(answer[name]) <= 1 for answer in answers for name in labelled)
    assert labelled | {"text"} <= set(answers[0])
    assert "emotion.fear" not in answers[0]  # nothing taught it
    assert "finished at step 2 of 2" in capsys.readouterr().out
