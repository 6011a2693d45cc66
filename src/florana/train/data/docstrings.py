"""Real text on every machine: the docstrings and comments of the installed Python standard library.

The sources are parsed, never imported. A docstring belongs to the topic of its top-level module, and to the
test share by a hash of its own words, so that pretraining (which skips the test share) and the demonstration
agree on what was never seen, whatever the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOPICS: dict[str, str] = {
    "concurrency": "asyncio threading multiprocessing concurrent queue subprocess sched selectors signal "
    "_threading_local contextvars",
    "data structures": "collections _collections_abc functools operator contextlib heapq bisect weakref copy "
    "graphlib pprint reprlib _weakrefset enum dataclasses types",
    "data formats": "xml html json csv configparser plistlib tomllib pickle pickletools shelve dbm _markupbase "
    "copyreg sqlite3",
    "email": "email mailbox mimetypes quopri base64 smtplib imaplib poplib netrc",
    "files": "tarfile zipfile shutil tempfile pathlib os gzip bz2 lzma _pyio fileinput glob fnmatch genericpath "
    "posixpath ntpath filecmp stat zipapp io _compression linecache",
    "internet": "http urllib wsgiref ftplib socketserver xmlrpc ssl socket ipaddress webbrowser uuid",
    "language": "importlib inspect ast dis typing symtable tokenize pkgutil runpy zipimport abc modulefinder "
    "pyclbr py_compile compileall codeop code site sysconfig opcode token keyword rlcompleter",
    "numbers": "_pydecimal decimal fractions statistics random numbers colorsys hashlib hmac secrets",
    "testing and logging": "unittest doctest pdb bdb pydoc trace traceback tracemalloc timeit profile pstats "
    "cProfile logging warnings faulthandler argparse optparse cmd getopt",
    "text and time": "datetime calendar zoneinfo difflib textwrap codecs encodings locale gettext string re "
    "_strptime shlex stringprep",
}
"""Topic -> the top-level modules whose docstrings carry it; all are part of every CPython 3.11 and later."""

_TOPIC_OF = {module: topic for topic, modules in TOPICS.items() for module in modules.split()}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Docstring:
    """One docstring: its text in one line, the module that holds it, the topic of that module."""

    text: str
    module: str
    topic: str | None

    @property
    def held_out(self) -> bool:
        """True for about a fifth of all docstrings, by a hash of the text alone."""
        return hashlib.sha256(self.text.lower().encode()).digest()[0] < 51


def source_files() -> Iterator[tuple[str, Path]]:
    """The (top-level module, file) pairs of the standard library's Python sources, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            yield parts[0].removesuffix(".py"), path


def docstrings(shortest: int = 30, *, only_topics: bool = False) -> list[Docstring]:
    """Every distinct docstring of at least `shortest` characters (of the modules with a topic), in the files' order."""
    found: dict[str, Docstring] = {}
    for module, path in source_files():
        if only_topics and module not in _TOPIC_OF:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files of the library hold another dialect on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= shortest:
                    found.setdefault(text, Docstring(text, module, _TOPIC_OF.get(module)))
    return list(found.values())


def comments(path: Path) -> list[str]:
    """The comment blocks of one source file, each in one line."""
    blocks: list[list[str]] = []
    last_row = -2
    try:
        with io.BytesIO(path.read_bytes()) as stream:
            for token in tokenize.tokenize(stream.readline):
                if token.type != tokenize.COMMENT:
                    continue
                words = token.string.lstrip("#!: ").strip()
                if token.start[0] == last_row + 1 and blocks:
                    blocks[-1].append(words)
                else:
                    blocks.append([words])
                last_row = token.start[0]
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return []
    return [text for block in blocks if len(text := " ".join(filter(None, block))) >= 30]
