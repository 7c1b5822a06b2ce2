"""OFA-KD: the loss is that of plain loops, exits are those of the stage table, twins are found, the study's arms share what they must share."""
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import Tap
from lowrank_distill.data.images import fashion_mnist
from lowrank_distill.distillation import ofa_kd as m
from lowrank_distill.models.teachers import embedded
from lowrank_distill.models.vision import ConvNet, Mixer, ResNet, ViT
from lowrank_distill.shapes import conform_objective as suite
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, Forward, SoftTargets, Teacher, look
from lowrank_distill.shapes.procedure import Batches, Progress
from lowrank_distill.shapes.train import train

NOW = Progress(0, 10)
TINY = {'maps': ({'a': (1, 2, 2), 'b': (2, 1, 1)}, {}), 'tokens': ({'a': (4, 2)}, dict(limit=1, heads=1)), 'class token': ({'a': (2, 2)}, dict(extra=1, limit=1, heads=1))}

def g(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=g(seed), dtype=torch.double)
def tiny(kind, **more): return m.OFA(TINY[kind][0], 3, 2, 1.5, generator=g(1), **TINY[kind][1] | more)

def seeing(kind):
    "Passes of three classes, whatever is asked: exits have a fixed number of classes."
    three = suite.classification(tiny(kind), TINY[kind][0])
    return lambda n, classes, *rest: three(n, 3, *rest)

def plain(z, t, labels, gamma, form):
    "The loss by loops over samples and classes."
    total = 0.
    for s_row, t_row, label in zip(z.tolist(), t.tolist(), labels.tolist(), strict=True):
        log_z = math.log(sum(math.exp(v) for v in s_row))
        weight_sum = sum(math.exp(v) for v in t_row)
        for c, (a, b) in enumerate(zip(s_row, t_row, strict=True)):
            p = math.exp(b) / weight_sum
            if form == 'code': w = (1 + p) ** gamma - 1 if c == label else p ** gamma
            else: w = (1 + p) ** gamma if c == label else p
            total -= w * (a - log_z)
    return total / len(z)


# The suite, and twins that it must find

@pytest.mark.parametrize('kind', TINY)
def test_suite(kind):
    make, see = partial(tiny, kind), seeing(kind)
    suite.repeats(make(), see)
    suite.gradients(make(), see)
    suite.remembers(make, see)
    assert set(suite.hostile(make(), see).values()) == {'finite'}

def naive(kind, form='code'):
    def value(seen):
        t, y = seen.teachers['teacher'].logits, seen.batch['labels']
        exits = tiny(kind).double().exits(seen.student.features)
        return {'head': plain(seen.student.logits, t, y, 1.5, form), 'exits': sum(plain(z, t, y, 1.5, form) for z in exits.values())}
    return value

@pytest.mark.parametrize('form', m.FORMS)
@pytest.mark.parametrize('kind', TINY)
def test_terms_are_those_of_plain_loops(kind, form):
    suite.equals(tiny(kind, form=form), seeing(kind), naive(kind, form))

def test_the_suite_finds_the_other_form():
    with pytest.raises(AssertionError): suite.equals(tiny('tokens', form='paper'), seeing('tokens'), naive('tokens', 'code'))

class Unsafe(m.Head):
    def forward(self, student, teachers, batch, at):
        w = m.target_weights(teachers['teacher'].logits, batch['labels'], self.gamma)
        return {'head': -(w * student.logits.softmax(1).log()).sum(1).mean()}

def test_the_suite_finds_a_logarithm_after_the_softmax():
    see = suite.classification(Unsafe())
    with pytest.raises(AssertionError, match='head'): suite.hostile(Unsafe(), see)
    assert set(suite.hostile(m.Head(), see).values()) == {'finite'}


# The loss

@given(st.integers(1, 5), st.integers(1, 6), st.floats(.1, 4), st.sampled_from(m.FORMS), st.integers(0, 10**6))
def test_loss_and_gradient(n, classes, gamma, form, seed):
    z, t, y = randn(n, classes, seed=seed).requires_grad_(), 2 * randn(n, classes, seed=seed + 1), torch.randint(classes, (n,), generator=g(seed))
    value = m.ofa_loss(z, t, y, gamma, form)
    assert value.item() == pytest.approx(plain(z, t, y, gamma, form), rel=1e-9)
    w = m.target_weights(t, y, gamma, form)
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], (w.sum(1, keepdim=True) * z.detach().softmax(1) - w) / n)

@given(st.floats(.2, 3), st.integers(0, 10**6))
def test_a_constant_for_a_sample_changes_nothing(gamma, seed):
    z, t, y, c = randn(4, 5, seed=seed), randn(4, 5, seed=seed + 1), torch.randint(5, (4,), generator=g(seed)), randn(4, 1, seed=seed + 2)
    torch.testing.assert_close(m.ofa_loss(z + c, t - 3 * c, y, gamma), m.ofa_loss(z, t, y, gamma))

def test_single_precision_keeps_a_small_probability():
    t = torch.tensor([[-18.4, 0.]])
    p = math.exp(-18.4) / (1 + math.exp(-18.4))
    assert m.target_weights(t, torch.tensor([0]), 2.)[0, 0].item() == pytest.approx(2 * p + p * p, rel=1e-4)

def test_mask_and_mixed_labels():
    z, t, y, mask = randn(6, 3), randn(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([True, False, True, True, False, False])
    def at(**batch): return m.Head(1.5)(Forward(None, z), {'teacher': Forward(None, t)}, batch, NOW)['head']
    assert at(labels=y, mask=mask) == m.ofa_loss(z[mask], t[mask], y[mask], 1.5)
    mixed = .7 * nn.functional.one_hot(y, 3).double() + .3 * nn.functional.one_hot((y + 1) % 3, 3)
    assert at(labels=mixed) == at(labels=y) and at(labels=y, mask=torch.zeros(6, dtype=torch.bool)) == 0

@pytest.mark.parametrize('wrong', [dict(gamma=0.), dict(gamma=-1.), dict(gamma=math.nan), dict(gamma=math.inf), dict(form='papier'), dict(temperature=0.)])
def test_wrong_numbers(wrong):
    with pytest.raises(InputError): m.ofa_loss(randn(2, 3), randn(2, 3), torch.tensor([0, 1]), **wrong)


# Exits

STUDENTS = {'conv': (ConvNet, {}), 'resnet': (ResNet, dict(width=8, blocks=1)), 'vit': (ViT, dict(dim=16)), 'mean': (ViT, dict(dim=16, pool='mean')), 'mixer': (Mixer, dict(dim=16))}

@pytest.mark.parametrize('limit', [1, 2, 7])
@pytest.mark.parametrize('image', [(1, 28, 28), (3, 32, 32), (1, 8, 8)], ids=str)
@pytest.mark.parametrize('name', STUDENTS)
def test_every_student_has_exits(name, image, limit):
    kind, options = STUDENTS[name]
    net = kind(image, 5, generator=g(), **options).eval()
    objective = m.ofa(net, ConvNet((1, 28, 28), width=24, generator=g()), limit=limit, generator=g(1))
    x = torch.rand(3, *image, generator=g(2))
    seen = look(net, {'inputs': x}, objective.needs.student)
    assert [tuple(z.shape) for z in objective.exits(seen.features).values()] == [(3, 5)] * len(net.stages())
    assert torch.equal(seen.logits, net(x)) and len(objective.table) == len(net.stages())
    assert objective.table.parameters.sum() == sum(p.numel() for p in objective.parameters())

def test_table_of_a_four_stage_convolutional_student():
    objective = m.OFA({'a': (8, 32, 32), 'b': (16, 16, 16), 'c': (32, 8, 8), 'd': (64, 4, 4)}, 10, teacher_dim=96, generator=g())
    shapes = [[tuple(layer.weight.shape) for layer in b.modules() if isinstance(layer, nn.Conv2d)] for b in objective.branches]
    assert [len(s) for s in shapes] == [12, 8, 4, 1] and shapes[3] == [(96, 64, 1, 1)]
    assert [s[0] for s in shapes[0][3::4]] == [16, 32, 96]  # channels double, the last is the wider of both networks
    assert {b.head.in_features for b in objective.branches} == {96} and objective.branches[3].steps.bias is not None

def test_table_of_a_four_stage_transformer():
    objective = m.OFA({i: (1 + 28 * 28, 16) for i in 'abcd'}, 10, extra=1, generator=g())
    assert [(len(b.merges), len(b.blocks)) for b in objective.branches] == [(2, 3), (2, 2), (2, 1), (2, 1)]
    assert [type(mg.act) for mg in objective.branches[0].merges] == [nn.GELU, nn.Identity]
    assert objective.branches[0].merges(torch.zeros(2, 784, 16)).shape == (2, 49, 16)

def test_widths_that_grow():
    objective = m.OFA({'a': (65, 4), 'b': (17, 8)}, 3, extra=1, limit=4, generator=g())
    assert [z.shape for z in objective.exits({'a': torch.zeros(2, 65, 4), 'b': torch.zeros(2, 17, 8)}).values()] == [(2, 3)] * 2

@pytest.mark.parametrize('side', [2, 3, 5, 8])
def test_merge_keeps_every_patch_once(side):
    merge = m.Merge(side, 1, 4, act=False)
    merge.norm, merge.reduce = nn.Identity(), nn.Identity()
    numbers = torch.arange(1., side * side + 1)
    out = merge(numbers.view(1, -1, 1))[0]
    half = -(-side // 2)
    assert out.shape == (half * half, 4) and sorted(out[out > 0].tolist()) == numbers.tolist()
    grid = nn.functional.pad(numbers.view(side, side), (0, side % 2, 0, side % 2))
    for i in range(half):
        for j in range(half): assert out[i * half + j].tolist() == [grid[2 * i + a, 2 * j + b].item() for b in (0, 1) for a in (0, 1)]

def test_the_class_token_walks_around_the_merging():
    exit_ = m.TokenExit(4, 4, 1, 4, 3, extra=1, limit=2)
    exit_.blocks = nn.Identity()
    x = torch.rand(2, 17, 4, generator=g())
    assert torch.equal(exit_(x), exit_.head(x[:, 0]))

def test_norm_of_one_value_uses_what_it_remembers():
    norm = m.Norm(2)
    norm(torch.rand(5, 2, 3, 3, generator=g()))
    x = torch.rand(1, 2, 1, 1, generator=g(1))
    assert torch.equal(norm(x), norm.eval()(x)) and norm.train()(x[:0]).shape == (0, 2, 1, 1)

def test_start_follows_from_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (torch.cat([p.flatten() for p in m.OFA({'a': (4, 8, 8), 'b': (8, 4, 4)}, 3, generator=g(n)).parameters()]) for n in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())

def test_gammas_stage_by_stage():
    gammas, features, z, t, y = (1., 2., 3.), {'a': torch.rand(4, 1, 2, 2, generator=g()), 'b': torch.rand(4, 2, 1, 1, generator=g())}, randn(4, 3).float(), randn(4, 3, seed=1).float(), torch.tensor([0, 1, 2, 0])
    objective = m.OFA(TINY['maps'][0], 3, 2, gammas, generator=g(1)).eval()
    found, exits = objective(Forward(None, z, features), {'teacher': Forward(None, t)}, {'labels': y}, NOW), list(objective.exits(features).values())
    assert found['head'] == m.ofa_loss(z, t, y, 3.)
    torch.testing.assert_close(found['exits'], m.ofa_loss(exits[0], t, y, 1.) + m.ofa_loss(exits[1], t, y, 2.))

@pytest.mark.parametrize('build', [lambda: m.OFA({}, 3), lambda: m.OFA({'a': (4, 8)}, 3, gammas=[1.]), lambda: m.OFA({'a': (5, 8)}, 3), lambda: m.OFA({'a': (4, 8)}, 3, heads=3), lambda: m.OFA({'a': (8,)}, 3),
                                   lambda: m.OFA({'a': (1, 8)}, 3, extra=1), lambda: m.recipe('fitnes', {}, m.learner(16), m.learner(16))])
def test_what_does_not_fit(build):
    with pytest.raises(InputError): build()

def test_a_tap_with_a_part():
    net = nn.Sequential()
    class Twice(nn.Module):
        def forward(self, x): return x, x + 1
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.head = Twice(), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.twice(x)[1].mean(1))
    net = Net()
    objective = m.OFA({Tap('twice', select=1): (4, 8)}, 3, generator=g())
    data = torch.rand(8, 4, 8, generator=g()), torch.randint(3, (8,), generator=g())
    train(Distillation(net, {'teacher': Teacher(lambda batch: batch['inputs'].mean(1)[:, :3])}, {'ofa': objective}, loader=Batches(data, 4), steps=2, example=data))


# Training and the study

def test_exits_train_and_without_them_the_loss_is_kd():
    data = fashion_mnist('train').first(40)
    def run(objectives, weights=None):
        student = m.learner(16)
        train(Distillation(student, {'teacher': Teacher(embedded('mixer'))}, {'labels': CrossEntropy()} | objectives, weights, loader=Batches((data.images, data.labels), 20), steps=4,
                           optimizer=lambda p: torch.optim.SGD(p, lr=.05)), seed=0)  # Adam would divide rounding by itself
        return torch.cat([p.detach().flatten() for p in student.parameters()])
    kd, head = run({'kd': SoftTargets(1.)}), run({'head': m.Head(1.)})
    torch.testing.assert_close(kd, head, atol=1e-5, rtol=1e-4)
    exits = m.ofa(m.learner(16), embedded('mixer'), limit=2, generator=g())
    before = [p.clone() for p in exits.parameters()]
    with_exits = run({'ofa': exits})
    assert not torch.allclose(with_exits, head) and all(not torch.equal(a, b) for a, b in zip(before, exits.parameters(), strict=True))

def test_deep_supervision_is_cross_entropy():
    "Under the control's teacher both terms are cross-entropy with the labels."
    y, z = torch.tensor([0, 3, 7, 9]), randn(4, 10)
    hard = m.smoothed(1e-6)({'labels': y}).double()
    assert m.ofa_loss(z, hard, y).item() == pytest.approx(nn.functional.cross_entropy(z, y).item(), abs=1e-4)

@pytest.mark.parametrize('arm', m.OWN)
def test_run_arm(arm):
    found = m.run_arm(arm, m.study.configs(arm)[0], 0, 'smoke')
    assert all(math.isfinite(v) for v in found.values()) and 0 <= found['test'] <= 1
    assert (found['extra'] > 0) == (arm in ('fitnet', 'deep', 'ofa', 'ofa_paper'))

def test_runs_repeat_and_tries_are_equal():
    config = m.study.configs('ofa')[1]
    a, b = ({k: v for k, v in m.run_arm('ofa', config, 1, 'smoke').items() if k != 'seconds_a_step'} for _ in range(2))
    assert a == b and len({len(m.study.configs(arm)) for arm in m.study.arms}) == 1
