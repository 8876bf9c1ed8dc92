"""What the documentation says in a form that can be checked: commands, links, headings, tables of its pages."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path

from tests.commands import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("configs", "launch", "launch/gke", "benchmarks")
    for file in (ROOT / folder).glob("*.py")
)
OURS = ("cfjax", "bash launch/", "launch/", "python launch/", "python benchmarks/", "python tests/")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command line of a page.

    Attributes:
      where: the file that has it.
      words: up to a `...`, which stands for what is left out.
      whole: it can be given as it stands; not so a mention within a sentence.
    """

    where: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def fenced(text: str, language: str) -> list[str]:
    """The bodies of a page's code blocks of one language ("" for plain ones)."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of code blocks; a span may be wrapped."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def lines_of(block: str) -> list[str]:
    """A block's commands, with the lines that go on from another joined to it."""
    joined = re.sub(r"\\?\n[ #]*(?=--)", " ", block)
    return [line.strip() for line in joined.replace("\\\n", " ").splitlines()]


def _command(where: str, line: str, whole: bool) -> list[Command]:
    """Commands of a line, which `&&` parts; a pipe's first."""
    out, tokens = [], shlex.split(line, comments=True)
    for _, part in groupby(tokens, key=lambda token: token == "&&"):
        words = list(takewhile(lambda token: token not in ("|", "&&"), part))
        left_out = next((place for place, word in enumerate(words) if word.endswith("...")), len(words))
        kept = [*words[:left_out], *(word for word in words[left_out:] if word == "--help")]
        if kept:
            out.append(Command(where, tuple(kept), whole and kept == words))
    return out


def _remark_cut(line: str) -> str:
    """Without the remark of a docstring, two or more spaces behind the command."""
    return re.split(r"\s{2,}(?=[^-\s])", line)[0]


def _indented(text: str) -> Iterator[str]:
    """Lines of a docstring that are commands; `... --flag` repeats the command before."""
    before = ""
    for line in lines_of(text):
        line = re.sub(r"^# ", "", line).strip()
        if line.startswith("... --"):
            yield f"{before} {line[4:]}"
        elif line.startswith(("cfjax ", *OURS[1:])) and not re.match(r"cfjax [^a-z]", line):
            before = _remark_cut(line)
            yield before


def commands_of_page(page: str) -> list[Command]:
    """Every command of a page: of its bash and indented blocks, and in backticks."""
    text = (ROOT / page).read_text()
    blocks = [line for body in fenced(text, "bash") for line in lines_of(body)]
    code = "\n".join(line for line in prose(text).splitlines() if line.startswith("    "))
    out = [c for line in [*blocks, *_indented(code)] for c in _command(page, line, whole=True)]
    named = [span for span in spans(text) if span.startswith(tuple(f"{word} " for word in ("cfjax", "bash", "python")))]
    return out + [c for span in named for c in _command(page, span, whole=False)]


def commands_of_script(file: str) -> list[Command]:
    """Every command of the docstrings of a file: in lines of their own, and in backticks."""
    tree = ast.parse((ROOT / file).read_text())
    nodes = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
    text = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)))
    out = [c for line in _indented(text) for c in _command(file, _remark_cut(line), whole=True)]
    named = [span for span in spans(text) if span.startswith(OURS) and " " in span]
    return out + [c for span in named for c in _command(file, span, whole=False)]


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures."""
    bare = re.sub(r"`[^`]*`", "code", prose(text))
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]*)\)", bare)


def anchors(text: str) -> set[str]:
    """What GitHub calls a page's headings in addresses."""
    out: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in out:
            number += 1
        out.add(name)
    return out


def tables(text: str) -> list[list[list[str]]]:
    """A page's tables as rows of cells; of each the first row is its head."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose(text), re.MULTILINE)
    split = lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
    return [[split(line) for line in table.splitlines() if not re.match(r"^[|\-\s:]+$", line)] for table in found]


def table_under(page: str, heading: str) -> list[list[str]]:
    """The first table behind a heading, its rows without the head."""
    text = (ROOT / page).read_text()
    part = text[re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE).end() :]
    return tables(part)[0][1:]


def paths(text: str, rooms: frozenset[str]) -> list[str]:
    """Files and folders of this repository that a page names in backticks, as docs/data.md or core/tree.py."""
    out = []
    for span in spans(text):
        for word in span.split():
            word = re.sub(r":[\w,]*$", "", word.partition("=")[2] or word)
            top = word.split("/")[0]
            if "/" in word and top in rooms and re.fullmatch(r"[a-z0-9_./-]+", word):
                out.append(word)
    return out


def folder_of(page: str) -> Path:
    return (ROOT / page).parent
