"""The models and configurations of adapters_live.py. What is left out, and why, is said there."""

from dataclasses import dataclass, field

STEPS = 20  # of training


def layer(name, kind, *sizes, **options):
    return {"name": name, "kind": kind, "sizes": list(sizes), **options}


def blocks(prefix, make, count=3):
    return [part for i in range(count) for part in make(f"{prefix}.{i}.")]


def text_model(head, embedding="embed", **options):
    """An embedding, three blocks, and a head."""
    block = lambda prefix: [
        layer(prefix + "self_attn", "SelfAttention", 8, 2),
        layer(prefix + "mlp.fc1", "Linear", 8, 12),
        layer(prefix + "mlp.fc2", "Linear", 12, 8, bias=False),
    ]
    return [
        layer(embedding, "Embedding", 11, 8, **options),
        *blocks("model.layers", block),
        layer("norm", "LayerNorm", 8),
        head,
    ]


def tied(head="head", embedding="embed"):
    return layer(head, "Linear", 8, 11, bias=False, tied=embedding)


def gpt(**attention):
    """GPT-2's layers, of which the Conv1D's keep their weights transposed."""
    attention = {"transposed": True, **attention}
    linear = "Conv1D" if attention["transposed"] else "Linear"
    block = lambda prefix: [
        layer(prefix + "attn", "FusedAttention", 8, 2, **attention),
        layer(prefix + "mlp.c_fc", linear, 8, 16),
        layer(prefix + "mlp.c_proj", linear, 16, 8),
    ]
    ends = layer("ln_f", "LayerNorm", 8), tied("lm_head", "wte")
    return [layer("wte", "Embedding", 11, 8), *blocks("layers", block, 2), *ends]


def convolutions(dimensions, inputs, **second):
    kind, batch_norm = f"Conv{dimensions}d", f"BatchNorm{dimensions}d"
    return [
        layer("conv1", kind, 3, 8, kernel_size=3, padding=1),
        layer("norm", batch_norm, 8),
        layer("conv2", kind, 8, 8, **{"kernel_size": 3, **second}),
        layer("flatten", "Flatten"),
        layer("head", "Linear", inputs, 5),
    ]


IDS, VECTORS = "ids", (2, 5, 8)
MODELS = {  # description, input
    "mlp": (
        [
            layer("fc1", "Linear", 8, 16),
            layer("fc2", "Linear", 16, 8, bias=False),
            layer("norm", "LayerNorm", 8),
            layer("xfc1", "Linear", 8, 8),
            layer("head", "Linear", 8, 4),
        ],
        VECTORS,
    ),
    "text": (text_model(layer("head", "Linear", 8, 11), padding_idx=1), IDS),
    "tied": (text_model(tied()), IDS),
    "language": (text_model(tied("lm_head", "embed_tokens"), "embed_tokens"), IDS),
    "language, untied": (text_model(layer("lm_head", "Linear", 8, 11), "embed_tokens"), IDS),
    "classifier": ([layer("fc1", "Linear", 8, 8), layer("classifier", "Linear", 8, 3)], VECTORS),
    "score": ([layer("fc1", "Linear", 8, 8), layer("score", "Linear", 8, 3, bias=False)], VECTORS),
    "gpt": (gpt(), IDS),
    "grouped_qkv": (gpt(transposed=False, kv_width=4), IDS),
    "conv1d": (convolutions(1, 40, stride=2), (2, 3, 11)),
    "conv2d": (convolutions(2, 72, stride=2, padding=1), (2, 3, 6, 5)),
    "conv3d": (convolutions(3, 64, padding=1, stride=2), (2, 3, 4, 3, 4)),
    "conv2d_same": (convolutions(2, 240, padding="same", bias=False), (2, 3, 6, 5)),
    "conv2d_oblong": (convolutions(2, 160, kernel_size=[3, 1], bias=False), (2, 3, 6, 5)),
    "conv2d_point": (convolutions(2, 240, kernel_size=1), (2, 3, 6, 5)),
    "conv2d_groups": (convolutions(2, 72, stride=2, padding=1, groups=2), (2, 3, 6, 5)),
    "conv1d_depthwise": (convolutions(1, 72, groups=8), (2, 3, 11)),
    "attention": (
        [
            layer("fc", "Linear", 8, 8),
            layer("attn", "MultiheadAttention", 8, 2),
            layer("block.attn", "MultiheadAttention", 8, 4, bias=False),
            layer("head", "Linear", 8, 4),
        ],
        VECTORS,
    ),
    "experts": (
        [layer("fc", "Linear", 8, 8), layer("mlp.experts", "Experts", 4, 8, 6), layer("head", "Linear", 8, 4)],
        VECTORS,
    ),
}


@dataclass
class Case:
    name: str
    model: str
    config: dict
    type: str = "LORA"
    dtype: str = "float32"
    second: dict = field(default_factory=dict)  # configuration of one more adapter, whose output is compared
    fused: list = field(default_factory=list)  # parts of fused projections
    reads: bool = True  # whether peft can make such an adapter by itself
    refused: str = ""  # why this library does not read what peft writes
    merges: bool = True  # whether peft's merged model computes what it computes unmerged
    half_adapter: bool = False  # whether the tensors in peft's file are in half precision
    pickled: bool = False  # whether peft writes adapter_model.bin
    steps: int = 0  # of training
    warning: str = ""  # what peft says about the model, whatever the adapter
    writes: bool = True  # whether this library makes such an adapter from the configuration
    tables: bool = False  # whether peft writes the tables of embedding and head along
    added: int = 0  # tokens that the model got before it was adapted, and that this library's model has not
    options: list = field(default_factory=list)  # of lora::LoadOptions


def case(name, model, targets, **options):
    own = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
    ranks = {"LORA": {"r": 4, "lora_alpha": 6}, "VERA": {"r": 6}, "IA3": {"feedforward_modules": []}}[own.get("type", "LORA")]
    config = {**ranks, **({} if targets is None else {"target_modules": targets}), **options}
    return Case(name, model, config, **own)


def parts(module, sizes, adapted):
    return {"fused": [{"module": module, "sizes": sizes, "adapted": adapted}], "reads": False}


DORA, RSLORA = {"use_dora": True}, {"use_rslora": True}
PATTERNS = {
    "rank_pattern": {r"^model\.layers\.0\..*q_proj": 2, "q_proj": 3},
    "alpha_pattern": {"self_attn.v_proj": 9, r"layers\.2\..*": 5},
}
BIASED = {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"head": 5}}
GROUPS = {"merges": False, "warning": "groups > 1", "refused": "reads inputs of other groups"}
GPT = {"fan_in_fan_out": True}
QK, KV, QV = [True, True, False], [False, True, True], [True, False, True]
UNEQUAL = [8, 4, 4]
PART_PATTERNS = {"rank_pattern": {"layers.1.attn.c_attn": 2}, "alpha_pattern": {"c_attn": 3}}
ATTENTION_PATTERNS = {"rank_pattern": {"block.attn": 2}, "alpha_pattern": {"attn": 3}}
SEEDED = {"save_projection": False, "projection_prng_key": 7, "warning": "vera_A and vera_B"}
FEEDFORWARD = {"feedforward_modules": ["fc1"]}
GPT_FEEDFORWARD = {**GPT, "feedforward_modules": ["mlp.c_proj"]}
GENERIC = {  # what a configuration names that is to do for several kinds of models; of one's own that is an error here
    "rank_pattern": {"fc1": 2, "gate_proj": 8},
    "alpha_pattern": {"c_attn": 3, "fc2": 5},
    "exclude_modules": ["vision_tower"],
    "warning": "did not match any targeted module",
    "writes": False,
}
HEADS = {"task_type": "SEQ_CLS"}  # for which peft adds two modules to those that it saves in full
GROWN = {"added": 3, "options": ["take_tables"], "tables": True, "writes": False}
ALONG = {"tables": True, "writes": False}
TWICE = {"options": ["out_proj_twice"], "writes": False}
EXPERTS = ["mlp.experts.gate_up", "mlp.experts.down"]
EXPERT_PATTERNS = {  # which act, though peft says that they do not
    "rank_pattern": {"gate_up": 2},
    "alpha_pattern": {"experts.down": 3},
    "warning": "did not match any targeted module",
}

CASES = [
    case("list", "mlp", ["fc1", "fc2"], steps=STEPS),
    case("regex", "mlp", r"fc\d|head"),
    case("regex with alternatives and a look-ahead", "text", r"(?!model\.layers\.1).*\.(q_proj|mlp\.fc[12])"),
    case("all linear layers", "mlp", "all-linear"),
    case("all linear layers of blocks", "text", "all-linear", r=2),
    case("exclude a list", "text", ["q_proj", "fc1"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    case("exclude a regex", "text", ["q_proj", "fc1"], exclude_modules=r".*\.2\..*"),
    case("rsLoRA", "mlp", ["fc1", "head"], **RSLORA, steps=STEPS),
    case("rsLoRA with patterns", "text", ["q_proj", "v_proj"], **RSLORA, **PATTERNS),
    case("alpha that is not whole", "mlp", ["fc1"], lora_alpha=2.5),
    case("DoRA", "mlp", ["fc1", "fc2"], **DORA, steps=STEPS),
    case("DoRA and rsLoRA with patterns", "text", ["q_proj", "v_proj"], **DORA, **RSLORA, **PATTERNS),
    case("dropout", "mlp", ["fc1", "fc2"], lora_dropout=0.3),
    case("DoRA with dropout", "mlp", ["fc1", "head"], **DORA, lora_dropout=0.3),
    case("Gaussian start", "mlp", ["fc1", "fc2"], init_lora_weights="gaussian"),
    case("orthogonal start", "mlp", ["fc1", "fc2"], init_lora_weights="orthogonal"),
    case("all biases", "mlp", ["fc1", "fc2"], bias="all", steps=STEPS),
    case("biases of adapted layers", "mlp", ["fc1", "fc2"], bias="lora_only", steps=STEPS),
    case("biases of blocks", "text", ["k_proj", "fc1", "fc2"], bias="lora_only"),
    case("biases of the update", "mlp", ["fc1", "head"], lora_bias=True, steps=STEPS),
    case("biases of the update, rsLoRA, ranks by patterns", "mlp", ["fc1", "head"], lora_bias=True, **RSLORA, **BIASED),
    case("biases of the update, bfloat16", "mlp", ["fc1", "head"], lora_bias=True, dtype="bfloat16"),
    case("biases of the update, and a module in full", "mlp", ["fc1"], lora_bias=True, modules_to_save=["head"]),
    case("biases of the update of a convolution", "conv2d", ["conv1", "conv2"], lora_bias=True, steps=STEPS),
    case("DoRA and biases", "mlp", ["fc1", "head"], bias="lora_only", **DORA),
    case("a head in full", "mlp", ["fc1"], modules_to_save=["head"], steps=STEPS),
    case("head and norm in full", "mlp", ["fc1", "fc2"], modules_to_save=["head", "norm"]),
    case("all linear layers, a head in full", "mlp", "all-linear", modules_to_save=["head"]),
    case("a layer in full whose name ends that of another", "mlp", ["fc2"], modules_to_save=["fc1"]),
    case("a block in full", "text", ["q_proj"], modules_to_save=["layers.1.mlp"]),
    case("DoRA and a head in full", "mlp", ["fc1"], modules_to_save=["head"], **DORA),
    case("all biases and a head in full", "mlp", ["fc1"], bias="all", modules_to_save=["head"]),
    case("a second adapter", "mlp", ["fc1", "fc2"], second={"r": 3, "target_modules": ["fc2", "head"], **DORA}),
    case("targets and patterns of several kinds of models", "mlp", ["fc1", "fc2", "c_attn", "query"], **GENERIC),
    case("a head in full that is not there", "mlp", ["fc1"], modules_to_save=["score", "head"], writes=False),
    case("heads in full, none of which is there", "mlp", ["fc1"], modules_to_save=["score", "lm_head"], writes=False),
    case("nothing but a head in full", "mlp", "dummy-target-modules", modules_to_save=["head"]),
    case("classification", "classifier", ["fc1"], modules_to_save=["classifier"], **HEADS),
    case("classification, without being asked", "score", ["fc1"], **HEADS, writes=False),
    case("classification of tokens, DoRA", "classifier", ["fc1"], task_type="TOKEN_CLS", **DORA, writes=False),
    case("classification, VeRA", "classifier", ["fc1"], type="VERA", **HEADS, writes=False),
    case("classification, IA3", "score", ["fc1"], type="IA3", **HEADS, writes=False),
    case("adapter_model.bin", "mlp", ["fc1", "fc2"], pickled=True),
    case("one block", "text", ["q_proj", "v_proj"], layers_to_transform=1),
    case("some blocks of a list", "text", ["q_proj", "fc1"], layers_to_transform=[0, 2], layers_pattern="layers"),
    case("one block and a full name", "text", ["model.layers.1.mlp.fc2", "q_proj"], layers_to_transform=[0]),
    case("one block of a list that nothing precedes", "grouped_qkv", ["c_attn"], layers_to_transform=[1], reads=False),
    case("ranks by patterns", "text", ["q_proj", "v_proj"], **PATTERNS),
    case("embedding", "text", ["embed"], steps=STEPS),
    case("embedding and layers, rsLoRA", "text", ["embed", "q_proj"], **RSLORA, steps=STEPS),
    case("embedding, DoRA", "text", ["embed"], **DORA, steps=STEPS),
    case("embedding in full", "text", ["q_proj"], modules_to_save=["embed"]),
    case("tied embedding", "tied", ["embed"], merges=False, steps=STEPS),
    case("tied head", "tied", ["head"], merges=False, steps=STEPS),
    case("tied head and embedding", "tied", ["head", "embed"], merges=False),
    case("tied head, DoRA", "tied", ["head", "fc1"], merges=False, **DORA),
    case("tied head in full", "tied", ["q_proj"], modules_to_save=["head"]),
    case("tied embedding in full", "tied", ["q_proj"], modules_to_save=["embed"]),
    case("embedding of a language model", "language", ["embed_tokens", "q_proj"], merges=False),
    case("head of a language model", "language", ["lm_head", "q_proj"], merges=False),
    case("tables along", "language", ["q_proj"], **ALONG),
    case("tables along, untied", "language, untied", ["q_proj", "lm_head"], **ALONG),
    case("added tokens", "language", ["q_proj"], **GROWN),
    case("added tokens, untied", "language, untied", ["q_proj"], **GROWN),
    case("added tokens, adapted embedding", "language", ["embed_tokens", "q_proj"], **GROWN, merges=False),
    case("added tokens, adapted head", "language", ["lm_head", "q_proj"], **GROWN, merges=False),
    case("added tokens, both adapted", "language, untied", ["lm_head", "embed_tokens"], **GROWN),
    case("added tokens, tables in full", "language, untied", ["q_proj"], **GROWN, modules_to_save=["lm_head", "embed_tokens"]),
    case("c_attn", "gpt", ["c_attn"], **GPT, steps=STEPS),
    case("every projection, rsLoRA", "gpt", ["c_attn", "c_proj", "c_fc"], **GPT, **RSLORA),
    case("c_attn, DoRA", "gpt", ["c_attn", "mlp.c_proj"], **GPT, **DORA),
    case("c_attn and biases", "gpt", ["c_attn"], **GPT, bias="lora_only"),
    case("query and value of c_attn", "gpt", ["c_attn"], **GPT, **parts("c_attn", [8, 8, 8], QV)),
    case("query and key of unequal width", "grouped_qkv", ["c_attn", "c_proj"], **parts("attn.c_attn", UNEQUAL, QK)),
    case("key and value, rsLoRA", "grouped_qkv", ["c_attn"], **RSLORA, **parts("c_attn", UNEQUAL, KV)),
    case("parts with patterns", "grouped_qkv", ["c_attn", "c_proj"], **PART_PATTERNS, **parts("c_attn", UNEQUAL, QV)),
    case("Conv1d", "conv1d", ["conv1", "conv2"]),
    case("Conv1d, DoRA", "conv1d", ["conv1", "conv2"], **DORA),
    case("Conv2d", "conv2d", ["conv1", "conv2"], steps=STEPS),
    case("Conv2d, rsLoRA, a rank by a pattern", "conv2d", ["conv1", "conv2"], **RSLORA, rank_pattern={"conv2": 2}),
    case("Conv2d and head", "conv2d", ["conv1", "head"], steps=STEPS),
    case("Conv2d, DoRA", "conv2d", ["conv1", "conv2"], **DORA, steps=STEPS),
    case("Conv2d and biases", "conv2d", ["conv1", "conv2"], bias="lora_only"),
    case("Conv2d, batch norm in full", "conv2d", ["conv1"], modules_to_save=["norm"]),
    case("Conv2d in full", "conv2d", ["conv1"], modules_to_save=["conv2"]),
    case("Conv2d, padding as wide as the kernel", "conv2d_same", ["conv1", "conv2"]),
    case("Conv2d, oblong kernel", "conv2d_oblong", ["conv2"]),
    case("Conv2d, oblong kernel, DoRA", "conv2d_oblong", ["conv2"], **DORA),
    case("Conv2d, kernel of one point", "conv2d_point", ["conv2", "head"]),
    case("Conv2d and all biases", "conv2d", ["conv2"], bias="all"),
    case("Conv2d of two groups", "conv2d_groups", ["conv1", "conv2"], **GROUPS),
    case("Conv2d of two groups, rsLoRA", "conv2d_groups", ["conv2"], **RSLORA, **GROUPS),
    case("Conv1d, depthwise", "conv1d_depthwise", ["conv2"], r=8, **GROUPS),
    case("Conv3d", "conv3d", ["conv1", "conv2"]),
    case("Conv3d, DoRA", "conv3d", ["conv1", "conv2"], **DORA),
    case("MultiheadAttention", "attention", ["attn"], steps=STEPS),
    case("MultiheadAttention by its full name", "attention", ["block.attn", "fc"], **RSLORA),
    case("query and value of MultiheadAttention", "attention", ["attn"], **RSLORA, **parts("attn", [8, 8, 8], QV)),
    case("MultiheadAttention, ranks by patterns", "attention", ["attn"], **ATTENTION_PATTERNS),
    case("MultiheadAttention, all biases", "attention", ["attn"], bias="all"),
    case("MultiheadAttention, its biases", "attention", ["attn"], bias="lora_only"),
    case("MultiheadAttention, as peft computes", "attention", ["attn"], **TWICE),
    case("MultiheadAttention with patterns, as peft computes", "attention", ["attn", "fc"], **ATTENTION_PATTERNS, **TWICE),
    case("MultiheadAttention in full", "attention", ["fc"], modules_to_save=["block.attn"]),
    case("parameter of experts", "experts", [], target_parameters=EXPERTS[:1]),
    case("parameters of experts", "experts", [], target_parameters=EXPERTS, steps=STEPS),
    case("parameters and layers, rsLoRA", "experts", ["fc"], target_parameters=EXPERTS, **RSLORA),
    case("parameters, ranks by patterns", "experts", [], target_parameters=EXPERTS, **EXPERT_PATTERNS),
    case("parameter that is a matrix", "experts", [], target_parameters=["experts.mix"]),
    case("three parameters of one module", "experts", [], target_parameters=[*EXPERTS, "experts.mix"]),
    case("weight of a layer as a parameter", "mlp", ["fc1"], target_parameters=["head.weight"]),
    case("VeRA", "mlp", ["fc1", "fc2"], type="VERA", steps=STEPS),
    case("VeRA of layers of different sizes, dropout", "text", ["q_proj", "fc1", "fc2"], type="VERA", vera_dropout=0.2),
    case("VeRA by its seed alone", "mlp", ["fc1", "head"], type="VERA", **SEEDED, steps=STEPS),
    case("VeRA, some blocks", "text", ["q_proj", "fc1"], type="VERA", layers_to_transform=[0, 2], d_initial=0.3),
    case("VeRA, biases and a head in full", "mlp", ["fc1"], type="VERA", bias="vera_only", modules_to_save=["head"]),
    case("VeRA on GPT-2's layers", "gpt", ["c_attn", "c_fc"], type="VERA", **GPT),
    case("VeRA, float64", "mlp", ["fc1", "fc2"], type="VERA", dtype="float64"),
    case("VeRA, float16", "mlp", ["fc1", "fc2"], type="VERA", dtype="float16"),
    case("IA3", "mlp", ["fc1", "head"], type="IA3", steps=STEPS),
    case("IA3 with feed-forward modules", "text", ["k_proj", "v_proj", "fc1"], type="IA3", **FEEDFORWARD, steps=STEPS),
    case("IA3, exclude a list", "text", ["k_proj", "fc1"], type="IA3", **FEEDFORWARD, exclude_modules=["layers.0.mlp.fc1"]),
    case("IA3 and a head in full", "mlp", ["fc1", "fc2"], type="IA3", feedforward_modules=["fc2"], modules_to_save=["head"]),
    case("IA3, Conv2d", "conv2d", ["conv1", "conv2"], type="IA3", steps=STEPS),
    case("IA3, Conv2d of two groups", "conv2d_groups", ["conv2"], type="IA3"),
    case("IA3 on GPT-2's layers", "gpt", ["c_attn", "mlp.c_proj"], type="IA3", **GPT_FEEDFORWARD),
    case("IA3, float64", "mlp", ["fc1", "head"], type="IA3", dtype="float64"),
    case("IA3, float16", "mlp", ["fc1", "head"], type="IA3", dtype="float16"),
    case("float64", "text", ["embed", "q_proj", "fc1"], dtype="float64"),
    case("float64, DoRA", "mlp", ["fc1", "head"], **DORA, dtype="float64"),
    case("float64, Conv2d", "conv2d", ["conv1", "conv2"], dtype="float64"),
    case("bfloat16", "text", ["embed", "q_proj", "fc1"], dtype="bfloat16"),
    case("bfloat16, DoRA", "mlp", ["fc1", "head"], **DORA, dtype="bfloat16"),
    case("bfloat16, head in full", "mlp", ["fc1"], modules_to_save=["head"], dtype="bfloat16"),
    case("bfloat16, adapter too", "text", ["q_proj", "fc1"], dtype="bfloat16", half_adapter=True),
    case("float16", "mlp", ["fc1", "fc2"], dtype="float16"),
    case("float16, adapter too", "mlp", ["fc1", "fc2"], dtype="float16", half_adapter=True),
]
