"""What a recipe says when it cannot go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that the user can mend are told on one line and end the command with 2; as a context or a decorator.

    Raises:
        typer.Exit: a ValueError, an ImportError or an OSError came out.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None
