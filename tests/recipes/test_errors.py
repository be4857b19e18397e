from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from errors import one_line_errors

app = typer.Typer()


@app.command()
@one_line_errors()
def main(word: Annotated[str, typer.Option(help="what is wrong")]) -> None:
    raise {"type": TypeError}.get(word, ValueError)(f"{word}\n  is wrong")


def test_what_the_user_can_mend_is_one_line() -> None:
    done = CliRunner().invoke(app, ["--word", "batch"])
    assert (done.exit_code, done.output) == (2, "error: batch is wrong\n")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    assert isinstance(CliRunner().invoke(app, ["--word", "type"]).exception, TypeError)
    with pytest.raises(typer.Exit), one_line_errors():
        raise OSError("full")
