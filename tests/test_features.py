"""FitNet, AT, VID: the suite holds and finds wrong twins, maps are made of whatever a tap gives, the apprentice follows from its seed."""
import math
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import DeiTConfig, DeiTForImageClassification, ResNetConfig, ResNetForImageClassification

from lowrank_distill.core.errors import InputError
from lowrank_distill.core.streams import Streams
from lowrank_distill.core.taps import Tap
from lowrank_distill.data.images import fashion_mnist
from lowrank_distill.distillation import features as m
from lowrank_distill.models.vision import ConvNet, Mixer, ResNet, ViT
from lowrank_distill.shapes.conform_objective import objective
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, Forward, SoftTargets, Teacher, look
from lowrank_distill.shapes.procedure import Progress

AT_STEP = Progress(0, 10)
EVEN, SMALLER = m.Pair('s', 't', (2, 2, 2), (3, 2, 2)), m.Pair('s', 't', (2, 3, 3), (3, 2, 2))
TOKENS = m.Pair('s', 't', (5, 2), (3, 4, 4))

def g(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=g(seed), dtype=torch.double)
def shapes(pair): return {'s': pair.student_shape, 't': pair.teacher_shape}
def fitnet(pair=EVEN, **options): return m.FitNet(pair, generator=g(1), **options)
def vid(pair=EVEN): return m.VID([pair], generator=g(1))
def net(kind=ConvNet, seed=0, **options): return kind((1, 28, 28), generator=g(seed), **options)
def terms(o, s, t): return o(Forward(None, None, {'s': s}), {'teacher': Forward(None, None, {'t': t})}, {}, AT_STEP)


# The suite, and twins that it must find

@pytest.mark.parametrize('pair', [EVEN, SMALLER, TOKENS, m.Pair('s', 't', (2, 4, 4), (3, 2, 2)), m.Pair('s', 't', (2, 2, 3), (3, 3, 5))], ids=lambda p: f'{p.student_shape}{p.teacher_shape}')
@pytest.mark.parametrize('kind', ['at', 'fitnet', 'bare', 'vid'])
def test_suite(kind, pair):
    make = {'at': lambda: m.AT([pair]), 'fitnet': partial(fitnet, pair), 'bare': partial(fitnet, pair, norm=False, act=False, bias=False), 'vid': partial(vid, pair)}[kind]
    assert set(objective(make, shapes=shapes(pair)).values()) == {'finite'}

def loops_at(seen):
    s, t = seen.student.features['s'], seen.teachers['teacher'].features['t']
    total = 0.
    for a, b in zip(s, t, strict=True):
        rows = [[sum(x.item() ** 2 for x in f[:, y, z]) / len(f) for y in range(2) for z in range(2)] for f in (a, b)]
        lengths = [math.sqrt(sum(v * v for v in r)) for r in rows]
        total += sum((p / lengths[0] - q / lengths[1]) ** 2 for p, q in zip(*rows, strict=True))
    return {'attention': total / (len(s) * 4)}

class Unnormalised(m.AT):
    def forward(self, student, teachers, batch, at):
        s, t = student.features['s'], teachers['teacher'].features['t']
        return {'attention': (s.square().mean(1) - t.square().mean(1)).square().mean()}

class Summed(m.AT):
    def forward(self, student, teachers, batch, at): return {'attention': 4 * super().forward(student, teachers, batch, at)['attention']}

class Cut(m.VID):
    def forward(self, student, teachers, batch, at):
        s, t = student.features['s'], teachers['teacher'].features['t']
        mean = self.regressors[0](s.to(self.alphas[0].dtype))
        return {'information': (m.vid(mean, t, self.alphas[0]) * mean.detach().mean().exp()).sum()}

@pytest.mark.parametrize('wrong', [lambda: Unnormalised([EVEN]), lambda: Summed([EVEN]), lambda: Cut([EVEN], generator=g(1))])
def test_suite_can_fail(wrong):
    naive = loops_at if isinstance(wrong(), m.AT) else None
    with pytest.raises(AssertionError): objective(wrong, shapes=shapes(EVEN), naive=naive)
    objective(lambda: m.AT([EVEN]), shapes=shapes(EVEN), naive=loops_at)


# The functions

@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.floats(1e-3, 1e3), st.sampled_from([1., 2., 3.5]), st.integers(0, 10**6))
def test_attention_is_blind_to_scale_and_order(n, c, h, w, scale, p, seed):
    f = randn(n, c, h, w, seed=seed)
    q = m.attention(f, p)
    assert q.shape == (n, h * w) and (q >= 0).all() and (q.norm(dim=1) - 1).abs().max() < 1e-12
    assert (m.attention(scale * f[:, torch.randperm(c, generator=g(seed))], p) - q).abs().max() < 1e-12
    assert (m.attention(-f, p) - q).abs().max() == 0

@pytest.mark.parametrize('scale', [0., 1e-300, 1e-30, 1e200])
def test_attention_of_any_size(scale):
    f = (scale * randn(3, 4, 2, 2)).requires_grad_()
    q = m.attention(f)
    assert q.isfinite().all() and torch.autograd.grad(q.sum(), f)[0].isnan().sum() == 0
    if scale: assert (q - m.attention(randn(3, 4, 2, 2))).abs().max() < 1e-9

def test_at_bound_and_sizes():
    a, b = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    a[..., 0, 0], b[..., 3, 3] = 1, 1
    assert m.at(a, b).item() == pytest.approx(2 / 16)
    big, little = randn(2, 3, 6, 4), randn(2, 5, 3, 5)
    assert [tuple(f.shape[2:]) for f in m.same_size(big, little)] == [(3, 4)] * 2
    assert m.at(big, little).item() == pytest.approx((m.attention(F.adaptive_avg_pool2d(big, (3, 4))) - m.attention(F.adaptive_avg_pool2d(little, (3, 4)))).square().mean().item())
    assert m.at(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2)).item() == 0
    for wrong in ((randn(2, 3, 1, 1), little), (randn(1, 3, 3, 3), little)):
        with pytest.raises(InputError): m.at(*wrong)
    with pytest.raises(InputError): m.attention(a, .5)

@pytest.mark.parametrize('own', range(1, 9))
@pytest.mark.parametrize('other', range(1, 9))
def test_regressor_reaches_every_size(own, other):
    made = m.regressor((2, own, own), (3, other, other), generator=g())
    assert made(torch.randn(2, 2, own, own, generator=g())).shape == (2, 3, other, other)
    if own == other: assert sum(p.numel() for p in made.parameters()) == 2 * 3 + 3 + 2 * 3

def test_regressor_like_its_code():
    "3 pixels at stride 2 for twice the side, a transposed one of 4 for half, one of 1 + s - t without padding."
    kinds = {s: m.regressor((2, s, s), (3, 8, 8)).conv for s in (16, 4, 11)}
    assert [(type(k), k.kernel_size, k.stride, k.padding) for k in kinds.values()] == [
        (nn.Conv2d, (3, 3), (2, 2), (1, 1)), (nn.ConvTranspose2d, (4, 4), (2, 2), (1, 1)), (nn.Conv2d, (4, 4), (1, 1), (0, 0))]
    with pytest.raises(InputError): m.regressor((1, 2, 4), (1, 4, 2))

def test_fitnet_with_identity_is_plain():
    o = fitnet(m.Pair('s', 't', (3, 2, 2), (3, 2, 2)), norm=False, act=False, bias=False).double()
    with torch.no_grad(): nn.init.dirac_(o.regressor.conv.weight)
    s, t = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    assert terms(o, s, t)['hint'].item() == (s - t).square().mean().item() and terms(o, t, t)['hint'].item() == 0

def test_fitnet_refuses():
    with pytest.raises(InputError): terms(fitnet(), torch.randn(4, 5, 2, 2), torch.randn(4, 3, 2, 2))
    with pytest.raises(InputError): m.FitNet(m.Pair('s', 't'))
    one = fitnet(m.Pair('s', 't', (2,), (3,)))
    assert terms(one, torch.randn(4, 2), torch.randn(4, 3))['hint'].isfinite()
    with pytest.raises(InputError, match='normalised'): terms(one, torch.randn(1, 2), torch.randn(1, 3))

def test_vid_start_and_optimum():
    assert torch.allclose(F.softplus(vid().alphas[0]) + 1e-5, torch.tensor(5.))
    t = randn(6, 3, 2, 2)
    assert m.vid(t, t, torch.full((3,), m.alpha_of(5.), dtype=torch.double)).item() == pytest.approx(.5 * math.log(5), abs=1e-12)
    mean = t + torch.tensor([.1, 1., 3.], dtype=torch.double).view(3, 1, 1)
    best = torch.tensor([m.alpha_of(v) for v in (.01, 1., 9.)], dtype=torch.double).requires_grad_()
    assert torch.autograd.grad(m.vid(mean, t, best), best)[0].abs().max() < 1e-14
    with pytest.raises(InputError): m.alpha_of(0.)
    with pytest.raises(InputError): m.vid(t, t, torch.zeros(4))

@given(st.floats(1e-4, 100.))
def test_alpha_of(variance):
    assert (F.softplus(torch.tensor(m.alpha_of(variance), dtype=torch.double)) + 1e-5).item() == pytest.approx(variance, rel=1e-9)


# Maps, pairs and networks of others

def test_as_map():
    x = torch.arange(1., 11).view(1, 10, 1)  # the first token is no patch
    assert m.as_map(x)[0, 0].tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    assert [tuple(m.as_map(torch.zeros(2, n, 3)).shape) for n in (1, 4, 5, 6, 49, 50, 51)] == [(2, 3, s, s) for s in (1, 2, 2, 2, 7, 7, 7)]
    assert m.as_map(torch.zeros(2, 3)).shape == (2, 3, 1, 1)
    for wrong in (torch.zeros(2, 7, 3), torch.zeros(2), torch.zeros(1, 2, 3, 4, 5), torch.zeros(2, 0, 3)):
        with pytest.raises(InputError): m.as_map(wrong)

def test_pairs_are_the_stages():
    x, resnet = fashion_mnist('test').images[:2], net(ResNet, width=4, blocks=1)
    assert {p.teacher.key: p.teacher_shape for p in m.paired(resnet, resnet, x)}.items() <= resnet.stages().items()
    for kind in (ConvNet, ViT, Mixer):
        one = net(kind, **(dict(width=4) if kind is ConvNet else dict(dim=8, depth=4)))
        assert {p.student.key: p.student_shape for p in m.paired(one, resnet, x)} == one.stages()

def foreign(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == 'resnet': return ResNetForImageClassification(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic', num_labels=10))
        return DeiTForImageClassification(DeiTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=4, num_channels=1, num_labels=10))

@pytest.mark.parametrize('other', ['resnet', 'deit'])
@pytest.mark.parametrize('mine', [ConvNet, Mixer])
def test_foreign_networks(other, mine):
    "A teacher of another library, on maps or on tokens with two extra ones: all three objectives train on it."
    x, student, teacher = fashion_mnist('test').first(8), net(mine), foreign(other)
    pairs = m.paired(student, teacher, x.images[:2])
    objectives = {'labels': CrossEntropy(), 'hint': m.FitNet(pairs[0], act=False, generator=g()), 'at': m.AT(pairs), 'vid': m.VID(pairs, generator=g())}
    d = Distillation(student, {'teacher': Teacher(teacher)}, objectives, example=(x.images, x.labels))
    found = d.terms((x.images, x.labels), AT_STEP)
    sum(found.values()).backward()
    assert len(found) == 4 and all(p.grad is not None for o in d.objectives.values() for p in o.parameters())
    assert not any(p.grad is not None for p in teacher.parameters())

def test_pairs_select_a_tensor():
    "Blocks of a diffusion network return tuples; the pair selects the map."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unets = [UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(c, 2 * c), layers_per_block=1, norm_num_groups=2,
                             down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2) for c in (4, 8)]
    batch = {'sample': torch.randn(2, 1, 8, 8, generator=g()), 'timestep': torch.tensor([3, 7])}
    pairs = m.paired(*unets, batch)
    seen = [look(u, batch, taps, read=lambda o: o.sample) for u, taps in zip(unets, zip(*[p[:2] for p in pairs], strict=True), strict=True)]
    o = m.VID(pairs, generator=g())
    found = o(seen[0], {'teacher': seen[1]}, {}, AT_STEP) | m.AT(pairs)(seen[0], {'teacher': seen[1]}, {}, AT_STEP)
    assert all(v.isfinite() for v in found.values())

def test_objectives_refuse():
    with pytest.raises(InputError): m.AT([])
    with pytest.raises(InputError): m.VID([('s', 't')])
    o = m.AT([('s', Tap('t', name='other')), ('s', 'u')])  # one place of the student against two of the teacher
    assert [t.key for t in o.needs.student] == ['s'] and [t.key for t in o.needs.teachers['teacher']] == ['other', 'u']


# The apprentice, and the study

SIZE = dict(images=50, width=4, epochs=2)

def test_apprentice_follows_from_its_seed():
    teacher = {'teacher': Teacher(net(width=8))}
    def run(seed, arm='at', **options):
        pairs = m.paired(m.learner(4), teacher['teacher'].source, torch.zeros(2, 1, 28, 28))
        made = {'at': m.AT(pairs), 'kd': SoftTargets(), 'vid': m.VID(pairs, generator=Streams(seed).generator('method'))}[arm]
        before = [p.clone() for p in made.parameters()]
        student, done = m.apprentice(teacher, {'labels': CrossEntropy(), arm: made}, seed=seed, **SIZE | options)
        assert all(not torch.equal(p, q) for p, q in zip(before, made.parameters(), strict=True)), 'what an objective learns does not train'
        assert done.steps == 2
        return torch.cat([p.flatten() for p in student.parameters()])
    same = run(0), run(0), run(0, remember=False)
    assert torch.equal(*same[:2]) and (same[0] - same[2]).abs().max() < 1e-4
    assert not torch.equal(same[0], run(1)) and not torch.equal(same[0], run(0, 'kd')) and run(0, 'vid').isfinite().all()

def test_remembered():
    teacher, images = net(ResNet, width=4, blocks=1), torch.rand(7, 1, 28, 28, generator=g())
    known, plain = m.Remembered(Teacher(teacher), images), Teacher(teacher)
    known.ask = partial(known.ask, chunk=3)
    rows = torch.tensor([5, 0, 5])
    a, b = (t({'inputs': images[rows], 'index': rows}, ['groups.1']) for t in (known, plain))
    assert torch.allclose(a.logits, b.logits, atol=1e-5) and torch.allclose(a.features['groups.1'], b.features['groups.1'], atol=1e-5)
    assert list(known.answers) == [(Tap('groups.1'),)] and not a.logits.requires_grad
    known({'index': rows}, ['groups.1'])
    assert len(known.answers) == 1
    with pytest.raises(InputError): known({'inputs': images})
    assert m.Remembered(Teacher(teacher, until='groups.0'), images)({'index': rows}, ['groups.0']).logits is None

@pytest.mark.parametrize('arm', m.OWN)
def test_smoke(arm):
    found = m.run_arm(arm, {'lr': .02} | {k: v[0] for k, v in m.OWN[arm].items()}, 0, 'smoke')
    assert all(map(math.isfinite, found.values())) and {'validation', 'test', 'agreement'} <= set(found)
    assert found['extra'] == {'labels': 0, 'kd': 0, 'at': 0}.get(arm, found['extra']) and (found['extra'] > 0) == (arm in ('fitnet', 'vid'))

def test_study_is_fair():
    assert len({len(m.study.configs(arm)) for arm in m.study.arms}) == 1
    with pytest.raises(InputError): m.recipe('atn', {}, [], nn.Identity())
