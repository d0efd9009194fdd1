"""Every configuration field, with its unit, and the paper that its value comes from, if any.

The values define a small UltraMemV2. 'Paper' is UltraMemV2 (arXiv 2508.18756), 'V1' is UltraMem
(arXiv 2411.12364), 'OLMoE' is arXiv 2409.02060.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base configuration; named configurations assign to a copy of it."""
    config = ConfigDict()
    config.seed = 0  # for parameter initialisation

    model = config.model = ConfigDict()
    # A block has attention, an FFN (`ffn`) and, where placed, a memory layer (`memory.layer`).
    # configs/families.py sets the fields of each published family.
    model.vocab_size = 264  # bytes and end-of-text, rounded up to a multiple of 8
    model.hidden_size = 256  # h, width of the residual stream
    model.num_layers = 4  # L, transformer blocks
    model.num_heads = 4  # attention heads
    model.num_key_value_heads = 4  # fewer than num_heads: grouped-query attention
    # The FFN of every block: dense | moe: a mixture of experts | none. Independent of the memory.
    model.ffn = "dense"
    # Inner width of the SwiGLU (half of its gate + up width); with moe: of a shared expert, or 0.
    model.ffn_size = 512
    model.tie_embeddings = True  # one matrix for input embedding and output head
    model.rope_theta = 10000.0  # OLMoE
    # Extends the context by a factor of rope_scale: none | linear: divide positions by it (arXiv
    # 2306.15595) | ntk: slow down only the low frequencies (arXiv 2309.00071, section 3.1)
    model.rope_scaling = "none"
    model.rope_scale = 1.0
    model.attention_window = 0  # positions a token attends to, its own included; 0: all
    model.norm_epsilon = 1e-5  # of every RMSNorm, OLMoE
    model.query_key_norm = True  # RMSNorm over all heads of queries and of keys, OLMoE
    # Dtype of matrix products; parameters and scores stay float32. float64 (which needs
    # JAX_ENABLE_X64=1) is for comparisons with other implementations.
    model.compute_dtype = "bfloat16"
    # auto: the first that supports the call | cudnn (GPU) | splash (TPU) | xla: anywhere, with all
    # scores of a query at once (on a CPU in blocks of queries)
    model.attention = "auto"
    model.scan_layers = True  # False: unroll, as is done for up to 8 blocks on a CPU
    # What the backward pass keeps, and does not compute again: none: everything | dots: results of
    # matrix products and kernels | kernels: of attention, retrieval and value aggregation | full:
    # only the inputs of blocks
    model.remat = "none"

    memory = model.memory = ConfigDict()
    # Layer in the memory slot: product_key | none | module:Class, a custom layer
    # (docs/extending.md).
    memory.layer = "product_key"
    # Blocks (from 1) whose normalised FFN input a memory layer reads, and blocks to whose FFN
    # output its output is added. Empty: every block, read = write (paper, section 3.1).
    memory.read_layers = ()
    memory.write_layers = ()
    memory.num_keys = 64  # n, row keys = column keys of one table of n^2 values
    memory.key_dim = 128  # D_k; paper, section 4.2.4: h / 2
    memory.tucker_rank = 2  # r; V1
    memory.num_cores = 2  # c, each scores its own slice of the value row; V1
    memory.num_heads = 1  # H; paper, section 4.2.3
    memory.top_m = 16  # m, values selected per token and head
    memory.shortlist = 16  # s, row (column) candidates that form the grid; paper: min(m, 128)
    memory.scoring = "tucker"  # tucker | sum: additive, as in product-key memory
    # Activation of the selected scores: none (V1) | softmax within each head (PKM, Memory+, PEER) |
    # relu (PEER without competition)
    memory.score_activation = "none"
    # per_rank: a query per Tucker rank (paper, section 4.2.2) | shared: one row and one column
    # query for all ranks and heads (V1) | per_head: a row and a column query per head (PKM) |
    # released: the layout of the published PyTorch code
    memory.query = "per_rank"
    memory.query_norm = "rms"  # rms (V1) | layer: with weight and bias (PKM) | none
    memory.key_norm = "rms"  # rms (V1) | none (PKM, Memory+, PEER)
    memory.key_expansion = 1  # E, key expansion: E^2 virtual blocks address the same rows
    memory.shuffle = True  # permute addresses by a fixed permutation (V1); False: row-major (PKM)
    memory.value_dim = 48  # D_v
    memory.pre_value_dim = 16  # D_p; 0: plain values. Paper, section 4.2.5: D_p : D_v = 1 : 3
    memory.pre_projection = True  # W_p; False: pre-scores use the input itself, D_p = h (PEER)
    memory.activation = "none"  # of the pre-score: none (paper, Eq. 15) | gelu (PEER) | silu | relu
    # W_v: single (paper, Eq. 12) | per_block: one per virtual block (V1) | none: D_v = h (PKM,
    # PEER)
    memory.projection = "single"
    memory.output_gate = "none"  # of the pooled values: none | silu(W_g y) (Memory+)
    memory.bias = False  # of the query, output and gate projections
    # Tables that a layer reads: its own (none), or a window of share_group tables that wraps around
    # (ring), is clipped at the ends (no_ring), or is common to share_group layers (block); section
    # 4.2.8.
    memory.sharing = "none"
    memory.share_group = 1  # g, tables in the window
    # principled: paper, section 3.5 | released: the published code's constants | unit: values of
    # standard deviation 1, which should train badly
    memory.initialization = "principled"
    # What training reads rows from: float32: the tables | compute: a copy of them in compute_dtype,
    # made once a step. Tables, moments and gradients are float32 in either case.
    memory.read_dtype = "float32"
    memory.chunk_tokens = 0  # tokens whose rows are fetched at once; 0: chosen from their size
    # Implementations of the two operators: auto | xla | pallas_tpu | pallas_gpu, and for
    # value_aggregation pallas_sparsecore. A named one that is not supported raises an error.
    memory.product_key_top_k = "auto"
    memory.value_aggregation = "auto"

    moe = model.moe = ConfigDict()  # OLMoE, section 2
    moe.num_experts = 64
    moe.top_k = 8  # experts per token
    moe.expert_size = 128  # inner width of one expert's SwiGLU; OLMoE: h / 2
    moe.renormalize = False  # True: divide the weights of the selected experts by their sum

    data = config.data = ConfigDict()
    # standard_library, site_packages (installed packages): Python source files | text |
    # array_record | memmap | hugging_face
    data.source = "standard_library"
    # Globs, for array_record, memmap and text. Text has one document per file, per line of .jsonl,
    # .ndjson and .json, or per row of .parquet; all but Parquet may be .gz, .bz2, .xz or .zst.
    data.paths = ()
    data.text_field = "text"  # key of the text in JSONL, Parquet and Hugging Face records
    data.memmap_dtype = "uint16"  # of token files: uint16 | uint32
    # Data set, configuration and split, streamed by --mode=prepare.
    data.hugging_face_name = ""
    data.hugging_face_config = ""
    data.hugging_face_split = "train"
    data.tokenizer = "bytes"  # | path of a tokenizers .json or SentencePiece .model | none
    data.end_of_text_id = -1  # -1: that of the tokenizer
    data.sequence_length = 256  # tokens per sequence
    # Fraction of documents held out for evaluation; with few documents, of the end of each.
    data.held_out_fraction = 0.05
    long_context = data.long_context = ConfigDict()
    # Tasks of umv2/data/long_context whose documents are mixed into a text source.
    long_context.tasks = ()
    # Documents per task, with lengths from 1/8 to one full sequence. 0: no documents.
    long_context.num_documents = 0
    # Maximum fraction of text in the training tokens; excess text documents are dropped.
    long_context.text_fraction = 0.25
    # Loss weight of all tokens of these documents except answers; answers and text have weight 1.
    # Random context cannot be learned, and would dominate the loss.
    long_context.context_weight = 1.0
    # Steps at the start that train only on pairs of symbols (umv2/data/long_context/recall.py).
    # Small models learn lookups there within a few hundred steps, or not at all.
    long_context.warm_up_steps = 0
    long_context.seed = 0  # for these documents
    data.mask_across_documents = True  # False: attention may cross document boundaries
    data.num_workers = 0  # processes that build batches; 0: threads of this process
    data.prefetch_batches = 4  # batches built ahead of the training step
    data.seed = 0  # for the order of documents

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 4e-4  # peak; paper, Table 10
    optimizer.warmup_steps = 20  # linear from 0
    optimizer.schedule = "cosine"  # | constant | constant_then_cosine (continued training)
    optimizer.decay_start_step = 0  # start of the decay of constant_then_cosine
    optimizer.final_fraction = 0.1  # of the peak, at the end of the cosine; OLMoE
    optimizer.beta1 = 0.9  # OLMoE
    optimizer.beta2 = 0.95  # OLMoE
    optimizer.epsilon = 1e-8  # OLMoE
    optimizer.clip_norm = 1.0  # of the global gradient norm, value tables included
    optimizer.weight_decay = ConfigDict()  # decoupled; 0.1 on everything as in OLMoE
    optimizer.weight_decay.embeddings = 0.1
    optimizer.weight_decay.norms = 0.1
    optimizer.weight_decay.matrices = 0.1
    optimizer.weight_decay.keys = 0.1  # memory keys and Tucker cores
    optimizer.weight_decay.values = 0.1  # value and pre-value tables
    # Optimizer of the value tables: adamw | module:function, a custom one (docs/extending.md).
    optimizer.values_optimizer = "adamw"
    # Learning rate of the value tables. multiplier: the schedule above times a factor that changes
    # linearly from values_multiplier to values_final_multiplier over the first
    # values_decay_fraction of training (paper, section 4.2.9: constant 1 for long runs, 4 -> 1 for
    # short ones) | constant: values_learning_rate (Memory+, arXiv 2412.09764)
    optimizer.values_schedule = "multiplier"
    optimizer.values_learning_rate = 1e-3
    optimizer.values_multiplier = 1.0
    optimizer.values_final_multiplier = 1.0
    optimizer.values_decay_fraction = 1.0

    loss = config.loss = ConfigDict()  # coefficients; 0: off
    loss.z_loss = 0.0  # mean squared log-partition of the output softmax
    loss.tucker_penalty = 0.0  # alpha, paper Eq. 17 (V1: 0.001)
    loss.tucker_margin = 0.15  # tau, paper Eq. 17
    loss.balance_loss = 0.0  # beta, of memory keys, paper Eq. 18-20 (arm: 0.001)
    loss.load_balance = 0.0  # of experts; OLMoE: 0.01
    # layer: the mean of the losses of the layers (OLMoE's training) | model: one loss over the
    # tokens of all layers (Hugging Face transformers)
    loss.load_balance_scope = "layer"
    loss.router_z_loss = 0.0  # mean squared log-partition of the router's softmax; OLMoE: 0.001

    train = config.train = ConfigDict()
    train.num_steps = 200  # optimizer steps
    train.batch_size = 16  # sequences per step, over all processes
    train.gradient_accumulation = 1  # microbatches per step
    train.log_interval_steps = 10  # loss, rates and health of the memory layers
    train.evaluation_interval_steps = 100  # held-out loss; also after the last step
    train.checkpoint_interval_steps = 100  # also after the last step
    train.num_checkpoints_kept = 3  # newest checkpoints to keep
    train.tensorboard = True  # event files in the work directory
    train.wandb_project = ""  # project for Weights & Biases; empty: off

    evaluation = config.evaluation = ConfigDict()
    evaluation.batch_size = 16  # sequences
    suite = evaluation.long_context = ConfigDict()  # --suite=long_context
    suite.tasks = (
        "memorize",
        "multi_round",
        "in_context",
        "needle",
        "key_value",
        "multi_hop",
        "reasoning",
    )
    suite.lengths = (256, 512, 1024)  # tokens; 32768 and more where memory allows
    suite.num_examples = 64  # per task and length
    suite.batch_tokens = 16384  # tokens per forward pass, which has at least one example
    # For lengths beyond data.sequence_length: none: as trained | linear | ntk: RoPE scaled by
    # length / sequence_length | window: attention to the last sequence_length positions
    suite.extrapolation = "ntk"  # measured: experiments/results/long_context
    suite.seed = 0  # for the examples

    generate = config.generate = ConfigDict()
    generate.max_new_tokens = 400  # without the prompt
    generate.temperature = 0.8  # 0: greedy
    generate.top_k = 0  # sample from the k most likely tokens; 0: all
    generate.top_p = 0.95  # sample from the most likely tokens with this total probability; 1: all
    generate.stop = ()  # strings that end a text, and are not part of it
    generate.seed = 0  # for sampling

    config.mesh = ConfigDict()
    # Devices along each axis; their product is the number in use. The first three shard the batch.
    config.mesh.replica = -1  # replicas of the state; -1: all devices that the other axes leave
    config.mesh.fsdp = 1  # also shards dense parameters, which are gathered for use
    config.mesh.memory = 1  # also shards value tables or experts, with lookups routed to them
    config.mesh.tensor = 1  # shards heads, FFN and vocabulary; the sequence in memory layers
    config.mesh.parameters = "fsdp"  # axes that shard dense parameters: fsdp, fsdp_and_memory
    config.mesh.table_sharding = "auto"  # table axis that memory shards: columns, rows, auto
    return config
