"""MkDocs hooks: README.md is the site's first page, and files outside of docs/ are named instead of linked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    # as if it lay in docs/: "docs/hub.md" is "hub.md", "examples/minimal.py" is "../examples/minimal.py"
    text = re.sub(r"\]\((?!docs/|https?:|#)", "](../", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)
