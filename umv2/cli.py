"""Trains, evaluates, converts and measures memory-layer language models.

    umv2 --config=tiny --workdir=runs/tiny                     train, or go on
    umv2 --workdir=runs/tiny --mode=evaluate                   loss on held-out text
    umv2 --workdir=runs/tiny --mode=generate --prompt="def "   continue a text
    umv2 --config=tiny:moe --mode=inspect                      every field and parameter

--config.SECTION.FIELD=VALUE replaces a value of the configuration, be it that of --config or, where
there is none, the one that the run in --workdir was trained with. In a clone, `python main.py` is
the same command.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags, logging

from umv2 import command, files
from umv2.config import Config, ConfigError, nearest_name
from umv2.config import files as config_files

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
# Without --config they take the configuration of the run in --workdir.
_OF_A_RUN = ("train", "evaluate", "generate", "inspect")
# The modes in which a flag means something, where that is not all: the others refuse it.
_FLAG_MODES = {
    "config": tuple(mode for mode in _MODES if mode != "export"),
    "workdir": tuple(mode for mode in _MODES if mode != "plan"),
    "suite": ("evaluate",),
    "num_fewshot": ("evaluate",),
    "limit": ("evaluate",),
    "include_path": ("evaluate",),
    "prompt": ("generate",),
    "json": ("evaluate", "inspect", "cost", "plan"),
    "compare": ("cost",),
    "context": ("cost",),
    "topology": ("plan",),
    "plan_step": ("plan",),
    "search": ("plan",),
    "search_limit": ("plan",),
    "folder": ("export", "import"),
    "format": ("export",),
    "coordinator_address": ("train", "evaluate"),
    "process_id": ("train", "evaluate"),
    "vocab_size": ("train_tokenizer",),
}
_MAY_BE_EMPTY = ("prompt",)
_OF_SEVERAL = ("coordinator_address", "process_id")
_MOST = 2**31 - 1  # of numbers that become int32 somewhere

# Of this command alone: scripts in experiments/ have flags of the same names.
FLAGS = flags.FlagValues()

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A name or file of configs/, or a file of your own, with ':FAMILY' for another than UltraMemV2"
    f" (configs/families.py). By name: {', '.join(config_files.names())}. Without it"
    f" {', '.join(_OF_A_RUN)} take the run's own.",
    flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run's checkpoints and metrics, or of what a mode writes.",
    flag_values=FLAGS,
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(_MODES),
    "; ".join(f"{name}: {what}" for name, what in _MODES.items()),
    flag_values=FLAGS,
)
_SUITE = flags.DEFINE_list(
    "suite",
    [],
    "Questions to ask in place of the held-out text (evaluate): long_context, or tasks of"
    " lm-evaluation-harness, such as arc_easy,hellaswag.",
    flag_values=FLAGS,
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Examples before each question (--suite of the harness).",
    0,
    _MOST,
    flag_values=FLAGS,
)
_LIMIT = flags.DEFINE_integer(
    "limit",
    None,
    "Questions of each task (--suite of the harness); default: all.",
    1,
    _MOST,
    flag_values=FLAGS,
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "Folder of local task files (--suite of the harness).", flag_values=FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue (generate).", flag_values=FLAGS)
_JSON = flags.DEFINE_bool(
    "json", False, "Print JSON instead of text (inspect, evaluate, cost, plan).", flag_values=FLAGS
)
_COMPARE = flags.DEFINE_list(
    "compare",
    [],
    "Other configurations, named as in --config, with commas between them (cost).",
    flag_values=FLAGS,
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Positions that a token attends to (cost); default: the sequence length.",
    1,
    _MOST,
    flag_values=FLAGS,
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Devices to plan for: v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h200:8.",
    flag_values=FLAGS,
)
_PLAN_STEP = flags.DEFINE_enum(
    "plan_step",
    "train",
    ["train", "decode"],
    "What to plan; decode: with a full cache (plan).",
    flag_values=FLAGS,
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes, rank those that fit (plan).", flag_values=FLAGS
)
_SEARCH_LIMIT = flags.DEFINE_integer(
    "search_limit", 8, "Programs that --search compiles.", 1, _MOST, flag_values=FLAGS
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "Folder of an exchanged model (export, import).", flag_values=FLAGS
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "umv2",
    ["umv2", "olmoe"],
    "umv2: any family | olmoe: of Hugging Face (export).",
    flag_values=FLAGS,
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, where JAX cannot tell (docs/pods.md).",
    flag_values=FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes of the job; 1: this one alone, whatever started it.",
    1,
    _MOST,
    flag_values=FLAGS,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", 0, _MOST, flag_values=FLAGS
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    8192,
    "Entries to train, of at least all bytes (train_tokenizer).",
    256,
    _MOST,
    flag_values=FLAGS,
)


def run() -> None:
    """Entry of the command."""
    command.run(main, parse=parse)


def parse(arguments: list[str]) -> list[str]:
    """Reads the flags of a command line, program first, and returns what is left of it.

    Raises:
      ConfigError: an override of a field that does not exist, or text that is not UTF-8.
      flags.Error: a flag that does not exist, or a value that it cannot have.
    """
    for argument in arguments:
        if argument != argument.encode(errors="replace").decode():
            raise ConfigError(f"{argument!r}: must be text in UTF-8")
    if {"--help", "-help", "-h", "-?"} & set(arguments[1 : command.end_of_flags(arguments)]):
        command.write(f"{__doc__}\n{FLAGS.get_help()}")
        sys.exit()
    command.define_overrides(arguments, ["config"], FLAGS)
    try:
        rest = FLAGS(arguments, known_only=True)
        return cast(list[str], flags.FLAGS(rest))  # absl's own, such as --verbosity
    except flags.UnrecognizedFlagError as error:
        nearest = nearest_name(error.flagname, FLAGS)
        raise ConfigError(f"--{error.flagname}: unknown flag{nearest}") from error
    except ValueError as error:  # --noFLAG=VALUE
        raise ConfigError(str(error)) from error


def main(arguments: list[str]) -> None:
    """Does what --mode says; `arguments` are what is left of the command line, program first."""
    command.refuse_arguments(arguments)
    _check_flags()
    _check_needed()
    overrides = command.overrides("config", FLAGS)
    config = config_files.read(_CONFIG.value, "--config", overrides) if _CONFIG.value else None
    # JAX is imported only now, so that --help and a mistake in the configuration answer at once.
    first = _join_processes()
    _dispatch(_config_of_run(overrides) if config is None else config, first)


def _dispatch(config: Config | None, first: bool) -> None:
    """Calls the function of the mode and prints what it returns, if this is the first process."""
    from umv2 import modes

    match _MODE.value:
        case "train":
            modes.train(_needed(config), _workdir())
        case "evaluate":
            report = _evaluate(config)
            if first:
                command.write(json.dumps(report.metrics()) if _JSON.value else report.table())
        case "generate":
            for piece in _after_logs(modes.generate(config, _workdir(), _PROMPT.value)):
                command.write(piece, end="")
            command.write("")
        case "inspect":
            inspection = modes.inspect(_needed(config))
            command.write(json.dumps(inspection.as_dict()) if _JSON.value else inspection.as_text())
        case "cost":
            folder = _path(_WORKDIR) or Path("runs/cost")
            costs = modes.cost(_compared(_needed(config)), _CONTEXT.value, folder)
            command.write(costs.as_json() if _JSON.value else costs.as_text())
        case "plan":
            plan = modes.plan(
                config_files.label(_CONFIG.value or ""),
                _needed(config),
                _topology(),
                step=cast(Any, _PLAN_STEP.value),
                search_limit=_search_limit(),
            )
            command.write(plan.as_json() if _JSON.value else plan.as_text())
        case "prepare":
            modes.prepare(_needed(config), _workdir())
        case "train_tokenizer":
            path = modes.train_tokenizer(_needed(config), _workdir(), _VOCAB_SIZE.value)
            command.write(str(path))
        case "export":
            modes.export_run(_workdir(), _folder(), cast(Any, _FORMAT.value))
        case "import":
            modes.import_model(_folder(), _workdir(), config)


def _check_flags() -> None:
    """Refuses flags that the mode would not look at, and empty ones.

    Raises:
      ConfigError: one was given.
    """
    for name, modes in _FLAG_MODES.items():
        flag = FLAGS[name]
        if not flag.present:
            continue
        if name in _OF_SEVERAL and (_NUM_PROCESSES.value or 1) > 1:
            continue  # `require_alone` says more
        if _MODE.value not in modes:
            raise ConfigError(f"--{name}: mode {_MODE.value!r} has no use for it")
        if flag.value in ("", []) and name not in _MAY_BE_EMPTY:
            raise ConfigError(f"--{name}: must not be empty")
    if not _SUITE.value or _SUITE.value == ["long_context"]:
        for name in ("num_fewshot", "limit", "include_path"):
            if FLAGS[name].present:
                raise ConfigError(f"--{name}: is for tasks of the harness, named by --suite")
    if _SEARCH_LIMIT.present and not _SEARCH.value:
        raise ConfigError("--search_limit: is for --search")


def _check_needed() -> None:
    """Refuses paths that cannot be, and a command line that lacks what the mode needs.

    Raises:
      ConfigError: a flag is missing.
      FileError: a path is none of this machine.
    """
    mode, has_run = _MODE.value, False
    for flag in (_INCLUDE_PATH, _WORKDIR, _FOLDER):
        _path(flag)
    if mode not in ("inspect", "cost", "plan"):
        _workdir()
    if mode in ("export", "import"):
        _folder()
    if mode == "plan":
        _topology()
    if mode in _OF_A_RUN and _WORKDIR.value is not None:
        # Where there is none, training begins one; the others say that they miss it.
        has_run = mode != "train" or (_workdir() / "checkpoints").is_dir()
    if _CONFIG.value is None and not has_run and mode not in ("export", "import"):
        _needed(None)


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
        command.set_up_logging(f"process {process}: ")
        logging.set_verbosity(logging.WARNING)
    return process == 0


def _config_of_run(overrides: dict[str, Any]) -> Config | None:
    """Returns the configuration of the run in --workdir with overrides; None where none is asked.

    Raises:
      ConfigError: overrides of a mode that begins with no run.
      CheckpointError: there is no run.
    """
    if _MODE.value not in _OF_A_RUN:
        for path in overrides:
            raise ConfigError(f"--config.{path}: mode {_MODE.value!r} needs --config=FILE with it")
        return None
    from umv2.training import checkpoint

    return config_files.of_run(checkpoint.saved_config(_workdir() / "checkpoints"), overrides)


def _compared(config: Config) -> dict[str, Config]:
    """Returns --config and the configurations of --compare, by their labels."""
    named = {config_files.label(_CONFIG.value or ""): config}
    for entry in _COMPARE.value:
        compared, label = config_files.read(entry, "--compare"), config_files.label(entry)
        if label in named:
            raise ConfigError(f"--compare={entry}: {label} is there already")
        named[label] = compared
    return named


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
        include_path=_path(_INCLUDE_PATH),
    )


def _after_logs(pieces: Iterator[str]) -> Iterator[str]:
    """Yields the prompt only with what follows it: until then the model loads, and that is logged.

    On a terminal the log would stand within the text.
    """
    prompt = next(pieces)
    yield prompt + next(pieces, "")
    yield from pieces


def _path(flag: flags.FlagHolder[str | None]) -> Path | None:
    return None if flag.value is None else files.user_path(flag.value, f"--{flag.name}")


def _needed(config: Config | None) -> Config:
    if config is None:
        raise ConfigError(f"--config: mode {_MODE.value!r} needs one, such as --config=tiny")
    return config


def _topology() -> str:
    if _TOPOLOGY.value is None:
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
    folder = _path(_FOLDER)
    if folder is None:
        raise ConfigError(f"--folder: mode {_MODE.value!r} needs the folder of the model")
    return folder


def _workdir() -> Path:
    workdir = _path(_WORKDIR)
    if workdir is None:
        raise ConfigError(f"--workdir: mode {_MODE.value!r} needs the folder of the run")
    return workdir
