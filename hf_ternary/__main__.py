"""``hf-ternary`` and ``python -m hf_ternary``: runs the command line of :mod:`hf_ternary.cli`; an error is one line."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0, or 2 after a one-line error. ``--debug`` anywhere shows the traceback instead."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")  # as files are, wherever this runs
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in arguments:
        arguments.remove("--debug")
        from .cli import app

        app(arguments)
    try:
        from .cli import app

        app(arguments)
    except ModuleNotFoundError as error:
        _stop(f"{error.name} is not installed. Fix: pip install 'hf_ternary[hf]'")
    except (ValueError, OSError, ImportError) as error:
        _stop(str(error) or type(error).__name__)
    except Exception as error:
        from huggingface_hub.errors import HTTPError

        if not isinstance(error, HTTPError):
            raise
        _stop(f"the Hub cannot be reached ({error!r}). Fix: check the connection and the proxy")


def _stop(message: str) -> None:
    print("hf-ternary: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
