"""Small models from a description, the same ones that exchange_adapter.cpp builds: layers that are run one after the
other with tanh between them.

A description is a list of {"name", "kind", "sizes", ...}: names may have dots ("layers.0.mlp.fc1"), "sizes" are what
the kind needs first, and whatever else there is are options of the kind.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


def attend(q, k, v, heads):
    """Plain attention of (batch, length, width) with keys and values that may have fewer heads."""
    split = [part.unflatten(-1, (-1, q.size(-1) // heads)).transpose(1, 2) for part in (q, k, v)]
    q, k, v = (part.repeat_interleave(heads // part.size(1), 1) for part in split)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width, heads, kv_width=None):
        super().__init__()
        self.heads = heads
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_width or width) for _ in range(2))

    def forward(self, x):
        return x + self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class FusedAttention(nn.Module):
    """Query, key and value from one projection, which is GPT-2's Conv1D with `transposed`."""

    def __init__(self, width, heads, kv_width=None, transposed=False):
        super().__init__()
        self.heads, self.parts = heads, [width, kv_width or width, kv_width or width]
        project = (lambda n_in, n_out: Conv1D(n_out, n_in)) if transposed else nn.Linear
        self.c_attn, self.c_proj = project(width, sum(self.parts)), project(width, width)

    def forward(self, x):
        return x + self.c_proj(attend(*self.c_attn(x).split(self.parts, -1), self.heads))


class Experts(nn.Module):
    """Bare parameters (experts, out, in), and one (out, in)."""

    def __init__(self, experts, width, hidden):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.mix = nn.Parameter(torch.empty(width, width))

    def forward(self, x):
        hidden = torch.matmul(x.unsqueeze(1), self.gate_up.transpose(1, 2)).tanh()  # (batch, experts, length, hidden)
        return functional.linear(torch.matmul(hidden, self.down.transpose(1, 2)).mean(1), self.mix)


KINDS = {
    "Linear": nn.Linear,
    "Conv1D": lambda n_in, n_out: Conv1D(n_out, n_in),
    "Embedding": nn.Embedding,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "LayerNorm": nn.LayerNorm,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "Flatten": nn.Flatten,
    "SelfAttention": SelfAttention,
    "FusedAttention": FusedAttention,
    "MultiheadAttention": nn.MultiheadAttention,
    "Experts": Experts,
}


class Net(nn.Module):
    def __init__(self, description, seed):
        super().__init__()
        self.steps = [(layer["name"], layer["kind"]) for layer in description]
        for layer in description:
            options = {key: value for key, value in layer.items() if key not in ("name", "kind", "sizes", "tied")}
            self.place(layer["name"], KINDS[layer["kind"]](*layer["sizes"], **options))
        self.fill(torch.Generator().manual_seed(seed))
        for layer in description:
            if "tied" in layer:
                self.get_submodule(layer["name"]).weight = self.get_submodule(layer["tied"]).weight

    def place(self, name, module):
        *parents, last = name.split(".")
        owner = self
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(last, module)

    def fill(self, generator):
        """Values that keep the size of a signal, and of which none is exactly 0 or 1, norms and biases included."""
        for name, tensor in self.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5)
            else:
                middle = 1 if name.endswith(("weight", "running_var")) else 0
                tensor.copy_(middle + 0.2 * noise.clamp(-2, 2))

    def run(self, step, x):
        name, kind = step
        module = self.get_submodule(name)  # by name, since peft puts its own layers in place of these
        if kind == "MultiheadAttention":
            return x + module(x, x, x, need_weights=False)[0]
        return module(x)

    def forward(self, x):
        for step in self.steps[:-1]:
            x = self.run(step, x).tanh()
        return self.run(self.steps[-1], x)


class LanguageNet(Net):
    """With the two methods by which peft knows the embeddings of a transformers model."""

    def add_tokens(self, count):
        """As resize_token_embeddings does: rows more for the embedding and for the head, tied or not."""
        generator = torch.Generator().manual_seed(7)
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        is_tied = head.weight is embedding.weight
        grown = lambda old: nn.Parameter(torch.cat([old.detach(), torch.randn((count, *old.shape[1:]), generator=generator)]))
        embedding.weight = grown(embedding.weight)
        embedding.num_embeddings = head.out_features = embedding.weight.shape[0]
        head.weight = embedding.weight if is_tied else grown(head.weight)
        if head.bias is not None:
            head.bias = grown(head.bias)

    def get_input_embeddings(self):
        return self.get_submodule(self.steps[0][0])

    def get_output_embeddings(self):
        return self.get_submodule(self.steps[-1][0])
