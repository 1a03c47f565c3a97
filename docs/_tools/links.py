"""A hook of MkDocs: pages outside docs/ join the site, and links of the repository hold in it.

Pages are written for whoever reads them in the repository: a link is relative to its file. The site
has the files of docs/ at its root, so what a link means there is worked out here. Scripts and
figures that pages link to are put beside them.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site that are not in docs/.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/quality.md")
# Not pages of it: where a link to one leads.
INSTEAD = {"README.md": "docs/index.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`]+`)", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    path = INSTEAD.get(path, path)
    return path.removeprefix("docs/")


def in_repository(src_uri: str) -> str:
    """The file of the repository that a file of the site is."""
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).exists() else src_uri


def targets(page: str, text: str) -> list[str]:
    """Files of the repository that a page links to."""
    folder = posixpath.dirname(page)
    links = {match[1] for part in CODE.split(text)[::2] for match in LINK.finditer(part)}
    return sorted(posixpath.normpath(posixpath.join(folder, link)) for link in links)


def on_files(files, config):
    """Adds the pages, and the files that any page links to."""
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    for file in files.documentation_pages():
        page = in_repository(file.src_uri)
        for path in targets(page, (ROOT / page).read_text(encoding="utf-8")):
            known = files.get_file_from_path(in_site(path))
            if known is None and not path.endswith(".md") and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes the links of a page those of the site."""
    source = in_repository(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri) or "."

    def moved(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return os.path.relpath(in_site(path), here).replace(os.sep, "/") + (match[2] or "")

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)
