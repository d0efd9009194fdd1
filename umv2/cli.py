"""Trains, evaluates, converts and analyses memory-layer language models.

    umv2 --config=tiny --workdir=runs/tiny                     train or resume
    umv2 --workdir=runs/tiny --mode=evaluate                   loss on held-out text
    umv2 --workdir=runs/tiny --mode=generate --prompt="def "   continue a text
    umv2 --config=tiny:moe --mode=inspect                      list fields and parameters

--config.SECTION.FIELD=VALUE overrides a field of the configuration given by --config or, without
--config, of the configuration of the run in --workdir. In a clone, `python main.py` is the same
command.
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
    "train": "train, or resume the run in --workdir",
    "evaluate": "held-out loss, perplexity and bits per byte of the run in --workdir",
    "generate": "continue --prompt with the model of the run in --workdir",
    "inspect": "print the resolved configuration and every parameter",
    "cost": "compare parameters, FLOPs and bytes of --config with those of --compare, with a plot",
    "plan": "compile a step of --config for --topology, which need not be attached: does it fit?",
    "prepare": "tokenise text or a Hugging Face data set into token shards in --workdir",
    "train_tokenizer": "train a byte-pair encoding of --vocab_size on the corpus, into --workdir",
    "export": "write the model of the run in --workdir to --folder, in --format",
    "import": "create a run in --workdir that starts from the model in --folder",
}
# Modes that without --config use the configuration of the run in --workdir.
_RUN_MODES = ("train", "evaluate", "generate", "inspect")
# Modes that accept a flag, for flags that only some modes accept.
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
    "plan_code": ("plan",),
    "search": ("plan",),
    "search_limit": ("plan",),
    "folder": ("export", "import"),
    "format": ("export",),
    "coordinator_address": ("train", "evaluate"),
    "process_id": ("train", "evaluate"),
    "vocab_size": ("train_tokenizer",),
}
_MAY_BE_EMPTY = ("prompt",)
_MULTI_PROCESS_FLAGS = ("coordinator_address", "process_id")
_MAX_INT32 = 2**31 - 1

# Not absl's global FLAGS, because scripts in experiments/ define flags with the same names.
FLAGS = flags.FlagValues()

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Name or path of a configuration file, with ':FAMILY' for a family other than UltraMemV2"
    f" (configs/families.py). Names: {', '.join(config_files.names())}. Modes"
    f" {', '.join(_RUN_MODES)} use the configuration of the run by default.",
    flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run's checkpoints and metrics, or of the output of other modes.",
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
    "Suite to evaluate on instead of held-out text (evaluate): long_context, or tasks of"
    " lm-evaluation-harness, such as arc_easy,hellaswag.",
    flag_values=FLAGS,
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Number of few-shot examples (harness tasks in --suite).",
    0,
    _MAX_INT32,
    flag_values=FLAGS,
)
_LIMIT = flags.DEFINE_integer(
    "limit",
    None,
    "Number of questions per task (harness tasks in --suite); default: all.",
    1,
    _MAX_INT32,
    flag_values=FLAGS,
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path",
    None,
    "Folder of additional task files (harness tasks in --suite).",
    flag_values=FLAGS,
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue (generate).", flag_values=FLAGS)
_JSON = flags.DEFINE_bool(
    "json", False, "Print JSON instead of text (inspect, evaluate, cost, plan).", flag_values=FLAGS
)
_COMPARE = flags.DEFINE_list(
    "compare",
    [],
    "Other configurations, given as in --config and separated by commas (cost).",
    flag_values=FLAGS,
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Number of positions that a token attends to (cost); default: the sequence length.",
    1,
    _MAX_INT32,
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
    "Step to plan: a training step, or a decoding step with a full cache (plan).",
    flag_values=FLAGS,
)
_PLAN_CODE = flags.DEFINE_bool(
    "plan_code",
    False,
    "Let the compiler also generate code, which takes minutes on TPUs but adds its estimate of the"
    " time, and shows whether it accepts every kernel (plan).",
    flag_values=FLAGS,
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Search meshes and rank those that fit (plan).", flag_values=FLAGS
)
_SEARCH_LIMIT = flags.DEFINE_integer(
    "search_limit",
    8,
    "Maximum number of programs that --search compiles.",
    1,
    _MAX_INT32,
    flag_values=FLAGS,
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "Folder of the exported or imported model (export, import).", flag_values=FLAGS
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "umv2",
    ["umv2", "olmoe"],
    "umv2: any family | olmoe: Hugging Face OLMoE (export).",
    flag_values=FLAGS,
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, if JAX cannot discover it (docs/pods.md).",
    flag_values=FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Number of processes of the job; 1: run this process alone, whatever started it.",
    1,
    _MAX_INT32,
    flag_values=FLAGS,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0.", 0, _MAX_INT32, flag_values=FLAGS
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    8192,
    "Number of entries to train, at least the 256 bytes (train_tokenizer).",
    256,
    _MAX_INT32,
    flag_values=FLAGS,
)


def run() -> None:
    """Entry point of the `umv2` command."""
    command.run(main, parse=parse)


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags of a command line, program first; returns the remaining arguments.

    Raises:
      ConfigError: a flag or an overridden field does not exist, or an argument is not UTF-8.
      flags.Error: the value of a flag is invalid.
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
        return cast(list[str], flags.FLAGS(rest))  # absl's own flags, such as --verbosity
    except flags.UnrecognizedFlagError as error:
        nearest = nearest_name(error.flagname, FLAGS)
        raise ConfigError(f"--{error.flagname}: unknown flag{nearest}") from error
    except ValueError as error:  # --noFLAG=VALUE
        raise ConfigError(str(error)) from error


def main(arguments: list[str]) -> None:
    """Runs --mode; `arguments` are the remaining command-line arguments, program first."""
    command.refuse_arguments(arguments)
    _check_flags()
    _check_required_flags()
    overrides = command.overrides("config", FLAGS)
    config = config_files.read(_CONFIG.value, "--config", overrides) if _CONFIG.value else None
    if _MODE.value in ("train", "evaluate"):
        command.use_huge_pages()
    # Import JAX only now, so that --help and configuration errors are fast.
    first = _join_processes()
    _dispatch(_config_of_run(overrides) if config is None else config, first)


def _dispatch(config: Config | None, first: bool) -> None:
    """Calls the function of the mode and, on the first process, prints its result."""
    from umv2 import modes

    match _MODE.value:
        case "train":
            modes.train(_required(config), _workdir())
        case "evaluate":
            report = _evaluate(config)
            if first:
                command.write(json.dumps(report.metrics()) if _JSON.value else report.table())
        case "generate":
            for piece in _after_logs(modes.generate(config, _workdir(), _PROMPT.value)):
                command.write(piece, end="")
            command.write("")
        case "inspect":
            inspection = modes.inspect(_required(config))
            command.write(json.dumps(inspection.as_dict()) if _JSON.value else inspection.as_text())
        case "cost":
            folder = _path(_WORKDIR) or Path("runs/cost")
            costs = modes.cost(_with_compared(_required(config)), _CONTEXT.value, folder)
            command.write(costs.as_json() if _JSON.value else costs.as_text())
        case "plan":
            plan = modes.plan(
                config_files.label(_CONFIG.value or ""),
                _required(config),
                _topology(),
                step=cast(Any, _PLAN_STEP.value),
                search_limit=_search_limit(),
                code=_PLAN_CODE.value,
            )
            command.write(plan.as_json() if _JSON.value else plan.as_text())
        case "prepare":
            modes.prepare(_required(config), _workdir())
        case "train_tokenizer":
            path = modes.train_tokenizer(_required(config), _workdir(), _VOCAB_SIZE.value)
            command.write(str(path))
        case "export":
            modes.export_run(_workdir(), _folder(), cast(Any, _FORMAT.value))
        case "import":
            modes.import_model(_folder(), _workdir(), config)


def _check_flags() -> None:
    """Rejects flags that the mode does not use, and empty ones.

    Raises:
      ConfigError: such a flag was given.
    """
    for name, modes in _FLAG_MODES.items():
        flag = FLAGS[name]
        if not flag.present:
            continue
        if name in _MULTI_PROCESS_FLAGS and (_NUM_PROCESSES.value or 1) > 1:
            continue  # `require_single_process` has a better message
        if _MODE.value not in modes:
            raise ConfigError(f"--{name}: is not used by mode {_MODE.value!r}")
        if flag.value in ("", []) and name not in _MAY_BE_EMPTY:
            raise ConfigError(f"--{name}: must not be empty")
    if not _SUITE.value or _SUITE.value == ["long_context"]:
        for name in ("num_fewshot", "limit", "include_path"):
            if FLAGS[name].present:
                raise ConfigError(f"--{name}: needs harness tasks in --suite")
    if _SEARCH_LIMIT.present and not _SEARCH.value:
        raise ConfigError("--search_limit: needs --search")


def _check_required_flags() -> None:
    """Rejects invalid paths, and a command line without the flags that the mode requires.

    Raises:
      ConfigError: a flag is missing.
      FileError: a path is not a valid local path.
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
    if mode in _RUN_MODES and _WORKDIR.value is not None:
        # Without a run, train needs --config to start one; the other modes report its absence.
        has_run = mode != "train" or (_workdir() / "checkpoints").is_dir()
    if _CONFIG.value is None and not has_run and mode not in ("export", "import"):
        _required(None)


def _join_processes() -> bool:
    """Joins the other processes, if any; returns whether this is the first.

    The other processes log only warnings and errors.
    """
    from umv2 import distributed

    given = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _MODE.value not in ("train", "evaluate"):
        distributed.require_single_process(f"mode {_MODE.value!r}", _NUM_PROCESSES.value)
        return True
    process = distributed.initialize(*given, saves_on_termination=_MODE.value == "train")
    if process != 0:
        command.set_up_logging(f"process {process}: ")
        logging.set_verbosity(logging.WARNING)
    return process == 0


def _config_of_run(overrides: dict[str, Any]) -> Config | None:
    """Returns the configuration of the run in --workdir with overrides; None for other modes.

    Raises:
      ConfigError: overrides in a mode that does not use the configuration of a run.
      CheckpointError: there is no run in --workdir.
    """
    if _MODE.value not in _RUN_MODES:
        for path in overrides:
            raise ConfigError(f"--config.{path}: mode {_MODE.value!r} needs --config=FILE as well")
        return None
    from umv2.training import checkpoint

    return config_files.of_run(checkpoint.saved_config(_workdir() / "checkpoints"), overrides)


def _with_compared(config: Config) -> dict[str, Config]:
    """Returns the configurations of --config and --compare, by label."""
    named = {config_files.label(_CONFIG.value or ""): config}
    for entry in _COMPARE.value:
        compared, label = config_files.read(entry, "--compare"), config_files.label(entry)
        if label in named:
            raise ConfigError(f"--compare={entry}: {label} is given twice")
        named[label] = compared
    return named


def _evaluate(config: Config | None) -> Any:
    """Returns the report for --suite, or for held-out text without it."""
    from umv2 import modes

    if not _SUITE.value:
        return modes.evaluate(config, _workdir())
    if _SUITE.value == ["long_context"]:
        return modes.evaluate_long_context(config, _workdir())
    if "long_context" in _SUITE.value:
        raise ConfigError(
            f"--suite={','.join(_SUITE.value)}: long_context cannot be combined with other tasks"
        )
    return modes.evaluate_downstream(
        config,
        _workdir(),
        _SUITE.value,
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        include_path=_path(_INCLUDE_PATH),
    )


def _after_logs(pieces: Iterator[str]) -> Iterator[str]:
    """Delays the prompt until the first generated piece, so that log lines do not split the text.

    Loading the model, which is logged, happens between the prompt and the first piece.
    """
    prompt = next(pieces)
    yield prompt + next(pieces, "")
    yield from pieces


def _path(flag: flags.FlagHolder[str | None]) -> Path | None:
    return None if flag.value is None else files.user_path(flag.value, f"--{flag.name}")


def _required(config: Config | None) -> Config:
    if config is None:
        raise ConfigError(f"--config: mode {_MODE.value!r} needs one, such as --config=tiny")
    return config


def _topology() -> str:
    if _TOPOLOGY.value is None:
        raise ConfigError("--topology: mode 'plan' needs one, such as v5p:4x4x8 or h200:8")
    return _TOPOLOGY.value


def _search_limit() -> int | None:
    """Returns the number of programs to compile in a search; None: plan only the given mesh."""
    if not _SEARCH.value:
        return None
    if _PLAN_STEP.value != "train":
        raise ConfigError("--plan_step='decode': --search supports only training steps")
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
