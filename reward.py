"""Video reward models: (latents or pixels, prompt) to scores (B, 3) for VQ, MQ, TA, and their accuracies.

    python reward.py                                                      the toy reward beside the oracle
    python reward.py --video a.mp4 --prompt "a red circle moving left"    the scores of a video
    python reward.py --video a.mp4 --prompt "a dog" --ckpt KwaiVGI/VideoReward --template prompt_template.py

VideoReward is the paper's reward model (Sec. 3): Qwen2-VL reads the video, a rubric and the prompt, and a
linear head turns its states at three special tokens into VQ, MQ and TA. LatentReward is the noisy-latent
reward (Sec. 4.4, Table 11): the first few blocks of the video DiT and a head with three outputs, told the
time t. Trained at t = 0 it is the labeller of the toy world; trained at all t it guides sampling. Scores are
z-normalised on a validation set: 0 is an average video, negative is below average, not wrong.
"""
import ast
import json
import math
import pickle
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import (DIMS, RANK, RANKS, Shapes, all_gather, cached_file, caption_of, check_world, content_hash,
                  flawed_videos, gather_rows, is_cached, known_hash, launch, load_cached, markdown,
                  metadata_of, normalised, oracle, progress, read_shapes, read_video, rng, save_cached,
                  short_hash, true_scores, video_info, with_overall, write_json)
from model import (LayerNorm, UserError, VideoDiT, add_lora, check_finite, fetch, load_strict,
                   read_config, read_json, read_tensors, read_weights, save_tensors)


# ---- the latent reward ----

class LatentReward(nn.Module):
    """Scores of noisy latents: the first blocks of a VideoDiT, one attention query and head per dimension.

    The paper does not describe its head. Two things matter in this one: tokens meet a nonlinearity before
    they are pooled, since their mean alone hardly tells a circle from a square; and the prompt multiplies
    what was pooled, since whether a video shows what it says is a product of both.
    """

    def __init__(self, config, depth=2):
        super().__init__()
        self.config, self.depth = config, depth
        self.reads = "shapes" if config.in_dim == 3 else "wan"              # the world whose latents it reads
        self.dit = VideoDiT(replace(config, num_layers=depth))
        self.dit.head = None                                                    # it draws no video
        self.norm = LayerNorm(config.dim, config.eps)
        self.query = nn.Parameter(torch.randn(len(DIMS), config.dim) / config.dim**0.5)
        self.hidden, self.word = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        nn.init.normal_(self.word.weight, std=config.dim**-0.5)
        self.out = nn.Parameter(torch.randn(len(DIMS), config.dim) / config.dim**0.5)
        self.register_buffer("mean", torch.zeros(len(DIMS)))             # of raw scores on the validation set
        self.register_buffer("std", torch.ones(len(DIMS)))

    def forward(self, xt, t, text):
        """Raw scores (B, 3) fp32 from xt (B, C, T, H, W), t (B,) in [0, 1] and text (B, S, text_dim); of
        Wan's latents in bf16 autocast, as it is trained.
        """
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=self.reads == "wan"):
            h = self.norm(self.dit(xt, t, text, depth=self.depth))              # (B, L, D)
            weight = (h @ self.query.T).softmax(dim=1)                          # (B, L, 3): of each dimension
            h = weight.transpose(1, 2) @ F.gelu(self.hidden(h))                 # (B, 3, D)
            text_mask = text.any(dim=-1, keepdim=True).type_as(text)        # (B, S, 1): 0 after the last word
            words = (self.dit.text_embedding(text) * text_mask).sum(1) / text_mask.sum(1).clamp(min=1)
            gate = 1 + self.word(F.layer_norm(words, words.shape[-1:]))         # (B, D)
            return (h * gate[:, None] * self.out).sum(-1).float()

    def score(self, xt, t, text):
        """Z-scores (B, 3), see z_scores."""
        return z_scores(self, self(xt, t, text))

    @torch.no_grad()
    def score_drawn(self, latents, text, files, prompts):
        """Z-scores (n, 3), on the CPU, of what a model drew, from its clean latents (t = 0) and the prompts'
        text.
        """
        batch, device = 64 if self.reads == "shapes" else 1, self.mean.device   # one of Wan's fills a GPU
        r = [self.score(x.to(device), torch.zeros(len(x), device=device), y.to(device)).cpu()
             for x, y in zip(latents.split(batch), text.split(batch))]
        return finite(torch.cat(r), files or prompts)

    def score_pairs(self, world, pairs, cache):
        """Z-scores (n, 2, 3) of A and B of encoded Pairs."""
        r, chunks = [], torch.arange(len(pairs)).split(256 if self.reads == "shapes" else 1)
        for rows in progress(chunks[RANK::RANKS], "scoring"):
            text = world.text(pairs, rows).repeat_interleave(2, dim=0)          # the same for A and B
            names = [f"{side} of row {line}" for line in (pairs.lines[i] for i in rows) for side in "AB"]
            r.append(self.score_drawn(world.latents(pairs, rows).flatten(0, 1), text, names, None))
        return torch.cat(gather_rows(r)).view(-1, 2, len(DIMS))

    @classmethod
    def from_base(cls, model, depth=2):
        """A LatentReward whose blocks start as the first ones of a pretrained VideoDiT, as in the paper."""
        reward = cls(model.config, depth)
        reward.dit.load_state_dict(model.state_dict(), strict=False)           # it has more blocks and a head
        return reward

    def save(self, folder, facts):
        """Write the weights in 16 bit; beside these facts the file says its world and how to build the model.
        """
        own = {"config": json.dumps(self.config.to_diffusers()), "depth": str(self.depth)}
        world = Shapes().metadata if self.reads == "shapes" else {}
        weights = {k: v.half() for k, v in self.state_dict().items()}
        save_tensors(weights, folder / "reward.safetensors", facts | own | world)

    @classmethod
    def from_pretrained(cls, path):
        """The reward of a run folder of train_reward.py, fp32 and in eval mode."""
        file = fetch(path, ["reward.safetensors"]) / "reward.safetensors"
        tensors, metadata = read_tensors(file)
        if "world" in metadata:
            check_world(metadata, file)
        config = read_config(read_json(file, metadata.get("config", "")), file)
        reward = cls(config, int(metadata.get("depth", 0)))                 # load_strict refuses a wrong one
        load_strict(reward, {k: v.float() for k, v in tensors.items()}, file)
        return reward.eval().requires_grad_(False)


class Oracle:
    """The truth of Shapes world in the place of a reward."""

    def score_pairs(self, world, pairs, cache):
        return normalised(true_scores(pairs))

    def score_drawn(self, latents, text, files, prompts):
        return normalised(oracle(latents, prompts))


def z_scores(reward, r):
    """Raw scores r (.., 3) less the mean of the validation set, in units of its standard deviation."""
    return (r - reward.mean.to(r)) / reward.std.to(r)


def finite(r, names):
    """The scores r (n, 3) of videos with these names. UserError names the first with a nan or inf in it."""
    bad = [name for name, row in zip(names, r) if not row.isfinite().all()]
    if bad:
        raise UserError(f"the scores of {bad[0]} are not finite: this video or the reward is damaged")
    return r


# ---- VideoReward: what it is asked ----

TOKENS = tuple(f"<|{dim}_reward|>" for dim in DIMS)     # the scores are read where these stand, in this order
# Our own prompt. Attention is causal: in it VQ and MQ are read before the text is told, so that they can't
# depend on it.
RUBRIC = """A model made this video from a text. Rate it from 0 to 10 on three scales, which are kept apart.

Visual quality is how single frames look, whatever they show: well-formed things and bodies, sharp edges and \
textures without noise, blocks or ghosts, pleasing light, colour and composition, nothing cruel or indecent.
Visual quality: <|VQ_reward|>

Motion quality is how the picture changes, whatever it shows: things keep their form, move as anatomy and \
physics allow, neither flicker nor vanish, and do move: a video that stands still is rated low.
Motion quality: <|MQ_reward|>

Text alignment is whether the video shows what the text asks for: the subjects, how many, how they look and \
what they do, the place, the weather, the style, the view and the movement of the camera.
The text: {text_prompt}
Text alignment: <|TA_reward|>"""
THEIR_TEMPLATE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"


def read_template(path):
    """The prompt of the released checkpoint: a string constant in the authors' prompt_template.py, which is
    parsed and never executed.
    """
    text = ""
    try:
        for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == THEIR_TEMPLATE:
                text = ast.literal_eval(node.value)
        text.format(text_prompt="")                                             # it has no other field
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"--template {path} cannot be read: {e}") from None
    marks = [*TOKENS[:2], "{text_prompt}", TOKENS[2]]                           # each once and in this order
    if re.findall("|".join(map(re.escape, marks)), text) != marks:
        raise UserError(f"--template {path} must set {THEIR_TEMPLATE} to a text with {', '.join(marks)}")
    return text


# ---- VideoReward: what it sees ----

PATCH, MERGE = 14, 2                  # pixels of a patch, and patches (also frames) that are merged, each way
MIN_PIXELS, MAX_PIXELS = 100_352, 200_704   # of a frame: 128 and 256 tokens of 28 x 28
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)    # CLIP's
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def frame_indices(total, fps, rate=2.0):
    """Which of a video's frames are looked at: an even number, from the first to the last at equal steps.

    About rate a second, 4 to 768. A single frame is shown twice. Python's round goes to even halves, as in
    the authors' code: 60 frames give 4 at 24 fps and 6 at 23.976.
    """
    n = min(max(total / fps * rate, 4), min(768, total) // 2 * 2)
    return torch.linspace(0, total - 1, max(2, 2 * round(n / 2))).round().long().tolist()


def frame_size(height, width, max_pixels=MAX_PIXELS, path="the video"):
    """(height, width) to which frames are resized: multiples of 28, the area within bounds, the shape kept.

    UserError names a path that is too narrow. A bound is checked after rounding, and frames that were shrunk
    are not enlarged again: all as in the authors' code, since the score depends on it.
    """
    side = PATCH * MERGE
    h, w = (round(x / side) * side for x in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (math.floor(x / shrink / side) * side for x in (height, width))
    elif h * w < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        h, w = (math.ceil(x * grow / side) * side for x in (height, width))
    if max(height, width) > 200 * min(height, width) or not h * w:
        raise UserError(f"{path} is {height} x {width}: too narrow to be scored")
    return h, w


def patchify(frames, size):
    """(patches (N, 1176), grid (T / 2, rows, columns)) of uint8 frames (T, H, W, 3), T even, resized to size.

    A patch spans two frames; the four that become one token follow each other.
    """
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()                    # (T, 3, H, W)
    x = F.interpolate(x, size, mode="bicubic", antialias=True)
    x = (x.round().clamp(0, 255) / 255 - PIXEL_MEAN) / PIXEL_STD           # whole grey levels, as in training
    grid = len(x) // MERGE, x.shape[2] // PATCH, x.shape[3] // PATCH
    x = x.view(grid[0], MERGE, 3, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(0, 4).flatten(1), torch.tensor(grid)


def check_video(path):
    """UserError names a video file that can't be scored, or can't be seen to its end."""
    count, _, *size = video_info(path)
    frame_size(*size, path=path)
    read_video(path, [count - 1])


# ---- VideoReward: the model ----

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # those that get LoRA
# The settings of a checkpoint, which may have numbers of its own, and those that have this one value alone.
SETTINGS = dict(fps=2.0, max_frame_pixels=MAX_PIXELS, lora_r=64, lora_alpha=128, mean=[0.] * 3, std=[1.] * 3)
FIXED = dict(prompt_template_type="detailed_special", reward_token="special", output_dim=1, num_frames=None,
             sample_type="uniform", use_rslora=False)


class VideoReward(nn.Module):
    """The paper's VideoReward: Qwen2-VL with a bias-free linear head, read at three special tokens. Sec. 3.2.

    settings: SETTINGS and "template", the text with a {text_prompt} in it that follows the video.
    """
    reads = "files"

    def __init__(self, config, tokenizer, settings):
        super().__init__()
        from transformers import Qwen2VLModel
        from transformers.initialization import no_init_weights
        self.tokenizer, self.settings = tokenizer, settings
        self.token_ids = tokenizer.convert_tokens_to_ids(TOKENS)
        self.video_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        config.text_config.vocab_size = len(tokenizer)                          # Qwen's spare rows go
        with no_init_weights():                                                 # all weights come from files
            self.qwen = Qwen2VLModel(config)
        width = config.text_config.hidden_size
        self.rows = nn.Parameter(torch.zeros(len(TOKENS), width))             # the special tokens' embeddings
        self.rm_head = nn.Linear(width, 1, bias=False)
        for name in ("mean", "std"):                                     # of raw scores on the validation set
            self.register_buffer(name, torch.tensor(settings[name]), persistent=False)

    def inputs(self, paths, prompts):
        """Ids and mask (B, L), padded right, patches (N, 1176) of all videos and grids (B, 3), for forward.

        UserError names a video that can't be scored, or a prompt with a special token in it.
        """
        ids, patches, grids, s = [], [], [], self.settings
        for path, prompt in zip(paths, prompts, strict=True):
            total, fps, *size = video_info(path)
            frames, _ = read_video(path, frame_indices(total, fps, s["fps"]))
            x, grid = patchify(frames, frame_size(*size, s["max_frame_pixels"], path))
            content = [{"type": "video"}, {"type": "text", "text": s["template"].format(text_prompt=prompt)}]
            chat = [{"role": "user", "content": content}]                       # with its default system turn
            chat = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            places = len(x) // MERGE**2                                      # one token for each merged patch
            text = chat.replace("<|video_pad|>", "<|video_pad|>" * places, 1)
            ids.append(torch.tensor(self.tokenizer(text).input_ids))
            patches.append(x)
            grids.append(grid)
            counts = [(ids[-1] == i).sum().item() for i in (self.video_id, *self.token_ids)]
            if counts != [places, 1, 1, 1]:
                raise UserError(f"the prompt '{prompt}' holds a special token, such as {TOKENS[0]}")
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        return pad_sequence(ids, batch_first=True), mask, torch.cat(patches), torch.stack(grids)

    def forward(self, ids, mask, patches, grids):
        """Raw scores (B, 3) fp32 of what `inputs` returns."""
        text, B, L = self.qwen.language_model, *ids.shape
        # Plain positions 0..L-1 on all three rotary axes, not Qwen2-VL's frame, row and column for video:
        # the authors hand embeddings to the language model, and transformers counted plainly then, in
        # training and after. With the others the released weights give other scores.
        positions = torch.arange(L, device=ids.device).expand(3, B, L)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.training and ids.is_cuda):
            x = text.embed_tokens(ids)                                          # (B, L, D)
            for i, row in zip(self.token_ids, self.rows):
                x = torch.where((ids == i)[..., None], row.type_as(x), x)
            seen = self.qwen.visual(patches.to(self.qwen.visual.dtype), grid_thw=grids).pooler_output
            x = x.masked_scatter((ids == self.video_id)[..., None], seen.type_as(x))
            h = text(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)
        at = torch.stack([(ids == i).int().argmax(1) for i in self.token_ids], dim=1)          # (B, 3)
        h = h.last_hidden_state[torch.arange(B, device=ids.device)[:, None], at].float()       # (B, 3, D)
        return self.rm_head(h)[..., 0]

    @torch.no_grad()
    def score(self, paths, prompts, normalise=True):
        """Scores (B, 3) of video files and their prompts: z-scores by the checkpoint's constants, or raw."""
        r = torch.cat([self(*(x.to(self.mean.device) for x in self.inputs([path], [prompt]))).cpu()
                       for path, prompt in zip(paths, prompts, strict=True)])
        return finite(z_scores(self, r) if normalise else r, paths)

    def score_pairs(self, world, pairs, cache):
        """Z-scores (n, 2, 3) of the files of Pairs, A and B; cache: folder of earlier scores."""
        paths = [path for pair in pairs.videos for path in pair]
        prompts = [prompt for prompt in pairs.prompts for _ in "AB"]
        return score_videos(self, paths, prompts, cache).view(-1, 2, len(DIMS))

    def score_drawn(self, latents, text, files, prompts):
        """Z-scores (n, 3) of what a model drew, from its files."""
        return self.score(files, prompts)

    def trainable(self, seed=0):
        """Make trainable what the paper trains: all of the vision tower and merger, LoRA on the language
        model's linear layers, the head and the three embedding rows. Returns the model, in training mode.

        All of that is in fp32, since steps of 2e-6 vanish in bf16; the rest keeps its dtype.
        """
        self.requires_grad_(True)
        rank, alpha = self.settings["lora_r"], self.settings["lora_alpha"]
        add_lora(self.qwen.language_model, rank, alpha, LINEARS, seed)
        self.qwen.visual.float()
        self.qwen.activation_checkpointing_enable({"use_reentrant": False})
        return self.train()

    def save(self, folder, metadata):
        """Write a folder that from_pretrained reads: unmerged weights, settings and constants, and in base/
        what the Qwen2-VL is.
        """
        save_tensors(self.state_dict(), folder / "reward.safetensors", metadata)
        constants = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        write_json(folder / "model_config.json", {"settings": self.settings | constants})
        self.qwen.config.save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")

    def load(self, tensors, source, dtype):
        """Take these tensors as weights, LoRA merged, Qwen2-VL in dtype, head and rows in fp32; returns self.

        source: their name, for messages.
        """
        merge_adapters(tensors, self.settings)
        if len(tensors.get(EMBEDDING, ())) == len(self.tokenizer):
            tensors.setdefault("rows", tensors[EMBEDDING][self.token_ids])
        load_strict(self, tensors, source)
        for name, p in self.named_parameters():
            p.data = p.data.to(dtype if name.startswith("qwen.") else torch.float32)
        return self

    @classmethod
    def from_base(cls, base, template=None, dtype=torch.float32):
        """An untrained VideoReward on a Qwen2-VL folder or hub repository in dtype, with new head and tokens.
        """
        settings = SETTINGS | {"template": read_template(template) if template else RUBRIC}
        folder = fetch(base, [*BASE_FILES, "*.safetensors*"])
        config, tokenizer = read_base(folder, folder)
        tensors = read_base_weights(folder, len(tokenizer))
        tensors["rm_head.weight"] = 0.02 * torch.randn(1, config.text_config.hidden_size)
        return cls(config, tokenizer, settings).load(tensors, base, dtype)

    @classmethod
    def from_pretrained(cls, checkpoint, base=None, template=None, dtype=torch.float32):
        """The VideoReward of a folder or hub repository, see find_checkpoint, its LoRA merged, in eval mode.

        base: the Qwen2-VL, if not the one that the checkpoint names; template: the file for read_template;
        dtype: of Qwen2-VL. By its identity, of weights, settings and dtype, cached scores know it again.
        """
        folder, files = find_checkpoint(checkpoint)
        settings, named = read_settings(folder, template)
        is_adapter, words = len(files) > 1, files[0].parent / "tokenizer"
        base = fetch(base or named, [*BASE_FILES, "*.safetensors*"] if is_adapter else BASE_FILES)
        config, tokenizer = read_base(base, words if words.is_dir() else base)
        tensors = read_base_weights(base, len(tokenizer)) if is_adapter else {}
        for file in files:                        # the later wins: an adapter may hold the embeddings as well
            tensors |= our_names(unpickle(file) if file.suffix == ".pth" else read_tensors(file)[0])
        reward = cls(config, tokenizer, settings).load(tensors, files[0].parent, dtype)
        own = [*files, *(sorted(base.glob("*.safetensors")) if is_adapter else [])]
        reward.identity = short_hash(settings, str(dtype), [content_hash(file) for file in own])
        if (reward.std == 1).all():
            print(f"{checkpoint} has no constants to normalise by: its scores are raw")
        return reward.eval().requires_grad_(False)


# ---- how good is a reward? ----

def accuracy_without_ties(label, d):
    """Share of the pairs labelled +1 or -1 whose difference d = r_A - r_B has that sign, not 0. App. H.3.

    label, d: (n,). Ties and nan labels count nowhere; nan where nothing is left.
    """
    decided = (label == 1) | (label == -1)
    return (d[decided].sign() == label[decided]).float().mean().item()


def accuracy_with_ties(label, d):
    """Share of labels +1, 0, -1 met by a tie where |d| <= threshold, else by the sign of d, at the best one.

    Tie calibration of Deutsch et al. 2023, Alg. 1; App. H.3. label, d: (n,); nan labels count nowhere. Exact:
    thresholds lie at the ends of groups of equal |d|, and "no ties" is one of them (the authors' script
    misses it and stops inside groups).
    """
    label, d = label[~label.isnan()], d[~label.isnan()].double()
    if len(label) == 0:
        return float("nan")
    size, order = d.abs().sort()
    label, sign = label[order], d[order].sign()
    right = (sign == label).sum()                                               # no ties predicted
    gain = ((label == 0).long() - (sign == label).long()).cumsum(0)        # of calling the smallest ones ties
    ends = torch.cat([size[1:] > size[:-1], torch.tensor([True])])
    return (right + gain[ends].max().clamp(min=0)).item() / len(label)


def accuracies(label, r):
    """{"VQ": {"with": .., "without": ..}, ..} of z-scores r (n, 2, 3) of A and B, for the columns VQ, MQ, TA,
    Overall of label (n, 4) in which any pair is labelled.
    """
    d = with_overall(r[:, 0] - r[:, 1])
    return {dim: {"with": accuracy_with_ties(h, m), "without": accuracy_without_ties(h, m)}
            for dim, h, m in zip((*DIMS, "Overall"), label.T, d.T) if not h.isnan().all()}


# ---- VideoReward: what its files hold ----

EMBEDDING = "qwen.language_model.embed_tokens.weight"
BASE_FILES = ["config.json", "*token*", "chat_template*"]
CHECKPOINT_FILES = ["model_config.json", "checkpoint-*/*.safetensors", "checkpoint-*/*.pth",
                    "checkpoint-*/tokenizer/*", "reward.safetensors", "base/*"]


def is_qwen(name):
    """Whether the folder or hub repository of this name is a Qwen2-VL. UserError where nothing is there, or
    another model for vision and language.
    """
    config = fetch(name, ["config.json"]) / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind not in ("qwen2_vl", "t2v", None):
        raise UserError(f"{name} is a {kind}: of vision-language models only Qwen2-VL is supported")
    return kind == "qwen2_vl"


def unpickle(path):
    """The tensors of a .pth file, read without running what a pickle could hold. UserError names a bad file.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_finite(tensors, path)                   # an AttributeError where it is no dictionary of tensors
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} cannot be read as tensors: {str(e).splitlines()[0]}") from None
    return tensors


def find_checkpoint(checkpoint):
    """(folder of model_config.json, files of the weights) of a VideoReward in one of three layouts: what save
    writes, or of the authors' last checkpoint-<step>/ a whole model, or an adapter's two files.
    """
    folder = fetch(checkpoint, CHECKPOINT_FILES)
    steps = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    last = steps[max(steps)] if steps else folder
    for files in ([folder / "reward.safetensors"], [last / "model.pth"],
                  [last / "non_lora_state_dict.pth", last / "adapter_model.safetensors"]):
        if all(file.exists() for file in [folder / "model_config.json", *files]):
            return folder, files
    raise UserError(f"{checkpoint} is no whole VideoReward: model_config.json or the weights are missing")


def read_settings(folder, template):
    """(settings, the Qwen2-VL they name) of a checkpoint's model_config.json, whose sections are read as one.
    UserError names a setting that asks for what is not supported.
    """
    file = folder / "model_config.json"
    raw = {k: v for section in read_json(file).values() if isinstance(section, dict)
           for k, v in section.items()}
    if raw.get("use_special_tokens"):                              # the released one calls its token "last"
        raw["reward_token"] = "special"
    for key, known in FIXED.items():
        if raw.get(key, known) != known:
            raise UserError(f"{file}: only {key} = {known!r} is supported, not {raw[key]!r}")
    settings = {k: raw.get(k, default) for k, default in SETTINGS.items()}
    for name in ("mean", "std"):                                          # the authors' are VQ_mean and so on
        constants = [raw.get(f"{dim}_{name}") for dim in DIMS]
        settings[name] = settings[name] if None in constants else constants
    if template and "template" in raw:
        raise UserError(f"{folder} knows the prompt that it was trained with: leave --template out")
    if not template and "template" not in raw:
        raise UserError(f"{folder} needs --template: prompt_template.py from the authors' KwaiVGI/VideoAlign")
    settings["template"] = read_template(template) if template else raw["template"]
    base = folder / "base" if (folder / "base").is_dir() else raw.get("model_name_or_path", "its Qwen2-VL")
    return settings, base


def read_base(base, words):
    """(config, tokenizer) of a Qwen2-VL: that of the folder words, and the three tokens."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig
    if not is_qwen(base):
        raise UserError(f"{base} is not a Qwen2-VL: its config.json must say so")
    try:                                                                       # AutoTokenizer would change it
        config = Qwen2VLConfig.from_pretrained(base)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
    except (OSError, ValueError) as e:
        raise UserError(f"{words} holds no tokenizer that can be read: {str(e).splitlines()[0]}") from None
    if tokenizer.chat_template is None or "<|video_pad|>" not in tokenizer.get_vocab():
        raise UserError(f"{words} holds no tokenizer of a Qwen2-VL: no chat template, or no <|video_pad|>")
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    return config, tokenizer


def our_names(tensors):
    """Tensors under our names, without peft's marks and whether transformers was older than 4.52 or not. The
    language model's own head stays behind, as no score needs it.
    """
    named = {}
    for key, value in tensors.items():
        key = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
        key = re.sub(r"^(model\.)?(visual|language_model)\.", r"qwen.\2.", key)
        key = re.sub(r"^model\.", "qwen.language_model.", key)
        if not key.startswith("lm_head."):
            named[re.sub(r"(lora_[AB])\.weight$", r"\1", key)] = value
    return named


def read_base_weights(folder, vocabulary):
    """The weights of a Qwen2-VL folder, its embedding cut or grown to this many rows, as transformers would.
    """
    tensors = our_names(read_weights(folder, "model"))
    if EMBEDDING in tensors:                                                    # else load_strict misses it
        rows = tensors[EMBEDDING][:vocabulary]
        more = 0.02 * torch.randn(vocabulary - len(rows), rows.shape[1], generator=rng("rows"))
        tensors[EMBEDDING] = torch.cat([rows, more.to(rows)])
    return tensors


def merge_adapters(tensors, settings):
    """Replace every W, lora_A, lora_B by W + scale B A, in fp32 and in place."""
    for name in [k.removesuffix(".lora_A") for k in tensors if k.endswith(".lora_A")]:
        if {f"{name}.weight", f"{name}.lora_B"} <= tensors.keys():              # else load_strict refuses it
            A, B = tensors.pop(f"{name}.lora_A").float(), tensors.pop(f"{name}.lora_B").float()
            added = settings["lora_alpha"] / len(A) * B @ A
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() + added


# ---- any reward, by its path ----

def kind_of_reward(path):
    """What the reward at path reads, which its files tell: latents of "shapes" or "wan", or "files" of
    videos; None if no finished reward is there.
    """
    folder = fetch(path, ["model_config.json", "reward.safetensors"])
    if (folder / "model_config.json").exists():
        return "files"
    file = folder / "reward.safetensors"
    return ("shapes" if "world" in metadata_of(file) else "wan") if file.exists() else None


def check_reward(path, world, kinds=None, template=None):
    """Refuse, before any work, a reward that cannot judge what a model of this world draws, or a VideoReward
    without the template that it needs; kinds: what it may read, unset: all that can.
    """
    kind = "shapes" if path == "oracle" else kind_of_reward(path)
    kinds = kinds or world.reward_inputs
    if kind not in kinds:
        found = f"reads {kind}" if kind else "holds no finished reward (or one above checkpoint-<step>/)"
        raise UserError(f"{path} {found}: name a run of train_reward.py that reads {' or '.join(kinds)}")
    if kind == "files":
        read_settings(find_checkpoint(path)[0], template)
    if kind == "wan":
        channels = json.loads(metadata_of(fetch(path, []) / "reward.safetensors")["config"])["in_channels"]
        if channels != world.channels:
            raise UserError(f"{path} reads {channels} latent channels, and this Wan has {world.channels}")


def load_reward(path, base=None, template=None, device="cpu"):
    """The reward at path, in fp32 on the device: VideoReward, LatentReward or, for "oracle", the truth."""
    if path == "oracle":
        return Oracle()
    if kind_of_reward(path) == "files":
        return VideoReward.from_pretrained(path, base, template).to(device)
    return LatentReward.from_pretrained(path).to(device)


def score_videos(reward, paths, prompts, cache):
    """VideoReward's z-scores (n, 3) of video files and their prompts; each distinct pair is scored once, and
    the raw scores are kept in the folder cache. Each rank scores its share. UserError names a bad video.
    """
    files = [cached_file(cache, "score", reward.identity, known_hash(cache, path), prompt)
             for path, prompt in zip(paths, prompts, strict=True)]
    todo = dict(zip(files, zip(paths, prompts)))
    for file, (path, prompt) in progress(list(todo.items())[RANK::RANKS], "scoring"):
        if not is_cached(file):
            save_cached(reward.score([path], [prompt], normalise=False)[0], file)
    all_gather(None)                                                            # every rank's share is there
    return finite(z_scores(reward, torch.stack([load_cached(file) for file in files])), paths)


# ---- the scores of a video, from the command line ----

@dataclass
class Args:
    video: list = ()                        # video files to score
    prompt: str = ""                        # what they should show
    ckpt: str = "assets/reward"             # run folder of a reward; for VideoReward also a hub repository
    template: str | None = None             # the authors' prompt_template.py, which their checkpoint needs
    base: str | None = None                 # Qwen2-VL folder, if not the one that the checkpoint names


def main(args):
    """Print the scores of videos, or of a few random ones of Shapes world; returns them (B, 3)."""
    check_reward(args.ckpt, Shapes(), ("shapes", "files"), args.template)
    names, prompts = args.video, [args.prompt] * len(args.video)
    for path in args.video:
        check_video(path)
    if kind_of_reward(args.ckpt) == "files":
        if not (args.video and args.prompt):
            raise UserError("VideoReward scores video files: name some, and by --prompt what they shall show")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scores = load_reward(args.ckpt, args.base, args.template, device).score(args.video, prompts)
    else:
        if args.video:
            x0 = torch.stack([read_shapes(path) for path in args.video])
        else:
            x0, prompts = flawed_videos(8, "eval", rng(0))
        scores = load_reward(args.ckpt).score_drawn(x0.float(), Shapes().embed(prompts), args.video, prompts)
        truth = oracle(x0, prompts)
        names = [f"{name} (oracle: {caption_of(x)})" for name, x in zip(args.video or prompts, truth)]
    rows = [[name, *(f"{x:+.3f}" for x in r)] for name, r in zip(names, with_overall(scores).tolist())]
    print(markdown(["", *DIMS, "Overall"], rows))
    print("z-scores: 0 is an average video, and negative is normal")
    return scores


if __name__ == "__main__":
    words = sys.argv[1:]
    files_alone = words and not words[0].startswith("-")
    launch(main, Args, __doc__, ["--video", *words] if files_alone else words)
