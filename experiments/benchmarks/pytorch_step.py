"""A training step of the dense family in eager PyTorch, in a process of its own.

`experiments.benchmarks.step_time` starts this file. It reads a line of JSON with the sizes, prints
`ready`, then takes one step for each line of standard input and prints the seconds it took. It
imports only torch, so that any Python that has torch can run it.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def create_parameters(sizes: dict[str, Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Draws the parameters: [embedding, final norm, head], and those of each block by name."""
    import torch

    size, ffn, vocabulary = sizes["hidden_size"], sizes["ffn_size"], sizes["vocab_size"]
    shapes = {name: (size, size) for name in ("query", "key", "value", "output")}
    shapes |= {"gate": (ffn, size), "up": (ffn, size), "down": (size, ffn)}
    norms = ("attention_norm", "ffn_norm", "query_norm", "key_norm")

    def normal(shape: tuple[int, ...]) -> Any:
        return (torch.randn(shape) * (0.4 / size) ** 0.5).requires_grad_()

    def ones() -> Any:
        return torch.ones(size, requires_grad=True)

    blocks = [
        {name: normal(shape) for name, shape in shapes.items()} | {name: ones() for name in norms}
        for _ in range(sizes["num_layers"])
    ]
    return [normal((vocabulary, size)), ones(), normal((vocabulary, size))], blocks


def forward(
    sizes: dict[str, Any], outer: list[Any], blocks: list[dict[str, Any]], tokens: Any, rope: Any
) -> Any:
    """Returns the logits."""
    import torch
    from torch.nn import functional

    def norm(y: Any, weight: Any) -> Any:
        return functional.rms_norm(y, weight.shape, weight, sizes["norm_epsilon"])

    def heads(y: Any) -> Any:
        return y.view(*y.shape[:2], sizes["num_heads"], -1).transpose(1, 2)

    def rotate(y: Any) -> Any:
        (cosine, sine), (first, second) = rope, y.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    embedding, final_norm, head = outer
    linear = functional.linear
    x = functional.embedding(tokens, embedding)
    for block in blocks:
        y = norm(x, block["attention_norm"])
        attended = functional.scaled_dot_product_attention(
            rotate(heads(norm(linear(y, block["query"]), block["query_norm"]))),
            rotate(heads(norm(linear(y, block["key"]), block["key_norm"]))),
            heads(linear(y, block["value"])),
            is_causal=True,
        )
        x = x + linear(attended.transpose(1, 2).reshape(x.shape), block["output"])
        y = norm(x, block["ffn_norm"])
        inner = functional.silu(linear(y, block["gate"])) * linear(y, block["up"])
        x = x + linear(inner, block["down"])
    return linear(norm(x, final_norm), head)


def make_step(sizes: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that takes a step on one batch and returns its loss."""
    import torch
    from torch.nn import functional
    from torch.nn.utils import clip_grad_norm_

    torch.manual_seed(0)
    outer, blocks = create_parameters(sizes)
    parameters = outer + [array for block in blocks for array in block.values()]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
    )
    half = sizes["hidden_size"] // sizes["num_heads"] // 2
    frequencies = sizes["rope_theta"] ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(sizes["sequence_length"]), frequencies)
    rope = (angles.cos(), angles.sin())
    shape = (sizes["batch_size"], sizes["sequence_length"] + 1)
    tokens = torch.randint(sizes["vocab_size"], shape)

    def step() -> float:
        logits = forward(sizes, outer, blocks, tokens[:, :-1], rope)
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Takes a step for each line of standard input."""
    step = make_step(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
