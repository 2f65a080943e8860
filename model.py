"""The rectified-flow video DiT (Wan 2.1's text-to-video architecture), its attention, LoRA and weights.

    python model.py                  a table of the presets: parameters, width, and the toy's speed here

VideoDiT predicts the velocity v = eps - x0 from xt = (1 - t) x0 + t eps (t = 0 is data, t = 1 is noise;
losses.py). Modules carry the official Wan names (`blocks.0.self_attn.q`, ...), so official weights load
without renaming; the toy is a small Config of the same classes. Only torch is needed; safetensors and
huggingface_hub are imported where a file is read or fetched.
"""
import json
import math
import os
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


# ---- configuration ----

@dataclass(frozen=True)
class Config:
    """Sizes of a VideoDiT, under the names of Wan's own config.json; the defaults are Wan 2.1 T2V 1.3B."""
    patch_size: tuple = (1, 2, 2)   # latent frames, rows and columns in one token
    in_dim: int = 16                # latent channels C (out_dim is the same)
    dim: int = 1536                 # width D
    ffn_dim: int = 8960             # width of the feed-forward layer
    freq_dim: int = 256             # width of the time sinusoid
    text_dim: int = 4096            # width of the prompt embedding (UMT5-XXL)
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6               # of every norm

    def to_diffusers(self):
        """The config.json of diffusers' WanTransformer3DModel."""
        sizes = {DIFFUSERS_CONFIG.get(name, name): x for name, x in vars(self).items() if name != "dim"}
        return {"_class_name": "WanTransformer3DModel", **sizes, "out_channels": self.in_dim,
                "attention_head_dim": self.dim // self.num_heads, "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads"}


PRESETS = {
    "toy": Config(patch_size=(2, 4, 4), in_dim=3, dim=160, ffn_dim=320, freq_dim=128, text_dim=32,
                  num_heads=5, num_layers=6),
    "wan-1.3b": Config(),
    "wan-14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan-2.2-a14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),    # each of its two experts
    "wan-2.2-5b": Config(in_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30),
}


# ---- positions and time ----

def time_sinusoid(t, width):
    """Sinusoidal features of t in [0, 1], (B, width) fp32: cosines, then sines.

    The only place where t is multiplied by 1000. In fp32 and by exp, as diffusers computes it; official Wan
    does it in fp64, which moves the model's output by about 2e-5.
    """
    half = width // 2
    freqs = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = (1000.0 * t.float())[:, None] * freqs                               # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=8)
def rotary(grid, head_dim, device):
    """Cosines and sines of the 3-D rotary angles of a token grid (T, H, W), each (L, head_dim / 2) fp32.

    The head is split between time, rows and columns as in Wan: a third (rounded down to even) each for rows
    and columns, time takes the rest. Angles are built in fp64 and kept per grid.
    """
    space = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * space, space, space)):
        freqs = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        a = torch.arange(grid[axis], dtype=torch.float64)[:, None] * freqs       # (T or H or W, width / 2)
        angles.append(a.view([-1 if i == axis else 1 for i in range(3)] + [width // 2]).expand(*grid, -1))
    angles = torch.cat(angles, dim=-1).flatten(0, 2)                             # (L, head_dim / 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x, cos, sin):
    """x (B, L, heads, head_dim) with each neighbouring pair of channels turned by its angle; dtype of x."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                      # (B, L, heads, head_dim / 2) each
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


# ---- the transformer ----

class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the dtype of x."""

    def forward(self, x):
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm computed in fp32 whatever the dtype of x. On a CPU F.rms_norm takes up to twice as long, so it
    is written out, in the order in which a frozen weight needs nothing but x kept for the backward pass.
    """

    def forward(self, x):
        x = x.float()
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return x * torch.rsqrt(mean_square + self.eps) * self.weight.float()


class Attention(nn.Module):
    """Multi-head attention with RMS-normed q and k: of x to itself, with rotary positions, or to a text."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)  # over all heads, as Wan

    def forward(self, x, context=None, rope=None):
        """(B, L, D) from x (B, L, D) and, across, context (B, S, D). As in Wan, zero-padded text is not
        masked.
        """
        context = x if context is None else context
        heads = lambda y: y.unflatten(2, (self.num_heads, -1))                   # (B, L, heads, head_dim)
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = heads(q.type_as(v)), heads(k.type_as(v)), heads(v)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))               # views: what was rotated is contiguous
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# What activation checkpointing keeps: attention is dear to compute again and its output is small to store.
KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")])


def mlp(d_in, d_hidden, d_out, activation):
    """Linear, activation, linear; the linear maps are modules 0 and 2, as in Wan."""
    return nn.Sequential(nn.Linear(d_in, d_hidden), activation, nn.Linear(d_hidden, d_out))


class Block(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward; time enters by a six-way modulation."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm3 = LayerNorm(c.dim, c.eps)                                # Wan's number for the text's norm
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm2 = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = mlp(c.dim, c.ffn_dim, c.dim, nn.GELU(approximate="tanh"))
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)
        self.checkpointing = False

    def forward(self, x, e, text, rope):
        """(B, L, D) from x (B, L, D), time e (B, 6, D), text (B, S, D). Norms, modulation, gates are fp32."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers, x, e, text, rope, use_reentrant=False, context_fn=KEEP_ATTENTION)
        return self.layers(x, e, text, rope)

    def layers(self, x, e, text, rope):
        e = self.modulation.float() + e
        shift1, scale1, gate1, shift2, scale2, gate2 = e.chunk(6, dim=1)         # (B, 1, D) each
        y = self.self_attn((self.norm1(x) * (1 + scale1) + shift1).type_as(x), rope=rope)
        x = (x.float() + y * gate1).type_as(x)
        x = x + self.cross_attn(self.norm3(x).type_as(x), text)
        y = self.ffn((self.norm2(x) * (1 + scale2) + shift2).type_as(x))
        return (x.float() + y * gate2).type_as(x)


class Head(nn.Module):
    """Modulated norm and the linear map from a token to its patch of velocities."""

    def __init__(self, c):
        super().__init__()
        self.norm = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, c.in_dim * math.prod(c.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)    # (B, 1, D) each
        with torch.autocast(x.device.type, enabled=False):                       # the velocity leaves in fp32
            return self.head((self.norm(x) * (1 + scale) + shift).to(self.head.weight.dtype))


# Parameters that stay fp32 when the linear maps are 16 bit, by parts of their names: as official Wan.
FP32_ISLANDS = ("norm", "modulation", "time_", "head.")


class VideoDiT(nn.Module):
    """Wan 2.1's text-to-video transformer: the velocity v of a noisy latent video xt at time t, given a
    prompt.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.compute_dtype = None                                              # None: that of the linear maps
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, kernel_size=c.patch_size, stride=c.patch_size)
        self.text_embedding = mlp(c.text_dim, c.dim, c.dim, nn.GELU(approximate="tanh"))
        self.time_embedding = mlp(c.freq_dim, c.dim, c.dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        self.init_weights()

    def init_weights(self):
        """Xavier for linear maps, small normals for text and time embeddings, a zero head: first it says v =
        0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(self, xt, t, text, depth=None):
        """Velocity like xt (B, C, T, H, W), from t (B,) in [0, 1] and text (B, S, text_dim).

        With depth=k, the hidden states (B, L, D) after the first k blocks instead. T, H and W must be
        multiples of the patch. A model whose linear maps are 16 bit computes in 16 bit autocast; in one of
        fp32 the caller decides.
        """
        dtype = self.compute_dtype or self.patch_embedding.weight.dtype
        with torch.autocast(xt.device.type, dtype) if dtype != torch.float32 else nullcontext():
            x = self.patch_embedding(xt)                                         # (B, D, T', H', W')
            grid = tuple(x.shape[2:])
            x = x.flatten(2).transpose(1, 2).contiguous()                        # (B, L, D)
            with torch.autocast(xt.device.type, enabled=False):                  # Wan keeps time in fp32
                features = time_sinusoid(t, self.config.freq_dim).to(self.time_embedding[0].weight.dtype)
                e = self.time_embedding(features)                                # (B, D)
                e6 = self.time_projection(e).unflatten(1, (6, -1))               # (B, 6, D)
            text = self.text_embedding(text)                                     # (B, S, D)
            rope = rotary(grid, self.config.dim // self.config.num_heads, xt.device)
            for block in self.blocks[:depth]:
                x = block(x, e6, text, rope)
            if depth is not None:
                return x
            x = self.head(x, e)                                                  # (B, L, patch * C)
        p, (T, H, W) = self.config.patch_size, grid
        x = x.view(-1, T, H, W, *p, self.config.in_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, self.config.in_dim, T * p[0], H * p[1], W * p[2])

    @classmethod
    def from_pretrained(cls, path, dtype=None, part="transformer"):
        """The model in a folder or hub repository, in diffusers' layout (or its transformer/) or official
        Wan's.

        dtype None keeps the file's own; else it is that of the linear maps, and the FP32_ISLANDS are fp32.
        Tensors are mapped from the file and assigned, so there is never a second copy. UserError names
        missing, unexpected and misshapen weights, and an architecture other than text-to-video.
        """
        folder = fetch(path, ["config.json", "diffusion_pytorch_model*", f"{part}/*"])
        folder = folder / part if (folder / part).is_dir() else folder
        files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        if not files or not (folder / "config.json").exists():
            raise UserError(f"{path} holds no config.json with diffusion_pytorch_model*.safetensors")
        config = read_config(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        tensors = {to_official(k): v for file in files for k, v in read_tensors(file)[0].items()}
        if dtype is not None:
            fp32 = {k for k in tensors if any(part in k for part in FP32_ISLANDS)}
            tensors = {k: v.to(torch.float32 if k in fp32 else dtype) for k, v in tensors.items()}
        load_strict(model, tensors, folder)
        return model

    def save_pretrained(self, folder, metadata=None, dtype=None):
        """Write the folder that diffusers' WanTransformer3DModel reads; dtype None keeps the model's own."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config.to_diffusers(), indent=1))
        tensors = {to_diffusers(k): v if dtype is None else v.to(dtype) for k, v in self.state_dict().items()}
        save_tensors(tensors, Path(folder) / "diffusion_pytorch_model.safetensors", metadata)

    def compile_blocks(self):
        """torch.compile, block by block and in place: one compilation serves all, parameter names stay."""
        for block in self.blocks:
            block.compile(dynamic=False)


class Experts(nn.Module):
    """Wan 2.2 A14B: a VideoDiT for times from boundary up and another below. The one in use comes to the
    device of xt and sends the other to the CPU, if it is not there already.
    """

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high, self.low, self.boundary, self.config = high, low, boundary, high.config

    def forward(self, xt, t, text):
        """Velocity like xt (B, C, T, H, W), at one time t (B,) for all."""
        expert, other = (self.high, self.low) if t[0] >= self.boundary else (self.low, self.high)
        if next(expert.parameters()).device != xt.device:
            other.cpu()
            expert.to(xt.device)
        return expert(xt, t, text)


# ---- LoRA (Hu et al. 2021, arXiv:2106.09685) ----

class LoRALinear(nn.Module):
    """A frozen linear layer plus scale B A, of A (rank, in) and B (out, rank) in fp32; earlier: (A, B) of the
    rounds before, which stay on, frozen.
    """

    def __init__(self, layer, A, B, scale=1.0, earlier=(None, None)):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = (nn.Parameter(x.to(layer.weight.device)) for x in (A, B))
        self.scale, self.enabled = scale, True
        for name, x in zip(("earlier_A", "earlier_B"), earlier):
            self.register_buffer(name, x, persistent=False)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.earlier_A is not None:
            y = y + F.linear(F.linear(x, self.earlier_A.type_as(x)), self.earlier_B.type_as(x))
        if self.enabled:
            y = y + F.linear(F.linear(x, (self.scale * self.lora_A).type_as(x)), self.lora_B.type_as(x))
        return y

    def joined(self):
        """(A, B) of all rounds, the scale folded into B: what they add is B A."""
        own = unshard(self.lora_A).detach(), unshard(self.lora_B).detach() * self.scale
        return own if self.earlier_A is None else join((self.earlier_A, self.earlier_B), own)


def join(one, other):
    """Two adapters (A, B) of a layer as one that adds what both add: they stand side by side in the rank."""
    return torch.cat([one[0], other[0].to(one[0])]), torch.cat([one[1], other[1].to(one[1])], dim=1)


def add_lora(model, rank, alpha, targets=("q", "k", "v", "o"), seed=0):
    """Freeze the model, put adapters of scale alpha / rank on the linear layers of its blocks with these
    names; returns the model, which computes what it did: B starts at zero.

    A layer that has adapters already keeps them, as an earlier round. A is a function of the seed, drawn on
    the CPU, and the global generator is left as it is. A model without `blocks`, such as a language model, is
    searched as a whole.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(getattr(model, "blocks", model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear) or (name in targets and isinstance(child, nn.Linear)):
                out_features, in_features = child.weight.shape
                A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=5**0.5, generator=generator)
                B = torch.zeros(out_features, rank)
                earlier = child.joined() if isinstance(child, LoRALinear) else (None, None)
                setattr(parent, name, LoRALinear(child, A, B, alpha / rank, earlier))
    return model


def merge_lora(model):
    """Fold all adapters into the weights, rounded to their dtype; returns the model, which then has none."""
    for name, m in list(model.named_modules()):
        if isinstance(m, LoRALinear):
            out_features, in_features = m.weight.shape
            linear, (A, B) = nn.Linear(in_features, out_features, device="meta"), m.joined()
            linear.weight, linear.bias = nn.Parameter((m.weight.float() + B @ A).type_as(m.weight)), m.bias
            model.set_submodule(name, linear)
    return model.requires_grad_(False)


@contextmanager
def lora_disabled(model):
    """Inside, the adapters are off but for those of earlier rounds: the reference policy of Flow-DPO, in
    eager mode bitwise the model that the adapters were added to.
    """
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for m in adapters:
        m.enabled = False
    try:
        yield model
    finally:
        for m in adapters:
            m.enabled = True


def save_lora(model, path, metadata=None):
    """Write the adapters as `diffusion_model.<official name>.lora_{A,B}.weight`, alpha / rank folded into B,
    all rounds joined along the rank: the file is relative to the pretrained model.

    Folded, because many loaders drop a separate alpha in silence; the prefix and names are what ComfyUI,
    diffusers and DiffSynth read. fp32, contiguous; metadata: strings for the file's header.
    """
    tensors = {}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear):
            for letter, x in zip("AB", m.joined()):
                tensors[f"diffusion_model.{name}.lora_{letter}.weight"] = x
    save_tensors(tensors, path, metadata)


def load_lora(model, path):
    """Add the adapters of a file, see read_lora, to those that the model has; returns the model, whose
    adapters lora_disabled switches off together.
    """
    own = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))}
    for name, (A, B) in read_lora(path, {name: tuple(m.weight.shape) for name, m in own.items()}).items():
        if isinstance(own[name], LoRALinear):
            A, B = join(own[name].joined(), (A, B))
        model.set_submodule(name, LoRALinear(own[name], A, B))
    return model.requires_grad_(False)


# ---- foreign names ----

DIFFUSERS_CONFIG = {"in_dim": "in_channels", "num_heads": "num_attention_heads"}     # others are equal
NAMES = {                                               # official Wan's and diffusers' of parts of parameters
    "self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "norm3": "norm2",                                                     # the text's norm has another number
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "head.modulation": "scale_shift_table", "modulation": "scale_shift_table",
}


def rename(key, names):
    """A parameter's name key with its parts, whole words between dots, replaced as names say."""
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda match: names[match[1]], key)


def to_diffusers(key):
    """diffusers' name of an official Wan parameter."""
    return rename(key, NAMES)


def to_official(key):
    """The official Wan name of diffusers' parameter; an official name stays as it is."""
    own = rename(key, {theirs: ours for ours, theirs in NAMES.items()})
    return "head.modulation" if own == "modulation" else own                    # as that of blocks has it too


LORA_FAULTS = {"dora|magnitude": "of DoRA, which is not supported", "img|image|add_[kv]": "an image model's",
               "bias$|diff_b$": "a bias, which is not supported", "": "of no layer of this model"}
LORA_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}
LORA_PREFIX = r"(?:(?:base_model\.model|diffusion_model|transformer|pipe\.dit)\.|lora_unet__?)*"
LORA_KEY = re.compile(rf"{LORA_PREFIX}(.+?)\.({'|'.join(LORA_PARTS)})(\.default)?(\.weight)?")


def read_lora(path, shapes):
    """{official layer name: (A, B)} fp32 of a LoRA file, its strength folded into B; shapes: {name: (out,
    in)} of the model's layers. Read are the spellings of diffusers, peft, ComfyUI, DiffSynth, kohya and
    musubi.

    The strength is alpha / rank, or alpha / sqrt(rank) with rsLoRA: alpha stands in `<layer>.alpha` or in the
    header, of a layer or of all. UserError names a tensor that has no place: an adapter that loads in part is
    worse than one that doesn't.
    """
    tensors, metadata = read_tensors(path)
    try:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        header = {key.removeprefix("transformer."): value for key, value in header.items()}
    except (ValueError, AttributeError):
        raise UserError(f"{path} has a header that is no JSON object under lora_adapter_metadata") from None
    flat, layers = {name.replace(".", "_"): name for name in shapes}, {}
    for key, x in tensors.items():
        match = LORA_KEY.fullmatch(key)
        name = to_official(match[1]) if match else key
        name = flat.get(name, name)
        if match is None or name not in shapes:
            why = next(what for pattern, what in LORA_FAULTS.items() if re.search(pattern, key))
            raise UserError(f"{path}: {key} is {why}")
        layers.setdefault(name, {})[LORA_PARTS[match[2]]] = x.float()
    found = {}
    for name, layer in layers.items():
        if not {"A", "B"} <= layer.keys():
            raise UserError(f"{path}: {name} is not a pair of lora_A and lora_B")
        A, B, rank = layer["A"], layer["B"], len(layer["A"])
        if (len(B), A.shape[1]) != shapes[name]:
            raise UserError(f"{path}: {name} is of a layer of {len(B)} x {A.shape[1]}, and this model's is "
                            f"{shapes[name][0]} x {shapes[name][1]}: it is another model's")
        alpha = header.get("lora_alpha", rank)
        for pattern, value in (header.get("alpha_pattern") or {}).items():
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", to_diffusers(name)) else alpha
        alpha = float(layer.get("alpha", alpha))
        found[name] = A, B * (alpha / (math.sqrt(rank) if header.get("use_rslora") else rank))
    if not found:
        raise UserError(f"{path} holds no adapters")
    return found


# ---- files ----

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """A fault that the user can mend: data.launch prints its one line and leaves with exit status 2."""


def find(path):
    """The folder at path, as given or beside this file, so that `assets/base` works from anywhere; None where
    it can only be a hub repository. UserError where it can't be one either.
    """
    for folder in (Path(path), HERE / path):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{path} is a file: a folder is needed")
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("runs/")
    if not of_hub or Path(path).parent.is_dir():
        raise UserError(f"{path} does not exist: name a run folder, a model's folder or a hub repository")
    return None


def fetch(path, wanted):
    """The folder at path, see find, or the wanted files of the hub repository of that name. UserError names a
    file that was not downloaded.
    """
    folder = find(path)
    if folder is not None:
        for file in (file for pattern in wanted for file in folder.glob(pattern)):
            check_pointer(file)
        return folder
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f"{path} does not exist here and cannot be had from the hub: {why}") from None


def check_pointer(path):
    """UserError names a file that is a pointer of git-lfs to its content."""
    small = Path(path).is_file() and Path(path).stat().st_size < 1024
    if small and Path(path).read_bytes().startswith(b"version https://git-lfs."):
        raise UserError(f"{path} is a pointer of git-lfs, not the content: run git lfs pull there")


def read_json(path):
    """The object in a JSON file. UserError names a file that holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def read_config(raw, path):
    """The Config that the config.json of diffusers or of official Wan holds, given as raw; path: where it
    stands. UserError for another architecture.
    """
    if "attention_head_dim" in raw:                                             # diffusers' keys
        raw = raw | {ours: raw.get(theirs) for ours, theirs in DIFFUSERS_CONFIG.items()}
        heads = raw["num_heads"]
        raw["dim"] = heads * raw["attention_head_dim"] if is_size(heads, 1) else None
    usual = vars(Config())
    sizes = {name: raw.get(name, value) for name, value in usual.items()}
    for name, value in sizes.items():
        if not is_size(value, usual[name]):
            raise UserError(f"{path}: {name} = {value} is not a valid size")
    channels = None, sizes["in_dim"]
    allowed = {"_class_name": ("WanModel", "WanTransformer3DModel"), "model_type": ("t2v",),
               "image_dim": (None,), "out_channels": channels, "out_dim": channels}
    for key, values in allowed.items():
        if raw.get(key, values[0]) not in values:
            raise UserError(f"{path}: only Wan's text-to-video is supported, not {key} = {raw[key]}")
    return Config(**sizes | {"patch_size": tuple(sizes["patch_size"])})


def is_size(x, usual):
    """Whether x can be where a number, or three of them, is usual: one of its kind, above 0 and not huge."""
    if isinstance(usual, tuple):
        return isinstance(x, list) and len(x) == len(usual) and all(is_size(n, 1) for n in x)
    return isinstance(x, type(usual)) and 0 < x < 2**20


def unshard(x):
    """The tensor x put together from the shards of all processes, where it has any."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def save_tensors(tensors, path, metadata=None):
    """Write tensors as safetensors, to a temporary name and then renamed: no reader meets half a file. The
    same tensors and metadata give the same bytes.

    Of several processes only the first writes; where tensors are sharded all must call this, to put them
    together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = {k: unshard(v).detach().cpu().contiguous() for k, v in tensors.items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    try:
        save_file(tensors, f"{path}.tmp", {"format": "pt", **(metadata or {})})
    except SafetensorError as e:                                                # such as a full disk
        raise OSError(f"{path} cannot be written: {e}") from None
    with open(f"{path}.tmp", "r+b") as file:                                   # safetensors shuffles metadata
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
    umask = os.umask(0)                                                    # it can't be read without a change
    os.umask(umask)
    os.chmod(f"{path}.tmp", 0o666 & ~umask)                          # safetensors' files are the user's alone
    os.replace(f"{path}.tmp", path)


def read_tensors(path, metadata_only=False):
    """(tensors, metadata) of a safetensors file. UserError names a file that is none or is cut short."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            keys = [] if metadata_only else file.keys()
            return {k: file.get_tensor(k) for k in keys}, file.metadata() or {}
    except (SafetensorError, OSError) as e:
        check_pointer(path)
        raise UserError(f"{path} cannot be read as safetensors: {e}") from None


def load_strict(module, tensors, path):
    """Give the module these tensors as its own. UserError names the missing, unexpected and misshapen, and
    those that are no floating-point numbers.
    """
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        _, *faults = str(e).splitlines()
        raise UserError(f"{path} does not fit the model: {shorten(' '.join(faults), 300)}") from None


if __name__ == "__main__":
    import time
    print("| preset | parameters | width | layers | heads |\n|---|---|---|---|---|")
    for name, c in PRESETS.items():
        with torch.device("meta"):
            size = sum(p.numel() for p in VideoDiT(c).parameters())
        print(f"| {name} | {size:,} | {c.dim} | {c.num_layers} | {c.num_heads} |")
    toy, tic = VideoDiT(PRESETS["toy"]), time.time()
    for _ in range(3):
        toy(torch.randn(24, 3, 8, 24, 24), torch.rand(24), torch.randn(24, 8, 32)).square().mean().backward()
    seconds = (time.time() - tic) / 3
    print(f"toy: {seconds:.2f} s for a forward and backward of 24 videos, {torch.get_num_threads()} threads")
