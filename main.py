"""Runs one experiment: `python main.py --config=configs/tiny.py --workdir=runs/tiny`.

Flags are read here and nowhere else; each mode is a function of the library.
"""

import contextlib
import json
import logging as std_logging
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from umv2.config import Config, ConfigError, from_config_dict, nearest_name
from umv2.schema import UserError

_MODES = {
    "train": "train, or continue the run in --workdir",
    "evaluate": "held-out loss, perplexity and bits per byte of the run in --workdir",
    "generate": "continue --prompt with the model in --workdir",
    "inspect": "resolved configuration and every parameter (--json for machines)",
    "prepare": "tokenise text or a Hugging Face data set into token shards in --workdir",
    "train_tokenizer": "train a byte-pair encoding of --vocab_size on the corpus, into --workdir",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; evaluate and generate default to the run's own."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's checkpoints and metrics.")
_MODE = flags.DEFINE_enum(
    "mode", "train", list(_MODES), "; ".join(f"{name}: {what}" for name, what in _MODES.items())
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue (generate).")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text (inspect, evaluate).")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Entries to train (train_tokenizer).")


def main(argv: list[str]) -> None:
    """Dispatches on --mode."""
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]}: unexpected argument; options are written --name=value")
    config = _load_config()
    # JAX is imported only now, so that --help and a mistake in the configuration answer at once.
    from umv2 import modes

    match _MODE.value:
        case "train":
            modes.train(_needed(config), _workdir())
        case "evaluate":
            report = modes.evaluate(config, _workdir())
            print(json.dumps(report.metrics()) if _JSON.value else report.table())
        case "generate":
            for piece in modes.generate(config, _workdir(), _PROMPT.value):
                print(piece, end="", flush=True)
            print()
        case "inspect":
            inspection = modes.inspect(_needed(config))
            print(json.dumps(inspection.as_dict()) if _JSON.value else inspection.as_text())
        case "prepare":
            modes.prepare(_needed(config), _workdir())
        case "train_tokenizer":
            print(modes.train_tokenizer(_needed(config), _workdir(), _VOCAB_SIZE.value))


def _load_config() -> Config | None:
    try:
        values = _CONFIG.value
        return None if values is None else from_config_dict(values)
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error


def _needed(config: Config | None) -> Config:
    if config is None:
        raise ConfigError(f"--config: mode {_MODE.value!r} needs one, such as configs/tiny.py")
    return config


def _workdir() -> Path:
    if not _WORKDIR.value:
        raise ConfigError(f"--workdir: mode {_MODE.value!r} needs the folder of the run")
    return Path(_WORKDIR.value)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake ends in one line that names the flag and the rule."""
    with _one_line_errors():
        try:
            return flags.FLAGS(arguments)
        except (AttributeError, KeyError) as error:
            # An override of a field that does not exist. ml_collections says which name it misses,
            # but not where, so the fields are looked up in the configuration without overrides.
            overrides = [a for a in arguments if a.startswith(("--config.", "-config."))]
            sys.argv = [a for a in arguments if a not in overrides]  # it reads overrides from there
            flags.FLAGS.unparse_flags()
            flags.FLAGS(sys.argv)
            for override in overrides:
                _check_field(override.lstrip("-").split("=")[0].removeprefix("config."))
            raise ConfigError(str(error)) from error


def _check_field(path: str) -> None:
    section = _CONFIG.value
    if section is None:
        raise ConfigError(f"--config.{path}: overrides need --config=FILE")
    names = path.split(".")
    for depth, name in enumerate(names):
        if not hasattr(section, "keys") or name not in section:
            choices = list(section.keys()) if hasattr(section, "keys") else []
            where = ".".join(names[: depth + 1])
            raise ConfigError(f"{where}: unknown field{nearest_name(name, choices)}")
        section = section[name]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the program with one line for mistakes that the user can mend; bugs keep their trace."""
    try:
        yield
    except (flags.Error, UserError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def _run(argv: list[str]) -> None:
    with _one_line_errors():
        main(argv)


def _set_up_logging() -> None:
    """Shows the library's messages with the time of day, and of jax only what is wrong."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    formatter = std_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.get_absl_handler().setFormatter(formatter)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)


if __name__ == "__main__":
    _set_up_logging()
    app.run(_run, flags_parser=_parse_flags)
