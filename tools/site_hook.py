"""Part of mkdocs.yml: what the pages have for code hosts and for the tests, MkDocs learns here.

Pages may link to files of examples/, which the site then carries beside them. Marks behind the language of
a block, as in ``python no-run``, are for the tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(```\w+) .*$", re.M)
LINK = re.compile(r"\]\((?:\.\./)+(examples/[\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of examples/ that a page links to."""
    texts = [file.content_string for file in files.documentation_pages()]
    for path in sorted({found for text in texts for found in LINK.findall(text)}):
        files.append(File.generated(config, f"{path}.txt", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead those links to the copies, which a browser shows as text; take the marks away."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"]({up}\1.txt)", FENCE.sub(r"\1", markdown))
