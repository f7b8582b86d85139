"""The HTML page of an executed notebook."""

from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mlkit.jobs.notebook import write_html


def page_of(tmp_path: Path, *tags: str) -> str:
    """The page of a notebook whose last cell has tags, and whose first code cell prints a warning."""
    warning = new_output("stream", name="stderr", text="UserWarning: few rows")
    table = new_output("execute_result", data={"text/html": "<p>accuracy 0.97</p>"}, execution_count=3)
    cells = [
        new_markdown_cell("# Train"),
        new_code_cell("epochs: int = 20", metadata={"tags": ["parameters"]}),
        new_code_cell("load()", outputs=[warning]),
        new_code_cell("evaluate()", outputs=[table], execution_count=3, metadata={"tags": list(tags)}),
    ]
    write_html(new_notebook(cells=cells), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    return text[text.index("<h1") :]


def test_result_and_warnings_stand_first(tmp_path: Path) -> None:
    page = page_of(tmp_path, "summary")
    first = page[: page.index("<details")]
    assert first.index("accuracy 0.97") < first.index("few rows")
    assert "jp-InputArea" not in first[first.index("</h1>") :]  # no source, no number of a cell
    assert page.count("accuracy 0.97") == 2


def test_without_a_summary_the_order_stays(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.count("accuracy 0.97") == page.count("few rows") == 1
    assert page.index("</details>") < page.index("few rows") < page.index("accuracy 0.97")
