"""Hooks of MkDocs: pages may include and show files that are in the repository, outside `docs/`."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

#: `<!-- include: PATH -->`, a path from the root of the repository. A file that does not exist yet is left out.
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
#: A link or image with a relative target: `[text](target)`, `![text](target)`.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+?)(#[^)\s]*)?\)")
#: transformers' way to refer to an object in a docstring, after rendering: [`~module.Name`].
REFERENCE = re.compile(r"\[<code>(~?)([\w.]+)</code>\]")
#: The type of an argument in transformers' form, which mkdocstrings shows literally: `<code>`str`, *optional*</code>`.
TYPE = re.compile(r"<code>([^<\n]*`[^<\n]*)</code>")


def on_page_markdown(markdown, page, config, files):
    """Includes files, and mends links to what is outside `docs/`."""
    root = Path(config.config_file_path).parent
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def include(match):
        path = match[1]
        if not (root / path).is_file():
            return ""
        text = (root / path).read_text(encoding="utf-8")
        if page.file.src_uri.startswith("methods/"):  # The page has a title; the file's headings go one level down.
            text = re.sub(r"\A# .*\n", "", text)
        return LINK.sub(lambda link: mended(link, posixpath.dirname(path)), text)

    def mended(match, folder):
        """The link as seen from this page: to another page, to a copied image, or, outside the site, plain text."""
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (root / path).exists():
            return match[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        if path.startswith("docs/"):
            return f"{image}[{text}]({posixpath.relpath(path.removeprefix('docs/'), here)}{anchor})"
        if not image:
            return text if text.startswith("`") else f"{text} (`{path}`)"
        name = f"images/{posixpath.basename(path)}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(root / path)))
        return f"![{text}]({posixpath.relpath(name, here)})"

    markdown = LINK.sub(lambda match: mended(match, folder), markdown)
    return INCLUDE.sub(include, markdown)


def on_page_content(html, **kwargs):
    """Turns transformers' references into links where the object has an entry, and into code elsewhere."""

    def link(match):
        name = match[2].rsplit(".", 1)[-1] if match[1] else match[2]
        return f'<autoref identifier="{match[2]}" optional><code>{name}</code></autoref>'

    html = TYPE.sub(lambda match: f"<code>{re.sub(r'[`*~]|[[]|[]](?=`?)', '', match[1])}</code>", html)
    return REFERENCE.sub(link, html)
