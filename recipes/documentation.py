"""Text that every machine has: Python's own documentation, what the recipes that need no download embed."""

import ast
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from rich.progress import track


def paragraphs() -> list[str]:
    """Of the language reference and of the standard library's docstrings, with their line breaks, in a fixed order."""
    texts = list(topics.values())
    for file in track(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), "reading documentation", transient=True):
        nodes = ast.walk(ast.parse(file.read_bytes()))
        documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts += [docstring for node in documented if (docstring := ast.get_docstring(node))]
    return [paragraph for text in texts for paragraph in text.split("\n\n")]
