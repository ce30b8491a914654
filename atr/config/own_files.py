"""Names of the user's own reducers and benchmarks: paths of Python files in the project, without `.py`."""

import re
from collections.abc import Collection
from pathlib import Path

from atr.config.errors import join, refusal

_PATH = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)
ALLOWED = "a path in the project without .py, e.g. my_package/my_module for my_package/my_module.py"


def check_own_files(names: list[str], taken: Collection[str]) -> list[str]:
    """Refuse paths that do not exist, lie outside the project, occur twice, or equal a name in `taken`."""
    for name in names:
        if not _PATH.fullmatch(name) or len(name) > 200:
            raise refusal(name, ALLOWED)
        if name in taken:
            raise refusal(name, f"a name other than {join(taken)}", problem="is taken")
        file = Path(f"{name}.py")
        if not file.is_file():
            raise refusal(name, f"{ALLOWED}; there is no file {file}")
        if not file.resolve().is_relative_to(Path.cwd()):
            raise refusal(name, f"{ALLOWED}; {file} links to a file outside")
    if len(set(names)) < len(names):
        raise refusal(names, "each path once")
    return names
