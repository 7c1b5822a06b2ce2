"""Photographs and SPAN: pictures are those of the wheels, small ones are Pillow's, PSNR and SSIM are scikit-image's, and the network is the official one, branched or collapsed."""
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import watch
from lowrank_distill.data import photographs as photos
from lowrank_distill.data.photographs import crops, degrade, enlarge, pairs, photograph, photographs, psnr, ssim
from lowrank_distill.models.span import SPAN, Conv3XC, attend, collapsed, counts, quality, span
from PIL import Image
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional as F

def g(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0): return torch.rand(*shape, generator=g(seed))
def image(h, w, seed=0): return torch.randint(256, (3, h, w), generator=g(seed)).to(torch.uint8)


# Photographs

def test_splits_share_no_photograph():
    for a, b in combinations(('train', 'validation', 'test'), 2): assert not set(photos.SPLITS[a]) & set(photos.SPLITS[b])
    assert set().union(*photos.SPLITS.values()) == set(photos.FILES)

@pytest.mark.parametrize('name', photos.FILES)
def test_every_photograph_is_in_its_wheel(name):
    x = photograph(name)
    assert x.dtype == torch.uint8 and x.shape[0] == 3 and min(x.shape[1:]) >= 256 and x.float().std() > 10

def test_a_file_that_is_not_there(monkeypatch):
    monkeypatch.setitem(photos.FILES, 'lily', ('skimage', 'lily.tif'))
    with pytest.raises(InputError, match=r'installed skimage; given: lily.tif'): photograph('lily')
    monkeypatch.setitem(photos.FILES, 'nobody', ('no_such_package', 'x.png'))
    monkeypatch.setitem(photos.FOLDERS, 'no_such_package', 'x')
    with pytest.raises(InputError, match='no_such_package'): photograph('nobody')
    with pytest.raises(InputError, match='astronaut'): photograph('astronot')
    with pytest.raises(InputError, match='validation'): photographs('validaton')

@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_small_is_pillows(scale, a, b, seed):
    x = image(scale * a, scale * b, seed)
    found = Image.fromarray(x.permute(1, 2, 0).numpy()).resize((b, a), Image.Resampling.BICUBIC)
    assert np.array_equal(degrade(x, scale).permute(1, 2, 0).numpy(), np.array(found))
    assert enlarge(x, scale).shape == (3, scale * scale * a, scale * scale * b)

def test_blur_comes_before_and_noise_after():
    x = image(64, 64)
    flat = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    assert degrade(x, 2, blur=2.).float().std() < degrade(x, 2).float().std() / 2 and (degrade(flat, 2, blur=3.) == 100).all()
    noisy = degrade(flat, 2, noise=5., generator=g()).float()
    assert abs(noisy.mean() - 100) < 1 and abs(noisy.std() - 5) < .5
    assert torch.equal(degrade(flat, 2, noise=5., generator=g()), noisy.to(torch.uint8))

@pytest.mark.parametrize('wrong', [lambda: degrade(image(5, 4), 2), lambda: degrade(image(4, 4).float(), 2), lambda: degrade(image(4, 4)[:1], 2), lambda: degrade(image(4, 4), 2, noise=1.),
                                   lambda: degrade(image(4, 4), 2, blur=-1.), lambda: degrade(image(4, 4), 0), lambda: crops(pairs({'a': image(8, 8)}, 2), 1, 5, g()), lambda: psnr(rand(1, 3, 8, 8), rand(1, 3, 8, 8)),
                                   lambda: psnr(rand(1, 3, 9, 9), rand(1, 3, 9, 8)), lambda: psnr(image(20, 20), image(20, 20)), lambda: ssim(rand(3, 30, 30), rand(3, 30, 30))])
def test_what_does_not_fit(wrong):
    with pytest.raises(InputError): wrong()

def test_crops_belong_together():
    "Where the large one is a ramp that no turn or mirror hides, the small crop is the large one averaged."
    y, x = torch.meshgrid(torch.arange(60), torch.arange(60), indexing='ij')
    ramp = torch.stack([2 * y, 3 * x, y + x]).to(torch.uint8)
    small, large = crops(pairs({'ramp': ramp}, 2), 30, 8, g())
    assert small.shape == (30, 3, 8, 8) and large.shape == (30, 3, 16, 16)
    inside = (small - F.avg_pool2d(large, 2)).abs() * 255
    assert inside.max() < 2.5 and len({tuple(c.flatten().tolist()) for c in small}) > 20
    again = crops(pairs({'ramp': ramp}, 2), 30, 8, g())
    assert torch.equal(small, again[0]) and torch.equal(large, again[1])

def test_a_crop_may_be_the_whole_photograph_and_its_corners_are_reached():
    x = image(8, 8)
    small, large = crops(pairs({'x': x}, 2), 5, 4, g())
    assert small.shape == (5, 3, 4, 4) and all(torch.equal(c.flatten().sort().values, (x / 255).flatten().sort().values) for c in large)
    assert {round(v * 255) for v in crops(pairs({'x': x}, 1), 400, 1, g())[0].flatten().tolist()} == set(x.flatten().tolist())

def test_odd_sides_are_cut_off():
    (small, large), = pairs({'odd': image(9, 7)}, 2).values()
    assert small.shape == (1, 3, 4, 3) and large.shape == (1, 3, 8, 6)

@settings(deadline=None)
@given(st.integers(0, 99), st.integers(0, 5))
def test_ssim_is_that_of_scikit_image(seed, border):
    a, b = rand(1, 3, 24, 21, seed=seed).double(), rand(1, 3, 24, 21, seed=seed + 1).double()
    inside = slice(border, -border or None)
    plain = [x[0, :, inside, inside].permute(1, 2, 0).numpy() for x in (a, b)]
    theirs = structural_similarity(*plain, channel_axis=2, data_range=1., gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert ssim(a, b, border) == pytest.approx(theirs, abs=1e-9) and ssim(a, a, border) == pytest.approx(1)

def test_psnr_by_hand():
    truth = torch.zeros(1, 3, 12, 12)
    assert psnr(truth + .1, truth) == pytest.approx(20, abs=1e-5) and psnr(truth, truth) == math.inf and psnr(truth - 5, truth) == math.inf
    edge = truth.clone()
    edge[..., :4, :] = 1
    assert psnr(edge, truth) == math.inf and psnr(edge, truth, border=3) < 20


# SPAN

@pytest.mark.parametrize(('scale', 'expected', 'bicubic'), [(2, 33.52, 30.50), (4, 29.07, 26.99)])
def test_the_stated_decibels(scale, expected, bicubic):
    made = pairs(photographs('five', 256), scale)
    interpolated = sum(psnr(enlarge((s[0] * 255).round().byte(), scale)[None] / 255, t) for s, t in made.values()) / 5
    assert quality(span(scale), made)['psnr'] == pytest.approx(expected, abs=.05) and interpolated == pytest.approx(bicubic, abs=.05)

def official(net, x):
    "The forward pass as the released code writes it, SiLU in place included."
    def c(layer, x): return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)
    first = y = c(net.conv_1, (x - torch.tensor([.4488, .4371, .4040]).view(1, 3, 1, 1)) * 255.)
    outs = []
    for block in net.blocks:
        out1 = c(block.c1, y)
        out2 = c(block.c2, F.silu(out1, inplace=True))
        out3 = c(block.c3, F.silu(out2, inplace=True))
        y = (out3 + y) * (torch.sigmoid(out3) - .5)
        outs.append((y, out1))
    return F.pixel_shuffle(c(net.up, c(net.conv_cat, torch.cat([first, c(net.conv_2, y), outs[0][0], outs[-1][1]], 1))), net.scale)

@pytest.mark.parametrize(('scale', 'channels', 'blocks'), [(2, 5, 1), (3, 4, 2), (4, 6, 6), (1, 1, 3)])
def test_forward_is_the_official_one(scale, channels, blocks):
    net, x = SPAN(scale, channels, blocks, generator=g()).eval(), rand(2, 3, 7, 5)
    with torch.no_grad():
        assert torch.allclose(net(x), official(net, x), atol=1e-4, rtol=1e-5) and net(x).shape == (2, 3, 7 * scale, 5 * scale)
        assert net(x[:0]).shape == (0, 3, 7 * scale, 5 * scale)

def test_a_tap_sees_the_map_before_its_activation():
    net, x = SPAN(2, 4, 2, generator=g()), rand(1, 3, 6, 6)
    with torch.no_grad(), watch(net, ['blocks.1.c1', 'blocks.1.act1']) as seen: net(x)
    assert (seen['blocks.1.c1'] < -.3).any() and torch.equal(F.silu(seen['blocks.1.c1']), seen['blocks.1.act1'])

@given(st.floats(-20, 20), st.floats(-20, 20))
def test_attention(response, x):
    found = attend(torch.tensor(response, dtype=torch.double), torch.tensor(x, dtype=torch.double)).item()
    assert found == pytest.approx((response + x) * (1 / (1 + math.exp(-response)) - .5), abs=1e-12)

@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_collapse_is_exact_borders_included(inp, out, gain, seed):
    wide = Conv3XC(inp, out, gain)
    with torch.no_grad(): [p.normal_(generator=g(seed + i)) for i, p in enumerate(wide.parameters())]
    wide, x = wide.double(), rand(2, inp, 4, 5, seed=seed).double()
    torch.testing.assert_close(wide.collapse()(x), wide(x), atol=1e-12, rtol=1e-10)

def test_padding_later_is_another_layer():
    wide, x = Conv3XC(2, 3), rand(1, 2, 5, 5)
    with torch.no_grad(): [p.normal_(generator=g(i)) for i, p in enumerate(wide.parameters())]
    wide.look.padding = (1, 1)
    later = wide.narrow(wide.look(wide.widen(x))) + wide.skip(x)
    single = wide.collapse()(x)
    assert (later - single)[..., 1:-1, 1:-1].abs().max() < 1e-4 < .1 < (later - single)[..., 0, :].abs().max()

def test_collapsed_network():
    wide = SPAN(2, 6, 2, branched=True, generator=g()).eval()
    narrow, x = collapsed(wide), rand(1, 3, 6, 6)
    assert not narrow.training and list(narrow.state_dict()) == list(SPAN(2, 6, 2, generator=g()).state_dict())
    assert (narrow(x) - wide(x)).abs().max() < 1e-4 * wide(x).abs().max()
    same = collapsed(narrow)
    assert torch.equal(same(x), narrow(x)) and same.conv_1.weight is not narrow.conv_1.weight
    assert {type(m) for m in wide.modules() if isinstance(m, Conv3XC | nn.Conv2d)} == {Conv3XC, nn.Conv2d}

@pytest.mark.parametrize(('scale', 'channels', 'blocks'), [(2, 5, 1), (4, 26, 6), (3, 8, 4)])
def test_counts(scale, channels, blocks):
    net = SPAN(scale, channels, blocks, generator=g())
    assert counts(scale, channels, blocks)['parameters'] == sum(p.numel() for p in net.parameters())
    assert counts(scale, channels, blocks, 10)['gmacs'] == pytest.approx(100e-9 * sum(p.numel() for p in net.parameters() if p.dim() > 1))

def test_start_follows_from_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (torch.cat([p.flatten() for p in SPAN(2, 4, 1, generator=g(n)).parameters()]) for n in (1, 1, 2))
    span(2)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize('wrong', [lambda: span(3), lambda: SPAN(0), lambda: SPAN(2, 0), lambda: SPAN(2, 4, 0)])
def test_wrong_sizes(wrong):
    with pytest.raises(InputError): wrong()
