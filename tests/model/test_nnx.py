"""The package within other programs: it changes no settings, and its modules are Flax modules."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import families, tiny
from umv2.config import ModelConfig, from_config_dict
from umv2.model import weights
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import ABSTRACT, Buffer, Initializer
from umv2.model.slots import Observe, memory_layer
from umv2.model.transformer import Transformer

# State shared by a process: options of jax, flax and numpy, signals, hooks, the environment.
_SETTINGS = """
import logging, os, pkgutil, signal, sys
import flax, jax, numpy, optax, orbax.checkpoint, grain, tensorboardX, matplotlib

def settings():
    return {
        "jax": dict(jax.config.values),
        "flax": dict(flax.config._values),
        "numpy": numpy.geterr(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "limits": (sys.getrecursionlimit(), matplotlib.get_backend()),
    }

before = settings()
import umv2
for module in pkgutil.walk_packages(umv2.__path__, "umv2."):
    if module.name not in ("umv2.evaluation.harness",):  # needs an extra
        __import__(module.name)
after = settings()
for name, values in before.items():
    assert after[name] == values, (name, values, after[name])
print(len([name for name in sys.modules if name.startswith("umv2.")]), "modules")
"""

# A program that depends on NNX's graph mode: random state in a gradient, ties, optimizers.
_OTHER_PROGRAM = """
import jax, jax.numpy as jnp, optax, sys
from flax import nnx
if len(sys.argv) > 1:
    import umv2.model.transformer, umv2.training.train

class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = self.first
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.second(self.dropout(self.first(x)))

def loss(model, x):
    return jnp.sum(model(x) ** 2)

model, x = Tied(nnx.Rngs(0)), jnp.ones((2, 3))
print(nnx.grad(loss)(model, x))
optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

@nnx.jit
def step(model, optimizer, x):
    value, gradients = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, gradients)
    return value

print(step(model, optimizer, x), step(model, optimizer, x), model.calls[...])
graph, parameters, rest = nnx.split(model, nnx.Param, ...)
merged = nnx.merge(graph, parameters, rest)
print(merged.first is merged.second, len(jax.tree.leaves(parameters)), merged(x))
"""


def output_of(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_the_package_changes_no_process_settings() -> None:
    assert int(output_of(_SETTINGS).partition(" ")[0]) > 50


@pytest.mark.slow
def test_other_modules_of_flax_work_as_without_the_package() -> None:
    assert output_of(_OTHER_PROGRAM, "with") == output_of(_OTHER_PROGRAM)


class Holder(nnx.Module):
    """A user's module with one of our layers, and the table that a memory reads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None) -> None:
        self.scale = nnx.Param(jnp.ones(config.hidden_size))
        if rngs is not None:
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
        init = Initializer(jax.random.key(1))
        self.layer: Any
        if config.ffn == "moe":
            self.layer = MixtureOfExperts(config, init=init)
            return
        kind = memory_layer(config)
        self.layer = kind(config, init=init)
        store = kind.create_store(config, init=init)
        assert store is not None
        self.values = nnx.Param(store.values)
        if store.pre_values is not None:
            self.pre_values = nnx.Param(store.pre_values)

    def __call__(self, x: Any) -> Any:
        scaled = x * self.scale[...][None, None, :]
        if hasattr(self, "dropout"):
            scaled = self.dropout(scaled)
        if not hasattr(self, "values"):
            return self.layer(scaled, observe=Observe())[0]
        pre_values = self.pre_values[...] if hasattr(self, "pre_values") else None
        store = ValueStore(values=self.values[...], pre_values=pre_values)
        window = StoreWindow(store=store, start=0)
        return self.layer(scaled, window=window, observe=Observe())[0]


def model_config(family: str) -> ModelConfig:
    return from_config_dict(tiny.get_config(family)).model


def loss(model: Holder, x: Any) -> Any:
    return jnp.sum(model(x) ** 2)


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "dense"])
def test_a_model_containing_a_layer_has_gradients_for_its_parameters(family: str) -> None:
    config = model_config(family)

    def parts() -> Any:
        model = Holder(config, rngs=nnx.Rngs(0))
        gradients = nnx.grad(loss)(model, jnp.ones((1, 3, config.hidden_size)))
        kinds = (nnx.Param, Buffer)
        return gradients, *(nnx.to_pure_dict(nnx.state(model, kind)) for kind in kinds)

    gradients, parameters, buffers = jax.eval_shape(parts)
    assert nnx.to_pure_dict(gradients) == parameters
    memory = config.memory
    names = {"core_u", "core_v"} if memory.scoring == "tucker" else set()
    names |= {"shuffle"} if memory.shuffle else set()
    assert set(buffers.get("layer", {})) == (names if config.placements else set())


def in_graph_mode(model: Holder, x: Any) -> Any:
    return nnx.grad(loss)(model, x)


def in_tree_mode(model: Holder, x: Any) -> Any:
    # In tree mode every leaf is differentiated, which integers do not allow.
    gradients = nnx.grad(loss, graph=False, allow_int=True)(model, x)
    return nnx.state(gradients, nnx.Param)


def of_parameters_alone(model: Holder, x: Any) -> Any:
    parts: Any = nnx.split(model, nnx.Param, ..., graph=False)
    graph, parameters, rest = parts
    return jax.grad(lambda p: loss(nnx.merge(graph, p, rest), x))(parameters)


@pytest.mark.parametrize("take", [in_tree_mode, of_parameters_alone])
def test_gradients_are_the_same_in_every_mode(take: Callable[..., Any]) -> None:
    config = model_config(families.REFERENCE)

    @jax.jit
    def both() -> Any:
        model, x = Holder(config, rngs=None), jnp.ones((1, 3, config.hidden_size))
        return [nnx.to_pure_dict(one(model, x)) for one in (take, in_graph_mode)]

    def compare(got: Any, want: Any) -> None:
        assert np.any(want)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)

    jax.tree.map(compare, *both())


def test_a_model_containing_a_layer_can_be_trained() -> None:
    config = model_config(families.REFERENCE)
    optimizer = optax.adam(1e-2)
    x = jnp.ones((1, 3, config.hidden_size))

    @jax.jit
    def train() -> Any:
        model = Holder(config, rngs=nnx.Rngs(0))
        before = nnx.to_pure_dict(nnx.state(model, Buffer))
        parameters = nnx.state(model, nnx.Param)
        moments = optimizer.init(parameters)
        losses = []
        for _ in range(2):
            value, gradients = nnx.value_and_grad(loss)(model, x)
            updates, moments = optimizer.update(gradients, moments, parameters)
            parameters = optax.apply_updates(parameters, updates)
            nnx.update(model, parameters)
            losses.append(value)
        return losses, before, nnx.to_pure_dict(nnx.state(model, Buffer))

    losses, before, after = train()
    assert losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_variable_at_two_paths_is_an_error_in_every_thread() -> None:
    model = Transformer(model_config("dense"), init=ABSTRACT)
    model.final_norm.weight = model.blocks.attention_norm.weight
    errors: list[str] = []

    def split() -> None:
        try:
            weights.split(model)
        except ValueError as error:
            errors.append(str(error))

    split()
    thread = threading.Thread(target=split)
    thread.start()
    thread.join()
    assert len(errors) == 2
    assert all("Duplicate Param" in error for error in errors)
