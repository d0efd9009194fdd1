"""Runs one experiment: `python main.py --config=configs/tiny.py --workdir=runs/tiny`.

Flags are read here and nowhere else; each mode is a function of the library.
"""

import contextlib
import json
import logging as std_logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from absl import app, flags, logging
from ml_collections import config_flags

from umv2.config import Config, ConfigError, from_config_dict, nearest_name
from umv2.schema import UserError

_MODES = {
    "train": "train, or continue the run in --workdir",
    "evaluate": "held-out loss, perplexity and bits per byte of the run in --workdir",
    "generate": "continue --prompt with the model in --workdir",
    "inspect": "resolved configuration and every parameter (--json for machines)",
    "cost": "parameters, FLOPs and bytes of --config beside those of --compare, with a plot",
    "plan": "compile the step of --config for --topology, which need not be there: does it fit?",
    "prepare": "tokenise text or a Hugging Face data set into token shards in --workdir",
    "train_tokenizer": "train a byte-pair encoding of --vocab_size on the corpus, into --workdir",
    "export": "write the model of the run in --workdir to --folder, as --format",
    "import": "make --workdir a run that starts from the model in --folder",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/, with ':FAMILY' for another than UltraMemV2 (configs/families.py);"
    " evaluate and generate default to the run's own.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's checkpoints and metrics.")
_MODE = flags.DEFINE_enum(
    "mode", "train", list(_MODES), "; ".join(f"{name}: {what}" for name, what in _MODES.items())
)
_SUITE = flags.DEFINE_list(
    "suite",
    [],
    "Questions to ask in place of the held-out text (evaluate): long_context, or tasks of"
    " lm-evaluation-harness, such as arc_easy,hellaswag.",
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question (--suite of the harness).", 0
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Questions of each task (--suite of the harness); default: all.", 1
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "Folder of local task files (--suite of the harness)."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue (generate).")
_JSON = flags.DEFINE_bool(
    "json", False, "Print JSON instead of text (inspect, evaluate, cost, plan)."
)
_COMPARE = flags.DEFINE_list("compare", [], "Other configurations, as FILE or FILE:FAMILY (cost).")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Positions that a token attends to (cost); default: the sequence length.", 1
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices to plan for: v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h200:8."
)
_PLAN_STEP = flags.DEFINE_enum(
    "plan_step", "train", ["train", "decode"], "What to plan; decode: with a full cache (plan)."
)
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, rank those that fit (plan).")
_SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 8, "Programs that --search compiles.", 1)
_FOLDER = flags.DEFINE_string("folder", None, "Folder of an exchanged model (export, import).")
_FORMAT = flags.DEFINE_enum(
    "format", "umv2", ["umv2", "olmoe"], "umv2: any family | olmoe: of Hugging Face (export)."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where JAX cannot tell (docs/pods.md)."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the job; 1: this one alone, whatever started it.", 1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", 0)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Entries to train (train_tokenizer).")


def main(argv: list[str]) -> None:
    """Dispatches on --mode."""
    _check_no_arguments(argv)
    config = _load_config()
    # JAX is imported only now, so that --help and a mistake in the configuration answer at once.
    first = _join_processes()
    from umv2 import modes

    match _MODE.value:
        case "train":
            modes.train(_needed(config), _workdir())
        case "evaluate":
            report = _evaluate(config)
            if first:
                print(json.dumps(report.metrics()) if _JSON.value else report.table())
        case "generate":
            for piece in modes.generate(config, _workdir(), _PROMPT.value):
                print(piece, end="", flush=True)
            print()
        case "inspect":
            inspection = modes.inspect(_needed(config))
            print(json.dumps(inspection.as_dict()) if _JSON.value else inspection.as_text())
        case "cost":
            folder = Path(_WORKDIR.value or ".")
            costs = modes.cost(_compared(_needed(config)), _CONTEXT.value, folder)
            print(costs.as_json() if _JSON.value else costs.as_text())
        case "plan":
            plan = modes.plan(
                _label(config_flags.get_config_filename(flags.FLAGS["config"])),
                _needed(config),
                _topology(),
                step=cast(Any, _PLAN_STEP.value),
                search_limit=_search_limit(),
            )
            print(plan.as_json() if _JSON.value else plan.as_text())
        case "prepare":
            modes.prepare(_needed(config), _workdir())
        case "train_tokenizer":
            print(modes.train_tokenizer(_needed(config), _workdir(), _VOCAB_SIZE.value))
        case "export":
            modes.export_run(_workdir(), _folder(), cast(Any, _FORMAT.value))
        case "import":
            modes.import_model(_folder(), _workdir(), config)


def _evaluate(config: Config | None) -> Any:
    """Returns the report that --suite asks for."""
    from umv2 import modes

    if not _SUITE.value:
        return modes.evaluate(config, _workdir())
    if _SUITE.value == ["long_context"]:
        return modes.evaluate_long_context(config, _workdir())
    if "long_context" in _SUITE.value:
        raise ConfigError(f"--suite={','.join(_SUITE.value)}: long_context stands alone")
    return modes.evaluate_downstream(
        config,
        _workdir(),
        _SUITE.value,
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        include_path=Path(_INCLUDE_PATH.value) if _INCLUDE_PATH.value else None,
    )


def _check_no_arguments(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]}: unexpected argument; options are written --name=value")


def _join_processes() -> bool:
    """Joins the other processes, where there are any; returns whether this is the first.

    The others say what is wrong and nothing else.
    """
    from umv2 import distributed

    given = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _MODE.value not in ("train", "evaluate"):
        distributed.require_alone(f"mode {_MODE.value!r}", _NUM_PROCESSES.value)
        return True
    process = distributed.initialize(*given, saves_on_termination=_MODE.value == "train")
    if process != 0:
        logging.set_verbosity(logging.WARNING)
        _set_log_format(f"process {process}: ")
    return process == 0


def _load_config() -> Config | None:
    try:
        values = _CONFIG.value
        return None if values is None else from_config_dict(values)
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error


def _compared(config: Config) -> dict[str, Config]:
    """Returns --config and the configurations of --compare, by the names of their files."""
    named = {_label(config_flags.get_config_filename(flags.FLAGS["config"])): config}
    for entry in _COMPARE.value:
        if _label(entry) in named:
            raise ConfigError(f"--compare={entry}: {_label(entry)} is there already")
        try:
            values = flags.FlagValues()  # read as --config is, but for overrides
            config_flags.DEFINE_config_file("entry", entry, flag_values=values)
            values([""])
            named[_label(entry)] = from_config_dict(values.entry)
        except (OSError, flags.Error) as error:
            raise ConfigError(f"--compare={entry}: {_last_line(error)}") from error
    return named


def _label(file: str) -> str:
    """'configs/tiny.py:moe' -> 'tiny:moe'."""
    path, colon, family = file.partition(":")
    return Path(path).stem + colon + family


def _last_line(error: Exception) -> str:
    """Returns what a mistake in a configuration file says, without its trace."""
    last = str(error).strip().splitlines()[-1]
    if "get_config() takes" in last:
        return "the file is of one family: leave out the colon and what follows"
    return re.sub(r"^[A-Za-z]+Error: ", "", last)


def _needed(config: Config | None) -> Config:
    if config is None:
        raise ConfigError(f"--config: mode {_MODE.value!r} needs one, such as configs/tiny.py")
    return config


def _topology() -> str:
    if not _TOPOLOGY.value:
        raise ConfigError("--topology: mode 'plan' needs one, such as v5p:4x4x8 or h200:8")
    return _TOPOLOGY.value


def _search_limit() -> int | None:
    """Returns how many programs to search among; None: the mesh of the configuration alone."""
    if not _SEARCH.value:
        return None
    if _PLAN_STEP.value != "train":
        raise ConfigError("--plan_step='decode': --search is for training steps")
    return _SEARCH_LIMIT.value


def _folder() -> Path:
    if not _FOLDER.value:
        raise ConfigError(f"--folder: mode {_MODE.value!r} needs the folder of the model")
    return Path(_FOLDER.value)


def _workdir() -> Path:
    if not _WORKDIR.value:
        raise ConfigError(f"--workdir: mode {_MODE.value!r} needs the folder of the run")
    return Path(_WORKDIR.value)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake ends in one line that names the flag and the rule."""
    with _one_line_errors():
        try:
            return flags.FLAGS(arguments)
        except OSError as error:  # the file of the configuration, where there are overrides
            raise ConfigError(f"--config: {_last_line(error)}") from error
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
        message = str(error)
        if "Traceback" in message:  # of a configuration file, within the flag's own message
            message = f"{message.partition(': ')[0]}: {_last_line(error)}"
        sys.exit("error: " + " ".join(message.split()))


def _run(argv: list[str]) -> None:
    with _one_line_errors():
        main(argv)


def _set_up_logging() -> None:
    """Shows the library's messages with the time of day, and of jax only what is wrong."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    _set_log_format()
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)


def _set_log_format(speaker: str = "") -> None:
    formatter = std_logging.Formatter(f"%(asctime)s {speaker}%(message)s", datefmt="%H:%M:%S")
    logging.get_absl_handler().setFormatter(formatter)


if __name__ == "__main__":
    _set_up_logging()
    app.run(_run, flags_parser=_parse_flags)
