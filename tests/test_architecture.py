"""The house: imports go one way, `import dpo_fast` is light, the symlink is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each floor may import those before it in the list, and itself where it is a set.
FLOORS = [
    {"kernels"},
    {"config", "intervals"},
    {"user_code"},
    {"pairs"},
    {"losses"},
    {"objective"},
    {"fused_loss"},
    {"fused_kto"},
    {"batch"},
    {"data"},
    {"model", "reference", "checkpoint", "optim", "metrics", "progress", "plots", "pages", "token_views"},
    {"guards", "warning_signs", "run_settings"},
    {"score"},
    {"step"},
    {"trainer", "integrations"},
    {"curate"},
    {"inspection_view"},
    {"evaluation", "inspection", "report"},
    {"demo_task"},
    {"demo"},
    {"cli"},
]
RANK = {name: rank for rank, floor in enumerate(FLOORS) for name in floor}


def modules():
    for path in sorted((ROOT / "dpo_fast").rglob("*.py")):
        parts = path.relative_to(ROOT / "dpo_fast").with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield path, "kernels"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "dpo_fast":
                yield from (f"dpo_fast.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("path", "name"), modules(), ids=lambda value: getattr(value, "stem", value))
def test_imports_go_one_way(path, name):
    assert name in RANK, f"{name} has no floor: add it to FLOORS"
    for module in imported(path):
        if module.startswith("dpo_fast."):
            other = module.split(".")[1]
            assert (
                RANK[other] < RANK[name]
                or (other == name and name in ("kernels", "data", "integrations", "curate"))
                or (RANK[other] == RANK[name] == RANK["model"])
            ), f"{path}: imports {module}, which is not below it"
        if name == "kernels":
            top = module.split(".")[0]
            assert (
                top in {"torch", "triton", "flash_attn", "flash_attn_interface", "dpo_fast"}
                or top in sys.stdlib_module_names
            ), f"{path} imports {module}"


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
    import dpo_fast.trainer

    for name in dpo_fast.__all__:
        assert callable(getattr(dpo_fast, name))
    from dpo_fast import train

    assert train is dpo_fast.trainer.train
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpo_fast.nothing  # noqa: B018
