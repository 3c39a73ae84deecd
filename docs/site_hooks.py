"""Hooks of ``make docs``: pages from outside of docs/, and links that lead out of it.

README.md becomes the first page, SECURITY.md and CHANGELOG.md pages of their own. On GitHub a link may lead to a file
of the repository; the site has no such file, so the link's text alone stays.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - MkDocs' own types
    """Add the pages from outside of docs/."""
    for name, page in PAGES.items():
        text = _links((ROOT / name).read_text(encoding="utf-8"), ROOT)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ANN401 - MkDocs' own types
    """Turn the links of a page of docs/ into links of the site."""
    del config, files
    source = page.file.abs_src_path
    return markdown if source is None else _links(markdown, Path(source).parent)


def _links(text: str, folder: Path) -> str:
    def turned(match: re.Match[str]) -> str:
        image, words, target, heading = match[1], match[2], match[3], match[4] or ""
        file = (folder / target).resolve()
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
        if name in PAGES:
            name = f"docs/{PAGES[name]}"
        elif not (name.startswith("docs/") and file.is_file()):
            return words
        depth = len(folder.relative_to(ROOT / "docs").parts) if folder.is_relative_to(ROOT / "docs") else 0
        return f"{image}[{words}]({'../' * depth}{name.removeprefix('docs/')}{heading})"

    return LINK.sub(turned, text)
