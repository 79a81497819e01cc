"""Hooks of the documentation site (mkdocs.yml): pages that live elsewhere, and what must hold of the result."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# page of the site -> file of the repository that it shows
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FILES = ("CITATION.cff", "LICENSE")
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
