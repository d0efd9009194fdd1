"""Configuration files and overrides: every error is one line with its location."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_configs import NAMES
from umv2.config import Config, ConfigError, from_config_dict, to_dict
from umv2.config import files as config_files
from umv2.config.schema import UserError

ROOT = Path(__file__).parents[2]
BASE = "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "Traceback" not in str(error.value)
    return " ".join(str(error.value).split())


def refused(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as error:
        config_files.read(str(path), "--config")
    return message(error)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_refers_to_a_file_in_configs(name: str) -> None:
    assert name in config_files.names()
    by_name = config_files.read(name, "--config")
    assert by_name == config_files.read(str(ROOT / "configs" / f"{name}.py"), "--config")
    assert by_name == from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def test_a_family_follows_the_colon_of_a_name_and_of_a_path_with_colons(tmp_path: Path) -> None:
    moe = config_files.read("tiny:moe", "--config")
    assert (moe.model.ffn, moe.model.memory.layer) == ("moe", "none")
    (tmp_path / "a:b").mkdir()
    path = tmp_path / "a:b" / "tiny.py"
    path.write_text((ROOT / "configs/tiny.py").read_text())
    assert config_files.read(f"{path}:moe", "--config") == moe
    assert config_files.label(f"{path}:moe") == config_files.label("tiny:moe") == "tiny:moe"
    assert config_files.label(str(path)) == config_files.label("tiny") == "tiny"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(BASE + "    config.seed = 7\n    return config\n")
    assert config_files.read("~/mine.py", "--config").seed == 7


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ("", "", "defines no function get_config"),
        ("get_config = 3\n", "", "defines no function get_config"),
        ("x = 1\ndef get_config(:\n", ":2)", "SyntaxError: invalid syntax"),
        ("x = 1\n  y = 2\n", ":2)", "IndentationError: unexpected indent"),
        ("x = 'open\n", ":1)", "SyntaxError: unterminated string literal"),
        (b"x = '\xff\xfe'\n", ":1)", "SyntaxError: (unicode error) 'utf-8' codec can't decode"),
        (b"\x00\x01\x02", "", "null bytes"),
        ("# coding: nonsense\n", "", "SyntaxError: unknown encoding: nonsense"),
        ("import nonsense\n", ":1)", "ModuleNotFoundError: No module named 'nonsense'"),
        ("from configs import bse\n", ":1)", "ImportError: cannot import name 'bse'"),
        ("from configs.base import nothing\n", ":1)", "ImportError: cannot import name 'nothing'"),
        ("from . import base\n", ":1)", "ImportError: attempted relative import"),
        ("x = undefined\n", ":1)", "NameError: name 'undefined' is not defined"),
        ("open('/nonexistent/x')\n", ":1)", "No such file or directory"),
        ("import sys\nsys.exit('bye')\n", ":2)", "SystemExit: bye"),
        ("def f():\n    f()\n\n\nf()\n", ":2)", "RecursionError: maximum recursion depth"),
        (BASE + "    config.modle.ffn_size = 3\n", ":6)", 'Did you mean "model"'),
        (BASE + "    config['modle']\n", ":6)", 'Did you mean "model"'),
        (BASE + "    config.seed = 1.5\n", ":6)", "TypeError: Could not override field 'seed'"),
        (BASE + "    config.model = 3\n", ":6)", "TypeError: Could not override field 'model'"),
        (BASE + "    config.lock()\n    config.sed = 1\n", ":7)", 'Key "sed" does not exist'),
        (BASE + "    return 1 / 0\n", ":6)", "ZeroDivisionError: division by zero"),
        (BASE + "    raise ValueError('two\\nlines')\n", ":6)", ": two lines ("),
        (BASE + "    raise KeyError('a key')\n", ":6)", "KeyError: a key ("),
        (BASE + "    raise Exception\n", ":6)", "Exception"),
        (BASE, "", "must return a ConfigDict, not NoneType"),
        (BASE + "    return config.to_dict()\n", "", "must return a ConfigDict, not dict"),
        ("def get_config(a, b):\n    pass\n", "", "needs FILE:ARGUMENT"),
        (
            "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n",
            "",
            "seed: missing; configs/base.py gives it a value",
        ),
        (
            BASE + "    config.model.memory.topm = 3\n    return config\n",
            "",
            "model.memory.topm: unknown field (nearest: top_m)",
        ),
        (BASE + "    config.extra = {'a': 1}\n    return config\n", "", "extra: unknown field"),
        (
            "import ml_collections\n"
            + BASE
            + "    with config.ignore_type():\n        config.model = 3\n    return config\n",
            "",
            "model=3: must be a section, not a value",
        ),
        (
            "from ml_collections import config_dict\n"
            + BASE
            + "    config.data.seed = config_dict.placeholder(int, required=True)\n"
            + "    return config\n",
            "",
            "--config.data.seed: must be given, since --config=",
        ),
    ],
)
def test_an_error_in_a_file_is_one_line_with_its_location(
    tmp_path: Path, content: str | bytes, where: str, what: str
) -> None:
    path = tmp_path / "mine.py"
    text = refused(path, content)
    assert what in text
    assert len(text) < 600
    if where:
        assert text.startswith(f"--config={path}: ")
        assert text.endswith(f" ({path}{where}")


def test_an_error_in_an_imported_file_names_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "circular_a.py").write_text("import circular_b\nx = 1\n")
    (tmp_path / "circular_b.py").write_text("from circular_a import x\n")
    (tmp_path / "broken_c.py").write_text("x = 1\nx = = 2\n")
    text = refused(tmp_path / "mine.py", "from circular_a import x\n")
    assert "partially initialized module 'circular_a'" in text
    assert text.endswith(f"({tmp_path / 'mine.py'}:1)")
    text = refused(tmp_path / "mine.py", "\nimport broken_c\n")
    assert text.endswith(f"SyntaxError: invalid syntax ({tmp_path / 'broken_c.py'}:2)")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--config='': must not be empty"),
        (":moe", "--config='': must not be empty"),
        ("tniy", "--config=tniy: no such file (nearest: tiny); named configurations: cpu_small,"),
        ("configs/tniy.py", "(nearest: configs/tiny.py)"),
        ("configs/tiny", "(nearest: configs/tiny.py)"),
        ("elsewhere/configs/tniy.py", "(nearest: tiny)"),
        ("configs", "--config=configs: is a folder, but must be a Python file"),
        ("base", "--config=base: no such file"),
        ("nothing_like_it.py", "--config=nothing_like_it.py: no such file"),
        ("gs://bucket/tiny.py", "--config=gs://bucket/tiny.py: must be a local path"),
        ("README.md", "--config=README.md: SyntaxError: "),
        ("tiny:moo", "family 'moo': must be one of ultramem_v2, moe, "),
        ("tiny:moo", " (nearest: moe) (/"),
        ("tiny:moe:extra", "family 'moe:extra': must be one of"),
        ("tiny:", "family '': must be one of"),
        ("configs/tiny.py:Moe", "family 'Moe': must be one of"),
        ("paper_430m_5b:moe", "takes no argument: leave out the colon"),
        ("long_context_tiny:pkm", "family 'pkm': must be one of ultramem_v2, moe, dense"),
    ],
)
def test_an_unknown_name_is_a_one_line_error(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for flag in ("--config", "--compare"):
        with pytest.raises(UserError) as error:
            config_files.read(given, flag)
        assert expected.replace("--config", flag) in message(error)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.touch()

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, who can read all files
    with pytest.raises(ConfigError, match=rf"--config={path}: cannot be read: Permission denied"):
        config_files.read(str(path), "--config")


@pytest.mark.parametrize(
    ("path", "texts", "expected"),
    [
        ("seed", ["1", "2"], 2),
        ("seed", [" 3 "], 3),
        ("optimizer.learning_rate", ["1"], 1.0),
        ("optimizer.learning_rate", ["1e-3"], 1e-3),
        ("model.scan_layers", ["False"], False),
        ("model.scan_layers", ["true"], True),
        ("model.ffn", ["none"], "none"),
        ("model.memory.layer", ["mine:Layer"], "mine:Layer"),
        ("data.tokenizer", ["a b=c.json"], "a b=c.json"),
        ("data.text_field", ["日本語"], "日本語"),
        ("data.text_field", ["1"], "1"),
        ("data.paths", ["corpus/*.txt"], ("corpus/*.txt",)),
        ("data.paths", ["my corpus/[ab]*.txt"], ("my corpus/[ab]*.txt",)),
        ("data.paths", ["123"], ("123",)),
        ("data.paths", ["('a b.txt', 'c,d.txt')"], ("a b.txt", "c,d.txt")),
        ("data.paths", ["['a', 'b']"], ("a", "b")),
        ("data.paths", ["a", "b"], ("a", "b")),
        ("data.paths", ["()"], ()),
        ("generate.stop", [r"'\n'"], ("\n",)),
        ("evaluation.long_context.lengths", ["(128, 256)"], (128, 256)),
        ("evaluation.long_context.lengths", ["128,256"], (128, 256)),
        ("evaluation.long_context.lengths", ["128"], (128,)),
        ("evaluation.long_context.tasks", ["needle"], ("needle",)),
    ],
)
def test_an_override_is_parsed_by_the_type_of_its_field(
    path: str, texts: list[str], expected: Any
) -> None:
    value = config_files.parse(path, texts)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("modle.ffn_size", "1", "--config.modle: unknown field (nearest: model)"),
        ("model.memory.topm", "1", "--config.model.memory.topm: unknown field (nearest: top_m)"),
        ("model.memory.top_m.x", "1", "--config.model.memory.top_m.x: unknown field"),
        ("", "1", "--config.: unknown field"),
        ("model.", "1", "--config.model.: unknown field"),
        ("model", "3", "--config.model: is a section, not a value"),
        ("model", "{'ffn_size': 8}", "--config.model: is a section, not a value"),
        ("data.paths[0]", "a", "--config.data.paths[0]: unknown field (nearest: paths)"),
        ("seed", "1.5", "--config.seed='1.5': must be an integer"),
        ("seed", "", "--config.seed='': must be an integer"),
        ("seed", "one", "--config.seed='one': must be an integer"),
        ("seed", "9" * 5000, "must be an integer"),
        ("optimizer.learning_rate", "fast", "learning_rate='fast': must be a number"),
        ("optimizer.learning_rate", "1,5", "learning_rate='1,5': must be a number"),
        ("model.scan_layers", "yes", "model.scan_layers='yes': must be true or false"),
        ("data.paths", "a.txt,b.txt", "must be a Python tuple, as in \"('a', 'b')\""),
        ("data.paths", "('a.txt', ", "must be a Python tuple"),
        ("data.paths", "", "must be a Python tuple"),
        ("evaluation.long_context.lengths", "256 512", 'must be a Python tuple, as in "(1, 2)"'),
        ("evaluation.long_context.lengths", "{1, 2}", "must be a Python tuple"),
        ("evaluation.long_context.lengths", "(" * 500, "must be a Python tuple"),
        ("evaluation.long_context.lengths", "x", "must be a Python tuple"),
    ],
)
def test_an_invalid_override_is_a_one_line_error(path: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_files.parse(path, [text])
    assert expected in message(error)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("seed", "99999999999999999999", "seed="),
        ("seed", "-1", "seed=-1: must be >= 0"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate=nan"),
        ("optimizer.learning_rate", "inf", "optimizer.learning_rate=inf"),
        ("model.ffn", "moee", "must be one of 'dense', 'moe', 'none' (nearest: moe)"),
        ("data.paths", "(1, 2)", "data.paths=1: must be of type str, not int"),
        ("evaluation.long_context.lengths", "(256, 1.5)", "lengths=1.5: must be of type int"),
        ("evaluation.long_context.tasks", "neeedle", "(nearest: needle)"),
    ],
)
def test_overridden_values_are_validated(path: str, text: str, expected: str) -> None:
    value = config_files.parse(path, [text])
    with pytest.raises(ConfigError) as error:
        config_files.read("tiny", "--config", {path: value})
    assert expected in message(error)


def test_every_field_can_be_overridden_with_its_own_value_as_text() -> None:
    config = config_files.read("tiny", "--config")

    def leaves(section: dict[str, Any], path: str = "") -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in section.items():
            is_section = isinstance(value, dict)
            fields |= leaves(value, f"{path}{name}.") if is_section else {path + name: value}
        return fields

    texts = {path: str(value) for path, value in leaves(to_dict(config)).items()}
    assert len(texts) > 100
    values = {path: config_files.parse(path, [text]) for path, text in texts.items()}
    assert config_files.read("tiny:moe", "--config", values) == config


def test_an_override_updates_references_and_fills_placeholders(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        + BASE
        + "    config.data.seed = config.get_ref('seed')\n"
        + "    config.generate.seed = config_dict.placeholder(int, required=True)\n"
        + "    return config\n"
    )
    config = config_files.read(str(path), "--config", {"seed": 5, "generate.seed": 6})
    assert (config.seed, config.data.seed, config.generate.seed) == (5, 5, 6)


def test_an_override_in_a_missing_section_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(BASE + "    del config.generate\n    return config\n")
    with pytest.raises(ConfigError, match=r"^generate: missing; configs/base\.py gives it a value"):
        config_files.read(str(path), "--config", {"generate.seed": 1})


def test_a_run_of_an_older_version_gets_the_defaults_of_newer_fields() -> None:
    saved = to_dict(config_files.read("tiny", "--config"))
    saved["model"]["memory"]["top_m"] = 4
    del saved["generate"], saved["model"]["rope_scaling"]
    config = config_files.of_run(saved, {"evaluation.batch_size": 4, "data.paths": ("a",)})
    assert config.generate == config_files.read("tiny", "--config").generate
    assert config.model.rope_scaling == "none"
    assert (config.model.memory.top_m, config.evaluation.batch_size) == (4, 4)
    with pytest.raises(
        ConfigError, match=r"another version of umv2, which has the fields model\.old; only"
    ):
        config_files.of_run(saved | {"model": saved["model"] | {"old": 1}}, {})


def in_a_process(program: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_local_folder_named_configs_does_not_shadow_the_named_configs(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('not these')\n")
    (tmp_path / "mine.py").write_text(BASE + "    config.seed = 3\n    return config\n")
    program = (
        f"import sys; sys.path.insert(1, {str(ROOT)!r});"  # after the folder itself
        "from umv2.config import files as config_files;"
        "print(config_files.read('mine.py', '--config').seed,"
        " config_files.read('tiny:pkm', '--config').model.memory.num_heads,"
        " 'jax' in sys.modules, 'numpy' in sys.modules)"
    )
    assert in_a_process(program, tmp_path).split() == ["3", "4", "False", "False"]
    assert isinstance(config_files.read("tiny", "--config"), Config)
