"""Hooks of the documentation site (mkdocs.yml): pages that live elsewhere, and what must hold of the result."""

import re
from pathlib import Path

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# page of the site -> file of the repository that it shows
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FILES = ("CITATION.cff", "LICENSE")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What a browser fetches without being asked; links that a reader follows may lead anywhere.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc\s*=\s*["']?(?:https?:)?//|<link\b[^>]*>""", re.I
)
REMOTE = re.compile(r"""href\s*=\s*["']?(?:https?:)?//""", re.I)
HARMLESS = re.compile(r"""rel\s*=\s*["']?canonical""", re.I)


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=for_site((ROOT / source).read_text())))
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for script in EXAMPLES:
        found = cells(script.read_text())
        files.append(
            File.generated(config, f"examples/{script.stem}.md", content=example_page(script.name, found))
        )
        files.append(File.generated(config, f"examples/{script.stem}.ipynb", content=notebook(found)))
    return files


def on_post_build(config):
    site = Path(config["site_dir"])
    for page in sorted(site.rglob("*.html")):
        for tag in fetched_from_network(page.read_text()):
            raise PluginError(f"{page.relative_to(site)} needs the network: {tag}")


def for_site(text: str) -> str:
    """A page from the repository's top folder, with its links as they are from docs/."""
    names = {source: page for page, source in PAGES.items()}

    def link(match: re.Match) -> str:
        target = match[2]
        return f"{match[1]}({names.get(target, target.removeprefix('docs/'))})"

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", link, text)


def fetched_from_network(html: str) -> list[str]:
    """The tags of a page that make a browser fetch something from another host."""
    tags = [match[0] for match in FETCHED.finditer(html)]
    return [
        tag
        for tag in tags
        if not tag.lower().startswith("<link") or (REMOTE.search(tag) and not HARMLESS.search(tag))
    ]


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a script in the percent format, each ("markdown" or "code", its text)."""
    found = []
    for cell in re.split(r"^# %%", script, flags=re.M)[1:]:
        title, _, body = cell.partition("\n")
        if title.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.M)))
        else:
            found.append(("code", body.strip()))
    return found


def example_page(name: str, found: list[tuple[str, str]]) -> str:
    texts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in found]
    links = f"This page as a [notebook]({Path(name).stem}.ipynb); as a script, `examples/{name}`."
    return "\n\n".join([texts[0], links, *texts[1:]]) + "\n"


def notebook(found: list[tuple[str, str]]) -> str:
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    content = [new[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(found)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=content, metadata=kernel))
