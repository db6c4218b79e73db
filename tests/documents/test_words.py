"""One word for one idea: the words that docs/glossary.md rules out are used nowhere."""

import re
from collections.abc import Iterator

import pytest

from .reading import REPOSITORY

GLOSSARY = "docs/glossary.md"
_SEARCHED = ("README.md", "CHANGELOG.md", "docs", "ogpsa_jax", "configs", "scripts")
_TEXT = {".md", ".py", ".yaml", ".yml"}

# Where such a word means something else, or is somebody else's: the file, and why.
ALLOWED = {
    ("ogpsa_jax/demo/findings.py", "holds"): "a claim holds",
    ("ogpsa_jax/demo/page.py", "holds"): "a claim holds",
}


def rows() -> Iterator[tuple[list[str], list[str]]]:
    """The words of each row of the glossary, and those it rules out."""
    for line in (REPOSITORY / GLOSSARY).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] != "word":
            words = [re.sub(r"[`*]", "", word).strip() for word in cells[0].split(",")]
            yield words, [word.strip() for word in cells[2].split(",") if word.strip()]


OUT = sorted({word for _, out in rows() for word in out})


def texts() -> dict[str, str]:
    """Every text that is searched, by its path."""
    found = {}
    for name in _SEARCHED:
        path = REPOSITORY / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            relative = file.relative_to(REPOSITORY).as_posix()
            if file.suffix in _TEXT and relative != GLOSSARY:
                found[relative] = file.read_text(encoding="utf-8")
    return found


def uses(word: str, text: str) -> list[str]:
    """The lines of a text that use a word, alone or as a part of a name."""
    parts = r"[\s_-]+".join(map(re.escape, re.split(r"[\s-]+", word)))
    found = re.finditer(rf"(?<![A-Za-z0-9]){parts}(?![A-Za-z0-9])", text, re.IGNORECASE)
    return [f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}" for match in found]


def test_no_word_is_both_in_and_out():
    words = [word for known, _ in rows() for word in known]
    assert len(words) > 50
    assert not {word.lower() for word in words} & {word.lower() for word in OUT}


@pytest.mark.parametrize("word", OUT)
def test_a_word_that_is_out_is_used_nowhere(word):
    found = {
        path: lines
        for path, text in texts().items()
        if (path, word) not in ALLOWED and (lines := uses(word, text))
    }
    assert not found


def test_every_exception_is_needed():
    every = texts()
    assert not [
        (path, word) for path, word in ALLOWED if word not in OUT or not uses(word, every[path])
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a riding batch", True),
        ("is_riding = 1", True),
        ("Output\n  directory", True),
        ("overriding", False),
        ("rides_", True),
    ],
)
def test_words_are_found_in_prose_and_in_names_and_not_within_others(text, found):
    assert any(uses(word, text) for word in ("riding", "rides", "output directory")) == found
