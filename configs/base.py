"""Every field that exists, with its unit, and its source where a paper gives one.

The values are those of the smallest sensible UltraMemV2. 'Paper' is UltraMemV2 (arXiv 2508.18756),
'V1' is UltraMem (arXiv 2411.12364), 'OLMoE' is arXiv 2409.02060.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base configuration; named configurations assign to a copy of it."""
    config = ConfigDict()
    config.seed = 0  # of the parameters

    model = config.model = ConfigDict()
    # A block has an attention, an FFN (`ffn`) and, where placed, a memory layer (`memory.layer`).
    # configs/families.py says which fields make which published family.
    model.vocab_size = 264  # bytes and end-of-text, rounded up to a multiple of 8
    model.hidden_size = 256  # h, width of the residual stream
    model.num_layers = 4  # L, transformer blocks
    model.num_heads = 4  # of the attention
    model.num_key_value_heads = 4  # of the attention; fewer than num_heads: grouped queries
    # The FFN of every block: dense | moe: a mixture of experts | none. Independent of the memory.
    model.ffn = "dense"
    # Inner width of the SwiGLU (half of its gate + up width); beside experts that of a shared one,
    # or 0.
    model.ffn_size = 512
    model.tie_embeddings = True  # one matrix for input embedding and output head
    model.rope_theta = 10000.0  # OLMoE
    # To read rope_scale times as far as trained: none | linear: positions divided by it (arXiv
    # 2306.15595) | ntk: only slow turns become slower (arXiv 2309.00071, section 3.1)
    model.rope_scaling = "none"
    model.rope_scale = 1.0
    model.attention_window = 0  # positions that attention reaches back, its own included; 0: all
    model.norm_epsilon = 1e-5  # of every RMSNorm, OLMoE
    model.query_key_norm = True  # RMSNorm on whole query and key projections, OLMoE
    # Of matrix products; parameters and scores stay float32. float64 (with JAX_ENABLE_X64=1) is
    # for comparisons with other implementations.
    model.compute_dtype = "bfloat16"
    model.attention = "xla"  # xla | cudnn (GPU)
    model.scan_layers = True  # False: unroll, for debugging
    model.remat = "none"  # none | full: keep block inputs only | dots: keep matrix products

    memory = model.memory = ConfigDict()
    # What stands in the memory slot: product_key | none | module:Class, a layer of your own
    # (docs/extending.md).
    memory.layer = "product_key"
    # Blocks (from 1) whose normalised FFN input a memory layer reads, and blocks beside whose FFN
    # its output is added. Empty: every block, read = write (paper, section 3.1).
    memory.read_layers = ()
    memory.write_layers = ()
    memory.num_keys = 64  # n, row keys = column keys of one table of n^2 values
    memory.key_dim = 128  # D_k; paper, section 4.2.4: h / 2
    memory.tucker_rank = 2  # r; V1
    memory.num_cores = 2  # c, each scores its own slice of the value row; V1
    memory.num_heads = 1  # H; paper, section 4.2.3
    memory.top_m = 16  # m, values a token activates in each head
    memory.shortlist = 16  # s, row (column) candidates kept before the grid; paper: min(m, 128)
    memory.scoring = "tucker"  # tucker | sum: additive, as in product-key memory
    # Of the selected scores: none (V1) | softmax over those of a head (PKM, Memory+, PEER) | relu
    # of each (PEER without competition)
    memory.score_activation = "none"
    # per_rank: a query for each Tucker rank (paper, section 4.2.2) | shared: one row and one column
    # query for all ranks and heads (V1) | per_head: a row and a column query for each head (PKM) |
    # released: the layout of the published PyTorch code
    memory.query = "per_rank"
    memory.query_norm = "rms"  # rms (V1) | layer: with weight and bias (PKM) | none
    memory.key_norm = "rms"  # rms (V1) | none (PKM, Memory+, PEER)
    memory.key_expansion = 1  # E, key expansion: E^2 virtual blocks address the same rows
    memory.shuffle = True  # addresses go through a fixed permutation (V1); False: row-major (PKM)
    memory.value_dim = 48  # D_v
    memory.pre_value_dim = 16  # D_p; 0: plain values. Paper, section 4.2.5: D_p : D_v = 1 : 3
    memory.pre_projection = True  # W_p; False: pre-values meet the input itself, D_p = h (PEER)
    memory.activation = "none"  # of the pre-score: none (paper, Eq. 15) | gelu (PEER) | silu | relu
    # W_v: single (paper, Eq. 12) | per_block: one a virtual block (V1) | none: D_v = h (PKM, PEER)
    memory.projection = "single"
    memory.output_gate = "none"  # of the pooled values: none | silu(W_g y) (Memory+)
    memory.bias = False  # of the projections of query, output and gate
    # Tables that a layer sees: its own, or a window of share_group tables that wraps round (ring),
    # is clipped at the ends (no_ring), or is fixed for share_group layers (block); section 4.2.8.
    memory.sharing = "none"
    memory.share_group = 1  # g, tables in the window
    # principled: paper, section 3.5 | released: the published code's constants | unit: values of
    # standard deviation 1, which must misbehave
    memory.initialization = "principled"
    memory.chunk_tokens = 0  # tokens whose rows are fetched at once; 0: chosen by their size
    # Implementations of the two operators: auto | xla | pallas_tpu | pallas_gpu, and for
    # value_aggregation pallas_sparsecore. What is named and cannot run ends with the reason.
    memory.product_key_top_k = "auto"
    memory.value_aggregation = "auto"

    moe = model.moe = ConfigDict()  # OLMoE, section 2
    moe.num_experts = 64
    moe.top_k = 8  # experts a token activates
    moe.expert_size = 128  # inner width of one expert's SwiGLU; OLMoE: h / 2
    moe.renormalize = False  # True: the weights of the chosen experts are divided by their sum

    data = config.data = ConfigDict()
    # standard_library and site_packages (what is installed beside it): Python sources | text |
    # array_record | memmap | hugging_face
    data.source = "standard_library"
    # Globs, for array_record, memmap and text: one document a file, a line of .jsonl, .ndjson and
    # .json, a row of .parquet; all but the last may be .gz, .bz2, .xz or .zst.
    data.paths = ()
    data.text_field = "text"  # key of the text in JSONL, Parquet and Hugging Face records
    data.memmap_dtype = "uint16"  # of token files: uint16 | uint32
    # Data set, its configuration and split, streamed by --mode=prepare.
    data.hugging_face_name = ""
    data.hugging_face_config = ""
    data.hugging_face_split = "train"
    data.tokenizer = "bytes"  # | path of a tokenizers .json or SentencePiece .model | none
    data.end_of_text_id = -1  # -1: the tokenizer's own
    data.sequence_length = 256  # tokens a sequence
    data.held_out_fraction = 0.05  # of documents, for evaluation; of the end of each, if few
    long_context = data.long_context = ConfigDict()
    # Tasks of umv2/data/long_context whose documents train beside those of a text source.
    long_context.tasks = ()
    # Of each task; as long as an eighth of a sequence to a whole one. 0: none.
    long_context.num_documents = 0
    # Share of text in the tokens that train: where there is more, whole documents are left out.
    long_context.text_fraction = 0.25
    # Of all their tokens but answers in the loss, where answers and text have 1: what is random in
    # a context cannot be learned, and drowns what can.
    long_context.context_weight = 1.0
    # At the start, on pairs of symbols alone (umv2/data/long_context/recall.py): small models
    # learn to look up there, within a few hundred steps, or not at all.
    long_context.warm_up_steps = 0
    long_context.seed = 0  # of these documents
    data.mask_across_documents = True  # False: attention may cross documents of one sequence
    data.num_workers = 0  # processes that build batches; 0: threads of this one
    data.prefetch_batches = 4  # batches built ahead of the training step
    data.seed = 0  # of the order of documents

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 4e-4  # peak; paper, Table 10
    optimizer.warmup_steps = 20  # linear from 0
    optimizer.schedule = "cosine"  # | constant | constant_then_cosine (continued training)
    optimizer.decay_start_step = 0  # step at which constant_then_cosine starts to decay
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
    # What updates the value tables: adamw | module:function, an optimizer of your own
    # (docs/extending.md).
    optimizer.values_optimizer = "adamw"
    # Learning rate of the value tables. multiplier: the schedule above times a factor that falls
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
    # layer: the mean of each layer's own loss (OLMoE's training) | model: of all layers' tokens
    # together (transformers)
    loss.load_balance_scope = "layer"
    loss.router_z_loss = 0.0  # mean squared log-partition of the router's softmax; OLMoE: 0.001

    train = config.train = ConfigDict()
    train.num_steps = 200  # optimizer steps
    train.batch_size = 16  # sequences a step, over all processes
    train.gradient_accumulation = 1  # microbatches a step
    train.log_interval_steps = 10  # loss, rates and health of the memory layers
    train.evaluation_interval_steps = 100  # held-out loss; also after the last step
    train.checkpoint_interval_steps = 100  # also after the last step
    train.num_checkpoints_kept = 3  # the newest
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
    suite.num_examples = 64  # of each task and length
    suite.batch_tokens = 16384  # of a pass; at least one example
    # How lengths beyond data.sequence_length are read: none: as trained | linear | ntk: rotary
    # positions scaled by length / sequence_length | window: attention to the last sequence_length
    suite.extrapolation = "ntk"  # measured: experiments/results/long_context
    suite.seed = 0  # of the examples

    generate = config.generate = ConfigDict()
    generate.max_new_tokens = 400  # beside the prompt
    generate.temperature = 0.8  # 0: greedy
    generate.top_k = 0  # sample from the k likeliest tokens; 0: all
    generate.top_p = 0.95  # sample from the likeliest tokens that hold this probability; 1: all
    generate.stop = ()  # strings that end a text and are left out
    generate.seed = 0  # of the samples

    config.mesh = ConfigDict()
    # Devices along each axis; their product is the number in use. The batch is divided over the
    # first three.
    config.mesh.replica = -1  # copies of the whole state; -1: as many as the other axes leave
    config.mesh.fsdp = 1  # dense parameters are divided too, and gathered where they are used
    config.mesh.memory = 1  # value tables, or experts, are divided too, and work is exchanged
    config.mesh.tensor = 1  # heads, FFN and vocabulary; the sequence in memory layers
    config.mesh.parameters = "fsdp"  # what divides dense parameters: fsdp, fsdp_and_memory
    config.mesh.table_sharding = "auto"  # what memory divides of a table: columns, rows, auto
    return config
