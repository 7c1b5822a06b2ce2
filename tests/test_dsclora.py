"""DSCLoRA: both suites pass and find broken twins, the kernel is the official layer's, losses are those of plain loops, equal weights under a self-teacher stand still."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_distill.adapters import dsclora as m
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.evidence import check_study
from lowrank_distill.core.layers import view
from lowrank_distill.core.taps import watch
from lowrank_distill.models.span import SPAN, span
from lowrank_distill.shapes import conform, conform_objective
from lowrank_distill.shapes.adapter import adapt, load_adapter
from lowrank_distill.shapes.conform_objective import Seen
from lowrank_distill.shapes.objective import Forward
from lowrank_distill.shapes.procedure import Progress
from lowrank_distill.shapes.train import train
from torch import nn
from torch.nn import functional as F

NOW, KEYS = Progress(0, 10), ('a', 'b')

def g(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=g(seed), dtype=torch.double)
def little(seed=0, scale=2): return SPAN(scale, 6, 3, generator=g(seed)).eval()
def shaken(handle, size=.1):
    with torch.no_grad(): [p.normal_(std=size, generator=g(i)) for i, p in enumerate(handle.parameters())]
    return handle


# The adapter

def test_adapter_suite():
    conform.adapter(m.ConvLoRA, examples=60)

class Permuted(m.ConvLoRALayer):
    "A twin whose delta is cut into blocks, while its forward pass reads on as before."
    def delta(self):
        if self.k == 1: return super().delta()
        o, i = self.layer.out, self.layer.inp // self.k
        return (self.scale * self.b @ self.a).view(o, self.k, i // self.k, -1).transpose(1, 2).reshape(o, -1) if i % self.k == 0 else -super().delta()

class PermutedSpec(m.ConvLoRA):
    def build(self, layer, weight, generator, statistics=None): return Permuted(layer, self, generator)

def test_the_suite_finds_another_reading():
    with pytest.raises(AssertionError, match='delta'): conform.adapter(PermutedSpec, examples=60, others=())

def official(layer, a, b, r, alpha, x):
    "Lora_Conv2d.forward of the released code, not merged."
    return F.conv2d(x, layer.weight + (b @ a).view(layer.weight.shape) * (alpha / r), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_layer_is_the_official_one(i, o, k, r, seed):
    r = min(r, o)
    layer = nn.Conv2d(i, o, k, padding=1).double()
    if r > min(o, i * k * k): return
    net, x = nn.Sequential(layer), randn(2, i, 6, 6, seed=seed)
    part = shaken(adapt(net, m.ConvLoRA(rank=r, alpha=3.)), 1.).layers['0']
    assert part.a.shape == (r * k, i * k) and part.b.shape == (o * k, r * k) and part.spec.count(part.layer) == r * k * k * (i + o)
    torch.testing.assert_close(net(x), official(layer, part.a, part.b, r, 3., x), atol=1e-9, rtol=1e-9)
    a, b, scale = part.product()
    torch.testing.assert_close(scale * b @ a, part.delta())

@pytest.mark.parametrize(('i', 'o', 'r', 'count'), [(26, 26, 2, 936), (26, 48, 8, 5328)])
def test_counts_of_the_card(i, o, r, count):
    assert m.ConvLoRA(rank=r).count(view(nn.Conv2d(i, o, 3))) == count

def test_ranks():
    part = m.ConvLoRALayer(view(nn.Conv2d(6, 8, 3)), m.ConvLoRA(rank=1), g()).double()
    with torch.no_grad(): part.b.normal_(generator=g())
    assert torch.linalg.matrix_rank(part.delta().view(24, 18)) == 3 and torch.linalg.matrix_rank(part.delta()) == 8

@pytest.mark.parametrize('scale', [2, 4])
def test_layered_configuration(scale):
    net = span(scale)
    handle = m.dsclora(net)
    ranks = {n: (p.spec.rank, p.spec.alpha) for n, p in handle.layers.items()}
    assert ranks == {f'blocks.{b}.c{c}': (2, 4.) for b in range(6) for c in (1, 2, 3)} | {'conv_2': (8, 16.), 'up': (8, 16.)}
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    assert all((p.b == 0).all() and p.a.abs().max() <= p.a.shape[1] ** -.5 for p in handle.layers.values())

def test_identity_merge_and_keys():
    net, base, x = span(2).double(), span(2).double(), torch.rand(1, 3, 12, 12, generator=g()).double()
    handle = m.dsclora(net)
    with torch.no_grad():
        assert torch.equal(net(x), base(x))
        shaken(handle, .02)
        before = net(x)
        assert (before - base(x)).abs().max() > 1e-3
        handle.merge()
        assert (net(x) - before).abs().max() < 1e-9 * before.abs().max()
    with handle.hidden(): assert [(k, v.shape) for k, v in net.state_dict().items()] == [(k, v.shape) for k, v in base.state_dict().items()]
    handle.unmerge()
    assert all(torch.equal(net.get_parameter(k), v) for k, v in base.named_parameters())

def test_eval_merges_once():
    net = little()
    w, wrapped = net.conv_2.weight.clone(), m.MergesInEval(shaken(m.dsclora(net, last_rank=2)))
    x, was = torch.rand(1, 3, 6, 6, generator=g()), None
    for mode in (True, False, False, True, True, False):
        wrapped.train(mode)
        assert wrapped.handle.merged != mode and torch.equal(net.conv_2.weight, w) == mode and net.training == mode
        out = wrapped(x).detach()
        assert was is None or torch.allclose(out, was, atol=1e-4 * was.abs().max())
        was = out

def test_files(tmp_path):
    net, x = little(), torch.rand(1, 3, 6, 6, generator=g())
    path, out = shaken(m.dsclora(net, last_rank=3)).save(tmp_path/'a.safetensors'), net(x)
    assert torch.equal(load_adapter(little(), path).model(x), out)  # found by the catalogue's key

def test_a_branched_network_is_refused():
    with pytest.raises(InputError, match='collapsed'): m.dsclora(SPAN(2, 4, 1, branched=True, generator=g()))


# The losses

def see(n, classes, scale, dtype, generator):
    def draw(*shape): return (scale * torch.randn(n, *shape, generator=generator, dtype=torch.double)).to(dtype)
    def forward(c):
        image = draw(3, 4, 4)
        return Forward(image, image, {'a': draw(c, 3, 2), 'b': draw(c + 1, 2, 2)})
    return Seen(forward(3), {'teacher': forward(3)}, {'labels': draw(3, 4, 4), 'index': torch.arange(n)})

def cosine(x, k, i, j):
    a, b = x[k, :, i].tolist(), x[k, :, j].tolist()
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))

def naive(seen):
    total = 0.
    for key in KEYS:
        s, t = seen.student.features[key].flatten(2), seen.teachers['teacher'].features[key].flatten(2)
        n, _, places = s.shape
        total += sum(abs(cosine(s, k, i, j) - cosine(t, k, i, j)) for k in range(n) for i in range(places) for j in range(places)) / (n * places**2)
    return {'affinity': total / len(KEYS)}

def test_objective_suite():
    did = conform_objective.objective(lambda: m.SpatialAffinity(KEYS), see=see, naive=naive, zero_terms=['affinity'])
    did |= conform_objective.objective(m.Reconstruction, see=see, naive=lambda seen: {'rec': (seen.student.logits - seen.batch['labels']).abs().mean()})
    did |= conform_objective.objective(m.OutputMatch, see=see, zero_terms=['output'])
    assert set(did.values()) == {'finite'}

class Raw(m.SpatialAffinity):
    def forward(self, student, teachers, batch, at):
        return {'affinity': sum(m.l1(a.flatten(2).mT @ a.flatten(2), b.flatten(2).mT @ b.flatten(2)) for a, b in ((student.features[k], teachers['teacher'].features[k]) for k in KEYS)) / 2}

def test_the_suite_finds_a_missing_normalisation():
    with pytest.raises(AssertionError, match='plain loop'): conform_objective.equals(Raw(KEYS), see, naive)

@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_affinity_sees_no_brightness_and_no_width(n, c, side, seed):
    x, bright = randn(n, c, side, 2, seed=seed), randn(n, 1, side, 2, seed=seed + 1).exp()
    assert m.affinity_loss(x * bright, x) < 1e-12
    wider = torch.cat([x, 0 * x], 1)
    assert m.affinity_loss(wider, x) < 1e-12 and m.affinity_loss(-x, x) < 1e-12

def test_a_place_of_zeros():
    x = randn(1, 3, 2, 2)
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    a = m.spatial_affinity(x)
    a.sum().backward()
    assert (a[0, 0] == 0).all() and (a[0, :, 0] == 0).all() and x.grad.isfinite().all() and x.grad.abs().max() < 1e3

def test_large_maps_are_pooled():
    objective = m.SpatialAffinity(['a'], most=4)
    large, other = randn(2, 3, 9, 3), randn(2, 5, 9, 3, seed=1)
    found = objective(Forward(None, None, {'a': large}), {'teacher': Forward(None, None, {'a': other})}, {}, NOW)['affinity']
    torch.testing.assert_close(found, m.affinity_loss(F.adaptive_avg_pool2d(large, (4, 3)), F.adaptive_avg_pool2d(other, (4, 3))))

@pytest.mark.parametrize('wrong', [lambda: m.SpatialAffinity([]), lambda: m.SpatialAffinity(['a', 'b'], ['c']), lambda: m.l1(randn(2, 3), randn(3, 2)), lambda: m.spatial_affinity(randn(2, 3, 4)),
                                   lambda: m.affinity_loss(randn(1, 2, 3, 3), randn(1, 2, 3, 2))])
def test_what_does_not_fit(wrong):
    with pytest.raises(InputError): wrong()

def test_taps_are_those_of_the_code():
    net = little()
    with torch.no_grad(), watch(net, m.TAPS) as seen: net(torch.rand(1, 3, 5, 5, generator=g()))
    assert len(seen) == 9 and all(v.shape == (1, 6, 5, 5) for v in seen.values())


# Training

def data(n=6, seed=0): return torch.rand(n, 3, 6, 6, generator=g(seed)), torch.rand(n, 3, 12, 12, generator=g(seed + 1))

def test_at_the_start_a_self_teacher_costs_nothing():
    net, base = little(), little()
    m.dsclora(net, last_rank=2)
    found = m.recipe(net, base, (1., 1., 1.), data(), 2, 3, 1e-3).terms(data(2), NOW)
    assert found['output.output'] == found['affinity.affinity'] == 0 < found['rec.rec']

def test_two_absolute_errors_cancel_and_their_half_does_not():
    "Between teacher and truth the loss of equal weights is flat: its gradient is zero in every pixel."
    t, y = randn(50), randn(50, seed=1)
    s = (t + torch.rand(50, generator=g()) * (y - t)).requires_grad_()
    for weight, size in ((1., 0.), (.5, .5)):
        slope, = torch.autograd.grad((s - y).abs().sum() + weight * (s - t).abs().sum(), s)
        torch.testing.assert_close(slope.abs(), torch.full_like(slope, size))

def test_training_moves_only_the_adapter_and_repeats():
    outs = []
    for _ in range(2):
        net, teacher = little(), little(1)
        before, handle = {k: v.clone() for k, v in net.named_parameters()}, m.dsclora(net, last_rank=2)
        train(m.recipe(net, teacher, (1., .5, .5), data(), 2, 4, 1e-2), seed=3)
        assert all(torch.equal(net.get_parameter(k), v) for k, v in before.items()) and any((p.b != 0).any() for p in handle.layers.values())
        assert all(p.grad is None for p in teacher.parameters())
        outs.append(net(data()[0]).detach())
    assert torch.equal(*outs)

def test_a_wider_teacher_fits():
    net, teacher = little(), SPAN(2, 9, 4, generator=g(1))
    m.dsclora(net, last_rank=2)
    losses = train(m.recipe(net, teacher, (1., 1., 1.), data(), 2, 2, 1e-3)).losses
    assert {k.partition('.')[2] for k in losses} == {'rec.rec', 'output.output', 'affinity.affinity'}


# The study

@pytest.mark.parametrize('arm', m.study.arms)
def test_run_arm(arm):
    found = m.run_arm(arm, m.study.configs(arm)[0], 0, 'smoke')
    assert all(math.isfinite(v) for v in found.values()) and 0 < found['psnr'] < 60 and found['ssim'] <= 1
    assert found.get('trained', 0) == {'base': 0, 'full': 410_700}.get(arm, 42_336)

def test_study():
    check_study(m.study)
    assert len({len(m.study.configs(a)) for a in m.study.arms}) == 1 and m.WEIGHTS['self_equal'] == (1., 1., 1.)
    config = m.study.configs('dsclora')[1]
    a, b = ({k: v for k, v in m.run_arm('rec', config, 1, 'smoke').items() if k != 'seconds_a_step'} for _ in range(2))
    assert a == b

def test_the_teacher_is_left_alone():
    teacher = m.better('smoke', 'cpu')
    before = copy.deepcopy(teacher.state_dict())
    m.run_arm('dsclora', {'lr': 1e-3}, 0, 'smoke')
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()) and not any(p.requires_grad for p in teacher.parameters())
