"""The house: imports go one way, `import dpo_fast` is light, the symlink is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The folders of dpo_fast as ARCHITECTURE.md lists them, each on a line of its own: imports run up that list.
FOLDERS = re.findall(r"^    (\w+)/", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)


def rank(module):
    """The place of `dpo_fast.<module>` in the list; files beside folders come after the kernels, the command last."""
    top = module.split(".")[0]
    if top in FOLDERS:
        return FOLDERS.index(top)
    return len(FOLDERS) if top in ("cli", "__init__", "__main__") else FOLDERS.index("kernels") + 0.5


def modules():
    for path in sorted((ROOT / "dpo_fast").rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT / "dpo_fast").with_suffix("").parts)
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield path, f"kernels.{path.stem}"


def imported(path, *, inside=True):
    """Modules that a file imports; those that its functions or its type checker import only if `inside`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "dpo_fast":
                yield from (f"dpo_fast.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_folder_is_in_the_list():
    folders = {path.parent.relative_to(ROOT / "dpo_fast").parts[0] for path in (ROOT / "dpo_fast").glob("*/*.py")}
    assert folders | {"kernels"} == set(FOLDERS)


@pytest.mark.parametrize(("path", "name"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(path, name):
    for module in imported(path):
        if module.startswith("dpo_fast."):
            other = module.removeprefix("dpo_fast.")
            assert rank(other) <= rank(name), f"{path}: imports {module}, which is above it"
        if name.startswith("kernels."):
            top = module.split(".")[0]
            assert (
                top in {"torch", "triton", "flash_attn", "flash_attn_interface", "dpo_fast"}
                or top in sys.stdlib_module_names
            ), f"{path} imports {module}"


def test_modules_do_not_import_each_other_in_a_circle():
    """Within a folder, too. Imports inside of functions do not count."""
    edges = {f"dpo_fast.{name}": set(imported(path, inside=False)) for path, name in modules()}
    seen, done = [], set()

    def visit(module):
        assert module not in seen, " -> ".join([*seen[seen.index(module) :], module])
        if module in edges and module not in done:
            seen.append(module)
            for other in edges[module]:
                visit(other)
            done.add(seen.pop())

    for module in edges:
        visit(module)


def test_kernels_is_a_namespace_folder_behind_a_symlink():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "dpo_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


def test_import_is_light_and_needs_no_gpu():
    code = (
        "import sys, dpo_fast; from dpo_fast import linear_logprob, DPOConfig;"
        "heavy = {'transformers', 'datasets', 'triton', 'bitsandbytes', 'matplotlib'} & set(sys.modules);"
        "import torch; assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    import dpo_fast
    import dpo_fast.training.run

    for name in dpo_fast.__all__:
        assert callable(getattr(dpo_fast, name))
    from dpo_fast import train

    assert train is dpo_fast.training.run.train
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpo_fast.nothing  # noqa: B018
