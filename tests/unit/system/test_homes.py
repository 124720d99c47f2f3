"""What only some systems have is called in its one home alone, where there is something to do without it."""

import ast
import io
import re
import tokenize

import pytest

from other_systems import SCRIPTS

ROOT = SCRIPTS.parent
SYSTEM = "scripts/lengthwise/system/"

HOMES = {
    r"fcntl|flock|F_FULLFSYNC": ["descriptors.py"],
    r"posix_fadvise|POSIX_FADV_\w+": ["descriptors.py"],
    r"fallocate|mincore|madvise|MADV_\w+": ["descriptors.py"],
    r"malloc_trim|.*/clear_refs": ["memory.py"],
    r"CDLL|cdll|find_library": ["libc.py", "gpus.py"],  # the second loads CUDA's driver
    r"sched_\w+|/proc/cpuinfo": ["machine.py"],
    r"/(proc|sys|dev)/.*": ["machine.py", "memory.py", "control_groups.py"],
    r"register_at_fork|O_NOFOLLOW": ["gpus.py"],
    r"get(res)?[ug]id|get(e|s)[ug]id": ["cache.py"],  # only compiling for a GPU asks for it
    r"resource|getrlimit": ["limits.py"],
    # Nowhere.
    r"posix_fallocate|posix_spawn|copy_file_range|sendfile|splice|memfd_create|eventfd|preadv|pwritev|RWF_\w+": [],
    r"O_(DIRECT|TMPFILE|PATH|NOATIME|DIRECTORY|SYNC|DSYNC)|setns|unshare|epoll|inotify\w*|(get|set|list)xattr": [],
    r"getrusage|ru_maxrss|prctl|sysconf|statvfs|fork|setsid|MAP_\w+|PROT_\w+": [],
}


def words_of(text: str) -> set[str]:
    """The names of Python or Snakemake code, and its strings but for texts that stand alone, such as docstrings."""
    words, line_began = set(), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME or (token.type == tokenize.STRING and not line_began):
            words.add(ast.literal_eval(token.string) if is_text(token) else token.string)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            line_began = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return {word for word in words if isinstance(word, str)}


def is_text(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.STRING and "f" not in token.string.partition(token.string[-1])[0].lower()


CODE = {
    str(path.relative_to(ROOT)): words_of(path.read_text())
    for folder in ("scripts", "workflow")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".smk") or path.name == "Snakefile"
}


@pytest.mark.parametrize("names", HOMES)
def test_is_called_in_its_home_alone(names):
    pattern = re.compile(names)
    found = {path for path, words in CODE.items() if any(map(pattern.fullmatch, words))}
    homes = {SYSTEM + home for home in HOMES[names]}
    assert found == homes


def test_words_are_those_of_code():
    text = '"""Text of flock."""\nimport fcntl as f\n\n\ndef g():\n    """madvise"""\n    x = h("/proc/a", os.sync)  # statvfs\n'
    assert words_of(text) == {"import", "fcntl", "as", "f", "def", "g", "x", "h", "/proc/a", "os", "sync"}
