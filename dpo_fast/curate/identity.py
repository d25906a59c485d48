"""Hashes of what results depend on besides settings and rows: weights, checkers, versions.

A log is bound to them (`worklog.WorkLog`), so results from before and after a change are never mixed. The processes
that judge answers import this module, so it must stay light.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from dpo_fast.errors import UserError
from dpo_fast.files import digest_of

# Hashes by name, or whatever else identifies a thing; JSON can hold it.
Identity: TypeAlias = Any

# Files of a checkpoint that are part of the model or of its tokenizer; states of optimizers are not.
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".tiktoken", ".jinja")


def file_identity(file: str | Path) -> Identity:
    """The hash of a file's contents.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return digest_of(Path(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def model_identity(name: str, base: str | None = None) -> Identity:
    """The hashes of a checkpoint's files, those of the model under an adapter included; for a Hub model its commit.

    Args:
        name: of the model.
        base: the model under the adapter, if not the one that its configuration names.

    Raises:
        UserError: a file cannot be read.
    """
    identity = _checkpoint_identity(name)
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        with suppress(ValueError, TypeError, KeyError):  # loading it says what is wrong
            own = json.loads(adapter.read_bytes())["base_model_name_or_path"]
            identity["base"] = _checkpoint_identity(base or own)
    return identity


def _checkpoint_identity(name: str) -> Identity:
    path = Path(name)
    if path.is_dir():
        files = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
        return _identities(file for file in files if file.suffix in _MODEL_FILES)
    return file_identity(path) if path.is_file() else _hub_commit(name)


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except (OSError, ValueError, HfHubHTTPError):
        return None  # loading it says what is wrong


def function_identity(function: str) -> Identity:
    """The hashes of the module of a function that was imported, and of all that it imports from its folder.

    Args:
        function: `module:function`.
    """
    name = function.partition(":")[0]
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        return name
    module = Path(file)
    root = module.parents[name.count(".") + (module.name == "__init__.py")]
    # The imports of an installed module lead through half of what is installed.
    if str(root) in sysconfig.get_paths().values():
        return file_identity(module)
    return _identities([module, *_imported(root, name)])


def command_identity(command: str) -> Identity:
    """The hashes of a program and of the files among its arguments; of Python scripts, those that they import too."""
    program, *words = shlex.split(command)
    files = [Path(word) for word in (shutil.which(program) or program, *words) if os.path.isfile(word)]
    scripts = [file.absolute() for file in files if file.suffix == ".py"]
    return _identities([*files, *(found for script in scripts for found in _imported(script.parent, script))])


def _imported(folder: Path, what: str | Path) -> list[Path]:
    """The files below `folder` that a module or script imports, found without running it."""
    from modulefinder import ModuleFinder

    class Finder(ModuleFinder):
        def find_module(self, name: str, *arguments: Any) -> Any:
            try:
                return super().find_module(name, *arguments)
            except AttributeError as error:  # a package without an `__init__.py`, which it does not know
                raise ImportError(name) from error

    finder = Finder([str(folder)])
    try:
        finder.run_script(str(what)) if isinstance(what, Path) else finder.import_hook(what)
    except (ImportError, SyntaxError, UnicodeDecodeError):
        return []
    files = [getattr(module, "__file__", None) for module in finder.modules.values()]
    return [Path(file) for file in files if file]


def _identities(files: Iterable[Path]) -> Identity:
    return {str(file): file_identity(file) for file in sorted(files) if file.is_file()}


def versions(*packages: str) -> Identity:
    """The versions of Python, of this package and of others; null where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("dpo-fast", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
