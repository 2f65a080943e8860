"""Video reward models: (latents or pixels, prompt) to scores (B, 3) for VQ, MQ, TA, and the accuracies that
judge them.

    python reward.py                                                      the toy reward beside the oracle
    python reward.py --video a.mp4 --prompt "a red circle moving left"    the scores of a video

LatentReward is the paper's noisy-latent reward (Sec. 4.4, Table 11): the first few blocks of the video DiT
and a head with three outputs, told the time t. Trained at t = 0 it is the labeller of the toy world; trained
at all t it guides sampling. Scores are z-normalised on a validation set: 0 is an average video, negative is
below average, not wrong.
"""
import json
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (DIMS, FRAMES, SIZE, caption_of, check_world, embed_text, fail, find, flawed_videos, oracle,
                  parse_args, read_video, rng, to_float)
from model import Config, LayerNorm, VideoDiT, load_strict, read_tensors, save_tensors


# ---- the latent reward ----

class LatentReward(nn.Module):
    """Scores of noisy latents: the first blocks of a VideoDiT, then one attention query and head per dimension."""

    def __init__(self, config, depth=2):
        super().__init__()
        self.config, self.depth = config, depth
        self.dit = VideoDiT(replace(config, num_layers=depth))
        self.dit.head = None                                                    # it draws no video
        self.norm = LayerNorm(config.dim, config.eps)
        self.query = nn.Parameter(torch.randn(len(DIMS), config.dim) / config.dim**0.5)
        self.hidden = nn.Linear(config.dim, config.dim)
        self.out = nn.Parameter(torch.randn(len(DIMS), config.dim) / config.dim**0.5)
        self.register_buffer("mean", torch.zeros(len(DIMS)))                    # of raw scores on the validation set
        self.register_buffer("std", torch.ones(len(DIMS)))

    def forward(self, xt, t, text):
        """Raw scores (B, 3) from xt (B, C, T, H, W), t (B,) in [0, 1] and text (B, S, text_dim)."""
        h = self.norm(self.dit(xt, t, text, depth=self.depth))                  # (B, L, D)
        look = (h @ self.query.T).softmax(dim=1)                                # (B, L, 3): where each dimension looks
        h = F.gelu(self.hidden(look.transpose(1, 2) @ h))                       # (B, 3, D)
        return (h * self.out).sum(-1)

    def score(self, xt, t, text, normalise=True):
        """Scores (B, 3), z-normalised on the validation set unless normalise is off."""
        raw = self(xt, t, text)
        return (raw - self.mean) / self.std if normalise else raw

    @classmethod
    def from_base(cls, model, depth=2):
        """A LatentReward whose blocks start as the first ones of a pretrained VideoDiT, as in the paper."""
        reward = cls(model.config, depth)
        weights, own = model.state_dict(), reward.dit.state_dict()
        reward.dit.load_state_dict({k: weights[k] for k in own})
        return reward

    def save(self, path, metadata, dtype=torch.float16):
        """Write the weights, 16 bit by default; the file's metadata says how to build the model again."""
        save_tensors({k: v.to(dtype) for k, v in self.state_dict().items()}, path,
                     {"config": json.dumps(self.config.to_diffusers()), "depth": str(self.depth), **metadata})

    @classmethod
    def from_pretrained(cls, path):
        """The reward of a run folder of train_reward.py, fp32 and in eval mode."""
        file = find(path, "reward.safetensors") / "reward.safetensors"
        try:
            tensors, metadata = read_tensors(file)
            check_world(metadata, file)
            reward = cls(Config.from_dict(json.loads(metadata["config"])), int(metadata["depth"]))
            load_strict(reward, {k: v.float() for k, v in tensors.items()}, file)
        except ValueError as e:
            fail(e)
        return reward.eval().requires_grad_(False)


@torch.no_grad()
def score_clean(reward, x0, text, batch=64):
    """Normalised scores (B, 3) of clean latents x0 (t = 0), in batches, on the CPU."""
    parts, device = zip(x0.split(batch), text.split(batch)), reward.mean.device
    clean = lambda x: torch.zeros(len(x), device=device)
    return torch.cat([reward.score(x.to(device), clean(x), y.to(device)).cpu() for x, y in parts])


# ---- how good is a reward? ----

def accuracy_without_ties(label, d):
    """Share of the pairs with label +1 or -1 whose difference d = r_A - r_B has that sign; d = 0 counts as
    wrong. App. H.3.

    label, d: (n,). Ties and nan labels count nowhere; nan where nothing is left.
    """
    decided = (label == 1) | (label == -1)
    return (d[decided].sign() == label[decided]).float().mean().item()


def accuracy_with_ties(label, d):
    """Best share of labels +1, 0, -1 met by predicting a tie where |d| <= threshold, else the sign of d, over
    all thresholds.

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
    gain = ((label == 0).long() - (sign == label).long()).cumsum(0)             # of calling the smallest ones ties
    ends = torch.cat([size[1:] > size[:-1], torch.tensor([True])])
    return (right + gain[ends].max().clamp(min=0)).item() / len(label)


def accuracies(label, d):
    """{"VQ": {"with": .., "without": ..}, ..} for label and d (n, 4), columns VQ, MQ, TA, Overall."""
    columns = zip((*DIMS, "Overall"), label.T, d.T)
    return {dim: {"with": accuracy_with_ties(h, m), "without": accuracy_without_ties(h, m)} for dim, h, m in columns}


# ---- the scores of a video, from the command line ----

def toy_latents(path):
    """x0 (1, 3, FRAMES, SIZE, SIZE) of a video file of Shapes world: frames taken evenly, pixels averaged
    down.
    """
    frames, _ = read_video(path)
    frames = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    x = to_float(torch.from_numpy(frames)).permute(0, 3, 1, 2)                  # (T, 3, H, W)
    return F.interpolate(x, (SIZE, SIZE), mode="area").transpose(0, 1)[None]


@dataclass
class Args:
    video: list = ()                        # video files to score
    prompt: str = ""                        # what they should show
    ckpt: str = "assets/reward"             # run folder of a reward


def main(args):
    """Print the scores of videos, or of a few random ones of Shapes world; returns them (B, 3)."""
    reward = LatentReward.from_pretrained(args.ckpt)
    if args.video:
        try:
            x0 = torch.cat([toy_latents(path) for path in args.video])
            prompts, names = [args.prompt] * len(x0), args.video
            truth = oracle(x0, prompts)
        except ValueError as e:
            fail(e)
    else:
        x0, prompts, _ = flawed_videos(8, "eval", rng(0))
        names, x0 = prompts, x0.float()
        truth = oracle(x0, prompts)
    scores = score_clean(reward, x0, embed_text(prompts))
    print(f"{'':36} {'reward, 0 is average':24}  oracle, 0 to 1")
    for name, r, o in zip(names, scores, truth):
        scored = " ".join(f"{dim} {x:+.2f}" for dim, x in zip(DIMS, r.tolist()))
        print(f"{str(name)[-36:]:36} {scored}  {caption_of(o)}")
    return scores


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
