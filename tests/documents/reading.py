"""What README.md, docs/ and the heads of the configuration files show: code blocks and commands."""

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"))
)
CONFIGS = sorted(
    str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").glob("*.yaml")
)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(r"^for (\w+) in (\S+)[^\n;]*[\n;]\s*do\s(.*?)^\s*done", re.MULTILINE | re.DOTALL)
# A file that a reader writes with the shell: `cat > NAME <<'END'`, its lines, `END`.
_FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
# A command in a sentence: a name alone (`ogpsa-jax evaluate`) only speaks of it.
_COMMAND = re.compile(r"(ogpsa-jax \S+|(python )?scripts/\S+\.py|python -m \S+|make|bash \S+) \S+")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [content for name, content in _BLOCK.findall(text) if name == language]


def files(page: str) -> dict[str, str]:
    """The files that the bash blocks of a page write, by name."""
    return dict(_FILE.findall("".join(blocks(page, "bash"))))


def commands(page: str) -> Iterator[str]:
    """Command lines of a page: of its bash blocks, loops by their first round, and of its text."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#   ")]
    else:
        block = "".join(blocks(page, "bash") + blocks(page, "sh") + blocks(page, "console"))
        block = _FILE.sub("", block)
        block = _LOOP.sub(lambda loop: loop[3].replace(f"${loop[1]}", loop[2]), block)
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        lines += [code for code in _INLINE.findall(_BLOCK.sub("", text)) if _COMMAND.match(code)]
    for line in lines:
        if command := re.sub(r"(^|\s+)#.*", "", line).strip():
            yield command
