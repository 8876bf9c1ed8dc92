"""Names of arrays: every suffix of axis letters in cfjax, and every injectable draw, is spelt by the legend."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import cfjax

PACKAGE = Path(cfjax.__file__).parent
SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)")
NOT_SHAPES = {"discrete_cd_N"}  # a key of the reference's config
LETTERS = set("BFPHWCTSEDLNKGJIYRMA")


def names(tree: ast.AST) -> set[str]:
    """Identifiers, and strings that are one (keys of batches and draws)."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name):
                found.add(name)
            case ast.Constant(value=str(name)) if name.isidentifier():
                found.add(name)
    return found - NOT_SHAPES


def test_the_legend_names_every_letter_once():
    (block,) = re.findall(r"stands for itself:\n\n(.*?)\n\n", cfjax.__doc__, re.DOTALL)
    letters = re.findall(r"\b([A-Z])(?=, [A-Z]\b| [a-z])", block)
    assert sorted(letters) == sorted(LETTERS)


def test_every_suffix_consists_of_letters_of_the_legend():
    wrong = defaultdict(set)
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in names(ast.parse(file.read_text())):
            found = SUFFIX.fullmatch(name)
            if found and not set(re.sub(r"\d", "", found[1])) <= LETTERS:
                wrong[name].add(file.relative_to(PACKAGE).as_posix())
    assert not wrong
