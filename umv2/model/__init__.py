"""The decoder: layers, attention, retrieval, memory, initialisation, transformer."""

import flax

# Modules are plain trees of parameters: one Variable reached over two paths is an error, where the
# default graph mode would let jax.jit untie it in silence. Set for the process rather than with
# nnx.set_graph_mode, which holds for the calling thread alone.
flax.config.update("nnx_graph_mode", False)
flax.config.update("nnx_graph_updates", False)
