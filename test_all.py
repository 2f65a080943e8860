"""Executable specification: the method, the model, Shapes world and the scripts, stated as facts.

    pytest test_all.py                                                  on a CPU, without network
    python test_all.py --bench                                          how fast it is, beside diffusers
    python test_all.py --bench --preset wan-1.3b --frames 81 --size 480,832 --dtype bf16 --checkpointing
"""
import contextlib
import csv
import gc
import importlib.util
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import tensor

import data
import losses
import model as model_file
import reward
import sample
import train_align
import train_reward
from data import DEFECTS, DIMS, DTYPES, GROUND, PROMPTS, attributes, clean_videos, normalised, oracle, render
from data import rng
from losses import beta_schedule, bt, btt, flow_dpo, flow_rwr, flow_sft, masked_mean, mix, regression
from losses import velocity_error
from model import PRESETS, UserError, VideoDiT, add_lora, load_lora, lora_disabled, read_tensors, save_lora
from sample import cfg, euler, nrg, timesteps

HERE, NAN = Path(__file__).parent, float("nan")
TINY = replace(PRESETS["toy"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16)

# How others spell the adapters of a layer: its prefix, A, B, and alpha where B does not hold the strength.
LORA_LAYOUTS = {"ComfyUI": ("diffusion_model.", "lora_down.weight", "lora_up.weight", "alpha"),
                "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", "alpha"),
                "DiffSynth": ("", "lora_A.default.weight", "lora_B.default.weight", None),
                "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight", None)}

# ---- the method in nine facts ----
# What the paper's method is, exact where the theory is. A change that breaks one changes what is taught.

def test_1_t_0_is_data_t_1_is_noise_and_v_is_the_derivative_of_xt():
    x0, eps = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64)
    t, h = tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    assert torch.equal(mix(x0, eps, torch.zeros(2)), x0) and torch.equal(mix(x0, eps, torch.ones(2)), eps)
    assert torch.allclose((mix(x0, eps, t + h) - mix(x0, eps, t - h)) / (2 * h), eps - x0, atol=1e-8)

def test_2_the_eps_error_is_one_minus_t_squared_times_the_velocity_error():
    (x0, eps, v), t = torch.randn(3, 4, 3, 2, 4, 4), torch.rand(4)
    err = velocity_error(v, eps - x0)
    eps_pred = mix(x0, eps, t) + (1 - t).view(-1, 1, 1, 1, 1) * v
    assert torch.allclose(velocity_error(eps_pred, eps), (1 - t) ** 2 * err, rtol=1e-4)
    assert velocity_error(v.bfloat16(), eps.bfloat16()).dtype == torch.float32  # DPO subtracts near errors

def test_3_dpo_is_log_2_at_the_reference_and_fits_the_winner_and_unfits_the_loser():
    (target_w, target_l), v = torch.randn(2, 3, 2, 2, 4, 4), torch.randn(2, 3, 2, 2, 4, 4)
    v_w, v_l = (x.clone().requires_grad_() for x in v)
    err_w, err_l = velocity_error(v_w, target_w), velocity_error(v_l, target_l)
    loss = flow_dpo(err_w, err_l, err_w.detach(), err_l.detach(), beta=500.0)
    assert torch.allclose(loss, torch.full((3,), math.log(2)), atol=1e-6)
    loss.sum().backward()
    assert (v_w.grad * (target_w - v_w)).sum() < 0 < (v_l.grad * (target_l - v_l)).sum()
    # the closed form of the gradient: d loss / d err_w = beta / 2 * sigmoid(beta / 2 * difference)
    err, ref = tensor([0.31], requires_grad=True), tensor([0.30])
    flow_dpo(err, ref, ref, ref, 100.0).backward()
    assert torch.allclose(err.grad, 50 * torch.sigmoid(tensor([0.5])), rtol=1e-4)

def test_4_beta_over_time_is_constant_or_what_a_derivation_gives():
    t = tensor([0.0, 0.25, 1.0])
    for kind, betas in {"constant": [8, 8, 8], "(1-t)^2": [8, 4.5, 0], "t^2": [0, 0.5, 8]}.items():
        assert beta_schedule(8.0, t, kind).tolist() == betas
    assert torch.allclose(beta_schedule(8.0, t, "(1-t)/t"), tensor([8 / 0.05, 24, 0]))  # finite at data
    with pytest.raises(ValueError, match="constant"):
        beta_schedule(8.0, t, "cosine")

def test_5_rwr_with_equal_rewards_is_sft_and_its_weights_have_mean_1_before_the_clip():
    err, r = torch.rand(5, requires_grad=True), tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    assert torch.allclose(flow_rwr(err, torch.full((5,), 3.0)), flow_sft(err))
    loss = flow_rwr(err, r)
    assert torch.allclose(loss / err, torch.exp(r) / torch.exp(r).mean())
    loss.sum().backward()
    assert r.grad is None
    one_great = torch.cat([torch.zeros(99), tensor([1000.0])])
    assert flow_rwr(torch.ones(100), one_great).tolist() == [0.0] * 99 + [10.0]

def test_6_btt_is_rao_and_kuppers_model_its_probabilities_sum_to_one_and_tie_1_gives_bt():
    d, one = torch.randn(50, dtype=torch.float64) * 4, torch.ones(50)
    p_a, p_tie, p_b = (torch.exp(-btt(d, label * one, tie=5.0)) for label in (1, 0, -1))
    assert torch.allclose(p_a + p_tie + p_b, one.double())
    odds = torch.exp(d)
    assert torch.allclose(p_a, odds / (odds + 5)) and torch.allclose(p_b, 1 / (5 * odds + 1))
    assert abs(torch.exp(-btt(torch.zeros(1), torch.zeros(1))).item() - 24 / 36) < 1e-6
    assert all(torch.allclose(btt(d, label * one, tie=1.0), bt(d, label * one)) for label in (1, -1))

def test_7_what_is_not_labelled_leaves_loss_and_gradient_untouched():
    label, score = tensor([1.0, NAN, -1.0, 0.0, NAN]), tensor([1.0, NAN, 2.0, 0.5, NAN])
    for loss, y, counted in ((bt, label, [0, 2]), (btt, label, [0, 2, 3]), (regression, score, [0, 2, 3])):
        d = tensor([0.3, NAN, -0.2, 5.0, 1e30], requires_grad=True)
        out = loss(d, y)
        assert all(out[i] == 0 for i in range(5) if i not in counted)
        out.sum().backward()
        assert all((d.grad[i] != 0) == (i in counted) for i in range(5)) and d.grad.isfinite().all()
        assert loss(d.double(), y).dtype == torch.float64
    assert masked_mean(tensor([1.0, 7.0, 3.0]), tensor([1.0, NAN, 0.0])) == 2.0
    assert masked_mean(tensor([NAN]), tensor([NAN])) == 0.0

def test_8_euler_hits_a_gaussian_and_nrg_its_tilted_mean_but_not_with_the_wrong_sign():
    mu, s = 0.7, 0.5                                        # the data are N(mu, s^2): all is known exactly

    def mean_x0(x, t):
        return mu + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * mu)

    def velocity(x, t):
        return (x - (1 - t) * mean_x0(x, t)) / t - mean_x0(x, t)

    def noisy_reward(x, t):                                 # E[r | xt] of r(x0) = 2 x0, up to a constant
        return 2 * mean_x0(x, t).float()
    eps, ts = torch.randn(20000, 1, generator=rng(0), dtype=torch.float64), timesteps(200).double()
    x, ratios = euler(velocity, eps, ts), []
    assert abs(x.mean() - 0.700) < 0.01 and abs(x.std() - 0.496) < 0.01
    # the target of guidance by w = 2 is N(mu + 2 w s^2, s^2) = N(1.7, s^2)
    x = euler(nrg(velocity, noisy_reward, rg_scale=2.0, dim_w=(1.0,), ratios=ratios), eps, ts)
    assert abs(x.mean() - 1.7) < 0.02 and abs(x.std() - 0.496) < 0.01
    assert len(ratios) == 199                                                   # t = 1 is skipped
    assert euler(nrg(velocity, noisy_reward, rg_scale=-2.0, dim_w=(1.0,)), eps, ts).mean() < -0.2
    v, guided = velocity(eps, ts[9]), nrg(velocity, noisy_reward, 1000.0, (1.0,), max_ratio=0.1)(eps, ts[9])
    assert torch.allclose((guided - v).abs(), 0.1 * v.abs(), rtol=1e-3)         # no more than its share

def test_9_the_model_with_its_adapters_off_is_bitwise_the_reference():
    m, batch = random_model(), random_batch()
    with torch.no_grad():
        base = m(*batch)
        assert torch.equal(add_lora(m, rank=4, alpha=8.0)(*batch), base)        # B starts at zero
        assert all(p.requires_grad == ("lora" in name) for name, p in m.named_parameters())
        tuned = shake_lora(m)(*batch)
        with lora_disabled(m):
            assert torch.equal(m(*batch), base)
        assert torch.equal(m(*batch), tuned) and (tuned - base).abs().max() > 1e-3

# ---- the model ----
# VideoDiT is Wan 2.1's transformer, number for number and name for name; the toy is a small one of it.

def test_each_loss_works_after_copy_and_paste():
    one, column = torch.ones(2), torch.ones(2, 1)
    calls = dict(flow_sft=(one,), flow_rwr=(one, one), flow_dpo=(one, one, one, one, 500.0), bt=(one, one),
                 btt=(one, one), beta_schedule=(500.0, one, "t^2"), regression=(one, one),
                 mix=(one, one, one), masked_mean=(one, one), velocity_error=(column, column))
    for name, arguments in calls.items():
        scope, own = {"torch": torch, "F": torch.nn.functional}, getattr(losses, name)
        exec(inspect.getsource(own), scope)
        assert torch.equal(scope[name](*arguments), own(*arguments))

def test_imports_stay_light_so_that_a_loss_or_the_model_can_be_copied_out():
    heavy = {"transformers", "diffusers", "av", "PIL", "huggingface_hub"}
    code = f"import sys, model, losses, data, reward; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)

def test_presets_have_the_published_sizes_and_official_names():
    for name, billions in (("wan-14b", 14.288), ("wan-1.3b", 1.419)):
        with torch.device("meta"):
            shapes = {k: tuple(p.shape) for k, p in VideoDiT(PRESETS[name]).state_dict().items()}
        assert round(sum(map(math.prod, shapes.values())) / 1e9, 3) == billions
    D = 1536
    official = {"patch_embedding.weight": (D, 16, 1, 2, 2), "text_embedding.0.weight": (D, 4096),
                "time_embedding.2.bias": (D,), "time_projection.1.weight": (6 * D, D),
                "blocks.29.self_attn.norm_q.weight": (D,), "blocks.0.cross_attn.k.weight": (D, D),
                "blocks.0.norm3.weight": (D,), "blocks.0.ffn.0.weight": (8960, D),
                "blocks.0.modulation": (1, 6, D), "head.modulation": (1, 2, D), "head.head.weight": (64, D)}
    assert official.items() <= shapes.items() and len(shapes) == 30 * 27 + 15

def test_a_batch_of_two_is_two_batches_of_one_and_no_input_is_ignored():
    m, (x, t, text) = random_model(), random_batch()
    with torch.no_grad():
        both = m(x, t, text)
        assert both.shape == x.shape and m(x, t, text, depth=1).shape == (2, 2 * 2 * 2, TINY.dim)
        for i in (0, 1):
            assert torch.allclose(both[i:i + 1], m(x[i:i + 1], t[i:i + 1], text[i:i + 1]), atol=1e-5)
        for changed in ((x.flip(2), t, text), (x, t * 0.5, text), (x, t, text.flip(0))):
            assert (m(*changed) - both).abs().max() > 1e-3

def test_patches_come_back_where_they_were():
    m, (x, t, text) = random_model(replace(TINY, num_layers=0)), random_batch()
    with torch.no_grad():
        before = m(x, t, text)
        x[:, :, 2:, :4, 4:] += 1.0                                              # one patch
        changed = (m(x, t, text) - before).abs() > 1e-6
    assert changed.any() and changed.sum() == changed[:, :, 2:, :4, 4:].sum()

def test_rotary_positions_are_relative():
    cos, sin = (x.view(6, 6, 6, 1, -1) for x in model_file.rotary((6, 6, 6), 24, torch.device("cpu")))
    q, k = torch.randn(2, 1, 1, 1, 24)

    def at(x, axis, n):
        """x turned as it is at the place that is 1 on all axes, but 1 + n on this one."""
        place = tuple(1 + n * (a == axis) for a in range(3))
        return model_file.rotate(x, cos[place], sin[place]).flatten()
    for axis in range(3):
        near, moved, further = (at(q, axis, i) @ at(k, axis, j) for i, j in ((0, 2), (1, 3), (0, 3)))
        assert torch.allclose(near, moved, atol=1e-5) and not torch.allclose(near, further, atol=1e-3)

def test_a_model_of_fp32_weights_computes_as_the_autocast_around_it_says():
    m, batch = random_model(), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert m(*batch, depth=1).dtype == torch.bfloat16
    assert m(*batch, depth=1).dtype == torch.float32 and m(*batch).dtype == torch.float32

def test_a_lora_file_has_the_names_that_others_read_and_is_the_same_model(tmp_path):
    m, batch = shake_lora(add_lora(random_model(), rank=4, alpha=8.0)), random_batch()
    save_lora(m, tmp_path / "a.safetensors")
    tensors = weights(tmp_path / "a.safetensors")
    assert tensors.keys() == LORA_NAMES
    again = load_lora(random_model(), tmp_path / "a.safetensors")
    assert torch.allclose(again(*batch), m(*batch), atol=1e-5)
    names = {k: "transformer." + model_file.to_diffusers(k.removeprefix("diffusion_model.")) for k in tensors}
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in names.values()
    model_file.save_tensors({names[k]: v for k, v in tensors.items()}, tmp_path / "b.safetensors")
    assert_near(load_lora(random_model(), tmp_path / "b.safetensors").state_dict(), again.state_dict(), 0)

def test_diffusers_wan_gives_the_same_output_and_reads_what_we_write(wan, tmp_path):
    expected, ours = diffusers_dit(wan), VideoDiT.from_pretrained(wan).eval()
    ours.save_pretrained(tmp_path / "ours" / "transformer")
    back, official = diffusers_dit(tmp_path / "ours"), tmp_path / "official"
    official.mkdir()                                                            # Wan's own names and keys
    model_file.save_tensors(ours.state_dict(), official / "diffusion_pytorch_model.safetensors")
    own = dict(_class_name="WanModel", model_type="t2v", out_dim=16, text_len=512)
    data.write_json(official / "config.json", vars(ours.config) | own)
    official = VideoDiT.from_pretrained(official).eval()
    for grid, words in (((1, 4, 4), 512), ((3, 6, 10), 7), ((5, 2, 14), 512)):
        x, t, text = torch.randn(2, 16, *grid), torch.rand(2), torch.randn(2, words, 24)
        text[:, 5:] = 0  # padding, which attention sees
        with torch.no_grad():
            v = expected(x, 1000 * t, text).sample
            for own in (ours(x, t, text), official(x, t, text), back(x, 1000 * t, text).sample):
                assert (own - v).norm() < 1e-5 * v.norm()

def test_adapters_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    a, b, c = (add_lora(random_model(), 2, 4.0, seed=seed).blocks[0].self_attn.q.lora_A for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    m, state = random_model(), torch.get_rng_state()
    add_lora(m, 2, 4.0)
    assert torch.equal(torch.get_rng_state(), state)

def test_decoupled_gives_the_same_gradient_in_half_of_the_memory():
    m = shake_lora(add_lora(random_model(replace(TINY, num_layers=3)), 2, 4.0))
    x0, eps, t = torch.randn(1, 2, 3, 8, 24, 24), torch.randn(1, 3, 8, 24, 24), torch.tensor([0.4])
    text, ref = torch.randn(1, 8, 32), torch.tensor([1.0])

    def backward(decoupled):
        m.zero_grad()
        for err_w, err_l in train_align.error_pairs(m, x0, text, t, eps, decoupled):
            flow_dpo(err_w, err_l, ref, 1.01 * ref, 100.0).sum().backward()
        return [p.grad.clone() for p in m.parameters() if p.requires_grad]
    together, most = kept_for_backward(m, lambda: backward(False))
    apart, half = kept_for_backward(m, lambda: backward(True))
    largest = max(x.norm() for x in together)
    assert all((a - b).norm() < 1e-6 * largest for a, b in zip(together, apart)) and half <= 0.55 * most

def test_a_block_keeps_no_more_for_its_backward_pass_than_diffusers():
    from diffusers import WanTransformer3DModel
    config = model_file.Config(dim=96, ffn_dim=192, text_dim=32, num_heads=2, num_layers=2)
    theirs = WanTransformer3DModel.from_config(config.to_diffusers()).requires_grad_(False)
    ours, x = VideoDiT(config).requires_grad_(False), torch.randn(1, 16, 3, 8, 8, requires_grad=True)
    t, text = torch.rand(1), torch.randn(1, 64, 32)                             # frozen, as beside adapters
    _, own = kept_for_backward(ours, lambda: ours(x, t, text))
    _, other = kept_for_backward(theirs, lambda: theirs(x, 1000 * t, text, return_dict=False)[0])
    assert own <= 1.005 * other

def test_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        model_file.save_tensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640

# ---- sampling ----
# A sample is a function of the seed and its number; guidance, win rates and tables are plain arithmetic.

def test_timesteps_are_even_and_then_shifted_as_in_official_wan():
    assert timesteps(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(timesteps(4, shift=3.0), tensor([1, 0.9, 0.75, 0.5, 0]))

def test_cfg_interpolates_and_extrapolates():
    for scale, v in ((0.0, -1), (1.0, 1), (3.0, 5)):
        assert cfg(lambda x, t: x + 1, lambda x, t: x - 1, scale)(torch.zeros(2), 1).tolist() == [v, v]

def test_sampling_is_a_function_of_seed_and_index():
    def videos(seed, batch):
        return sample.toy_videos(random_model(), PROMPTS[:3], seed, steps=2, batch=batch)
    a = videos(1, 3)
    assert torch.equal(a, videos(1, 3)) and torch.allclose(a, videos(1, 2), atol=1e-5)
    assert (a - videos(2, 3)).abs().max() > 0.1

def test_a_win_rate_drops_exact_ties():
    assert sample.win_rate(tensor([1.0, 2.0, 3.0, 0.0]), tensor([0.0, 2.0, 0.0, 1.0])) == 2 / 3
    assert sample.win_rate(torch.ones(3), torch.ones(3)) == 0.5

def test_flawless_videos_close_the_whole_gap_and_the_start_none_of_it():
    prompts, g = PROMPTS[::2], rng(0)
    flawed = data.render_as(torch.arange(36) % 12, prompts, g).float()
    clean = render(attributes(prompts), torch.zeros(36, len(DEFECTS)), g).float()
    half = torch.cat([clean[:18], flawed[18:]])
    whole, none, part = (sample.evaluate(videos, flawed, prompts) for videos in (clean, flawed, half))
    assert all(x == pytest.approx(1, abs=0.03) for x in whole["gap_closed"].values())
    assert set(none["gap_closed"].values()) == {0.0}
    start, now, end = (part[name]["TA"] for name in ("oracle_start", "oracle", "oracle_clean"))
    assert part["gap_closed"]["TA"] == pytest.approx((now - start) / (end - start), abs=1e-3)
    assert whole["oracle"]["TA"] == pytest.approx(end, abs=0.01)

def test_a_table_of_scores_has_means_and_spreads(capsys):
    def result(*rows, distance):
        keys = zip(("oracle_start", "oracle", "gap_closed"), rows)
        return {key: dict(zip((*DIMS, "Overall"), row)) for key, row in keys} | {"distance": distance}
    a = result((0.2, 0.5, 0.8), (0.3, 0.4, 0.5), (1.0, 0.03, 0.3, -0.2), distance=0.25)
    b = result((0.0, 0.5, 1.0), (0.1, 0.2, 0.3), (0.0, 0.01, 0.5, -0.1), distance=0.5)
    sample.print_scores({"half": [a, b], "alone": [b]})
    assert capsys.readouterr().out.strip().splitlines()[2:] == [
        "| half | 0.10 ± 0.14 to 0.20 ± 0.14 (50 ± 71) | 0.50 ± 0.00 to 0.30 ± 0.14 (2 ± 1) | "
        "0.90 ± 0.14 to 0.40 ± 0.14 (40 ± 14) | (-15 ± 7) | 0.3750 ± 0.1768 |",
        "| alone | 0.00 to 0.10 (0) | 0.50 to 0.20 (1) | 1.00 to 0.30 (50) | (-10) | 0.5000 |"]

def test_a_hacked_reward_is_named_and_a_good_run_is_not():
    video = clean_videos(PROMPTS[::4])
    grey, still = video.mean(1, keepdim=True).expand_as(video), video[:, :, :1].expand_as(video)

    def said(now=video, oracle=0.8, reward=0.9):
        rates = {"win_rate": {"Overall": oracle}, "win_rate_reward": {"Overall": reward}}
        return sample.hacking(rates | {"pixels": look(now), "pixels_start": look(video)})
    look = sample.pixel_statistics
    assert look(video).keys() == {"motion", "saturation", "brightness"}
    assert not said() and not said(grey, reward=0.4)
    assert re.search(r"in 90%, but saturation fell from 0\.\d+ to 0.000$", said(grey))
    assert re.search(r"but motion fell from 0\.\d+ to 0.000$", said(still))
    assert "the oracle prefers them in 30% only" in said(oracle=0.3)

def test_sampling_writes_videos_that_one_can_look_at_and_score(runs):
    draw(runs, "videos", steps=3, prompt=[PROMPTS[0]], n_per_prompt=2, cfg=2.0, nrg=f"{runs}/noisy")
    assert data.read_video(runs / "videos/001.mp4")[0].shape == (8, 192, 192, 3)
    args = reward.Args(ckpt=f"{runs}/reward", video=[f"{runs}/videos/000.mp4"], prompt=PROMPTS[0])
    assert reward.main(args).shape == (1, 3)

def test_runs_are_compared_in_one_table_with_seeds_together(runs, capsys):
    result = draw(runs, "nrg", steps=3, nrg=f"{runs}/noisy", eval=18, dim_w=(0.0, 0.0, 1.0))
    sample.compare(sample.Compare(compare=[f"{runs}/nrg"] * 2))
    said = capsys.readouterr().out.partition("| 18 |")[2]                       # after the run's own table
    assert said.count("| nrg | oracle |") == 1 and said.count(" ± 0.0 |") == 4 and "| 2 x 18 |" in said
    assert result["n"] == 18 and (runs / "compare.png").exists()

def test_numbers_of_runs_are_drawn_over_an_argument(runs):
    results = {x: draw(runs, f"scale{x:g}", steps=1, nrg=f"{runs}/noisy", eval=4, rg_scale=x)
               for x in (1.0, 30.0)}
    args = sample.Compare(compare=[f"{runs}/scale1", f"{runs}/scale30"], x="rg_scale", by=["steps"],
                          y=["win_rate/VQ", "oracle/VQ"], out=f"{runs}/drawn.png")
    assert sample.compare(args) == {f"{y}, steps 1": {x: [result[y.split("/")[0]]["VQ"]]
                                                      for x, result in results.items()} for y in args.y}
    assert (runs / "drawn.png").read_bytes()[:4] == b"\x89PNG"
    assert sample.compare(replace(args, by=[])).keys() == set(args.y)

def test_rewards_are_compared_beside_the_ceiling_and_by_how_they_tell_ties(runs, capsys):
    sample.compare(sample.Compare(compare=[f"{runs}/reward", f"{runs}/noisy"]))
    said, ties = capsys.readouterr().out, read(runs / "noisy/eval.json")["differences"]["TA"]
    assert re.search(r"ceiling.*\n\| reward \|.*\n\| noisy \|", said)
    cell = f"{ties['tied'][1]:.2f} / {ties['other'][1]:.2f} ({100 * ties['separation']:.0f}) |"
    assert said.splitlines()[-1].endswith(cell)

def test_every_shift_starts_at_exactly_1_and_ends_at_exactly_0():
    for shift in range(102, 2001):
        ts = timesteps(7, shift / 100)
        assert ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()

def test_memory_of_sampling_does_not_grow_with_the_number_of_videos(wan, tmp_path, monkeypatch):
    alive, own = [], sample.write_video

    def count(path, video, *rest):
        own(path, video, *rest)
        shapes = [x.shape[-2:] for x in gc.get_objects() if type(x) is torch.Tensor]
        alive[-1].append(sum(shape in ((32, 48), (4, 6)) for shape in shapes))  # pixels and latents
    monkeypatch.setattr(sample, "write_video", count)
    for n in (13, 18):
        alive.append([])
        sample.main(sample.Args(model=str(wan), prompt=["a cat"], n_per_prompt=n, steps=1, cfg=1.0,
                                out=f"{tmp_path}/{n}", **CLIP))
    assert max(alive[1]) == max(alive[0])

def test_the_figure_of_runs_over_their_steps_is_their_log_of_ten_events_or_more(runs, tmp_path):
    events = data.read_log(runs / "base")
    args = sample.Compare(compare=[f"{runs}/base"], x="step", y=["loss"], out=f"{tmp_path}/a.png")
    lines = sample.compare(args)
    assert len(events) >= 10 and {e["step"]: [e["loss"]] for e in events} == lines["loss, run base"]

# ---- the world ----
# Shapes world knows the truth: a score falls with its own flaw alone, and nothing but a good video scores.

OWN = dict(VQ=("blur", "wash"), MQ=("jitter", "stutter", "teleport"), TA=("colour", "shape", "direction"))

@pytest.mark.parametrize("dim", DIMS)
def test_an_oracle_score_falls_with_its_own_defects_and_hardly_moves_with_the_others(dim):
    prompts, k = PROMPTS[::2], DIMS.index(dim)
    for defect in OWN[dim]:
        defects = torch.zeros(5, len(prompts), len(DEFECTS))
        defects[..., DEFECTS.index(defect)] = torch.linspace(0, 1, 5)[:, None]
        videos = (render(attributes(prompts), strength, rng(1)).float() for strength in defects)
        table = torch.stack([oracle(video, prompts).mean(0) for video in videos])  # (strength, dimension)
        assert (table[0] > 0.96).all() and (table[:, k].diff() < -0.02).all() and table[-1, k] < 0.7, table
        assert (table - table[0])[:, [j for j in range(3) if j != k]].abs().max() < 0.08, table

def test_the_oracle_is_not_fooled_off_the_manifold():
    prompts = PROMPTS[:48:2]
    clean = clean_videos(prompts)
    empty, flicker = torch.full_like(clean, 2 * GROUND - 1), clean.clone()
    flicker[:, :, ::2] = 2 * GROUND - 1

    def mean(video):
        return dict(zip(DIMS, oracle(video, prompts).mean(0).tolist()))
    for video in (empty, torch.rand(clean.shape, generator=rng(0)) * 2 - 1, torch.ones_like(clean)):
        assert max(mean(video).values()) < 0.05
    assert mean(clean[:, :, :1].expand_as(clean))["MQ"] < 0.01                  # it stands still
    assert mean(flicker)["MQ"] < 0.01 and mean(flicker)["VQ"] < 0.6
    assert mean(clean.flip(2))["TA"] < 0.7  # backwards: one of three is wrong
    assert oracle(clean * 5, prompts).isfinite().all()

def test_the_split_is_even_and_disjoint():
    splits, held_out = [data.split_of(p) for p in PROMPTS], attributes(data.prompts_of("eval"))
    assert [splits.count(s) for s in ("train", "val", "eval")] == [45, 9, 18]
    assert [held_out[:, k].bincount().tolist() for k in (0, 1)] == [[3] * 6, [6] * 3]
    assert held_out[:, 2].bincount().min() >= 4

def test_annotators_tie_as_often_as_people_and_mostly_agree_with_the_oracle():
    pairs = data.toy_pairs(400, "train", seed=0)
    score = data.true_scores(pairs)
    d = -data.with_overall(normalised(score)).diff(dim=1)[:, 0]                      # of A over B
    assert all(0.4 <= x <= 0.6 for x in (pairs.label == 0).float().mean(0).tolist())
    assert all(0.8 < reward.accuracy_without_ties(pairs.label[:, k], d[:, k]) < 0.97 for k in range(4))
    assert pairs.mos.unique().tolist() == [1, 2, 3, 4, 5]
    assert np.corrcoef(pairs.mos[..., 1].flatten(), score[..., 1].flatten())[0, 1] > 0.8
    assert {data.split_of(p) for p in pairs.prompts} == {"train"}
    right, error = {}, {}
    for noise in (0.1, 1.0, 10.0):                                              # blurs labels and points
        label, mos = data.annotate(*score.unbind(1), rng(0), noise), data.likert(score, rng(0), noise)
        right[noise] = reward.accuracy_without_ties(label[:, 1], d[:, 1])
        error[noise] = (mos - (1 + 4 * score)).abs().mean().item()
    assert right[0.1] > 0.94 > right[1.0] > 0.75 > right[10.0]
    assert error[0.1] < 0.3 < error[1.0] < 1 < error[10.0]

def test_pairs_noise_and_order_are_functions_of_seed_step_and_sample():
    a, b, blurred = (data.toy_pairs(24, "train", seed=0, noise=noise) for noise in (1.0, 1.0, 10.0))
    assert torch.equal(a.videos, b.videos) and torch.equal(a.label, b.label) and torch.equal(a.mos, b.mos)
    assert torch.equal(a.videos, blurred.videos) and not torch.equal(a.mos, blurred.mos)
    t, eps = data.draw_noise((3, 2), 0, 5, [7, 8, 9])
    t2, eps2 = data.draw_noise((3, 2), 0, 5, [9])
    assert t[2] == t2[0] and torch.equal(eps[2], eps2[0]) and not torch.equal(eps[1], eps[2])
    epochs = torch.cat([data.step_rows(10, 4, 0, step) for step in range(5)]).view(2, 10)
    assert epochs.sort().values.tolist() == [list(range(10))] * 2

def test_the_shipped_weights_are_small_and_of_this_world():
    files = sorted((HERE / "assets").rglob("*.safetensors"))
    assert [str(f.parent.relative_to(HERE)) for f in files] == [
        "assets/base/transformer", "assets/noisy", "assets/reward"]
    assert sum(f.stat().st_size for f in files) < 8e6
    for metadata in (read_tensors(f)[1] for f in files):
        assert metadata["world"] == data.world_hash() and metadata["seed"] == "0"
        assert metadata["command"].startswith("python train_")

def test_the_shipped_base_draws_well_and_the_shipped_reward_tells_good_from_bad():
    prompts = data.prompts_of("eval", 24)
    steps, shift, scale = (sample.RECIPES[name]["shapes"] for name in ("steps", "shift", "cfg"))
    videos = sample.toy_videos(sample.load_model("assets/base"), prompts, 0, steps, shift, cfg_scale=scale)
    share = oracle(videos, prompts).mean(0) / oracle(*data.flawed_videos(200, None, rng(0))).mean(0)
    assert (share > 0.7).all(), share                                           # 24 leave room for chance
    pairs = data.toy_pairs(200, "eval", seed=1)
    d = -reward.load_reward("assets/reward").score_pairs(data.Shapes(), pairs, None).diff(dim=1)[:, 0]
    assert all(reward.accuracy_without_ties(pairs.label[:, k], d[:, k]) > 0.65 for k in range(3))

# ---- pairs ----
# Preferences come from files in the layouts that people have, from annotators, or from a model's own videos.

def test_pairs_are_read_from_csv_json_and_jsonl_in_the_layouts_that_people_have(tmp_path):
    for name in "ab":
        (tmp_path / name).touch()

    def pairs(name, *lines):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return data.read_pairs(tmp_path / name)
    authors = pairs("authors.csv", "path_A,path_B,prompt,VQ,MQ,TA,MOS_A_VQ,MOS_B_VQ",
                    'a,b,"a cat, asleep",A,same,invalid,4,2.5', "b,a,a dog,B,,A,,")
    assert authors.prompts == ["a cat, asleep", "a dog"] and authors.lines == [2, 3]
    assert authors.videos[0] == (tmp_path / "a", tmp_path / "b")
    assert authors.label.nan_to_num(9).tolist() == [[1, 0, 9, 9], [-1, 9, 1, 9]]
    assert authors.mos[0, :, 0].tolist() == [4, 2.5] and authors.mos.isnan().sum() == 10
    votes = [f"p,x,a,y,b,{vote}" for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")]
    label = pairs("genai.csv", "prompt,left_model,left_video,right_model,right_video,vote_type", *votes).label
    assert label[:, 3].tolist() == [1, -1, 0, 0] and label[:, :3].isnan().all()
    answers = [f"p,a,b,{word}" for word in ("video1", "video2", "tie", "")]
    label = pairs("vision.csv", "prompt,video1_path,video2_path,standard_answer", *answers).label
    assert label[:, 3].nan_to_num(9).tolist() == [1, -1, 0, 9]
    row = '{"prompt": "p", "chosen": "b", "rejected": "a"}'
    assert pairs("dpo.json", f"[{row}, {row}]").lines == [1, 2]
    chosen = pairs("dpo.jsonl", row, "", row)
    assert chosen.label[:, 3].tolist() == [1, 1] and chosen.lines == [1, 3]
    shares = [f"p,a,b,{one},{two}" for one, two in ((0.7, 0.3), (0.2, 0.8), (0.5, 0.5), ("", ""))]
    label = pairs("rapidata.csv", "prompt,file_name1,file_name2,weighted_results1_Coherence,"
                  "weighted_results2_Coherence", *shares).label
    assert label[:, 1].nan_to_num(9).tolist() == [1, -1, 0, 9] and label[:, (0, 2, 3)].isnan().all()
    answers = [f"p,a,b,{word}" for word in ("video 1 better", "Video 2 better", "tie")]
    label = pairs("mj.csv", "caption,video_0_path,video_1_path,overall_preference", *answers).label
    assert label[:, 3].tolist() == [1, -1, 0]
    clips = [{"basic": {"clip_path": name}} for name in "ab"]                   # the winner is video1
    (tmp_path / "metadata.json").write_text(json.dumps(clips))
    numbered = pairs("videodpo.json", json.dumps([{"frame_caption": "p", "video1": 1, "video2": 0}]))
    assert numbered.videos == [(tmp_path / "a", tmp_path / "b")] and numbered.label[0, 3] == -1

PROMPT_TABLES = {                                                               # all hold the same two prompts
    "list.json": '["a cat, asleep", "a dog"]', "lines.txt": "a cat, asleep\n\n a dog\n",
    "lines.json": '{"prompt": "a cat, asleep"}\n{"prompt": "a dog"}\n',
    "bom.csv": '\ufeffprompt\n"a cat, asleep"\na dog\n',
    "semi.csv": "prompt;n\na cat, asleep;1\na dog;2\n", "tab.data": "n\tprompt\n1\ta cat, asleep\n2\ta dog\n",
    "csv.jsonl": 'prompt,n\n"a cat, asleep",1\na dog,2\n', "twice.csv": 'prompt\n"a cat, asleep"\n\na dog\n'}

@pytest.mark.parametrize("name", PROMPT_TABLES)
def test_the_format_of_a_table_is_in_its_content(name, tmp_path):
    (tmp_path / name).write_text(PROMPT_TABLES[name], encoding="utf-8")
    table = data.read_table(tmp_path / name)
    assert [row["prompt"].strip() for _, row in table] == ["a cat, asleep", "a dog"]

def test_a_prompt_in_a_text_file_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "p.txt").write_text("[wide shot] a cat\n{slow} a dog\n")
    prompts = [row["prompt"] for _, row in data.read_table(tmp_path / "p.txt")]
    assert prompts == ["[wide shot] a cat", "{slow} a dog"]

@pytest.mark.parametrize("text, says", [
    ("path_A,path_B,prompt,VQ\na,b,one, two,A\n", "row 2 has more or fewer .* must stand in quotes"),
    ("path_A,path_B,prompt,VQ\na,b,p,A\na,b\n", "row 3 has more or fewer fields"),
    ('{"path_A": "a", "path_B": "b", "prompt": ["p"], "VQ": "A"}', "row 1: prompt is .* must be a text"),
    ('{"path_A": "a", "path_B": "b", "prompt": "p", "VQ": {"x": 1}}', "row 1: VQ is .* must be a text"),
    ('{"path_A": "a", "path_B": "b", "prompt": NaN, "VQ": "A"}', "row 1: prompt is NaN and must be a text"),
    ('{"path_A": "a", "path_B": "b", "prompt": "\\ud83d", "VQ": "A"}', "prompt holds half a character"),
    ("path_A,path_B,prompt,VQ,MOS_A_VQ\na,b,p,A,80\n", "row 2 gives 80 points.* 1 \\+ 4 x / 100 if"),
    ("path_A,path_B,prompt,VQ,MOS_A_VQ\na,b,p,A,0\n", "row 2 gives 0 points"),
    ("PAR1\0", "is Parquet: .*python -c")])
def test_a_row_that_is_not_what_its_header_says_is_refused_by_its_number(text, says, tmp_path):
    for name in "ab":
        (tmp_path / name).touch()
    (tmp_path / "pairs.csv").write_text(text)
    with refusing(f"pairs.csv.*{says}"):
        data.read_pairs(tmp_path / "pairs.csv")

def test_paths_are_found_as_other_systems_spell_them(tmp_path):
    file = tmp_path / "videos" / "caf\u00e9" / "a:b.mp4"
    write_clips(tmp_path, [file])
    for name in ("videos/caf\u00e9/a:b.mp4", "videos\\cafe\u0301\\a:b.mp4", "caf\u00e9\\a:b.mp4"):
        found = data.find_video(tmp_path, name)
        assert found.samefile(file) and data.video_info(found) == (12, 8.0, 32, 48)
    assert data.find_video(tmp_path, "gone\\x.mp4") == tmp_path / "gone\\x.mp4"

def test_the_pair_report_counts_ties_agreement_repeats_and_contradictions(tmp_path, capsys):
    rows = ["a,b,x,A,A", "b,a,x,B,B", "c,d,x,A,B", "d,c,x,A,same", "c,d,x,A,same", "a,b,y,same,", "a,d,z,,B"]
    for name in "abcd":
        (tmp_path / name).touch()
    (tmp_path / "pairs.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,TA", *rows]))
    data.report_pairs(data.read_pairs(tmp_path / "pairs.csv"), ["y", "z", "w"])
    assert capsys.readouterr().out.splitlines() == [
        "7 pairs of 4 videos and 3 prompts, 2 of which are evaluated on too",
        "2 pairs occur more than once: 2 in both orders, 1 with opposite labels",
        "VQ: 86% labelled; A 67%, B 17%, ties 17%; where both decide, it agrees with TA 67%",
        "TA: 86% labelled; A 17%, B 50%, ties 33%; where both decide, it agrees with VQ 67%"]
    data.report_pairs(data.toy_pairs(40, "train", 0).subset([*range(40), 3]), data.prompts_of("eval"))
    said = capsys.readouterr().out.splitlines()
    assert re.match("41 pairs of 80 videos and .* prompts, 0 of which", said[0])
    assert said[1].startswith("1 pairs occur more than once: 0 in both")

def test_labels_decide_by_their_sign_and_ties_are_dropped():
    pairs, args = data.toy_pairs(60, "train", 0), train_align.Args(labels="human", dim_w=(0.0, 1.0, 0.0))
    ordered, rows, r = train_align.label(args, data.Shapes(), pairs, "cpu")
    assert r is None and torch.equal(rows, (pairs.label[:, 1] != 0).nonzero()[:, 0])
    b_wins = (pairs.label[rows, 1] < 0).long()
    for place in (0, 1):
        assert torch.equal(ordered.videos[rows, place], pairs.videos[rows, b_wins ^ place])
    _, rows, r = train_align.label(replace(args, labels="oracle"), data.Shapes(), pairs, "cpu")
    assert len(rows) == 60 and (r[:, 0] >= r[:, 1]).all()

def test_on_policy_pairs_are_the_best_and_the_worst_of_what_a_model_drew_itself(runs, tmp_path):
    draw(runs, "own", prompt=data.prompts_of("train")[:12], n_per_prompt=2, steps=2, cfg=1.0, reward="oracle")
    pairs = data.Shapes().encode(data.read_pairs(runs / "own/pairs.csv"), train_align.Args())
    assert pairs.prompts == data.prompts_of("train")[:12] and (pairs.label[:, 3] == 1).all()
    prompts = [p for p in pairs.prompts for _ in range(2)]
    own = sample.toy_videos(sample.load_model(runs / "base"), prompts, 0, 2)
    r = data.overall(normalised(oracle(own, prompts))).view(12, 2)
    own, rows = data.to_uint8(own).view(12, 2, *own.shape[1:]).float(), torch.arange(12)
    for place, i in ((0, r.argmax(1)), (1, r.argmin(1))):  # mp4 keeps noise within a few levels
        assert (pairs.videos[:, place] - own[rows, i]).abs().mean() < 6
    align(runs, tmp_path / "run", pairs=f"{runs}/own/pairs.csv", steps=1)
    assert read(tmp_path / "run/config.json")["args"]["labels"] == "human"      # the file's own decide
    r = tensor([1, 3, 2, 6, 5, 4])
    sample.write_pairs(tmp_path / "best.csv", list("abcdef"), ["x"] * 3 + ["y"] * 3, r, 3)
    assert (tmp_path / "best.csv").read_text().split() == [
        "prompt,chosen,rejected", "x,b.mp4,a.mp4", "y,d.mp4,f.mp4"]

def test_videos_survive_their_file(tmp_path):
    video = clean_videos(PROMPTS[:1])[0].repeat_interleave(8, 2).repeat_interleave(8, 3)
    file = tmp_path / "a.mp4"
    data.write_video(file, video, fps=8)
    frames, fps = data.read_video(file)
    assert frames.shape == (8, 192, 192, 3) and frames.dtype == np.uint8 and fps == 8
    assert np.abs(frames - data.to_uint8(video).permute(1, 2, 3, 0).numpy().astype(float)).mean() < 2
    assert np.array_equal(data.read_video(file, [1, 6])[0], frames[[1, 6]])
    assert data.video_info(file) == (8, 8.0, 192, 192)                          # counted, not decoded
    with refusing("a.mp4"):
        data.read_video(file, [99])

def test_videos_that_cannot_be_used_are_named(tmp_path):
    import av
    write_clips(tmp_path, ["whole.mp4"], fps=24)
    write_clips(tmp_path, ["enormous.mp4"], frames=1, size=(16, 8208))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "nothing.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode()])
    with av.open(str(tmp_path / "frameless.mp4"), "w") as container:
        container.add_stream("libx264", rate=8, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    unread = "cannot be read as a video"
    for name, says in (("cut", unread), ("text", unread), ("nothing", unread), ("gone", unread),
                       ("sound", "has no video in it"), ("enormous", "8208 x 16: more than 8192"),
                       ("frameless", f"frames|has no video|{unread}")):
        with refusing(f"{name}.mp4.*({says})"):
            data.read_clip(tmp_path / f"{name}.mp4", 1, (16, 16))
    for look in (data.read_video, data.video_info):
        with refusing(f"text.mp4 {unread}"):
            look(tmp_path / "text.mp4")

def test_a_clip_is_a_stretch_of_time_whatever_the_frame_rate_and_the_files_name(tmp_path):
    write_clips(tmp_path, ["whole.mp4"], frames=12, fps=24)
    write_clips(tmp_path, ["slow.mp4"], frames=4, fps=8)                        # half a second too
    shutil.copy(tmp_path / "whole.mp4", tmp_path / "whole.txt")
    clips = [data.read_clip(tmp_path / name, 5, (16, 16)) for name in ("whole.mp4", "whole.txt", "slow.mp4")]
    assert torch.equal(clips[0], clips[1]) and clips[2].shape == clips[0].shape == (3, 5, 16, 16)

def test_a_video_is_read_as_players_show_it(tmp_path):
    grey = np.stack([np.full((32, 48, 3), 20 * k, np.uint8) for k in range(12)])
    grey[:, :, 24:] += 30                                                       # darker on the left
    film(tmp_path / "plain.mp4", grey)
    film(tmp_path / "wide.mp4", grey, aspect=2)
    film(tmp_path / "cover.mkv", grey, cover=True)
    content = bytearray((tmp_path / "plain.mp4").read_bytes())                  # as phones do, with a matrix
    place = content.index(b"tkhd") + 44
    content[place:place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    plain, turned = (data.read_video(tmp_path / f"{name}.mp4")[0] for name in ("plain", "turned"))
    assert np.array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))             # a quarter turn clockwise
    assert data.video_info(tmp_path / "turned.mp4") == (12, 25.0, 48, 32)
    assert data.video_info(tmp_path / "wide.mp4") == (12, 25.0, 32, 96)
    assert data.read_video(tmp_path / "wide.mp4", [3])[0].shape == (1, 32, 96, 3)
    assert np.array_equal(data.read_video(tmp_path / "cover.mkv")[0], plain)
    film(tmp_path / "uneven.mp4", grey, ms=[0, 100, 200, 300, 320, 340, 360, 380, 400, 700, 800, 900])
    shown = [0, 0, 1, 1, 2, 3, 6, 8, 8]                                         # at k / 16 s
    assert data.clip_frames(tmp_path / "uneven.mp4", 9).tolist() == shown

@pytest.mark.parametrize("loss", ["eval", "btt", "dpo"])
def test_a_video_is_bad_in_three_ways_and_left_out_in_each(loss, qwen, wan, tmp_path, capsys):
    import av
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(qwen[0] / name, tmp_path)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:900])
    with av.open(str(tmp_path / "a.mp4")) as container:                         # it opens and then breaks
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in packets[1:]:
        content = content[:place + 4] + bytes(size - 4) + content[place + size:]
    (tmp_path / "late.mp4").write_bytes(content)
    both = "ab", "ba", ("a", "gone"), ("cut", "b"), ("a", "late")
    rows = [f"{a}.mp4,{b}.mp4,p {a} {b},A,B,A" for a, b in both]
    (tmp_path / "p.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,MQ,TA", *rows]))
    own = dict(pairs=f"{tmp_path}/p.csv", skip_bad=True, cache=f"{tmp_path}/cache")
    if loss == "dpo":
        args = wan_args(wan, "", **own, frames=9)
        assert data.Wan(wan).encode(data.read_pairs(args.pairs, True), args).lines == [2, 3]
    elif loss == "btt":
        train_reward.main(qwen_args(qwen, tmp_path / "run", **own, steps=1))
    else:
        args = train_reward.Args(eval=f"{qwen[0]}/released", template=f"{qwen[0]}/prompt_template.py",
                                 out=f"{tmp_path}/eval", **own)
        assert train_reward.main(args)["reward"]["VQ"]["with"] >= 0
        assert len((tmp_path / "eval/pairs.csv").read_text().splitlines()) == 3
    said = capsys.readouterr().out
    assert "skipped" in said and "bad videos" in said, said

def test_the_toy_draws_judges_and_aligns_from_files(runs, tmp_path):
    drawn, file = f"{tmp_path}/drawn", f"{tmp_path}/drawn/pairs.csv"
    sample.main(sample.Args(model=f"{runs}/base", prompt=data.prompts_of("train")[:9], n_per_prompt=2, cfg=1.0,
                            steps=1, reward="oracle", out=drawn))
    args = align_args(runs, f"{tmp_path}/run", pairs=file, steps=2, eval_n=2, eval_steps=1)
    world = data.world_of(args.model)
    train_align.check(args, world)
    pairs = world.encode(world.read(args), args)
    assert args.labels == "human" and pairs.videos.shape == (9, 2, 3, 8, 24, 24)
    truth = data.with_overall(normalised(data.true_scores(pairs)))[..., 3]
    assert (truth[:, 0] >= truth[:, 1] - 0.05).all()                            # H.264 moves the truth
    train_align.main(args)
    m, start = sample.load_model(args.out), sample.load_model(runs / "base")
    batch = torch.randn(1, 3, 8, 24, 24), torch.rand(1), torch.randn(1, 8, 32)
    assert not torch.equal(m(*batch), start(*batch))

def test_a_row_that_comes_twice_in_a_step_has_noise_of_its_own():
    samples = data.noise_samples(torch.tensor([3, 5, 3, 3]))
    t, eps = data.draw_noise((4,), 0, 1, samples)
    assert samples == [3, 5, (3, 1), (3, 2)] and t.unique().numel() == 4
    assert torch.equal(eps[0], data.draw_noise((4,), 0, 1, [3])[1][0])

# ---- rewards ----
# A reward is as good as its accuracy. The latent one grows from the base; the VLM is the released one.

def test_accuracies_are_the_exact_maximum_over_thresholds():
    assert reward.accuracy_with_ties(tensor([1.0, 1.0]), tensor([1.0, 2.0])) == 1.0         # "no ties" counts
    label, d = tensor([1.0, -1.0, 0.0, NAN]), tensor([0.0, -1.0, 5.0, 5.0])
    assert reward.accuracy_without_ties(label, d) == 0.5                        # d = 0 is wrong
    g = rng(0)
    for _ in range(50):
        label, d = (torch.randint(-n, n + 1, (12,), generator=g).float() for n in (1, 3))   # many equal |d|
        predicted = [torch.where(d.abs() <= e, 0, d.sign()) for e in range(-1, 4)]
        brute = max((p == label).float().mean().item() for p in predicted)
        assert abs(reward.accuracy_with_ties(label, d) - brute) < 1e-6

def test_score_differences_separate_ties_from_preferences():
    label = tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]])
    gap = tensor([[0.1, 0.1, 3.0], [0.3, 0.2, 1.0], [0.2, 0.3, 2.0], [0.4, 0.4, 1.0]])
    found = train_reward.differences(label, gap)
    assert [found[dim]["separation"] for dim in DIMS] == [0.75, 0.25, 1.0]
    assert found["VQ"]["tied"] == [0.15, 0.2, 0.25] and found["TA"]["other"] == [2.25, 2.5, 2.75]

def test_a_latent_reward_starts_from_the_base_and_survives_its_file(tmp_path):
    base, batch = random_model(), random_batch()
    r = reward.LatentReward.from_base(base, depth=1).requires_grad_(False)
    assert torch.equal(r.dit(*batch, depth=1), base(*batch, depth=1))
    r.mean.fill_(0.5)
    r.std.fill_(2.0)
    assert torch.allclose(r.score(*batch), (r(*batch) - 0.5) / 2)
    r.half().float().save(tmp_path, data.Shapes().metadata)                     # the file is 16 bit
    assert torch.equal(reward.load_reward(tmp_path).score(*batch), r.score(*batch))

def test_loading_gives_the_scores_of_the_unmerged_model_in_every_layout(qwen, tmp_path):
    (root, truth), released = qwen, released_reward(qwen)
    base, template = root / "base", root / "prompt_template.py"
    raw, rows = raw_scores(qwen, released), released.qwen.get_input_embeddings().num_embeddings
    assert raw.std() > 0.1 and rows == len(released.tokenizer) == 503           # of 700 in the base
    mean, std = (tensor([CONSTANTS[f"{dim}_{name}"] for dim in DIMS]) for name in ("mean", "std"))
    assert torch.allclose(raw_scores(qwen, released, normalise=True), (raw - mean) / std)
    unmerged = reward.VideoReward.from_base(base, template=template).trainable()
    unmerged.eval().load_state_dict(truth | {"rows": truth[reward.EMBEDDING][unmerged.token_ids]})
    assert torch.allclose(raw_scores(qwen, unmerged), raw, atol=1e-4)

    lora = {k: v for k, v in truth.items() if "lora_" in k or "embed_tokens" in k}
    rest = {k: v for k, v in truth.items() if "visual" in k or "rm_head" in k or "embed_tokens" in k}
    for layout in ("new", "adapter", "adapter_new"):
        step = shutil.copytree(root / "released", tmp_path / layout) / "checkpoint-30"
        shutil.copytree(step, tmp_path / layout / "checkpoint-4")               # older, and of bad weights
        (tmp_path / layout / "checkpoint-4/model.pth").write_bytes(b"")
        if layout == "new":
            torch.save(theirs(truth, layout), step / "model.pth")
        else:
            (step / "model.pth").unlink()
            torch.save(theirs(rest, layout.replace("adapter", "")), step / "non_lora_state_dict.pth")
            model_file.save_tensors(theirs(lora, layout) | LM_HEAD, step / "adapter_model.safetensors")
        again = reward.VideoReward.from_pretrained(tmp_path / layout, base, template)
        assert torch.allclose(raw_scores(qwen, again), raw, atol=1e-5), layout

def test_positions_are_plain_and_not_the_three_dimensional_ones(qwen):
    """transformers' own forward gives our scores with plain positions, with its own M-RoPE others."""
    own = released_reward(qwen)
    ids, mask, patches, grids = own.inputs(clips(qwen, "a"), ["a cat"])
    assert torch.equal(own.qwen.get_input_embeddings()(ids)[0, ids[0] == own.token_ids[0]], own.rows[:1])
    r, at = own(ids, mask, patches, grids)[0], [ids[0].tolist().index(i) for i in own.token_ids]
    plain, mrope = (own.rm_head(own.qwen(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values_videos=patches,
        video_grid_thw=grids, mm_token_type_ids=2 * (ids == own.video_id).int()).last_hidden_state)[0, at, 0]
        for positions in (torch.arange(ids.shape[1]).expand(3, 1, -1), None))
    assert torch.allclose(r, plain, atol=1e-5) and (r - mrope).abs().min() > 1e-3

def test_vq_and_mq_cannot_see_the_prompt_and_a_batch_is_one_by_one(qwen):
    own, videos = released_reward(qwen), clips(qwen, "a", "b", "a")
    prompts = ["a cat", "a very long tale of two dogs in the snow", "sea"]
    r = own.score(videos, prompts)
    alone = torch.cat([own.score([v], [p]) for v, p in zip(videos, prompts)])
    assert torch.allclose(r, alone, atol=1e-5) and (r[0] - r[1]).abs().min() > 1e-4
    assert (r[0, :2] - r[2, :2]).abs().max() < 1e-5 < 1e-3 < (r[0, 2] - r[2, 2]).abs()

@pytest.mark.parametrize("token", ["special", "last"])
def test_three_outputs_are_read_each_at_its_token_or_all_at_the_last(qwen, token):
    own = reward.VideoReward.from_base(qwen[0] / "base", token)
    own.rm_head.weight.data = torch.randn(3, 32)
    own.settings["output_dim"] = 3
    ids, mask, patches, grids = own.inputs(clips(qwen, "a", "b"), ["a cat", "one, two, three dogs"])
    h = own.rm_head(own.qwen(
        input_ids=ids, attention_mask=mask, pixel_values_videos=patches, video_grid_thw=grids,
        position_ids=torch.arange(ids.shape[1]).expand(3, 2, -1)).last_hidden_state)
    r, lengths = own(ids, mask, patches, grids), mask.sum(1).tolist()
    for b, n in enumerate(lengths):
        at = [ids[b].tolist().index(i) for i in own.token_ids] or [n - 1] * 3
        assert torch.allclose(r[b], h[b, at, [0, 1, 2]], atol=1e-4)
    assert lengths[0] != lengths[1] and (token == "special") == (reward.TOKENS[0] in own.settings["template"])

def test_the_input_is_the_default_system_turn_the_video_and_the_prompt(qwen):
    own = released_reward(qwen)
    ids, _, patches, grids = own.inputs(clips(qwen, "a"), ["a cat"])
    said = own.tokenizer.decode(ids[0]).replace("<|video_pad|>" * (len(patches) // 4), "<|video_pad|>")
    assert said == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                    "<|vision_start|><|video_pad|><|vision_end|>"
                    + THEIRS.replace("{text_prompt}", "a cat").replace("{{it}}", "{it}")
                    + "<|im_end|>\n<|im_start|>assistant\n")
    assert grids.tolist() == [[2, 20, 28]]                                      # 4 frames of 280 x 392
    with refusing("special token"):
        own.inputs(clips(qwen, "a"), ["a cat <|TA_reward|>"])

def test_how_many_frames_and_which():
    for total, fps, n in ((60, 24, 4), (60, 23.976, 6), (150, 30, 10), (126, 24, 10), (1, 24, 2), (2, 24, 2),
                          (3, 24, 2), (5, 1, 4), (24 * 600, 24, 768)):
        got = reward.frame_indices(total, fps)
        assert len(got) == n and got[0] == 0 and got[-1] == total - 1, (total, fps, got)
    assert reward.frame_indices(7, 1) == [0, 1, 2, 4, 5, 6]
    assert reward.frame_indices(9, 24, count=40) == [0, 1, 2, 3, 5, 6, 7, 8]

def test_frame_sizes_follow_the_authors_bounds():
    for size, fitted in (((576, 1024), (336, 588)), ((1280, 720), (588, 336)), ((64, 96), (280, 392)),
                         ((448, 448), (448, 448)), ((336, 336), (336, 336)), ((100, 8000), (28, 4004)),
                         ((300, 310), (336, 336))):
        assert reward.frame_size(*size) == fitted, size
    assert reward.frame_size(300, 310, max_pixels=64 * 28 * 28) == (196, 224)   # shrunk, not enlarged again
    assert reward.frame_size(100, 100, max_pixels=20_000) == (336, 336)         # enlarged past its own bound
    for size, most in (((10, 3000), 200704), ((30, 4000), 20000)):
        with refusing(f"v.mp4 is {size[0]} x {size[1]}"):
            reward.frame_size(*size, most, "v.mp4")

def test_patches_are_those_of_transformers_own_processor():
    """A frame shown twice gives the processor's patches; two frames, an independent reading of the layout."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(min_pixels=reward.MIN_PIXELS, max_pixels=reward.MAX_PIXELS)
    g = np.random.default_rng(0)
    frames = g.integers(0, 256, (2, 280, 364, 3), dtype=np.uint8)               # of a size that stays
    greys = [g.integers(90, 166, (*size, 3), dtype=np.uint8) for size in ((97, 131), (900, 700))]
    for frame, levels in ((frames[0], 0.01), *((grey, 1.5) for grey in greys)):  # Pillow resizes, and clamps
        out = processor(Image.fromarray(frame), return_tensors="pt")
        x, grid = reward.patchify(frame[None].repeat(2, 0), reward.frame_size(*frame.shape[:2]))
        assert grid.tolist() == out["image_grid_thw"][0].tolist()
        assert (x - out["pixel_values"]).abs().max() * 0.27 * 255 < levels

    def pixels(x):
        return x.view(-1, 3, 2, 14, 14) * reward.PIXEL_STD[None, :, None] + reward.PIXEL_MEAN[None, :, None]
    grey = pixels(x) * 255
    assert (grey - grey.round()).abs().max() < 1e-3 and grey.min() > -0.01 and grey.max() < 255.01
    x = pixels(reward.patchify(frames, (280, 364))[0]).numpy()
    for n in (0, 1, 2, 3, 4, 200, 519):  # token n // 4, corner n % 4 of it
        row, column = 14 * (n // 4 // 13 * 2 + n % 4 // 2), 14 * (n // 4 % 13 * 2 + n % 2)
        seen = frames[:, row:row + 14, column:column + 14].transpose(3, 0, 1, 2) / 255
        assert np.abs(x[n] - seen).max() < 1e-5, n

def test_odd_videos_are_scored_or_refused_by_name(qwen, tmp_path):
    own = released_reward(qwen)
    write_clips(tmp_path, ["portrait.mp4"], frames=8, size=(96, 32))
    write_clips(tmp_path, ["one.mp4"], frames=1)
    write_clips(tmp_path, ["narrow.mp4"], frames=4, size=(10, 2400))
    (tmp_path / "text.mp4").write_text("no video")
    film(tmp_path / "uneven.mkv", np.full((7, 64, 64, 3), 30, np.uint8), (0, 40, 80, 500, 1500, 1540, 2000))
    for name in ("portrait.mp4", "one.mp4", "uneven.mkv"):
        assert own.score([tmp_path / name], ["p"]).isfinite().all()
    for name in ("narrow.mp4", "text.mp4"):
        with refusing(name):
            own.score([tmp_path / name], ["p"])

def test_a_template_is_parsed_and_never_executed(qwen, tmp_path):
    assert reward.read_template(qwen[0] / "prompt_template.py") == THEIRS       # it would end the tests
    odd = THEIRS.replace("{text_prompt}", "{text_prompt.x}")
    early = "{text_prompt}" + THEIRS.replace("{text_prompt}", "")
    values = [repr(odd), repr(early), "1", "open('x').read()", "'no tokens {text_prompt}'"]
    for text in ("x = 1", "def (", *(f"{reward.THEIR_TEMPLATE} = {value}" for value in values)):
        (tmp_path / "t.py").write_text(text)
        with refusing("t.py"):
            reward.read_template(tmp_path / "t.py")

def test_interrupted_scoring_goes_on_and_nothing_is_scored_twice(qwen, tmp_path, monkeypatch):
    own, cache, scored = released_reward(qwen), tmp_path / "scores.jsonl", []
    videos, prompts = clips(qwen, "a", "b", "a", "a"), ["x", "x", "x", "y"]
    plain = own.score(videos, prompts)

    def score(paths, prompts, normalise):
        if len(scored) == 2:
            raise Killed
        scored.append((Path(paths[0]).stem, prompts[0]))
        return reward.VideoReward.score(own, paths, prompts, normalise)
    monkeypatch.setattr(own, "score", score)
    with pytest.raises(Killed):
        reward.score_videos(own, videos, prompts, cache)
    cache.write_text(cache.read_text() + '{"key": "cut sho')                    # as a power cut leaves it
    for todo in ([("a", "y")], []):
        scored.clear()
        assert torch.allclose(reward.score_videos(own, videos, prompts, cache), plain, atol=1e-5)
        assert scored == todo
    other = released_reward(qwen, torch.bfloat16)                               # another, with other scores
    assert other.identity != own.identity
    assert (reward.score_videos(other, videos, prompts, cache) - plain).abs().max() > 1e-6
    with refusing("gone.mp4 cannot be read"):
        reward.score_videos(own, [tmp_path / "gone.mp4"], ["x"], cache)

@pytest.mark.parametrize("changes", [{}, dict(loss="bt", reward_token="last"), dict(loss="regression")],
                         ids=["btt", "bt last", "regression"])
def test_training_a_video_reward_moves_only_what_the_paper_trains(qwen, changes, tmp_path):
    args, special = qwen_args(qwen, tmp_path / "run", steps=8, **changes), "reward_token" not in changes
    result = train_reward.main(args)
    assert result["loss_last"] < result["loss_first"] and result["n"] == 1
    assert set(result["reward"]) == {"VQ", "TA"}
    torch.manual_seed(0)
    memory = reward.VideoReward.from_base(args.model, args.reward_token).trainable()
    before, saved = memory.state_dict(), weights(tmp_path / "run/reward.safetensors")
    moved, heads = {k for k in before if not torch.equal(before[k], saved[k])}, {"rm_head.weight"}
    heads |= {"rows"} if special else set()
    assert moved == {k for k in before if "lora" in k or "visual" in k} | heads
    assert saved.keys() == before.keys()
    assert before["rows"].shape == (3 if special else 0, 32)
    memory.eval().load_state_dict(saved)
    again, raw = reward.load_reward(tmp_path / "run"), raw_scores(qwen, memory)
    assert torch.allclose(raw_scores(qwen, again), raw, atol=1e-5)
    scores = raw_scores(qwen, again, normalise=True)
    assert torch.allclose(scores, (raw - again.mean) / again.std, atol=1e-4)

def test_a_step_in_parts_is_a_step_in_one(qwen, tmp_path):
    for parts in ("1", "2"):
        train_reward.main(qwen_args(qwen, tmp_path / parts, steps=1, accumulate=int(parts)))
    one, two = (data.read_log(tmp_path / parts)[-1] for parts in ("1", "2"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)

def test_the_benchmark_counts_what_is_labelled_and_writes_every_pair(qwen, tmp_path, capsys):
    root = qwen[0]
    args = train_reward.Args(eval=f"{root}/released", template=f"{root}/prompt_template.py",
                             pairs=prefs(qwen), cache=str(tmp_path), out=f"{tmp_path}/eval")
    found = train_reward.main(args)["reward"]
    better = raw_scores(qwen, released_reward(qwen), normalise=True)[:, 0]
    assert set(found) == {*DIMS} and found["VQ"]["without"] == float(better[0] > better[1])
    assert math.isnan(found["MQ"]["without"]) and found["MQ"]["with"] == 1.0    # its one label is a tie
    assert (tmp_path / "scores.jsonl").stat().st_size > 0
    assert "| the paper's, VideoGen-RewardBench | 75.7 / 59.7 |" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "eval/pairs.csv")))
    assert len(rows) == 8 and rows[0]["VQ"] == "B" and rows[0]["MQ"] == ""
    assert float(rows[1]["score_A_VQ"]) == pytest.approx(better[0].item(), abs=1e-3)
    (root / "genai.csv").write_text("prompt,left_video,right_video,vote_type\np,a.mp4,b.mp4,leftvote\n")
    result = train_reward.main(replace(args, pairs=f"{root}/genai.csv"))
    assert set(result["reward"]) == set(result["TA alone"]) == {"Overall"}
    assert "| 72.9 / 49.4 |" in capsys.readouterr().out

def test_the_command_line_scores_videos_and_says_that_negative_is_normal(qwen, capsys):
    own, videos = released_reward(qwen), clips(qwen, "a", "b")
    args = reward.Args(video=videos, prompt="a cat", ckpt=f"{qwen[0]}/released",
                       template=f"{qwen[0]}/prompt_template.py")
    assert torch.allclose(reward.main(args), own.score(videos, ["a cat"] * 2))
    assert "negative is normal" in capsys.readouterr().out
    own.mean.fill_(NAN)
    for _ in range(2):                                                          # said once, scored twice
        assert torch.equal(raw_scores(qwen, own, normalise=True), raw_scores(qwen, own))
    assert capsys.readouterr().out.count("no normalisation constants") == 1

# ---- runs ----
# A run is its command: it says how it goes, may be cut anywhere, and gives the same numbers all the same.

@pytest.mark.parametrize("name, changes", [
    ("dpo", {}), ("dpo_full", dict(lora_rank=0, lr=3e-4)),
    ("dpo_ta", dict(dim_w=(0.0, 0.0, 1.0), labels="oracle", beta_schedule="(1-t)^2")),
    ("sft", dict(loss="sft", labels="human", lora_rank=0, steps=40)),
    ("rwr", dict(loss="rwr", lora_rank=0, steps=40))])
def test_each_objective_trains_and_its_loss_falls(runs, name, changes):
    run, result = runs / name, align(runs, runs / name, **changes)
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and read(run / "eval.json") == result
    events, config = data.read_log(run), read(run / "config.json")
    assert events[-1]["loss"] < events[0]["loss"] and len(events[0]["loss_by_t"]) == 10
    if "dpo" in name:
        assert {"margin", "gap_w", "gap_l"} <= events[0].keys() and events[-1]["implicit_acc"] > 0.5
    again = data.parse_args(train_align.Args, "", shlex.split(config["command"])[2:])
    train_align.check(again, data.Shapes())
    assert json.loads(json.dumps(vars(again))) == config["args"]
    assert (run / "samples.png").exists() and sample.load_model(run)(*random_batch()).isfinite().all()

def test_pretraining_and_rewards_learn_and_say_how_well(runs):
    for name, most in (("base", 0.8), ("reward", 1), ("noisy", 1)):
        events = data.read_log(runs / name)
        assert events[-1]["loss"] < most * events[0]["loss"]
    assert set(read(runs / "base/eval.json")["oracle"]) == set(DIMS)
    for name, times in (("reward", 1), ("noisy", 5)):
        by_t = read(runs / name / "eval.json")["by_t"]
        assert len(by_t) == times and 0 <= by_t["0.0"]["VQ"]["with"] <= 1

def test_rwr_accumulated_over_micro_batches_is_rwr_in_one(runs, tmp_path):
    for parts in (1, 4):
        align(runs, tmp_path / str(parts), loss="rwr", steps=2, batch=4, accumulate=parts)
    assert_near(*(weights(tmp_path / parts / "lora.safetensors") for parts in ("1", "4")), 1e-5)

def test_two_processes_give_the_losses_and_videos_of_one(runs, tmp_path):
    methods = {"dpo": {}, "rwr": dict(loss="rwr", accumulate=2)}
    one, two = ([align_args(runs, tmp_path / f"{name}{n}", steps=2, **changes)
                 for name, changes in methods.items()] for n in (1, 2))
    for args in one:
        train_align.main(args)
    torchrun(tmp_path, two)
    for a, b in (map(Path, (a.out, b.out)) for a, b in zip(one, two)):
        last, other = (data.read_log(run)[-1] for run in (a, b))
        assert all(np.isclose(last[k], other[k], rtol=1e-4) for k in ("loss", "grad_norm"))
        for file, atol in (("lora.safetensors", 1e-5), ("samples.safetensors", 1)):         # 1 level of 256
            assert_near(weights(a / file), weights(b / file), atol)

def test_the_distance_is_the_mean_squared_difference_of_velocities():
    still, moved = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    still.forward, moved.forward = lambda x, t, text: x, lambda x, t, text: x + 3 * t.view(-1, 1, 1, 1, 1)
    videos, reference = torch.zeros(100, 3, 2, 2, 2), lambda: contextlib.nullcontext(still)
    far = [train_align.distance(m, reference, videos, PROMPTS * 2, 0) for m in (still, moved)]
    t, _ = data.draw_noise((), 0, 2**31, list(range(100)))
    assert far == [0, pytest.approx(9 * t.square().mean().item(), rel=1e-5)]

@pytest.mark.parametrize("name", ["dpo", "pretrain", "reward", "videos", "win rates"])
def test_the_command_in_config_json_makes_the_same_files_again(name, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    small, drawn = dict(out=f"{tmp_path}/run", steps=2), dict(ckpt=f"{runs}/base", nrg=f"{runs}/noisy")
    script, args = {
        "dpo": (train_align, align_args(runs, n_pairs=8, batch=4, **small)),
        "pretrain": (train_align, align_args(runs, loss=name, batch=2, lora_rank=None, **small)),
        "reward": (train_reward, reward_args(runs, n_pairs=8, batch=4, n_eval=12, noisy=True, **small)),
        "videos": (sample, sample.Args(prompt=PROMPTS[:9:5], **drawn, **small)),
        "win rates": (sample, sample.Args(eval=4, dim_w=(0.0, 0.5, 1.0), **drawn, **small))}[name]
    script.main(args)
    (tmp_path / "run/mine.txt").write_text("an older run is renamed and never overwritten")
    command = shlex.split(read(tmp_path / "run/config.json")["command"])
    data.launch(script.main, script.Args, script.__doc__, command[2:])
    first, again = ({f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
                    for run in (tmp_path / "run.1", tmp_path / "run"))
    assert first.pop(Path("mine.txt")) and len(first) > 2 and first.keys() == again.keys()
    assert timeless_log(tmp_path / "run.1") == timeless_log(tmp_path / "run")
    assert all(first[name] == again[name] for name in first if name.name != "log.jsonl")  # the clock is in it

def test_a_console_that_cannot_spell_a_name_still_prints(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    data.launch(lambda args: print("\u65e5\u672c.mp4", 0.5), train_reward.Args, "", [])
    console.flush()
    assert console.buffer.getvalue() == b"\\u65e5\\u672c.mp4 0.5\n"

def test_without_git_a_run_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert read(data.Run(sample.Args(out=f"{tmp_path}/run")).folder / "config.json")["commit"] == ""

def test_every_command_of_the_pages_parses():
    scripts = {f"{m.__name__}.py": m for m in (train_align, train_reward, sample, reward)}
    commands = page_commands()
    assert len(commands) >= 30
    documented = [line.strip().split("    ")[0] for m in scripts.values() for line in m.__doc__.splitlines()]
    for script, *words in commands + [shlex.split(line)[1:] for line in documented if line[:7] == "python "]:
        assert (HERE / script).exists(), script
        if script in scripts:
            data.parse_args(entry(scripts[script], words)[1], scripts[script].__doc__, words)

HEALTHY = [dict(step=10 * i, loss=0.693 - 0.02 * i, logit=0.05 * i, grad_factor=0.5 - 0.02 * i,
                margin=0.0003 * i, gap_w=0.0008 * i, gap_l=0.0011 * i, err_ref_w=0.036) for i in range(1, 11)]

@pytest.mark.parametrize("changes, says", [
    (dict(logit=0.001), "the loss is still log 2, with logits of 0.0010"),
    (dict(grad_factor=0.004), "saturated: the gradient has 0.40% of its strength left"),
    (dict(gap_w=0.02, gap_l=0.03),
     "a worse loser alone: the winner's error is 0.0200 above the reference's 0.0360"),
    (dict(gap_w=0.08, margin=-0.01), "errors explode"),
    (dict(loss=1.5), "the loss has doubled, to 1.50"), ({}, None)])
def test_the_doctor_names_each_disease_once_and_is_silent_on_health(changes, says):
    events = [HEALTHY[0]] + [e | changes for e in HEALTHY[1:]]
    said = [verdict for i in range(1, 11) for verdict in train_align.diagnose(events[:i])]
    assert len(said) == bool(says) and all(says in verdict for verdict in said), said

def test_the_log_tells_the_logit_and_its_gradient_factor_and_beta_in_others_units():
    logit = tensor([-3.0, 0.0, 0.5, 20.0, 1000.0])
    loss = -torch.nn.functional.logsigmoid(logit)
    seen = torch.stack([torch.rand(5), loss, *torch.rand(3, 5), logit], dim=1)
    for row in seen:
        event = train_align.summary(("t", "loss", "gap_w", "gap_l", "err_ref_w", "logit"), row[None])
        assert event["logit"] == pytest.approx(abs(row[-1].item()), abs=1e-4)
        assert event["grad_factor"] == pytest.approx(torch.sigmoid(-row[-1]).item(), rel=1e-3)
    assert re.search("250 .* 0.0362 .* 13,824 numbers, 0.0181 ", train_align.beta_elsewhere(500.0, 13824))
    sft = [dict(step=10 * i, loss=loss) for i, loss in enumerate((0.04, 0.05, 0.09), 1)]
    assert not train_align.diagnose(sft[:2]) and "explode" in train_align.diagnose(sft)[0]

@pytest.mark.parametrize("name", ["dpo", "pretrain", "reward"])
def test_a_killed_run_resumes_to_the_same_bits(name, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    small = dict(n_pairs=16, steps=9, batch=4, save_every=2, accumulate=2)
    script, args = {
        "dpo": (train_align, align_args(runs, **small)),
        "pretrain": (train_align, align_args(runs, loss=name, lora_rank=None, warmup=2, **small)),
        "reward": (train_reward, reward_args(runs, n_eval=12, **small))}[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main(replace(args, out=str(whole)))
    main_killed(script, replace(args, out=str(cut)), 7, monkeypatch)
    assert [f.name[:13] for f in sorted(cut.glob("state-*"))] == ["state-0000004", "state-0000006"]
    newest = max(cut.glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-100])                              # as a power cut leaves them
    (cut / "state.tmp").write_bytes(b"half a state")
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    capsys.readouterr()
    script.main(replace(args, out=str(cut), resume=True))
    said = capsys.readouterr().out
    assert f"{newest} is damaged: going back" in said and "going on after step 4" in said
    files = [sorted(f.relative_to(run) for f in run.rglob("*.safetensors")) for run in (whole, cut)]
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        assert_near(weights(whole / file), weights(cut / file), 0)
    assert read(whole / "eval.json") == read(cut / "eval.json") and timeless_log(whole) == timeless_log(cut)

def test_resume_starts_anew_without_a_state_and_refuses_other_arguments(runs, tmp_path, capsys, monkeypatch):
    args = align_args(runs, tmp_path / "run", n_pairs=8, steps=3, batch=4)
    main_killed(train_align, replace(args), 1, monkeypatch)
    train_align.main(replace(args, resume=True))
    assert "holds no whole state: starting at step 0" in capsys.readouterr().out
    with refusing(r"made by another command \(--lr was 0.003, not 1.0\)"):
        train_align.main(replace(args, resume=True, lr=1.0))

def test_ctrl_c_saves_first_and_is_heard_again_afterwards(runs, tmp_path, monkeypatch, capsys):
    args = align_args(runs, tmp_path / "run", n_pairs=8, steps=5, batch=4)
    clip, before = train_align.clip_grad_norm_, signal.getsignal(signal.SIGINT)

    def interrupted(*x):
        signal.raise_signal(signal.SIGINT)
        return clip(*x)
    with monkeypatch.context() as patch, refusing("stopped after step 1: the same command with --resume"):
        patch.setattr(train_align, "clip_grad_norm_", interrupted)
        train_align.main(replace(args))
    assert signal.getsignal(signal.SIGINT) is before
    train_align.main(replace(args, resume=True))
    assert "going on after step 1" in capsys.readouterr().out

@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("script", [train_align, train_reward], ids=["align", "reward"])
def test_numbers_gone_wrong_stop_the_run_and_are_named(script, what, runs, tmp_path, monkeypatch):
    small = dict(n_pairs=16, steps=6, batch=4, out=f"{tmp_path}/run")
    args = align_args(runs, **small) if script is train_align else reward_args(runs, noisy=True, **small)
    clip, noise, norms = script.clip_grad_norm_, script.draw_noise, []

    def draw(shape, seed, step, samples, **settings):
        t, eps = noise(shape, seed, step, samples, **settings)
        eps[samples.index(max(samples))] *= NAN if step == 3 and what == "loss" else 1
        return t, eps

    def norm(*x):
        norms.append(clip(*x))
        return norms[-1] * (math.inf if len(norms) == 4 and what == "gradient" else 1)
    monkeypatch.setattr(script, "draw_noise", draw)
    monkeypatch.setattr(script, "clip_grad_norm_", norm)
    with refusing("^step 4: loss or gradient is not finite"):
        script.main(args)
    facts = json.loads((tmp_path / "run/broken.json").read_text(), parse_constant=pytest.fail)
    assert facts["step"] == 4 and len(facts["rows"]) == len(facts["t"]) == 4
    assert all(0 <= t < 1 for t in facts["t"])
    assert facts["grad_norm"] == ("NaN" if what == "loss" else "Infinity")
    if script is train_align:
        broken = [i for i, loss in zip(facts["rows"], facts["loss"]) if loss == "NaN"]
        assert broken == [max(facts["rows"])] * (what == "loss")
    assert [f.name[:13] for f in (tmp_path / "run").glob("state-*")] == ["state-0000003"]

@pytest.mark.parametrize("what", ["state", "weights", "reward", "videos", "cache"])
def test_a_full_disk_ends_in_one_line(what, runs, tmp_path, capsys):
    """Files may grow to 4000 bytes only, which stops writes as a full disk does."""
    small = dict(out=f"{tmp_path}/run", steps=3)
    script, args = {
        "state": (train_align, align_args(runs, n_pairs=4, batch=2, save_every=1, **small)),
        "weights": (train_align, align_args(runs, n_pairs=4, batch=2, save_every=9, **small)),
        "reward": (train_reward, reward_args(runs, n_pairs=4, batch=2, n_eval=4, **small)),
    }.get(what, (sample, sample.Args(ckpt=f"{runs}/base", prompt=PROMPTS[:1], **small)))

    def save_latents(args):
        data.save_cached(torch.zeros(9999), tmp_path / "x")
    main = save_latents if what == "cache" else script.main
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            data.launch(main, script.Args, script.__doc__, shlex.split(data.command(args))[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(said) == 1 and re.search("written|too large", said[0]), said
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pt")]

def test_a_run_gives_ctrl_c_back_when_something_fails(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = data.Run(train_align.Args(out=f"{tmp_path}/run", save_every=9))
    with pytest.raises(ZeroDivisionError):
        for step in run.steps(3, model=torch.nn.Linear(1, 1)):
            assert signal.getsignal(signal.SIGINT) != before
            1 / step
    assert signal.getsignal(signal.SIGINT) == before

def test_a_rehearsal_tells_time_and_memory_decides_and_moves_nothing(wan, monkeypatch, capsys):
    args = wan_args(wan, "rehearsed", cache=f"{wan}/nowhere")
    world = data.world_of(args.model)
    train_align.check(args, world)
    m, reference = train_align.policy_and_reference(args, "cpu")
    before, state = [p.clone() for p in m.parameters()], torch.get_rng_state()
    for held, decoupled in ((1, False), (10**12, True)):                        # bytes, of 100 GB
        args.decoupled, peaks = None, iter([0, held, held])
        monkeypatch.setattr(train_align, "memory", lambda device: (next(peaks), 10**11))
        train_align.rehearse(args, world, m, reference, 7, "cpu")
        said = capsys.readouterr().out
        assert re.search("s a micro-batch.*; 7 steps take about .* minutes and .* of 100 GB", said)
        assert args.decoupled == decoupled == ("one video of a pair at a time" in said)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(m.parameters(), before))
    assert torch.equal(torch.get_rng_state(), state) and not Path(args.cache).exists()

def test_a_loss_without_a_logit_is_logged_without_and_the_doctor_is_silent():
    seen = tensor([[0.1, 9.0, 0.1, 0.3], [0.9, 8.0, 0.2, 0.1]])
    event = train_align.summary(("t", "loss", "gap_w", "gap_l"), seen)
    assert event["implicit_acc"] == 0.5 and event["margin"] == pytest.approx(0.05) and "logit" not in event
    assert not train_align.diagnose([{"step": 10, **event}, {"step": 60, **event}])

def test_the_doctor_judges_the_end_of_a_short_run_too():
    flat = dict(loss=0.69, logit=0.001, grad_factor=0.5, margin=0.0, gap_w=0.0, gap_l=0.0, err_ref_w=0.04)
    assert not train_align.diagnose([{"step": 8, **flat}]) and train_align.diagnose([{"step": 8, **flat}], 8)

def test_what_changed_under_a_stopped_run_is_told_and_an_ended_run_can_be_made_longer(wan, tmp_path, capsys):
    for name in ("pairs.csv", *(f"v/{x}.mp4" for x in "abcd")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(wan / name, tmp_path / name)
    args = wan_args(wan, "", pairs=f"{tmp_path}/pairs.csv", steps=2, out=f"{tmp_path}/run")
    train_align.main(replace(args))
    capsys.readouterr()
    train_align.main(replace(args, steps=4, resume=True))
    assert "going on after step 2" in capsys.readouterr().out
    train_align.main(replace(args, steps=4, out=f"{tmp_path}/whole"))
    assert_near(*(weights(tmp_path / name / "lora.safetensors") for name in ("run", "whole")), 0)
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text.replace("a cat runs,A", "a cat runs,B"))
    with refusing("pairs.csv has changed since"):
        train_align.main(replace(args, steps=4, resume=True))
    noisy = train_reward.Args(model=str(wan), pairs=f"{wan}/pairs.csv", noisy=True, depth=1, steps=1, batch=2,
                              accumulate=2, cache=f"{wan}/cache", out=f"{tmp_path}/noisy", **CLIP)
    train_reward.main(replace(noisy))
    with refusing("--steps was 1, not 2"):                                   # its learning rate hangs on them
        train_reward.main(replace(noisy, steps=2, resume=True))

def test_averaged_weights_are_those_that_are_trained(runs, tmp_path):
    for ema in (0.5, 0.0):
        align(runs, tmp_path / str(ema), steps=3, ema=ema, save_every=1, eval_n=1, eval_steps=1)
    a, b = (weights(tmp_path / x / "lora.safetensors") for x in ("0.5", "0.0"))
    assert a.keys() == b.keys() and not any(torch.equal(a[k], b[k]) for k in a if "lora_B" in k)
    state = torch.load(max((tmp_path / "0.5").glob("state-*")), weights_only=True)
    assert len(state["average"]) == len(a) and len(state["model"]) == len(a)

def test_one_rank_that_fails_ends_all_in_one_line(wan, tmp_path):
    (tmp_path / "two.py").write_text(
        "import data, train_align as t\nlabel = t.label\n"
        "def fails(*args):\n    if data.RANK:\n        raise OSError('disk full')\n    return label(*args)\n"
        "t.label = fails\ndata.launch(t.main, t.Args, '')\n")
    words = shlex.split(data.command(wan_args(wan, "", steps=1, batch=2, out=f"{tmp_path}/run")))[2:]
    out = subprocess.run([*TORCHRUN, tmp_path / "two.py", *words], env=os.environ | {"PYTHONPATH": str(HERE)},
                         capture_output=True, text=True, timeout=60)
    said = [line for line in out.stderr.splitlines() if line.startswith("error:")]
    assert out.returncode and said == ["error: rank 1: disk full"]

# ---- Wan ----
# The same scripts on Wan 2.1: a tiny random pipeline of the real classes, which diffusers itself saved.

def test_sampling_gives_the_latents_and_frames_of_diffusers_pipeline(wan):
    pipe, prompts, world = pipeline(wan), ["a  cat &amp; dog", "a dog"], data.Wan(wan)
    eps = torch.stack([torch.randn(16, 2, 4, 6, generator=rng("eval", 7, i)) for i in range(2)])
    settings = dict(prompt=prompts, negative_prompt="sleeps", height=32, width=48, num_frames=5,
                    num_inference_steps=3, guidance_scale=4.0, latents=eps)
    latents = pipe(**settings, output_type="latent").frames
    frames = pipe(**settings, output_type="pt").frames                          # (B, T, 3, H, W) in [0, 1]
    pipe.scheduler.set_timesteps(3)
    ours = sample.generate(
        sample.load_model(wan), world, prompts, sample.embed_all(world, prompts, "sleeps"), 7,
        pipe.scheduler.sigmas, (5, 32, 48), cfg_scale=4.0, negative="sleeps", batch=1)
    x, videos = map(torch.stack, zip(*ours))
    assert torch.allclose(x, latents, rtol=0, atol=1e-4)
    assert torch.allclose((videos + 1) / 2, frames.transpose(1, 2), rtol=0, atol=1e-4)

def test_latents_are_encoded_once_and_an_interrupted_encode_goes_on(wan, tmp_path, monkeypatch):
    args, encoded, own = wan_args(wan, "", cache=str(tmp_path)), [], data.Wan.encode_video
    monkeypatch.setattr(data.Wan, "encode_video", lambda world, x: encoded.append(1) or own(world, x))
    world, again = data.Wan(wan), data.Wan(wan)
    pairs = world.encode(data.read_pairs(wan / "pairs.csv"), args)
    x0, text = world.latents(pairs, [0, 2, 1]), world.text(pairs, [0, 2])
    assert len(encoded) == 4 and x0.shape == (3, 2, 16, 2, 4, 6) and text.shape == (2, 512, 24)
    assert torch.equal(x0[0, 0], x0[1, 1]) and torch.equal(text[0], text[1])    # one video, one prompt, twice
    pixels = data.read_clip(wan / "v/a.mp4", 5, (32, 48))
    assert torch.equal(x0[0, 0], own(world, pixels[None])[0].bfloat16().float())
    assert text[0].any(1).sum() == 4                                            # three words, the end, zeros
    file = world.cached[pairs.videos[1][0]]
    file.write_bytes(file.read_bytes()[:-8])                                    # as a full disk leaves it
    again.encode(pairs, args)
    assert len(encoded) == 5 and torch.equal(again.latents(pairs, [0, 2, 1]), x0)
    again.encode(pairs, replace(args, frames=9))  # other settings, other latents
    assert len(encoded) == 9

def test_a_bad_video_is_named_with_its_row_and_left_out_on_request(wan, tmp_path, capsys):
    shutil.copytree(wan / "v", tmp_path / "v")
    shutil.copy(wan / "pairs.csv", tmp_path)
    args, pairs = wan_args(wan, "", cache=f"{tmp_path}/cache"), data.read_pairs(tmp_path / "pairs.csv")
    write_clips(tmp_path, ["v/b.mp4"], frames=1)
    with refusing("row 2: .*b.mp4 lasts 0.12 s, too short for 5 frames"):
        data.Wan(wan).encode(pairs, args)
    (tmp_path / "v/c.mp4").write_bytes((wan / "v/c.mp4").read_bytes()[:300])
    kept = data.Wan(wan).encode(pairs, replace(args, skip_bad=True))
    assert kept.prompts == ["a cat runs"] and kept.lines == [4]
    assert "skipped 2 pairs with 2 bad videos" in capsys.readouterr().out

def test_dpo_on_wan_trains_a_lora_that_diffusers_loads_to_the_same_model(wan):
    train_align.main(wan_args(wan, "dpo"))
    events = data.read_log(wan / "dpo")
    assert events[-1]["loss"] < events[0]["loss"]
    assert weights(wan / "dpo/lora.safetensors").keys() == LORA_NAMES
    x, t, text = torch.randn(1, 16, 2, 4, 6), tensor([0.3]), torch.randn(1, 7, 24)
    v = sample.load_model(wan / "dpo")(x, t, text)
    assert (v - sample.load_model(wan)(x, t, text)).abs().max() > 1e-3
    pytest.importorskip("peft")
    pipe = pipeline(wan)
    pipe.load_lora_weights(str(wan / "dpo"), weight_name="lora.safetensors")
    expected = pipe.transformer(x, 1000 * t, text).sample
    assert (v - expected).norm() < 1e-5 * expected.norm()

def test_a_run_whose_base_moved_is_sampled_with_its_new_place(wan, tmp_path):
    shutil.copytree(wan, tmp_path / "there", ignore=shutil.ignore_patterns("dpo", "runs"))
    train_align.main(wan_args(tmp_path / "there", "run", cache=f"{tmp_path}/cache", steps=1))
    x, t, text = torch.randn(1, 16, 2, 4, 6), tensor([0.3]), torch.randn(1, 7, 24)
    expected = sample.load_model(tmp_path / "there/run")(x, t, text)
    here = (tmp_path / "there").rename(tmp_path / "here")
    with refusing("there does not exist"):
        sample.load_model(here / "run")
    assert torch.equal(sample.load_model(here / "run", base=str(here))(x, t, text), expected)
    sample.main(sample.Args(ckpt=[f"{here}/run"], model=str(here), prompt=["a cat"], frames=5, size=(32, 48),
                            steps=1, out=f"{tmp_path}/drawn"))
    assert (tmp_path / "drawn/000.mp4").exists()

def test_sft_and_dpo_run_in_bf16_and_checkpointing_moves_no_digit(wan):
    for name, changes in (("sft", dict(loss="sft", dtype="bf16")), ("half", dict(dtype="bf16")),
                          ("plain", dict(checkpointing=False)), ("kept", dict(checkpointing=True))):
        train_align.main(wan_args(wan, name, steps=2, accumulate=1, batch=2, **changes))
    assert_near(*(weights(wan / name / "lora.safetensors") for name in ("plain", "kept")), 1e-6)
    plain, half = (data.read_log(wan / name)[-1]["err_ref_w"] for name in ("plain", "half"))
    assert plain != half and plain == pytest.approx(half, rel=0.02)

def test_wan_is_sampled_side_by_side_under_the_names_that_vbench_expects(wan, tmp_path):
    (tmp_path / "prompts.csv").write_text(
        "prompt,prompt_shorter\na cat runs and runs,a cat runs\na dog sleeps,\na cat runs,\n")
    train_align.main(wan_args(wan, "side", steps=2))
    sample.main(sample.Args(ckpt=f"{wan}/side", prompts=f"{tmp_path}/prompts.csv", n_per_prompt=2, steps=2,
                            against="base", out=f"{tmp_path}/out", **CLIP))
    names = {f"a cat runs-{i}.mp4" for i in range(4)} | {f"a dog sleeps-{i}.mp4" for i in range(2)}
    for folder in (tmp_path / "out", tmp_path / "out/start"):
        assert {p.name for p in folder.glob("*.mp4")} == names and (folder / "samples.png").exists()
    frames, fps = data.read_video(tmp_path / "out/a dog sleeps-1.mp4")
    assert frames.shape == (5, 32, 48, 3) and fps == 16

def test_a_noisy_reward_grows_from_wan_guides_it_and_judges_it(wan, tmp_path):
    noisy = f"{tmp_path}/noisy"
    train_reward.main(train_reward.Args(
        noisy=True, model=str(wan), pairs=f"{wan}/pairs.csv", cache=f"{wan}/cache", depth=1, steps=4, batch=2,
        accumulate=2, lr=1e-3, out=noisy, **CLIP))
    train_align.main(wan_args(wan, "guided", loss="rwr", labels="reward", reward=noisy, steps=2))
    args = sample.Args(model=str(wan), prompt=["a cat runs"], n_per_prompt=2, steps=3,
                       out=f"{tmp_path}/plain", **CLIP)
    sample.main(replace(args))
    result = sample.main(replace(args, ckpt=f"{wan}/guided", nrg=noisy, against="base", reward=noisy,
                                 out=f"{tmp_path}/out"))
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and read(tmp_path / "out/eval.json") == result
    folders = ("plain", "out", "out/start")
    plain, guided, start = (data.read_video(tmp_path / name / "001.mp4")[0] for name in folders)
    assert not np.array_equal(plain, guided) and np.array_equal(plain, start)   # the same noise, unguided
    pairs = data.read_pairs(tmp_path / "out/pairs.csv")
    assert pairs.label[0, 3] == 1 and {path.name for path in pairs.videos[0]} == {"000.mp4", "001.mp4"}

def test_videoreward_labels_the_pairs_of_wan_and_judges_what_it_draws(wan, qwen, tmp_path, capsys):
    judge = dict(reward=f"{qwen[0]}/released", template=f"{qwen[0]}/prompt_template.py")
    train_align.main(wan_args(wan, "judged", loss="rwr", labels="reward", steps=2, **judge))
    assert "3 of 3 pairs labelled by reward" in capsys.readouterr().out
    assert len((wan / "cache/scores.jsonl").read_text().splitlines()) >= 5      # distinct videos and prompts
    result = sample.main(sample.Args(ckpt=f"{wan}/judged", prompt=["a dog runs"], n_per_prompt=2, steps=2,
                                     against="base", out=f"{tmp_path}/out", **CLIP, **judge))
    assert result["n"] == 2 and result["judge"] == judge["reward"]

def test_a_second_round_in_bf16_starts_at_the_first_and_its_file_holds_both(wan, tmp_path):
    one = wan_args(wan, "", dtype="bf16", out=f"{tmp_path}/one")
    two = replace(one, model=one.out, seed=1, out=f"{tmp_path}/two")
    train_align.main(replace(one))
    train_align.check(two, data.world_of(two.model))
    xt = torch.randn(1, 16, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 7, 24)
    base, first = (sample.load_model(path, torch.bfloat16)(*xt) for path in (wan, one.out))
    policy, reference = train_align.policy_and_reference(two, "cpu")
    with reference() as frozen:
        for v in (policy(*xt), frozen(*xt)):
            assert (v - first).norm() < 1e-2 * (first - base).norm()
    train_align.main(replace(two))
    base, first, ours = (sample.load_model(path) for path in (wan, one.out, two.out))
    v = ours(*xt)
    assert (v - first(*xt)).norm() > 0.05 * (first(*xt) - base(*xt)).norm()
    with lora_disabled(ours):
        assert torch.equal(ours(*xt), base(*xt))                               # the pretrained, not round one
    file = tmp_path / "two/lora.safetensors"
    assert {len(x) for name, x in weights(file).items() if "lora_A" in name} == {8}     # of rank 4 each
    pytest.importorskip("peft")
    pipe = pipeline(wan)
    pipe.load_lora_weights(two.out, weight_name=file.name)
    theirs = pipe.transformer(xt[0], 1000 * xt[1], xt[2]).sample
    assert (v - theirs).norm() < 1e-5 * theirs.norm()

def test_wan_sharded_over_two_processes_trains_as_in_one_and_resumes_to_the_same_bits(wan, tmp_path):
    args = wan_args(wan, "", steps=4, batch=2, accumulate=1, save_every=2, cache=f"{tmp_path}/cache")
    names = "one", "whole", "cut"
    one, whole, cut = (replace(args, out=f"{tmp_path}/{x}", shard=x != "one") for x in names)
    train_align.main(replace(one))
    torchrun(tmp_path, [whole, replace(cut, steps=2), replace(cut, resume=True)])
    logs = [data.read_log(tmp_path / name) for name in ("one", "whole")]
    for key in ("loss", "grad_norm"):
        assert np.allclose(*([event[key] for event in log] for log in logs), rtol=1e-3)
    assert_near(*(weights(tmp_path / name / "lora.safetensors") for name in ("whole", "cut")), 0)

def test_a_latent_reward_of_wan_computes_in_bf16_and_its_gradient_is_fp32(wan):
    r, seen = reward.LatentReward.from_base(sample.load_model(wan), 1), []
    r.hidden.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    x = torch.randn(1, 16, 2, 4, 6, requires_grad=True)
    score = r.score(x, torch.rand(1), torch.randn(1, 7, 24))
    assert seen == [torch.bfloat16] and score.dtype == torch.float32
    assert torch.autograd.grad(score.sum(), x)[0].dtype == torch.float32

def test_all_weights_of_wan_are_trained_in_fp32_under_bf16(wan, tmp_path):
    args = wan_args(wan, "", lora_rank=0, dtype="bf16", steps=1, lr=1e-5, out=f"{tmp_path}/run")
    train_align.main(args)
    saved = weights(tmp_path / "run/transformer/diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    m, _ = train_align.policy_and_reference(args, "cpu")
    xt = torch.randn(1, 16, 2, 4, 6), torch.rand(1), torch.randn(1, 7, 24)
    v, m.compute_dtype = m(*xt), None
    assert 1e-5 < (v - m(*xt)).norm() / v.norm() < 0.05

def test_the_cache_holds_a_content_once_bears_many_writers_sees_a_flipped_byte(wan, tmp_path, monkeypatch):
    shutil.copy(wan / "v/a.mp4", tmp_path / "copy.mp4")
    (tmp_path / "pairs.csv").write_text(f"prompt,chosen,rejected\na cat,{wan}/v/a.mp4,copy.mp4\n")
    args = wan_args(wan, "", pairs=f"{tmp_path}/pairs.csv", cache=f"{tmp_path}/cache")
    world, encoded, opened, own = data.Wan(wan), [], [], data.fingerprint
    encode = world.encode_video
    monkeypatch.setattr(world, "encode_video", lambda x: encoded.append(1) or encode(x))
    pairs = world.encode(world.read(args), args)
    assert len(encoded) == 1 and torch.equal(*world.latents(pairs, [0])[0])
    monkeypatch.setattr(data, "fingerprint", lambda path: opened.append(Path(path).suffix) or own(path))
    again = data.Wan(wan)
    again.encode(again.read(args), args)
    assert opened and ".mp4" not in opened                                 # remembered by path, size and time
    file = world.cached[pairs.videos[0][0]]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: data.save_cached(torch.zeros(50, 50), file), range(50)))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with refusing("is damaged: delete it"):
        world.latents(pairs, [0])

def test_a_short_clip_is_told_before_anything_loads_with_the_frames_that_fit(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Wan, "part", lambda *_: pytest.fail("something was loaded"))
    with refusing(r"row 2: .* lasts 1.50 s, too short for 81 frames .*--frames 25 would fit.*--skip_bad"):
        train_align.main(wan_args(wan, "", frames=81, cache=f"{tmp_path}/c", out=f"{tmp_path}/run"))

def test_an_aligned_wan_is_sampled_as_it_was_trained_and_14b_has_numbers_of_its_own(wan, tmp_path):
    train_align.main(wan_args(wan, "", steps=1, out=f"{tmp_path}/run"))
    args = sample.Args(ckpt=[f"{tmp_path}/run"], prompt=["a cat"], out=f"{tmp_path}/out")
    sample.check(args, data.world_of(args.ckpt[0]))
    assert (args.frames, *args.size, args.shift, args.cfg) == (5, 32, 48, 8.0, 6.0)
    large = shutil.copytree(wan, tmp_path / "large", ignore=shutil.ignore_patterns("cache", "*.mp4"))
    config = read(wan / "transformer/config.json") | dict(num_attention_heads=40, attention_head_dim=128)
    (large / "transformer/config.json").write_text(json.dumps(config))
    args = sample.Args(model=str(large), prompt=["a cat"], out=f"{tmp_path}/out")
    sample.check(args, data.world_of(args.model))
    assert (args.shift, args.cfg) == (5.0, 5.0)

@pytest.mark.parametrize("name, size", [("a14b", (5, 32, 48)), ("5b", (5, 64, 96))])
def test_both_wan_22_are_sampled_as_by_diffusers(name, size, wan22):
    folder = wan22[name]
    pipe, world = pipeline(folder), data.world_of(folder)
    eps = torch.randn(world.latent_shape(size[0], size[1:]), generator=rng("eval", 7, 0))[None]
    settings = dict(prompt=["a cat runs"], negative_prompt="sleeps", num_frames=5, height=size[1],
                    width=size[2], num_inference_steps=4, guidance_scale=4.0, latents=eps)
    settings |= {"guidance_scale_2": 3.0} if name == "a14b" else {}
    theirs = pipe(**settings, output_type="latent").frames[0]
    frames = pipe(**settings, output_type="pt").frames[0].transpose(0, 1)
    pipe.scheduler.set_timesteps(4)
    ts, prompts = pipe.scheduler.sigmas, settings["prompt"]
    assert (ts[:-1] >= 0.875).unique().numel() == 2                             # both experts are asked
    (x, video), = sample.generate(
        sample.load_all([str(folder)], world, torch.float32), world, prompts,
        sample.embed_all(world, prompts, "sleeps"), 7, ts, size, cfg_scale=4.0, cfg_low=3.0,
        negative="sleeps")
    for ours, other in ((x, theirs), ((video + 1) / 2, frames)):
        assert torch.allclose(ours, other, rtol=0, atol=1e-4)

def test_each_expert_is_trained_in_its_range_and_its_lora_loads_in_diffusers(wan22, tmp_path, monkeypatch):
    folder, loaded, times = wan22["a14b"], [], []
    args = wan_args(folder, "", steps=2, batch=2, accumulate=2, cache=f"{tmp_path}/cache")
    load, noise = VideoDiT.from_pretrained.__func__, data.draw_noise
    monkeypatch.setattr(VideoDiT, "from_pretrained", classmethod(lambda *a: loaded.append(a[-1]) or load(*a)))
    draw_noise = lambda *a, **k: times.append(noise(*a, **k)) or times[-1]
    monkeypatch.setattr(train_align, "draw_noise", draw_noise)
    for expert, low, high, part in (("high", 0.875, 1, "transformer"), ("low", 0, 0.875, "transformer_2")):
        train_align.main(replace(args, expert=expert, out=f"{tmp_path}/{expert}"))
        assert loaded == [part] and times and all(low <= t <= high for ts, _ in times for t in ts)
        loaded.clear(), times.clear()
    runs, world = [f"{tmp_path}/low", f"{tmp_path}/high"], data.world_of(folder)        # in any order
    both, one, plain = (sample.load_all(x, world, torch.float32) for x in (runs, runs[:1], [str(folder)]))
    xt, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 24)
    for t, same in ((0.9, True), (0.3, False)):                               # one run beside the plain other
        assert torch.equal(*(m(xt, torch.tensor([t]), text) for m in (one, plain))) == same
    with refusing("of the same expert"):
        sample.load_all(runs[:1] * 2, world, torch.float32)
    sample.main(sample.Args(ckpt=runs, prompt=["a cat"], steps=2, against="base", out=f"{tmp_path}/out"))
    assert data.video_info(tmp_path / "out/start/000.mp4")[:2] == (5, 16.0)
    pytest.importorskip("peft")
    pipe = pipeline(folder)
    pipe.load_lora_weights(runs[1], weight_name="lora.safetensors")
    pipe.load_lora_weights(runs[0], weight_name="lora.safetensors", load_into_transformer_2=True)
    for t, theirs in ((0.9, pipe.transformer), (0.3, pipe.transformer_2)):
        v = theirs(xt, torch.tensor([1000 * t]), text).sample
        assert (both(xt, torch.tensor([t]), text) - v).norm() < 1e-5 * v.norm()

def test_the_5b_is_trained_and_written_at_its_own_rate_and_grid(wan22, tmp_path):
    args = wan_args(wan22["5b"], "", size=(64, 96), steps=1, batch=2, accumulate=2,
                    cache=f"{tmp_path}/cache", out=f"{tmp_path}/run")
    train_align.main(args)
    sample.main(sample.Args(ckpt=[args.out], prompt=["a cat"], steps=1, out=f"{tmp_path}/out"))
    assert data.video_info(tmp_path / "out/000.mp4") == (5, 24.0, 64, 96)
    pytest.importorskip("peft")
    pipe, ours = pipeline(wan22["5b"]), sample.load_model(args.out)
    pipe.load_lora_weights(args.out, weight_name="lora.safetensors")
    xt, text = torch.randn(1, 48, 2, 4, 6), torch.randn(1, 7, 24)
    v = pipe.transformer(xt, torch.tensor([300.0]), text).sample
    assert (ours(xt, torch.tensor([0.3]), text) - v).norm() < 1e-5 * v.norm()

@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_files_of_other_trainers_load_to_the_same_model(layout, wan, tmp_path):
    m = shake_lora(add_lora(sample.load_model(wan), 2, 4.0))
    xt, tensors = (torch.randn(1, 16, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 7, 24)), {}
    for name, layer in m.named_modules():
        if isinstance(layer, model_file.LoRALinear):
            prefix, a, b, alpha = LORA_LAYOUTS[layout]
            name = prefix + (name.replace(".", "_") if layout == "kohya" else name)
            tensors |= {f"{name}.{a}": layer.lora_A, f"{name}.{b}": layer.lora_B * (1 if alpha else 2)}
            tensors |= {f"{name}.{alpha}": tensor(4.0)} if alpha else {}
    model_file.save_tensors(tensors, tmp_path / "x.safetensors")
    again = load_lora(sample.load_model(wan), tmp_path / "x.safetensors")
    assert torch.allclose(again(*xt), m(*xt), atol=1e-5)
    twice = load_lora(again, tmp_path / "x.safetensors")                        # a second one adds up
    with lora_disabled(m):
        base = m(*xt)
    assert (twice(*xt) - m(*xt)).norm() > 0.1 * (m(*xt) - base).norm()

@pytest.mark.parametrize("key, says", [
    ("blocks.0.self_attn.q.dora_scale", "of DoRA"), ("blocks.0.cross_attn.k_img.lora_A.weight", "an image"),
    ("blocks.0.self_attn.q.lora_B.bias", "a bias"), ("blocks.9.self_attn.q.lora_A.weight", "of no layer"),
    ("blocks.0.self_attn.k.lora_A.weight", "not a pair"), (None, "another model's"), ("", "no adapters")])
def test_a_lora_tensor_that_has_no_place_is_refused_by_its_cause(key, says, wan, tmp_path):
    width = 24 if key is not None else 25
    layer = "blocks.0.self_attn.q.lora_"
    tensors = {f"{layer}A.weight": torch.zeros(2, width), f"{layer}B.weight": torch.zeros(24, 2)}
    tensors = {} if key == "" else tensors | ({key: torch.zeros(2, 24)} if key else {})
    model_file.save_tensors(tensors, tmp_path / "x")
    with refusing(says):
        load_lora(sample.load_model(wan), tmp_path / "x")

# ---- refusals ----
# What the user can mend ends in one line that says how, with exit status 2, before anything is written.

REFUSALS = """
train_align   --lss dpo                                            did you mean --loss
train_align   --loss ppo                                           choose from
train_align   --steps many                                         is not a whole number, 1 or more
train_align   --steps 0                                            is not a whole number, 1 or more
train_reward  --save_every 0                                       is not a whole number, 1 or more
sample        --prompt p --n_per_prompt 0                          is not a whole number, 1 or more
sample        --eval -1                                            is not a whole number, 1 or more
train_align   --seed -1                                            is not a whole number, 0 or more
train_align   --dim_w 1,1                                          is not 3 numbers
train_align   --lora_rank -1                                       give 0 or more
train_align   --loss rwr --tau 0                                   --tau more than 0
train_align   --loss rwr --labels human                            use --labels reward
train_align   --loss pretrain --lora_rank 4                        trains all weights
train_reward  --tie 1                                              above 1
train_reward  --label_noise 0                                      above 0
train_reward  --depth 99 --n_pairs 9                               blocks
train_align   --model runs/nowhere                                 does not exist
train_reward  --model runs/nowhere                                 does not exist
sample        --ckpt runs/nowhere --eval 4                         does not exist
train_align   --model {empty}                                      is the run finished
train_align   --model {other} --n_pairs 9                           does not fit the model
train_align   --model {cut}                                        cannot be read as safetensors
sample        --model {cut} --eval 4                               cannot be read as safetensors
train_align   --model {pickle}                                     cannot be read as safetensors
train_align   --model {world} --n_pairs 9                           another Shapes world
train_align   --model {layers} --n_pairs 9                          num_layers = 0 is not a valid size
train_align   --model {image} --n_pairs 9                           text-to-video
train_align   --out {file}/run                                     is a file
train_align   --model {other} --out {other}                        is the model itself
sample        --model {other} --out {other} --eval 4               is the model itself
train_align   --resume --out {broken}                              config.json cannot be read as JSON
sample        --size 30,30 --eval 4                                --frames and --size are for Wan
sample        --out x                                              one thing at a time
sample        --eval 4 --prompt p                                  one thing at a time
sample        --eval 4 --split test                                invalid choice
sample        --eval 4 --x beta                                    unknown argument --x
sample        --eval 4 --against base                              this model has none
sample        --prompt 'a dog'                                     not a prompt of Shapes world
sample        --prompt 'a red circle moving left' --reward oracle  add --against base or --n_per_prompt 4
sample        --prompts gone.csv                                   gone.csv
sample        --prompts {blank}                                    row 3 has no prompt
sample        --compare {empty}                                    config.json cannot be read as JSON
sample        --compare {nothing}                                  takes runs that have win rates
sample        --compare {won} --x rg_scale --y win_rate/XQ         cannot be drawn: 'XQ'
sample        --compare {won} --x rg_scale --y win_rate            cannot be drawn
sample        --compare {won} --x nrg                              could not convert
sample        --compare {won} --out drawn                          draws one .png
sample        --compare {won} --out gone/a.png                     in a folder that exists
reward        --video {file} --prompt 'a red circle moving left'   cannot be read as a video
train_align   --pairs gone.csv                                     gone.csv
train_align   --pairs pairs.parquet                                python -c
train_align   --pairs {file}                                       holds no pairs
train_align   --pairs {blank}                                      understood are
train_align   --pairs {p0}                                         holds no pairs
train_align   --pairs {p1}                                         columns caption, video; understood are
train_align   --pairs {p2}                                         understood are
train_align   --pairs {p3}                                         gone.mp4 does not exist (and 1 more
train_align   --pairs {p4}                                         is not UTF-8
train_align   --pairs {p5}                                         has the labels 0, 1: write A, B or same
train_align   --pairs {p6}                                         xxx.mp4 does not exist
train_align   --pairs {p7}                                         b.mp4 does not exist
train_align   --pairs {p8}                                         field larger than field limit
train_align   --pairs {p9}                                         cannot be read as CSV
reward        {ask}                                                KwaiVGI/VideoAlign
reward        {ask} --template {base}/config.json                  must set DETAILED_PROMPT
reward        --video {clip} --ckpt {released}                     --prompt
reward        {ask} --ckpt nobody/nothing                          does not exist
reward        {ask} --ckpt {base}                                  finished run
reward        {ask} --template {template} --base {released}        is not a Qwen2-VL
reward        {ask} --template {template} --ckpt {odd}             only sample_type = 'uniform' is known
reward        {ask} --template {template} --ckpt {cut_reward}      model.pth cannot be read
reward        {ask} --template {template} --ckpt {short}           does not fit the model: Missing
reward        {ask} --template {template} --ckpt {evil}            model.pth cannot be read
train_reward  --model {base}                                       with --pairs
train_reward  --pairs {prefs}                                      --model
train_reward  --model {base} --pairs {prefs} --noisy               on latents
train_reward  --model {base} --pairs {plain} --loss regression     MOS_A_VQ
train_reward  --model {base} --pairs {unread}                      text.mp4 cannot be read as a video
train_reward  --eval {released} --template {template}              with --pairs
train_reward  --eval {released} --pairs {prefs}                    KwaiVGI/VideoAlign
train_reward  --eval nobody/nothing --pairs {prefs}                does not exist
train_align   --model {wan} --labels human                         is no toy of Shapes world
train_align   --model {wan} --frames 6                             4k + 1 frames
sample        --model {wan} --prompt p --size 30,30                give multiples of 16
sample        --model {wan} --eval 4                               are of Shapes world
sample        --model {text_encoder} {draw}                        git lfs pull
sample        --model {tokenizer} {draw}                           git lfs pull
sample        --model {vae} {draw}                                 git lfs pull
sample        --model {transformer} {draw}                         git lfs pull
sample        --model {half} {draw}                                lacks 2 tensors
sample        --model {wan}/transformer/diffusion_pytorch_model.safetensors {draw}  is a file
sample        --model {wan} {draw} --lora {empty}                  is a folder
train_align   --model {wan} --pairs {folder}                       empty is a folder, a video file is needed
train_reward  --model {base_pointer} --pairs {prefs}               git lfs pull
train_reward  --model {qwen25} --pairs {prefs}                     only Qwen2-VL
reward        --video {clip} --prompt p --ckpt {released}/checkpoint-30  name its parent
reward        --video {pointer} --prompt p --ckpt {released}       git lfs pull
"""

@pytest.mark.parametrize("script", [train_align, train_reward, sample, reward], ids=lambda m: m.__name__)
def test_what_the_user_can_mend_ends_in_one_line_and_status_2(script, spoiled, monkeypatch, capsys):
    root, names = spoiled
    monkeypatch.chdir(root)
    before, wrong = sorted(root.rglob("*")), []
    rows = [re.split(r"\s{2,}", line) for line in REFUSALS.strip().splitlines()]
    for _, line, says in [row for row in rows if row[0] == script.__name__]:
        words, says = shlex.split(line.format(**names)), says.format(**names)
        with pytest.raises(SystemExit) as stop:
            data.launch(*entry(script, words), script.__doc__, words)
        said = re.sub(r"[^\n]*(\r|100%.*\n)", "", capsys.readouterr().err)      # without bars
        said = said.strip().splitlines()
        if stop.value.code != 2 or len(said) != 1 or not said[0].startswith("error:") or says not in said[0]:
            wrong.append(f"{line}: said {said}")
        after = sorted(root.rglob("*"))
        if after != before:
            wrong.append(f"{line}: wrote {sorted(set(after) - set(before))}")
        before = after
    assert not wrong, "\n".join(wrong)

def test_damaged_files_are_read_or_refused_in_one_line(good, n=12, seed=0):
    root, readers = good
    outcomes = {"read": 0, "refused": 0}
    for name, look in readers.items():
        content = (root / name).read_bytes()
        for i in range(n):
            (root / name).write_bytes(mutant(content, rng(name, seed, i)))
            try:
                look(root / name)
                outcomes["read"] += 1
            except UserError as e:                                              # anything else fails the test
                assert len(str(e)) > 30, (name, seed, i)
                outcomes["refused"] += 1
            finally:
                (root / name).write_bytes(content)
    assert min(outcomes.values()) > n, outcomes

def label_page(folder):
    """A Playwright page of Debian's Chromium, and the folder's label.html of four pairs of tiny videos of odd
    prompts, opened in it.
    """
    api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    prompts = ["say \"hi\", <b>bold</b> & 'x'", "красный круг 赤い丸", "</script><script>alert(1)", "a, b; #c?%d"]
    for side in "ab":
        (folder / side).mkdir()
        for i, prompt in enumerate(prompts):
            name = f"{prompt.replace('/', ' ')}-{i}.mp4"
            data.write_video(folder / side / name, torch.rand(3, 8, 16, 16) * 2 - 1, 8)
    table = folder / "pairs.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "chosen", "rejected"])
        for i, prompt in enumerate(prompts):
            rows.writerow([prompt, *(f"{side}/{prompt.replace('/', ' ')}-{i}.mp4" for side in "ab")])
    return api, chromium, prompts


def test_a_person_labels_pairs_in_a_browser_and_training_reads_what_was_saved(tmp_path):
    api, chromium, prompts = label_page(tmp_path)
    data.main(data.Args([str(tmp_path / "pairs.csv")]))
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "pairs.html").as_uri())
        shown, faults = [], []
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.wait_for_function("[...videos].every(v => v.currentTime > 0)")       # both play
        swapped = page.evaluate("state.swapped")
        shown.append(page.locator("h1").inner_text())
        for key in "168":                                                         # VQ A, MQ B, TA same
            page.keyboard.press(key)
        page.keyboard.press("n")
        shown.append(page.locator("h1").inner_text())
        page.locator("fieldset").nth(0).get_by_text("B").click()                  # by mouse
        page.locator("#next").click()
        page.reload()                                                             # in the middle
        assert page.locator("#place").inner_text() == "Pair 3 of 4"
        assert page.evaluate("state.swapped") == swapped
        shown.append(page.locator("h1").inner_text())
        page.keyboard.press("1")
        page.locator("#back").click()
        assert page.locator("fieldset").nth(0).get_by_label("B").is_checked()     # it was kept
        page.keyboard.press("n")
        page.locator("#skip").click()                                             # the third is not judged
        shown.append(page.locator("h1").inner_text())
        page.keyboard.press("Tab")                                                # by keyboard alone: the
        page.keyboard.press("Space")                                              # first answer, then "same"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator("#results").is_visible() and page.locator("#wins").inner_text().count("%") >= 2
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "elsewhere/pairs.csv")
        browser.close()
    assert shown == prompts and not faults
    pairs = data.read_pairs(tmp_path / "elsewhere/pairs.csv")
    assert pairs.prompts == [prompts[0], prompts[1], prompts[3]]
    assert [path.parent.name for path in map(Path, pairs.videos[0])] == ["a", "b"]
    turn = [-1 if swap else 1 for swap in swapped]
    assert pairs.label[:, :3].nan_to_num(9).tolist() == [[turn[0], -turn[0], 0], [-turn[1], 9, 9], [0, 9, 9]]


def test_samples_and_folders_get_a_labelling_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    prompt = PROMPTS[0]
    shared = dict(prompt=[prompt], steps=1, cfg=1.0)
    sample.main(sample.Args(n_per_prompt=5, out=str(tmp_path / "many"), **shared))
    sample.main(sample.Args(against="assets/base", out=str(tmp_path / "two"), **shared))
    many, two = (json.loads(re.search('json">(.*?)</script>', (tmp_path / name / "label.html").read_text())[1])
                 for name in ("many", "two"))
    assert [pair["videos"] for pair in many["pairs"]] == [["000.mp4", "001.mp4"], ["002.mp4", "003.mp4"]]
    assert two["pairs"] == [{"prompt": prompt, "videos": ["000.mp4", "start/000.mp4"]}]
    assert two["sides"] == ["two", "assets/base"]
    data.main(data.Args([str(tmp_path / "many"), str(tmp_path / "two")]))
    assert '["many/000.mp4", "two/000.mp4"]' in (tmp_path / "label.html").read_text()
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="share no .mp4"):
        data.main(data.Args([str(tmp_path / "many"), str(tmp_path / "none")]))


# ---- fixtures ----
# Tiny random models in the real layouts, folders good and spoiled, and ways to kill a run. Nothing is mocked.

CLIP = dict(frames=5, size=(32, 48))  # what Wan draws and reads here
LORA_NAMES = {f"diffusion_model.blocks.{i}.{a}_attn.{n}.lora_{ab}.weight"
              for i in (0, 1) for a in ("self", "cross") for n in "qkvo" for ab in "AB"}

def random_model(config=TINY):
    """A model whose head is not zero, so that its output says something."""
    torch.manual_seed(0)
    m = VideoDiT(config)
    torch.nn.init.normal_(m.head.head.weight, std=0.1)
    return m.eval()

def random_batch():
    g = rng(0)
    return tuple(draw(shape, generator=g) for draw, shape in (
        (torch.randn, (2, 3, 4, 8, 8)), (torch.rand, (2,)), (torch.randn, (2, 8, 32))))

def shake_lora(m):
    """The model with random adapters."""
    for name, p in m.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.1)
    return m

def weights(file):
    return read_tensors(file)[0]

def read(file):
    return json.loads(Path(file).read_text())

def refusing(says):
    return pytest.raises(UserError, match=says)

def assert_near(a, b, atol):
    """Two dictionaries of tensors have the same keys and, within atol, the same values."""
    assert a.keys() == b.keys() and a
    assert all((a[k].float() - b[k].float()).abs().max() <= atol for k in a)

def timeless_log(run):
    """The events in a run's log without the clock."""
    return [{k: v for k, v in event.items() if k not in ("time", "seconds")} for event in data.read_log(run)]

def entry(script, words):
    """(main, Args) of a script for these words of its command line."""
    compares = script is sample and "--compare" in words
    return (sample.compare, sample.Compare) if compares else (script.main, script.Args)

def page_commands():
    """The words after `python` in the pages' commands, by a shell that follows loops and runs nothing."""
    pages = (HERE / "README.md").read_text() + (HERE / "assets/results.md").read_text()
    shell = 'PATH=/nowhere; command_not_found_handle() { :; }; python() { printf "%s\\0" "$@"; echo; }\n'
    blocks = [shell + block for block in re.findall(r"```bash\n(.*?)```", pages, re.S)]
    said = [subprocess.run(["bash", "-c", block], cwd=HERE, capture_output=True, text=True, check=True).stdout
            for block in blocks]
    return [line.split("\0")[:-1] for line in "".join(said).splitlines()]

def write_clips(folder, names, frames=12, size=(32, 48), fps=8):
    """Small mp4 files with something in them."""
    for k, name in enumerate(names):
        video = torch.zeros(3, frames, *size) - 0.5
        video[k % 3, :, 8:20, 8 + k:24 + k] = 0.9
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_video(folder / name, video, fps)

def film(path, frames, ms=None, aspect=1, cover=False):
    """A video file of frames (T, H, W, 3) at 25 a second, or at these ms; its pixels are aspect times as wide
    as high; before it a cover picture.
    """
    import av
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", width=16, height=16, pix_fmt="yuvj420p") if cover else None
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.time_base = Fraction(1, 1000 if ms else 25)
        if cover:
            container.mux(picture.encode(av.VideoFrame(16, 16, "yuvj420p")))
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if ms:
                frame.pts, frame.time_base = ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

class Killed(BaseException):
    """In the place of SIGKILL, which leaves no time to clean up either."""

def main_killed(script, args, step, monkeypatch):
    """Run a training script until its process would die in the middle of the step with this number."""
    calls, own = [], script.clip_grad_norm_

    def clip(*x):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return own(*x)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "clip_grad_norm_", clip)
        script.main(args)

TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"

def torchrun(folder, runs):
    """Align with each of these arguments in two processes, by one torchrun, since its start takes long."""
    code = "import sys, train_align as t\nfor args in eval(sys.argv[1], vars(t)):\n    t.main(args)\n"
    (folder / "two.py").write_text(code)
    subprocess.run([*TORCHRUN, folder / "two.py", repr(runs)], env=os.environ | {"PYTHONPATH": str(HERE)},
                   check=True)

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a tiny base, a reward and a noisy reward, made by the scripts themselves."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "toy", TINY)
        align(root, root / "base", loss="pretrain", steps=50, lora_rank=None, lr=None, warmup=5)
    for name, extra in (("reward", {}), ("noisy", dict(noisy=True, shared_noise=False))):
        train_reward.main(reward_args(root, n_pairs=32, steps=60, batch=16, n_eval=60, out=f"{root}/{name}",
                                      **extra))
    return root

def align_args(runs, out="", **changes):
    return train_align.Args(**dict(
        model=f"{runs}/base", reward=f"{runs}/reward", n_pairs=24, steps=20, batch=8, lr=3e-3, lora_rank=4,
        eval_n=6, eval_steps=2, out=str(out)) | changes)

def align(runs, out, **changes):
    return train_align.main(align_args(runs, out, **changes))

def reward_args(runs, **changes):
    return train_reward.Args(model=f"{runs}/base", depth=1, lr=3e-3, **changes)

def draw(runs, name, **settings):
    """Sample from the base of runs into the folder of this name."""
    return sample.main(sample.Args(ckpt=f"{runs}/base", out=f"{runs}/{name}", **settings))

@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a tiny WanPipeline, with pairs.csv of four mp4 files beside it."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate("<pad> </s> <unk> a cat dog runs sleeps".split())}
    words, root = Tokenizer(models.WordLevel(vocabulary, "<unk>")), tmp_path_factory.mktemp("wan")
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    dit = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=24,
        ffn_dim=48, freq_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)
    for p in dit.parameters():                                                  # as drawn, some of it is zero
        p.data += 0.1 * torch.randn_like(p)
    diffusers.WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, **special), transformer=dit,
        text_encoder=UMT5EncoderModel(text),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(root)
    write_clips(root, [f"v/{name}.mp4" for name in "abcd"])
    (root / "pairs.csv").write_text("path_A,path_B,prompt,VQ,MQ,TA\nv/a.mp4,v/b.mp4,a cat runs,A,A,same\n"
                                    "v/c.mp4,v/d.mp4,a dog sleeps,A,B,A\nv/d.mp4,v/a.mp4,a cat runs,B,,\n")
    return root

def wan_args(wan, name, **changes):
    beta = {"beta": 2000.0} if changes.get("loss", "dpo") == "dpo" else {}
    return train_align.Args(**dict(
        model=str(wan), pairs=f"{wan}/pairs.csv", steps=12, batch=3, accumulate=3, lr=3e-3, lora_rank=4,
        lora_alpha=8.0, dtype="fp32", cache=f"{wan}/cache", out=f"{wan}/{name}") | CLIP | beta | changes)

def diffusers_dit(folder):
    """diffusers' own transformer in a folder."""
    from diffusers import WanTransformer3DModel
    WanTransformer3DModel._keep_in_fp32_modules = None                          # else it asks for accelerate
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()

def pipeline(folder):
    """diffusers' own WanPipeline in a folder, quiet."""
    from diffusers import WanPipeline
    pipe = WanPipeline.from_pretrained(folder, transformer=diffusers_dit(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe

CHAT = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THEIRS = "Rate: <|VQ_reward|> then <|MQ_reward|> for '{text_prompt}' so {{it}} is <|TA_reward|>.\n"
CONSTANTS = dict(VQ_mean=3.7, MQ_mean=1.2, TA_mean=2.8, VQ_std=2.0, MQ_std=2.0, TA_std=2.0)
LM_HEAD = {"base_model.model.lm_head.weight": torch.zeros(503, 32)}             # in their files, of no use

@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(A folder with base/, a tiny Qwen2-VL; clips a, b; prompt_template.py; released/, a VideoReward in the
    authors' layout, whole, LoRA not merged; and the tensors in it.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    root, words = tmp_path_factory.mktemp("qwen"), Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.pre_tokenizer, words.decoder = level, decoders.ByteLevel()
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    words.train_from_iterator([reward.RUBRIC], trainers.BpeTrainer(
        vocab_size=500, special_tokens=[f"<|{name}|>" for name in special], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    own = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", chat_template=CHAT)
    own.save_pretrained(root / "base")
    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    text = dict(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, bos_token_id=0,
                eos_token_id=2, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=4,
        image_token_id=5, video_token_id=6))
    for p in model.parameters():  # every part matters to a score
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(root / "base")
    write_clips(root, ["a.mp4", "b.mp4"], frames=20, size=(64, 96), fps=10)
    (root / "prompt_template.py").write_text(f'raise SystemExit\n{reward.THEIR_TEMPLATE} = """{THEIRS}"""\n')
    own = reward.VideoReward.from_base(str(root / "base")).trainable()
    for name, p in own.named_parameters():
        if "lora_B" in name or name in ("rm_head.weight", "rows"):
            torch.nn.init.normal_(p, 0, 0.3)
    truth = {k: v.detach().clone() for k, v in own.state_dict().items()}
    truth[reward.EMBEDDING][own.token_ids] = truth.pop("rows")
    step = root / "released" / "checkpoint-30"
    step.mkdir(parents=True)
    torch.save(theirs(truth) | LM_HEAD, step / "model.pth")
    own.tokenizer.save_pretrained(step / "tokenizer")
    data.write_json(root / "released/model_config.json", {
        "data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 200704, "sample_type": "uniform",
                        "prompt_template_type": "detailed_special"},
        "model_config": {"model_name_or_path": str(root / "base"), "output_dim": 1, "reward_token": "last",
                         "use_special_tokens": True},
        "peft_lora_config": {"lora_r": 64, "lora_alpha": 128, "use_rslora": False},
        "training_args": {"learning_rate": 2e-6}, "inference_config": CONSTANTS})
    return root, truth

def theirs(tensors, layout=""):
    """Tensors under the authors' names: peft's marks, transformers' names of before, or of after: "new"."""
    def name(key):
        if re.search(r"\.lora_[AB]$", key):
            key += ".weight" if "adapter" in layout else ".default.weight"
        elif any(f".{linear}." in key for linear in reward.LINEARS) and "language_model" in key:
            key = re.sub(r"\.(weight|bias)$", r".base_layer.\1", key)
        if "new" not in layout:
            key = key.replace("qwen.language_model.", "model.").replace("qwen.visual.", "visual.")
        return "base_model.model." + key.replace("qwen.", "model.")
    return {name(key): value for key, value in tensors.items()}

def released_reward(qwen, dtype=None):
    released, template = (qwen[0] / name for name in ("released", "prompt_template.py"))
    return reward.VideoReward.from_pretrained(released, template=template, dtype=dtype)

def clips(qwen, *names):
    return [str(qwen[0] / f"{name}.mp4") for name in names]

def raw_scores(qwen, own, normalise=False):
    """Scores of both clips by this reward."""
    return own.score(clips(qwen, "a", "b"), ["a cat", "a dog"], normalise)

def prefs(qwen, name="prefs.csv", mos=True):
    """A file of pairs like the authors': a beats b on VQ and TA, and MQ is unlabelled or a tie."""
    lines = ["path_A,path_B,prompt,VQ,MQ,TA" + ",MOS_A_VQ,MOS_B_VQ" * mos]
    for i in range(8):
        pair, label, points = ("a.mp4,b.mp4", "A", ",5,1") if i % 2 else ("b.mp4,a.mp4", "B", ",1,5")
        lines.append(f"{pair},prompt {i},{label},{'same' if i == 3 else 'invalid'},{label}" + points * mos)
    (qwen[0] / name).write_text("\n".join(lines) + "\n")
    return str(qwen[0] / name)

def qwen_args(qwen, out, **changes):
    own = dict(model=f"{qwen[0]}/base", pairs=prefs(qwen), batch=2, accumulate=2, lr=2e-3, out=str(out))
    return train_reward.Args(**own | changes)

class Executed:
    """Unpickled, it ends the tests."""

    def __reduce__(self):
        return sys.exit, ("ran",)

HEAD = "path_A,path_B,prompt,VQ\n"
SPOILED_FILES = {                                                               # p0 to p9: files of pairs
    "p0": HEAD, "p1": "video,caption\na,b\n", "p2": "path_A,path_B,prompt\na.mp4,a.mp4,p\n",
    "p3": f"{HEAD}a.mp4,gone.mp4,p,A\na.mp4,a.mp4,,A\n", "p4": f"{HEAD}a.mp4,a.mp4,\xff,A\n",
    "p5": f"{HEAD}a.mp4,a.mp4,p,1\na.mp4,a.mp4,p,0\n", "p6": f"{HEAD}{'x' * 5000}.mp4,a.mp4,p,A\n",
    "p7": f'{HEAD}"a\nb.mp4",a.mp4,p,A\n', "p8": f"{HEAD}a.mp4,a.mp4,{'long ' * 30000},A\n",
    "p9": f'{HEAD}a.mp4,a.mp4,"open,A\n', "unread": f"{HEAD}a.mp4,text.mp4,p,A\n", "file": "",
    "text.mp4": "no video", "blank": f"prompt,x\n{PROMPTS[0]},1\n ,2\n", "broken/config.json": '{"args": ',
    "runs/cache/seen.jsonl": "", "folder": f"{HEAD}a.mp4,empty,p,A\n",
    "pointer": f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 5676070424\n",
    "nothing/config.json": '{"args": {}}', "nothing/eval.json": "{}",
    "won/config.json": '{"args": {"rg_scale": 1, "nrg": "x"}}', "won/eval.json": '{"win_rate": {"VQ": 1}}'}

@pytest.fixture(scope="module")
def spoiled(runs, qwen, wan, tmp_path_factory):
    """(a folder of bad files and models of every kind, {name: path} of them and of good ones)."""
    root, source = tmp_path_factory.mktemp("spoiled"), qwen[0]
    write_clips(root, ["a.mp4"])
    (root / "empty").mkdir()
    for part, file in (("text_encoder", "model.safetensors"), ("tokenizer", "tokenizer.json"),
                       ("vae", "diffusion_pytorch_model.safetensors"), ("transformer", "config.json")):
        shutil.copytree(wan, root / part)
        (root / part / part / file).write_text(SPOILED_FILES["pointer"])
    for name in ("base_pointer", "qwen25"):
        shutil.copytree(source / "base", root / name)
    (root / "base_pointer/model.safetensors").write_text(SPOILED_FILES["pointer"])
    data.write_json(root / "qwen25/config.json", read(source / "base/config.json") | {"model_type": "qwen2_5_vl"})
    shutil.copytree(wan, root / "half")
    tensors, metadata = read_tensors(root / "half/text_encoder/model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items() if "layer.0.SelfAttention.q" not in k}
    model_file.save_tensors(tensors, root / "half/text_encoder/model.safetensors", metadata)
    for name, text in SPOILED_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("latin-1"))
    for name in ("other", "world", "layers", "image", "cut", "pickle"):
        file = shutil.copytree(runs / "base", root / name) / "transformer/diffusion_pytorch_model.safetensors"
        (tensors, metadata), config = read_tensors(file), read(file.with_name("config.json"))
        tensors |= {"proj_out.bias": torch.zeros(7)} if name == "other" else {}
        metadata |= {"world": "0"} if name == "world" else {}
        config |= {"layers": {"num_layers": 0}, "image": {"image_dim": 1280}}.get(name, {})
        model_file.save_tensors({k: v.clone() for k, v in tensors.items()}, file, metadata)
        data.write_json(file.with_name("config.json"), config)
    for name in ("odd", "cut_reward", "short", "evil"):
        shutil.copytree(source / "released", root / name)
    config = root / "odd/model_config.json"
    config.write_text(config.read_text().replace("uniform", "multi_pts"))
    for name in ("cut/transformer/diffusion_pytorch_model.safetensors", "cut_reward/checkpoint-30/model.pth"):
        (root / name).write_bytes((root / name).read_bytes()[:1000])
    torch.save({"x": Executed()}, root / "pickle/transformer/diffusion_pytorch_model.safetensors")
    torch.save({"x": Executed()}, root / "evil/checkpoint-30/model.pth")
    torch.save({}, root / "short/checkpoint-30/model.pth")
    names = {path.name: path for path in root.iterdir()} | dict(
        root=root, wan=wan, base=source / "base", released=source / "released", clip=source / "a.mp4",
        template=source / "prompt_template.py", prefs=prefs(qwen), plain=prefs(qwen, "plain.csv", mos=False))
    return root, names | {"ask": f"--video {names['clip']} --prompt p --ckpt {names['released']}",
                          "draw": "--prompt p --frames 5 --size 32,48 --steps 1"}

@pytest.fixture(scope="module")
def good(runs, tmp_path_factory):
    """(a folder of good files of every kind that is read, {file: how it is read})."""
    root = tmp_path_factory.mktemp("good")
    align(runs, root / "dpo", n_pairs=4, steps=1, batch=2)
    for name in ("base", "reward"):
        shutil.copytree(runs / name, root / name)
    write_clips(root, ["a.mp4", "b.mp4"], frames=6)
    (root / "pairs.csv").write_text("path_A,path_B,prompt,VQ,MQ,MOS_A_VQ\n"
                                    'a.mp4,b.mp4,"a cat, asleep",A,same,4\nb.mp4,a.mp4,a dog,B,,2\n')
    (root / "pairs.jsonl").write_text('{"prompt": "a cat", "path_A": "a.mp4", "path_B": "b.mp4", "TA": "A"}\n'
                                      '{"prompt": "é", "path_A": "b.mp4", "path_B": "a.mp4", "TA": null}\n')
    (root / "prompts.csv").write_text("prompt,prompt_shorter\na cat,\na dog that sleeps,dog\n")

    def model(folder):
        return data.lineage(folder), sample.load_model(folder)(*random_batch())

    def video(path):
        return data.read_clip(path, 2, (16, 16)), reward.check_video(path), data.read_shapes(path)
    return root, {
        "pairs.csv": data.read_pairs, "pairs.jsonl": data.read_pairs, "a.mp4": video,
        "prompts.csv": lambda path: sample.read_prompts(sample.Args(prompts=str(path)), data.Shapes()),
        "base/transformer/diffusion_pytorch_model.safetensors": lambda path: model(path.parents[1]),
        "base/transformer/config.json": lambda path: model(path.parents[1]),
        "dpo/config.json": lambda path: model(path.parent),
        "dpo/lora.safetensors": lambda path: model(path.parent),
        "reward/reward.safetensors": lambda path: reward.load_reward(path.parent)}

def mutant(content, g):
    """The bytes with some flipped, cut out or put in, more often near the start, where headers are."""
    def pick(n):
        return int(torch.randint(max(n, 1), (1,), generator=g))
    at = pick(min(len(content), (len(content), 2000, 200)[pick(3)]))
    noise, start, rest = bytes(pick(256) for _ in range(1 + pick(4))), content[:at], content[at:]
    return (start + noise + rest[len(noise):], start + noise + rest, start, start + rest[1 + pick(8):],
            start + bytes([rest[0] ^ 1 << pick(8)]) + rest[1:])[pick(5)]

def kept_for_backward(m, call):
    """(what call returns, the most bytes at a time that autograd keeps in it, the weights left out)."""
    own, now, most = {p.untyped_storage().data_ptr() for p in m.parameters()}, [0], [0]

    class Kept:
        def __init__(self, x):
            self.x, self.size = x, x.nbytes * (x.untyped_storage().data_ptr() not in own)
            now[0] += self.size
            most[0] = max(most[0], now[0])

        def __del__(self):
            now[0] -= self.size
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        return call(), most[0]

@pytest.fixture(scope="module")
def wan22(wan, tmp_path_factory):
    """{"a14b", "5b": folder}: tiny random pipelines of both Wan 2.2 for text to video, with wan's clips."""
    import diffusers
    old, root = pipeline(wan), tmp_path_factory.mktemp("wan22")
    same = dict(num_attention_heads=2, attention_head_dim=12, text_dim=24, freq_dim=16, ffn_dim=48,
                num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)
    second, dit = (diffusers.WanTransformer3DModel(in_channels=n, out_channels=n, **same) for n in (16, 48))
    for p in (*second.parameters(), *dit.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48,
        latents_std=[0.9] * 48)
    parts = dict(tokenizer=old.tokenizer, text_encoder=old.text_encoder, scheduler=old.scheduler)
    pipes = {"a14b": diffusers.WanPipeline(**parts, vae=old.vae, transformer=old.transformer,
                                           transformer_2=second, boundary_ratio=0.875),
             "5b": diffusers.WanPipeline(**parts, vae=vae, transformer=dit, expand_timesteps=True)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
        shutil.copytree(wan / "v", root / name / "v")
        shutil.copy(wan / "pairs.csv", root / name)
    return {name: root / name for name in pipes}

# ---- bench ----
# How fast it is, beside diffusers: python test_all.py --bench

@dataclass
class Bench:
    """Time a forward pass, a training step of all weights and a Flow-DPO step (LoRA) beside diffusers' Wan.

    All take turns in one process. The DPO step around diffusers is the usual one: adapters by peft, the
    reference is the model with them off, winner and loser go through it one after the other.
    """
    preset: Literal["small", "toy", "wan-1.3b", "wan-14b"] = "small"  # small: Wan for two CPU cores
    frames: int = 13                        # of each video; Wan's are 4k + 1
    size: data.Size = (256, 256)            # height and width of each video
    batch: int = 1                          # videos; pairs in the DPO step
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the linear maps
    compile: bool = True                    # measure with compiled blocks too
    checkpointing: bool = False             # activation checkpointing, each in its own way
    lora_rank: int = 64                     # of the DPO step
    steps: list = ("forward", "train", "dpo")  # which to measure
    rounds: int = 7                         # turns of each after two to warm up; medians are shown
    profile: bool = False                   # print which operations each eager step's time goes to

SMALL = model_file.Config(dim=384, ffn_dim=2240, text_dim=512, num_heads=3, num_layers=4)  # as 1.3B
# Of (linear maps, attention). A backward pass costs its forward pass twice, for inputs and for weights,
# which LoRA's frozen ones do not need. DPO: two videos through the policy, there and back, and through the
# reference. What is computed again because of checkpointing does not count.
PASSES = {"forward": (1, 1), "train": (3, 3), "dpo": (2 * (2 + 1), 2 * (3 + 1))}

def flops(c, shape, words):
    """(linear maps, attention) of one video's forward pass, a multiply-add being two; no norms and such."""
    D, patch, S = c.dim, c.in_dim * math.prod(c.patch_size), words
    L = math.prod(shape) // patch
    outside = 4 * L * D * patch + 2 * S * D * (c.text_dim + D)                  # patches in and out; the text
    block = 2 * D * (6 * L * D + 2 * S * D + 2 * L * c.ffn_dim)  # q k v o; q o, text's k v; ffn
    return outside + c.num_layers * block, c.num_layers * 4 * L * (L + S) * D   # scores, sums they weigh

def contender(args, step, who, compiled, weights, config, batch):
    """(the model, function of no arguments that does the step, bytes held between steps) of who: ours, ours
    decoupled, diffusers, or that with cuDNN's attention. Weights are shared by all.
    """
    from diffusers import WanTransformer3DModel
    (x0, t, text, eps), dpo, dtype, ours = batch, step == "dpo", DTYPES[args.dtype], "ours" in who
    with x0.device:
        m = VideoDiT(config) if ours else WanTransformer3DModel.from_config(config.to_diffusers())
    if not ours:  # fp32 where its loader keeps it
        fp32, weights = m._keep_in_fp32_modules, {model_file.to_diffusers(k): v for k, v in weights.items()}
        weights = {k: v if any(part in k for part in fp32) else v.to(dtype) for k, v in weights.items()}
    m.load_state_dict(weights, assign=True)
    m.train().requires_grad_(not dpo)
    if dpo and ours:
        add_lora(m, args.lora_rank, 2.0 * args.lora_rank)
    elif dpo:
        from peft import LoraConfig
        m.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                 target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if "cuDNN" in who:
        m.set_attention_backend("_native_cudnn")
    if args.checkpointing and ours:
        for block in m.blocks:
            block.checkpointing = True
    elif args.checkpointing:
        m.enable_gradient_checkpointing()
    if compiled:
        m.compile_blocks() if ours else m.compile_repeated_blocks(dynamic=False)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def velocity(xt, t, text):
        return m(xt, t, text) if ours else m(xt.to(dtype), 1000 * t, text.to(dtype), return_dict=False)[0]

    @contextlib.contextmanager
    def adapters_off():
        m.disable_adapters()
        yield
        m.enable_adapters()

    def errors():
        """Errors of winner and loser: ours in one batch, the usual recipe one after the other."""
        if ours:
            return train_align.velocity_errors(m, x0, text, t, eps).unbind(1)
        return [velocity_error(velocity(mix(x, eps, t), t, text), eps - x) for x in x0.unbind(1)]

    def run():
        if step == "forward":
            with torch.no_grad():
                return velocity(mix(x0[:, 0], eps, t), t, text)
        if dpo:
            with torch.no_grad(), lora_disabled(m) if ours else adapters_off():
                err_ref = errors()
            pairs = train_align.error_pairs(m, x0, text, t, eps, "decoupled" in who) if ours else [errors()]
            for err in pairs:
                flow_dpo(*err, *err_ref, 500.0).mean().backward()
        else:
            velocity_error(velocity(mix(x0[:, 0], eps, t), t, text), eps - x0[:, 0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = 2 * (step != "forward")
    return m, run, sum(p.nbytes * (1 + moments * p.requires_grad) for p in m.parameters())

def take_turns(functions, rounds, device):
    """Seconds (rounds, n) of n functions that take turns, and the most bytes that each added on a GPU (n).
    Every other turn goes backwards, so that none always runs in what the same other one left in the caches.
    """
    sync, added = (torch.cuda.synchronize if device == "cuda" else lambda: None), [0] * len(functions)
    seconds = np.zeros((rounds + 2, len(functions)))
    for turn in range(rounds + 2):  # two to compile and to warm up
        for i, function in list(enumerate(functions))[::1 - 2 * (turn % 2)]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            sync()
            tic = time.perf_counter()
            function()
            sync()
            seconds[turn, i] = time.perf_counter() - tic
            if device == "cuda":
                added[i] = torch.cuda.max_memory_allocated() - before
    return seconds[2:], added

def operations(run, device, times=5):
    """{operation: its own milliseconds in one run}, of runs one after the other."""
    from torch.autograd import DeviceType
    from torch.profiler import profile
    with profile() as profiler:
        for _ in range(times):
            run()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, spent) / 1000 / times for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU}                             # its kernels count towards it

def attention_times(config, tokens):
    """A line of the milliseconds that bf16 attention takes on a GPU, there and back, on a video's tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    shape = 1, config.num_heads, tokens, config.dim // config.num_heads
    q, found = torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True), {}

    def attend():
        with sdpa_kernel(kinds):
            torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum(), q)
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    for name, kinds in (("flash", [flash]), ("cuDNN", [cudnn]), ("PyTorch's choice", [flash, cudnn])):
        with contextlib.suppress(RuntimeError):                                 # this machine hasn't got it
            found[name] = 1000 * np.median(take_turns([attend], 5, "cuda")[0])
    return "Attention, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in found.items())

def bench(args):
    """Print one Markdown table of args.steps, then what the data path does in a second."""
    import diffusers
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[args.dtype]
    toy, peft = args.preset == "toy", importlib.util.find_spec("peft")
    config = SMALL if args.preset == "small" else PRESETS[args.preset]
    shape = (16, (args.frames - 1) // 4 + 1, *(x // 8 for x in args.size))
    shape = (3, args.frames, *args.size) if toy else shape
    words, n = data.TEXT_LEN if toy else data.WAN_TEXT_LEN, 8192 if device == "cuda" else 2048
    torch.manual_seed(0)
    with torch.device(device):
        m = VideoDiT(config)
        batch = (torch.randn(args.batch, 2, *shape), torch.rand(args.batch),
                 torch.randn(args.batch, words, config.text_dim), torch.randn(args.batch, *shape))
        a, b = torch.randn(2, n, n, dtype=dtype)
    tokens = args.batch * math.prod(shape) // (config.in_dim * math.prod(config.patch_size))
    if device == "cuda":
        print(attention_times(config, tokens // args.batch), end="\n\n")
    fp32 = [k for k in m.state_dict() if any(part in k for part in model_file.FP32_ISLANDS)]
    weights = {k: v if k in fp32 else v.to(dtype) for k, v in m.state_dict().items()}
    del m
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.preset}, {args.frames} frames of {args.size[0]} x {args.size[1]}, {tokens:,} tokens, "
          f"{args.dtype}, {where}, torch {torch.__version__}, diffusers {diffusers.__version__}; medians of "
          f"{args.rounds} turns\n\n| step | model | s | GB | tokens/s | TFLOP/s | of matmul | "
          "time / diffusers | time / compiled diffusers |\n" + "|---" * 9 + "|")
    profiles, kept = [], []
    for step in args.steps:
        whose = ["ours", "diffusers", "diffusers, cuDNN"][:3 if device == "cuda" else 2]
        whose = whose[:1] if step == "dpo" and not peft else whose
        names = [(who, compiled) for compiled in (False, True)[:1 + args.compile] for who in whose]
        _, runs, held = zip(*[contender(args, step, who, compiled, weights, config, batch)
                              for who, compiled in names])
        seconds, added = take_turns([*runs, lambda: a @ b], args.rounds, device)
        median, seen = np.median(seconds, axis=0), tokens * (2 if step == "dpo" else 1)
        matmul = 2e-12 * n**3 / median[-1]
        work = 1e-12 * args.batch * np.dot(PASSES[step], flops(config, shape, words))
        for i, (who, compiled) in enumerate(names):
            beside = [("diffusers", False), ("diffusers", True)]
            ratios = [f"{np.median(seconds[:, i] / seconds[:, names.index(other)]):.2f}"
                      if other in names else "" for other in beside]
            memory = f"{(held[i] + added[i]) / 1e9:.1f}" if device == "cuda" else ""
            cells = (step, who + ", compiled" * compiled, f"{median[i]:.3f}", memory,
                     f"{seen / median[i]:,.0f}", f"{work / median[i]:.3g}",
                     f"{work / median[i] / matmul:.0%}", *ratios)
            print("| " + " | ".join(cells) + " |", flush=True)
        if args.profile:
            eager = runs[:len(names) // (1 + args.compile)]
            profiles.append((step, [operations(run, device) for run in eager]))
        if step == "dpo" and not peft:
            print("| dpo | diffusers needs `pip install peft` |" + " |" * 7)
        del runs
        torch.compiler.reset()
        if step == "dpo" and peft:
            most = {}
            for who in ("ours", "ours, decoupled", "diffusers"):
                m, run, _ = contender(args, step, who, False, weights, config, batch)
                most[who] = kept_for_backward(m, run)[1]
                del m, run
            kept.append("Kept for the backward pass of a DPO step, eager: " + ", ".join(
                f"{who} {x / 1e6:.0f} MB ({x / most['diffusers']:.2f} of diffusers with peft)"
                for who, x in most.items()))
    for step, found in profiles:
        others = len(found) - 1
        print(f"\n| {step}, ms | ours |" + " diffusers |" * others + "\n|---|---|" + "---|" * others)
        for name in sorted(found[0], key=found[0].get)[:-9:-1] + ["all"]:
            cells = [sum(x.values()) if name == "all" else x.get(name, 0) for x in found]
            print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in cells) + " |")
    print("", *kept, sep="\n")
    print(f"\nA matmul of {n} x {n} ran at {matmul:.3g} TFLOP/s, taking turns with the last step's rows.")
    bench_data(args, device)

def bench_data(args, device):
    """Print how fast pairs of Shapes world are drawn and judged, and videos are decoded and encoded."""
    from diffusers import AutoencoderKLWan

    def rate(function, n=1):
        return n / np.median(take_turns([function], 3, device)[0])
    print(f"Shapes world: {rate(lambda: data.toy_pairs(64, 'train', 0), 64):.0f} pairs/s.", end="")
    if args.preset != "toy":
        with tempfile.TemporaryDirectory() as folder:
            noise = torch.rand(3, 6, *args.size).mul(2).sub(1).repeat_interleave(-(-args.frames // 6), 1)
            data.write_video(f"{folder}/a.mp4", noise, data.WAN_FPS)
            clip = data.read_clip(f"{folder}/a.mp4", args.frames, args.size)
            decode = rate(lambda: data.read_clip(f"{folder}/a.mp4", args.frames, args.size))
        vae = AutoencoderKLWan().to(device).eval().requires_grad_(False)  # Wan 2.1's sizes, random weights
        encode = rate(lambda: vae.encode(clip[None].to(device)))
        print(f" Videos of {args.frames} frames: {decode:.2f}/s decoded and scaled, "
              f"{encode:.3f}/s through the autoencoder.", end="")
    print()

if __name__ == "__main__":
    if "--bench" in sys.argv:
        words = [word for word in sys.argv[1:] if word != "--bench"]
        raise SystemExit(bench(data.parse_args(Bench, Bench.__doc__, words)))
    raise SystemExit(pytest.main([__file__, "-q"]))
