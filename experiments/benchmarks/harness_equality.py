"""Our lm-evaluation-harness adapter against the harness's Hugging Face backend, on a tiny OLMoE.

    python -m experiments.benchmarks.harness_equality

Makes a random OLMoE with transformers, imports it, and sends both the same requests: choices, full
texts, greedy generation, and every possible next token of some prompts, few of which are greedy.
Needs the extras `eval` and `reference`.
"""

import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from configs import tiny
from experiments import cli, measurements

TASKS = ("umv2_choices", "umv2_texts", "umv2_prompts")
TASK_FILES = "tests/evaluation/tasks"
_TOKENIZER = "experiments/bpe_2048.json"
_MAX_LENGTH = 128
_PROMPTS = 4  # prompts of which every next token is scored

_OUTPUT = flags.DEFINE_string(
    "equality_output", "experiments/results/harness/equality.jsonl", "File of the result."
)


def write_olmoe(folder: Path) -> None:
    """Writes a random OLMoE whose predictions vary with the token, and a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=_TOKENIZER, eos_token="<|endoftext|>"
    )
    config = transformers.OlmoeConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=_MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.OlmoeForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(25 if "embed" in name else 6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(folder: Path, workdir: Path) -> Any:
    """Imports the model into a run, and returns it as a harness model."""
    from umv2 import modes
    from umv2.config import from_config_dict
    from umv2.training import checkpoint

    values = tiny.get_config("moe")
    values.data.tokenizer = _TOKENIZER
    values.data.sequence_length = _MAX_LENGTH
    values.evaluation.batch_size = 8
    values.mesh.replica = 1
    modes.import_model(folder, workdir, from_config_dict(values))
    config = from_config_dict(checkpoint.saved_config(workdir / "checkpoints"))
    model, _ = modes.harness_model(config, workdir)
    return model


def hugging_face(folder: Path) -> Any:
    """Returns the same model in the harness's Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder),
        tokenizer=str(folder),
        device="cpu",
        dtype="float32",
        max_length=_MAX_LENGTH,
        batch_size=4,
    )


def answers(model: Any) -> dict[str, dict[str, Any]]:
    """Returns the metrics of each task, and the answers to its requests."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    evaluated = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=TASK_FILES),
        bootstrap_iters=0,
    )
    assert evaluated is not None
    return {
        task: {
            "figures": {
                name: value
                for name, value in evaluated["results"][task].items()
                if "," in name and "stderr" not in name
            },
            "answers": [sample["resps"] for sample in evaluated["samples"][task]],
        }
        for task in TASKS
    }


def next_tokens(model: Any, prompts: list[str], tokens: list[str]) -> dict[str, dict[str, Any]]:
    """Scores every token after every prompt; an answer also says whether the token is greedy."""
    from lm_eval.api.instance import Instance

    pairs = [(prompt, token) for prompt in prompts for token in tokens]
    scores = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)],
        disable_tqdm=True,
    )
    figures = {"greedy": float(sum(greedy for _, greedy in scores))}
    return {"next_tokens": {"figures": figures, "answers": [[pair] for pair in scores]}}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns, for each task, the metrics of both sides and the largest difference of an answer."""
    records = []
    for task in ours:
        pairs = list(zip(_flat(ours[task]["answers"]), _flat(theirs[task]["answers"]), strict=True))
        numbers = [(a, b) for a, b in pairs if isinstance(b, float)]
        others = [(a, b) for a, b in pairs if not isinstance(b, float)]
        records.append(
            {
                "task": task,
                "ours": ours[task]["figures"],
                "hugging_face": theirs[task]["figures"],
                "requests": sum(map(len, ours[task]["answers"])),
                "greatest_difference_nats": max((abs(a - b) for a, b in numbers), default=0.0),
                "least_log_likelihood": min((b for _, b in numbers), default=0.0),
                "texts_and_flags": len(others),
                "unequal_texts_and_flags": sum(a != b for a, b in others),
                "different_texts": len({b for _, b in others}),
            }
        )
    return records


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list | tuple):
        return [leaf for part in nested for leaf in _flat(part)]
    return [nested]


def run(folder: Path) -> list[dict[str, Any]]:
    """Makes the model in a folder and compares the two adapters on it."""
    write_olmoe(folder / "olmoe")
    models = ours(folder / "olmoe", folder / "run"), hugging_face(folder / "olmoe")
    lines = measurements.read(Path(TASK_FILES, "prompts.jsonl"))
    # Without trailing whitespace, which the harness would move into the continuation.
    prompts = [line["prompt"].rstrip() for line in lines[:_PROMPTS]]
    tokenizer = models[1].tokenizer
    # Only tokens of complete characters, and no special tokens, whose names are plain text to us.
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    tokens = [token for token in map(tokenizer.decode, ids) if "\ufffd" not in token]
    return compare(*(answers(model) | next_tokens(model, prompts, tokens) for model in models))


def main(_: list[str]) -> None:
    """Compares, prints, and writes a line per task."""
    path = cli.path(_OUTPUT)
    cli.require_installed("eval,reference", "lm_eval", "torch", "transformers", "accelerate")
    measurements.require_writable(path)
    with tempfile.TemporaryDirectory() as folder:
        compared = run(Path(folder))
    for record in compared:
        print(f"{record['task']}: {record['requests']} requests")
        for side in ("ours", "hugging_face"):
            figures = ", ".join(f"{name} {value:.6g}" for name, value in record[side].items())
            print(f"  {side:<13} {figures}")
        print(
            f"  log-likelihoods differ by at most {record['greatest_difference_nats']:.2e} nats,"
            f" {record['unequal_texts_and_flags']} of {record['texts_and_flags']} texts and flags"
        )
    measurements.write(path, [measurements.about() | record for record in compared])


if __name__ == "__main__":
    cli.run(main)
