"""On PYTHONPATH this takes from every Python process what `LENGTHWISE_WITHOUT` lists, as on a system that lacks it.

A word of the list is ``module:<name>``, which cannot be imported then; ``os:<name>``, an attribute of `os`; ``libc:<name>``, a
function of the C library, or ``libc:`` alone for the whole library; ``mmap:<name>``, a method of maps; ``open:folders``, as
Windows opens none; ``open:<path>``, a folder whose files the package does not find. (Other packages do: psutil for this system
reads /proc and imports `resource`, psutil for others does not.)
"""

import ctypes
import mmap
import os
import shutil
import sys
import sysconfig
from importlib.abc import MetaPathFinder

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PACKAGE = os.path.join("scripts", "lengthwise", "")


def _caller():
    """The file of the innermost frame that is not the standard library's, nor this file's."""
    frame = sys._getframe()
    while frame:
        file = frame.f_code.co_filename
        if "-packages" in file or not file.startswith((_STANDARD_LIBRARY + os.sep, "<frozen", __file__)):
            return file
        frame = frame.f_back
    return ""


class _NoModule(MetaPathFinder):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path, target=None):
        if name in self.names and f"{os.sep}psutil{os.sep}" not in _caller():
            raise ModuleNotFoundError(f"No module named {name!r}, as on another system", name=name)


def _without_maps_methods(names):
    def missing(name):
        def get(_):
            raise AttributeError(name)

        return property(get)

    return type("mmap", (mmap.mmap,), {name: missing(name) for name in names})


def _without_libc(names):
    class Library(ctypes.CDLL):
        def __init__(self, name, *arguments, **keywords):
            if name is None and "" in names:
                raise TypeError("bad argument type for built-in operation")  # what it says on Windows
            super().__init__(name, *arguments, **keywords)
            self._is_libc = name is None

        def __getattr__(self, name):
            if self._is_libc and name in names:
                raise AttributeError(f"symbol not found: {name}")
            return super().__getattr__(name)

    return Library


def _hide(folders):
    def hook(event, arguments):
        path = arguments[0] if event in ("open", "os.listdir", "os.scandir") else None
        if isinstance(path, str) and path.startswith(folders) and _PACKAGE in _caller():
            raise FileNotFoundError(2, "No such file or directory", path)

    sys.addaudithook(hook)


def _open_files_alone():
    with_folders = os.open

    def open_file(path, flags, *arguments, **keywords):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return with_folders(path, flags, *arguments, **keywords)

    os.open = open_file
    shutil._use_fd_functions = False  # as on Windows


def _remove(without):
    found = {"module": set(), "os": set(), "libc": set(), "mmap": set(), "open": set()}
    for word in without.split():
        kind, _, name = word.partition(":")
        found[kind].add(name)
    for name in found["os"]:
        delattr(os, name)
    if "folders" in found["open"]:
        _open_files_alone()
    if folders := tuple(found["open"] - {"folders"}):
        _hide(folders)
    if found["libc"]:
        ctypes.CDLL = _without_libc(found["libc"])
    if found["mmap"]:
        mmap.mmap = _without_maps_methods(found["mmap"])
    for name in found["module"]:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _NoModule(found["module"]))


_remove(os.environ.get("LENGTHWISE_WITHOUT", ""))
