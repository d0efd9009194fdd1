"""A training step, compiled and ready to be timed; benchmarks take turns with several."""

import time

from ml_collections import ConfigDict


class Step:
    """A compiled training step with a state and a batch to run it on."""

    def __init__(self, values: ConfigDict):
        import jax

        from umv2 import parallel
        from umv2.config import from_config_dict
        from umv2.cost import accounting
        from umv2.data import pipeline, tokenizers
        from umv2.training import optim, train
        from umv2.training.state import create_state, model_structure

        config = from_config_dict(values)
        tokenizer = tokenizers.load_tokenizer(config.data.tokenizer, config.data.end_of_text_id)
        corpus = pipeline.load_corpus(config.data, tokenizer, vocab_size=config.model.vocab_size)
        batches = pipeline.train_batches(
            corpus, config.data, batch_size=config.train.batch_size, start_step=0
        )
        optimizer = optim.Optimizer(config.optimizer, config.train.num_steps)
        self._mesh = parallel.create_mesh(config.mesh, config.train.batch_size)
        with jax.set_mesh(self._mesh):
            self._state = jax.jit(lambda: create_state(config, optimizer))()
            self._batch = parallel.local_to_global(self._mesh, next(batches))
            step = train.make_train_step(config, model_structure(config.model), optimizer)
            start = time.perf_counter()
            lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
            self._compiled = lowered.compile()
            self.compile_seconds = time.perf_counter() - start
        batches.close()
        memory = self._compiled.memory_analysis()
        assert memory is not None  # every XLA backend of jax reports it
        self.temporary_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        self.active_parameters = accounting.parameter_counts(config.model).active
        self.seconds: list[float] = []

    def run(self, *, timed: bool) -> None:
        """Takes one step."""
        import jax

        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        if timed:
            self.seconds.append(time.perf_counter() - start)
