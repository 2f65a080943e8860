"""The rectified-flow video DiT (Wan 2.1's text-to-video architecture), its attention, LoRA and weights.

    python model.py                  the sizes of the presets

VideoDiT predicts the velocity v = eps - x0 from xt = (1 - t) x0 + t eps (t = 0 is data, t = 1 is noise;
losses.py). Modules carry the official Wan names (`blocks.0.self_attn.q`, ...), so official weights load
without renaming; the toy is a small Config of the same classes. Only torch is needed; safetensors and
huggingface_hub are imported where a file is read or fetched.
"""
import json
import math
import re
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """A fault that the user can mend: data.launch prints its one line and leaves with exit status 2."""


# ---- configuration ----

DIFFUSERS_CONFIG = {"in_dim": "in_channels", "num_heads": "num_attention_heads"}     # other names are equal


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
        """The config.json of diffusers' WanTransformer3DModel; what is left out has its default there."""
        sizes = {DIFFUSERS_CONFIG.get(name, name): x for name, x in vars(self).items() if name != "dim"}
        return {"_class_name": "WanTransformer3DModel", **sizes, "out_channels": self.in_dim,
                "attention_head_dim": self.dim // self.num_heads}


PRESETS = {
    "toy": Config(patch_size=(2, 4, 4), in_dim=3, dim=160, ffn_dim=320, freq_dim=128, text_dim=32,
                  num_heads=5, num_layers=6),
    "wan-1.3b": Config(),
    "wan-14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),     # and each expert of 2.2 A14B
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
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))         # (L, 3)
    space, angles = 2 * (head_dim // 6), []
    for place, width in zip(places.unbind(1), (head_dim - 2 * space, space, space)):
        freqs = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(place[:, None] * freqs)                                    # (L, width / 2)
    angles = torch.cat(angles, dim=1)                                            # (L, head_dim / 2)
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
        """(B, L, D) from x (B, L, D) and, across, context (B, S, D). Padding of the text is not masked, as in
        Wan.
        """
        context = x if context is None else context
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (y.type_as(v).unflatten(2, (self.num_heads, -1)) for y in (q, k, v))   # heads apart
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))               # views: what was rotated is contiguous
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(d_in, d_hidden, d_out, activation):
    """Linear, activation, linear; the linear maps are modules 0 and 2, as in Wan."""
    return nn.Sequential(nn.Linear(d_in, d_hidden), activation, nn.Linear(d_hidden, d_out))


def keep_self_attention(ctx, op, *args, **kwargs):
    """The policy of activation checkpointing: only the result of self-attention is kept.

    It is dear to compute again and small to store. Cross-attention runs in the same kernels, but is cheap as
    the text has few keys.
    """
    is_self = "_scaled_dot_product" in str(op) and args[0].shape == args[1].shape       # as many q as k
    return CheckpointPolicy.MUST_SAVE if is_self else CheckpointPolicy.PREFER_RECOMPUTE


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
            keep = partial(create_selective_checkpoint_contexts, keep_self_attention)
            return checkpoint(self.layers, x, e, text, rope, use_reentrant=False, context_fn=keep)
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
    """Wan 2.1's text-to-video transformer. It predicts the velocity v of a noisy latent video xt at time t
    from the embedding of a prompt.
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
        """Linear maps get Xavier's weights, the embeddings of text and time small normal ones. The head's are
        zero, so that an untrained model says v = 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for linear in (*self.text_embedding[::2], *self.time_embedding[::2]):
            nn.init.normal_(linear.weight, std=0.02)
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
        x = x.view(-1, *grid, *self.config.patch_size, self.config.in_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)                          # (B, C, T, H, W)

    @classmethod
    def from_pretrained(cls, path, dtype=None, part="transformer"):
        """The model in a folder or hub repository, in the layout of diffusers or of official Wan; part: the
        folder in it that holds the transformer, if there is one.

        dtype None keeps the file's own; else it is that of the linear maps, and the FP32_ISLANDS are fp32.
        Tensors are mapped from the file and assigned, so there is never a second copy. UserError names
        weights that are missing, unexpected, misshapen or not finite, and another architecture.
        """
        folder = fetch(path, ["config.json", "diffusion_pytorch_model*", f"{part}/*"])
        folder = folder / part if (folder / part).is_dir() else folder
        with torch.device("meta"):
            model = cls(read_config(read_json(folder / "config.json"), folder / "config.json"))
        own = {to_diffusers(name): name for name in model.state_dict()}
        tensors = {own.get(k, k): v for k, v in read_weights(folder, "diffusion_pytorch_model").items()}
        if dtype is not None:
            fp32 = {k for k in tensors if any(island in k for island in FP32_ISLANDS)}
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
        """torch.compile, block by block and in place: one compilation serves all, parameter names stay.

        It is compiled anew for each size of a micro-batch, with and without gradients, with and without
        adapters. Above its limit of such variants, 8 by default, torch runs them uncompiled.
        """
        torch._dynamo.config.recompile_limit = 64
        # attention counts as random, for a dropout that is 0 here: its state is kept in the plainer way
        torch._functorch.config.graphsafe_rng_functionalization = False
        for block in self.blocks:
            block.compile(dynamic=False)


class Experts(nn.Module):
    """Wan 2.2 A14B: a VideoDiT for times from boundary up and another below. The one in use comes to the
    device of xt, the other goes to the CPU.
    """

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high, self.low, self.boundary, self.config = high, low, boundary, high.config

    def forward(self, xt, t, text):
        """Velocity like xt (B, C, T, H, W), at one time t (B,) for all."""
        expert, other = (self.high, self.low) if t[0] >= self.boundary else (self.low, self.high)
        other.cpu()                                                     # nothing moves that is there already
        return expert.to(xt.device)(xt, t, text)


# ---- LoRA (Hu et al. 2021, arXiv:2106.09685) ----

class LoRALinear(nn.Module):
    """A frozen linear layer plus scale B A, with A (rank, in) and B (out, rank) in fp32. earlier: (A, B) of
    earlier rounds, which are frozen and always on.
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
    """Freeze the model and put adapters of scale alpha / rank on the linear layers of its blocks that have
    these names. Returns the model, which still computes the same, as B starts at zero.

    A layer that has adapters already keeps them, as those of an earlier round. A is a function of the seed,
    drawn on the CPU; the global generator stays as it is. A model without `blocks`, such as a language model,
    is searched as a whole.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    searched = getattr(model, "blocks", model)
    for name, m in list(searched.named_modules()):
        if isinstance(m, LoRALinear) or (isinstance(m, nn.Linear) and name.split(".")[-1] in targets):
            A, B = torch.empty(rank, m.weight.shape[1]), torch.zeros(m.weight.shape[0], rank)
            nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
            earlier = m.joined() if isinstance(m, LoRALinear) else (None, None)
            searched.set_submodule(name, LoRALinear(m, A, B, alpha / rank, earlier))
    return model


def merge_lora(model):
    """Fold all adapters into the weights, rounded to their dtype. Returns the model, which then has none."""
    for name, m in list(model.named_modules()):
        if isinstance(m, LoRALinear):
            linear, (A, B) = nn.Linear(*m.weight.T.shape, device="meta"), m.joined()
            linear.weight, linear.bias = nn.Parameter((m.weight.float() + B @ A).type_as(m.weight)), m.bias
            model.set_submodule(name, linear)
    return model.requires_grad_(False)


@contextmanager
def lora_disabled(model):
    """Switches the newest adapters off. What remains is Flow-DPO's reference: the pretrained model with the
    adapters of earlier rounds, bit for bit where it is not compiled.
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
    """Write the adapters as `diffusion_model.<official name>.lora_{A,B}.weight` in fp32, alpha / rank folded
    into B and all rounds joined along the rank, so that the file is relative to the pretrained model.

    Folded, because many loaders drop a separate alpha in silence. The prefix and the names are those that
    ComfyUI, diffusers and DiffSynth read. metadata: strings for the file's header.
    """
    tensors = {f"diffusion_model.{name}.lora_{letter}.weight": x
               for name, m in model.named_modules() if isinstance(m, LoRALinear)
               for letter, x in zip("AB", m.joined())}
    save_tensors(tensors, path, metadata)


def load_lora(model, path):
    """Add the adapters in a file, see read_lora, to those that the model has. Returns the model, whose
    adapters lora_disabled switches off together.
    """
    own = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))}
    for name, (A, B) in read_lora(path, {name: m.weight.shape for name, m in own.items()}).items():
        if isinstance(own[name], LoRALinear):
            A, B = join(own[name].joined(), (A, B))
        model.set_submodule(name, LoRALinear(own[name], A, B))
    return model.requires_grad_(False)


# ---- foreign names ----

NAMES = {                                            # parts of parameters' names: official Wan's, diffusers'
    "self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",        # norm3 is the text's norm
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "head.modulation": "scale_shift_table", "modulation": "scale_shift_table",
    **{f"{what}_embedding.{ours}": f"condition_embedder.{what}_embedder.linear_{theirs}"
       for what in ("text", "time") for ours, theirs in ((0, 1), (2, 2))}}


def to_diffusers(name):
    """diffusers' name of an official Wan parameter or layer."""
    return re.sub(rf"\b({'|'.join(map(re.escape, NAMES))})\b", lambda match: NAMES[match[1]], name)


# How LoRA files name adapters: ComfyUI and we, diffusers, peft, and kohya, who has _ for the dots in names.
LORA_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}
LORA_KEY = re.compile(r"(?:diffusion_model\.|transformer\.|base_model\.model\.|lora_unet__?)(.+)\."
                      rf"({'|'.join(LORA_PARTS)})(?:\.weight)?")


def read_alpha(path, tensors, metadata):
    """The alpha of all layers of a LoRA file, from the adapter_config.json that peft writes beside it or from
    the header that diffusers writes into it. None where no alpha is told.
    """
    text = metadata.get("lora_adapter_metadata", "{}")
    if any(key.startswith("base_model.") for key in tensors):
        path, text = Path(path).parent / "adapter_config.json", None
    settings = {key.removeprefix("transformer."): value for key, value in read_json(path, text).items()}
    other = [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if settings.get(key)]
    alpha = settings.get("lora_alpha")
    if other or (settings and not is_size(alpha, 1.0)):
        raise UserError(f"{path}: only a lora_alpha for all layers is supported, not {other or alpha}")
    return alpha


def read_lora(path, shapes):
    """{layer: (A, B)} of a LoRA file in fp32, its strength alpha / rank folded into B; shapes: {layer: (out,
    in)} of the model. Where no alpha is told the strength is 1.

    Read are our own files, diffusers', peft's beside their adapter_config.json, ComfyUI's and kohya's.
    UserError names a tensor that has no place: an adapter that loads in part is worse than one that doesn't.
    """
    tensors, metadata = read_tensors(path)
    alpha, layers = read_alpha(path, tensors, metadata), {}
    own = {theirs: name for name in shapes for theirs in (name, to_diffusers(name), name.replace(".", "_"))}
    for key, x in tensors.items():
        match = LORA_KEY.fullmatch(key)
        name, part = (own.get(match[1]), LORA_PARTS[match[2]]) if match else (None, None)
        if not name or part in layers.get(name, {}) or (part == "alpha" and x.numel() != 1):
            raise UserError(f"{path}: {key} has no place in this model: only LoRA of its linear layers is "
                            "supported, without DoRA, LoKr, LoHa, biases or image parts")
        layers.setdefault(name, {})[part] = x.float()
    for name, layer in layers.items():
        A, B = (layer.get(part, torch.zeros(0)) for part in "AB")
        (out_features, in_features), rank = shapes[name], A.shape[:1]
        if not A.numel() or A.shape != (*rank, in_features) or B.shape != (out_features, *rank):
            raise UserError(f"{path}: {name} is no pair of this model: A {[*A.shape]}, B {[*B.shape]}")
        layers[name] = A, B * (float(layer.get("alpha", alpha or len(A))) / len(A))
    if not layers:
        raise UserError(f"{path} holds no adapters")
    return layers


# ---- files ----

def find(path):
    """The folder at path, as given or beside this file, so that `assets/base` works from anywhere; None where
    it can only be a hub repository. UserError where it can be neither.
    """
    for folder in (Path(path), HERE / path):
        if folder.is_dir():
            return folder
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("runs/")
    if not of_hub or Path(path).parent.is_dir():
        raise UserError(f"{path} is no folder: name that of a run or a model, or a hub repository")
    return None


def fetch(path, wanted):
    """The folder at path, see find, or else one with the wanted files of the hub repository of that name.
    UserError where they cannot be downloaded.
    """
    if folder := find(path):
        return folder
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} does not exist, here or on the hub: {shorten(str(e), 200)}") from None


def check_pointer(path):
    """UserError names a file that is a pointer of git-lfs to its content."""
    small = Path(path).is_file() and Path(path).stat().st_size < 1024
    if small and Path(path).read_bytes().startswith(b"version https://git-lfs."):
        raise UserError(f"{path} is a pointer of git-lfs, not the content: run git lfs pull there")


def read_json(path, text=None):
    """The object in a JSON file, or in a text from a file. UserError names a file that holds none."""
    try:
        return dict(**json.loads(Path(path).read_text(encoding="utf-8") if text is None else text))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        check_pointer(path)
        raise UserError(f"{path} cannot be read as JSON: {e}") from None


def read_config(raw, path):
    """The Config in raw, what a config.json of diffusers or of official Wan holds; path: that file. UserError
    names what is no size and what is of another architecture.
    """
    if "attention_head_dim" in raw:                                             # diffusers' keys
        raw = raw | {ours: raw.get(theirs) for ours, theirs in DIFFUSERS_CONFIG.items()}
        heads, width = raw["num_heads"], raw["attention_head_dim"]
        raw["dim"] = heads * width if is_size(heads, 1) and is_size(width, 1) else None
    sizes = {name: raw.get(name, usual) for name, usual in vars(Config()).items()}
    fixed = dict(model_type="t2v", image_dim=None, out_channels=sizes["in_dim"], out_dim=sizes["in_dim"])
    wrong = {name: value for name, value in sizes.items() if not is_size(value, getattr(Config, name))}
    wrong |= {name: raw[name] for name, value in fixed.items() if raw.get(name) not in (None, value)}
    if wrong:
        raise UserError(f"{path} is not of a text-to-video Wan: {wrong}")
    return Config(**sizes | {"patch_size": tuple(sizes["patch_size"])})


def is_size(x, usual):
    """Whether x can stand where usual does, a number or three: of its kind, above 0 and not huge."""
    if isinstance(usual, tuple):
        return isinstance(x, list) and len(x) == len(usual) and all(is_size(n, 1) for n in x)
    return isinstance(x, (int, type(usual))) and 0 < x < 2**20


def unshard(x):
    """The tensor x put together from the shards of all processes, where it has any."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def write_whole(path, content):
    """Write bytes to a name that no other writer has, then rename it: no reader meets half a file."""
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(path)


def save_tensors(tensors, path, metadata=None):
    """Write tensors as safetensors. The same tensors and metadata give the same bytes.

    Of several processes only the first writes. Where tensors are sharded all must call this, since each has a
    part of them.
    """
    from safetensors.torch import save
    tensors = {k: unshard(v).detach().cpu().contiguous() for k, v in tensors.items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    content = bytearray(save(tensors, {"format": "pt", **(metadata or {})}))
    end = 8 + int.from_bytes(content[:8], "little")                            # of the header, which is JSON
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content[8:end] = header.encode().ljust(end - 8)                            # safetensors shuffles metadata
    write_whole(path, content)


def read_tensors(path, metadata_only=False):
    """(tensors, metadata) of a safetensors file. UserError names a file that is none or is cut short, and
    tensors that are not finite.
    """
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            tensors = {} if metadata_only else {k: file.get_tensor(k) for k in file.keys()}
            check_finite(tensors, path)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as e:
        check_pointer(path)
        raise UserError(f"{path} cannot be read as safetensors: {e}") from None


def check_finite(tensors, path):
    """UserError names a tensor of the file at path that holds nan or infinity, as its sum then is one too."""
    for name, x in tensors.items():
        if not x.sum(dtype=torch.float32).isfinite():
            raise UserError(f"{path}: {name} holds numbers that are not finite: make or download it again")


def read_weights(folder, name):
    """The tensors of a model in a folder: those in the shards that <name>.safetensors.index.json names or,
    where there is no index, in <name>.safetensors. All other files are left alone.
    """
    index = folder / f"{name}.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.exists() else {"all": f"{name}.safetensors"}
    if not isinstance(shards, dict):
        raise UserError(f"{index} holds no weight_map")
    return {k: v for file in sorted(set(shards.values())) for k, v in read_tensors(folder / file)[0].items()}


def load_strict(module, tensors, path):
    """Give the module these tensors as its own. UserError names those that are missing, unexpected, misshapen
    or no floating-point numbers.
    """
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the model: {shorten(str(e).split(':', 1)[-1], 300)}") from None


if __name__ == "__main__":
    for name, config in PRESETS.items():
        print(f"{name}: {config}")
