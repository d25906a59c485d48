"""What a log is bound to besides settings and rows, against changes made one at a time."""

import importlib
import json
import subprocess
import sys

import pytest
import xxhash
from oracle import save_tiny_checkpoint

from dpo_fast.curate.identity import command_identity, file_identity, function_identity, model_identity, versions
from dpo_fast.errors import UserError


def changes(identity, file, text="changed = 1\n"):
    """Whether changing a file changes what `identity` returns, and restoring it restores that."""
    before, content = identity(), file.read_bytes()
    file.write_text(text)
    after = identity()
    file.write_bytes(content)
    assert identity() == before
    json.dumps(before)
    return after != before


def test_a_file_is_its_contents(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(content := bytes(range(256)) * 10_000)
    assert file_identity(file) == xxhash.xxh3_128_hexdigest(content)
    with pytest.raises(UserError, match="b: cannot be read: No such file"):
        file_identity(tmp_path / "b")


def test_a_model_is_its_weights_tokenizer_and_template(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "optimizer.pt", "README.md"):
        (folder / name).write_text("x")

    def identity():
        return model_identity(str(folder))

    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert changes(identity, folder / name)
    assert changes(identity, folder / "additional_chat_templates" / "tools.jinja")
    assert not changes(identity, folder / "optimizer.pt")
    assert not changes(identity, folder / "README.md")
    gguf = tmp_path / "model.gguf"
    gguf.write_text("x")
    assert changes(lambda: model_identity(str(gguf)), gguf)


def test_an_adapter_is_also_the_model_under_it(tmp_path):
    base = save_tiny_checkpoint(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert changes(lambda: model_identity(str(adapter)), base / "model.safetensors")
    for text in ("[", "[]", "{}"):
        (adapter / "adapter_config.json").write_text(text)
        model_identity(str(adapter))


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    def download(name, file):
        if name != "org/model":
            raise ValueError("no such repository")
        return str(tmp_path / "snapshots" / "0123abcd" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert model_identity("org/model") == "0123abcd"
    assert model_identity("./no/such/folder") is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package of checkers, one of which imports two more files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "own_checkers"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "used.py").write_text("WORDS = 3\n")
    (package / "length.py").write_text(
        "import json, numpy\nfrom .deep import used\n\ndef judge(answer, row):\n    import own_lazy\n    return 1\n"
    )
    (tmp_path / "own_lazy.py").write_text("import no_such_module\n")
    (tmp_path / "own_unused.py").write_text("")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_function_is_its_module_and_what_that_imports_from_its_folder(folder):
    importlib.import_module("own_checkers.length")

    def identity():
        return function_identity("own_checkers.length:judge")

    for name in ("length.py", "deep/used.py", "deep/__init__.py", "__init__.py"):
        assert changes(identity, folder / "own_checkers" / name)
    assert changes(identity, folder / "own_lazy.py")
    assert changes(identity, folder / "own_lazy.py", "not ( Python")
    assert not changes(identity, folder / "own_unused.py")
    assert len(identity()) == 5


def test_functions_of_installed_modules_are_their_module(folder):
    assert function_identity("json.decoder:scanstring") == file_identity(json.decoder.__file__)
    assert function_identity("sys:getsizeof") == "sys"


def test_a_command_is_its_program_and_its_files(folder):
    script = folder / "check.py"
    script.write_text("import own_lazy\n")
    (folder / "check.sh").write_text("#!/bin/sh\necho 1\n")
    (folder / "check.sh").chmod(0o755)
    (folder / "words").write_text("a")
    for command, files in (
        (f"{sys.executable} -S check.py words --of 3", ("check.py", "words", "own_lazy.py")),
        ("./check.sh words", ("check.sh", "words")),
    ):
        for name in files:
            assert changes(lambda command=command: command_identity(command), folder / name)
        assert not changes(lambda command=command: command_identity(command), folder / "own_unused.py")


def test_versions_are_those_installed():
    found = versions("xxhash", "no-such-package")
    assert found["xxhash"] == xxhash.VERSION
    assert found["no-such-package"] is None
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_importing_it_is_light():
    code = "import sys, dpo_fast.curate.signals.registry; assert not {'torch', 'modulefinder'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
