"""Losses of relations: values by hand, what each is blind to, gradients that stay numbers where images are equal, and twins that the suite finds."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import Tap
from lowrank_distill.distillation import relations
from lowrank_distill.distillation.relations import (
    CC, PKT, RKD, SP, WEIGHTS, alike, cc_pairs, cc_rbf, cosines, directions, distances, pkt, recipe, relation, rkd_angle,
    rkd_distance, run_arm, sp, study)
from lowrank_distill.shapes import conform_objective as conform
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, Teacher
from lowrank_distill.shapes.procedure import Batches
from lowrank_distill.shapes.train import train

LOSSES = {'rkd_distance': rkd_distance, 'rkd_angle': rkd_angle, 'sp': sp, 'pkt': pkt, 'cc_rbf': cc_rbf, 'cc_pairs': cc_pairs}
PROJECTIVE = [k for k in LOSSES if k != 'cc_pairs']  # those that compare tables, not features
every, tables = (pytest.mark.parametrize('name', names) for names in (LOSSES, PROJECTIVE))

def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def gradient(loss, x, t):
    x = x.clone().requires_grad_()
    value = loss(x, t)
    return value.item(), torch.autograd.grad(value, x)[0]


# Values

def test_by_hand():
    triangle, line = torch.tensor([[0., 0], [3, 0], [0, 4]]).double(), torch.tensor([[0.], [1], [2]]).double()
    assert rkd_distance(line, triangle).item() == pytest.approx(.5 / 9, abs=1e-14)
    assert rkd_angle(line, triangle).item() == pytest.approx(2 * 1.62 / 27, abs=1e-12)
    one, two = torch.ones(2, 1).double(), torch.eye(2).double()
    assert sp(one, two).item() == pytest.approx(1 - .5 ** .5, abs=1e-14)
    assert pkt(one, two, eps=0.).item() == pytest.approx((2 / 3 * math.log(4 / 3) + math.log(2 / 3) / 3) / 2, abs=1e-14)
    assert cc_rbf(one, two).item() == pytest.approx(.5 * (math.exp(-.8) * 1.12) ** 2, abs=1e-14)
    assert cc_pairs(torch.tensor([[1., 2], [3, 0], [1, 1]]), torch.zeros(3, 2)).item() == (3 + 3) / 2

def test_equals_the_library_where_nothing_is_zero():
    "The lines of RepDistiller's losses, written out, on features without equal images."
    s, t = drawn(9, 6), drawn(9, 4, seed=1)
    def pdist(e):
        squares = e.pow(2).sum(1)
        d = (squares[:, None] + squares - 2 * e @ e.T).clamp(min=1e-12).sqrt().fill_diagonal_(0)
        return d / d[d > 0].mean()
    def angles(e):
        sides = F.normalize(e[None] - e[:, None], dim=2)
        return sides @ sides.mT
    def likeness(e):
        c = F.normalize(e) @ F.normalize(e).T / 2 + .5
        return c / c.sum(1, keepdim=True)
    assert rkd_distance(s, t).item() == pytest.approx(F.smooth_l1_loss(pdist(s), pdist(t)).item(), abs=1e-10)
    assert rkd_angle(s, t).item() == pytest.approx(F.smooth_l1_loss(angles(s), angles(t)).item(), abs=1e-12)
    assert sp(s, t).item() == pytest.approx((F.normalize(s @ s.T) - F.normalize(t @ t.T)).square().mean().item(), abs=1e-12)
    p, q = likeness(t), likeness(s)
    assert pkt(s, t).item() == pytest.approx((p * ((p + 1e-7) / (q + 1e-7)).log()).mean().item(), abs=1e-12)

def test_series_tends_to_the_kernel():
    u = directions(drawn(7, 5))
    exact = torch.exp(-.4 * torch.cdist(u, u) ** 2)
    errors = [(relations.kernel(u, order=k) - exact).abs().max().item() for k in (0, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[1]

def test_maps_count_as_vectors():
    s, t = drawn(5, 3, 2, 2), drawn(5, 4, 1, 3, seed=1)
    for name in PROJECTIVE: assert torch.equal(LOSSES[name](s, t), LOSSES[name](s.flatten(1), t.flatten(1)))


# What is promised

@every
def test_nothing_where_equal(name):
    t = drawn(8, 5)
    value, grad = gradient(LOSSES[name], t, t)
    assert abs(value) < 1e-12 and grad.abs().max() < 1e-7 and LOSSES[name](drawn(8, 5, seed=3), t) > 1e-4

BLIND = {'rotated': set(PROJECTIVE), 'scaled': set(PROJECTIVE), 'shifted': {'rkd_distance', 'rkd_angle'}, 'lengths': {'pkt', 'cc_rbf'}}

@every
@pytest.mark.parametrize('what', BLIND)
def test_invariance(name, what):
    s, t = drawn(8, 5), drawn(8, 5, seed=1)
    turn, lengths = torch.linalg.qr(drawn(5, 5, seed=2)).Q, drawn(8, 1, seed=3).abs() + .1
    moved = {'rotated': s @ turn, 'scaled': 7 * s, 'shifted': s + drawn(5, seed=4), 'lengths': s * lengths}[what]
    change = (LOSSES[name](moved, t) - LOSSES[name](s, t)).abs()
    assert (change < 1e-12) == (name in BLIND[what]) and (name in BLIND[what] or change > 1e-6)

@every
def test_gradient_is_that_of_the_value(name):
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, drawn(6, 5, seed=1)), (drawn(6, 5).requires_grad_(),))

@pytest.mark.parametrize('chunk', [1, 3, 9, 50])
def test_chunks_change_nothing(chunk):
    s, t = drawn(9, 6), drawn(9, 4, seed=1)
    (whole, grad), (parts, other) = gradient(rkd_angle, s, t), gradient(lambda a, b: rkd_angle(a, b, chunk), s, t)
    assert parts == pytest.approx(whole, abs=1e-15) and torch.allclose(grad, other, atol=1e-16, rtol=1e-12)


# Equal images, no images, huge ones

@every
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_hostile_batches_are_finite(name, dtype):
    for n in (0, 1, 2, 5):
        for kind in ('random', 'equal', 'zeros', 'one zero', 'copies', 'huge', 'tiny'): check_hostile(name, n, kind, dtype)

def check_hostile(name, n, kind, dtype):
    scale = {'huge': 1e30, 'tiny': 1e-30} if dtype in (torch.float32, torch.float64) and name != 'cc_pairs' else {'huge': 1e3, 'tiny': 1e-3}
    x = drawn(n, 9)
    x = {'random': x, 'equal': x[:1].expand(n, 9), 'zeros': 0 * x, 'one zero': x * (torch.arange(n) > 0)[:, None],
         'copies': x[torch.arange(n) // 2], 'huge': scale.get('huge') * x, 'tiny': scale.get('tiny') * x}[kind].to(dtype)
    value, grad = gradient(LOSSES[name], x, drawn(n, 9, seed=1, dtype=dtype))
    assert math.isfinite(value) and grad.isfinite().all() and value >= -1e-6, (n, kind)

@pytest.mark.parametrize('name', ['rkd_distance', 'rkd_angle', 'sp', 'cc_rbf', 'pkt'])
def test_two_equal_images_or_a_dead_one_do_not_explode(name):
    "Where the obvious code has gradients of 1e8 and more."
    s, t = drawn(8, 20, dtype=torch.float32), drawn(8, 10, seed=1, dtype=torch.float32)
    usual = gradient(LOSSES[name], s, t)[1].abs().max()
    for x in (torch.cat([s[:1], s[:7]]), s * (torch.arange(8) > 0)[:, None]):
        assert gradient(LOSSES[name], x, t)[1].abs().max() < 10 * usual

def test_the_obvious_codes_do_fail():
    x, t = torch.cat([drawn(1, 5), drawn(3, 5)]), drawn(4, 5, seed=1)
    assert gradient(lambda a, b: F.mse_loss((a[:, None] - a).square().sum(2).sqrt(), torch.cdist(b, b)), x, t)[1].isnan().all()
    def angles(e):
        sides = F.normalize(e[None] - e[:, None], dim=2)
        return sides @ sides.mT
    assert gradient(lambda a, b: F.smooth_l1_loss(angles(a), angles(b)), x, t)[1].abs().max() > 1e6

def test_distances_far_from_the_origin():
    x = drawn(20, 30, dtype=torch.float32)
    torch.testing.assert_close(distances(x + 1000), distances(x), atol=1e-4, rtol=1e-3)
    assert (cosines(x, x[:3])[1, 1] == 0).all() and distances(x).diagonal().abs().max() == 0


# Objectives

MAKES = {'rkd': lambda: RKD('s', 't'), 'rkd in chunks': lambda: RKD('s', 't', chunk=2), 'sp': lambda: SP('s', 't'), 'pkt': lambda: PKT('s', 't'), 'cc, rbf': lambda: CC('s', 't', 'rbf')}
TERMS = {'rkd': ['distance', 'angle'], 'sp': ['similarity'], 'pkt': ['probability'], 'cc': ['correlation']}

@pytest.mark.parametrize('name', MAKES)
def test_suite(name):
    key = name.split(' ')[0].strip(',')
    assert set(conform.objective(MAKES[name], shapes={'s': (5,), 't': (3,)}).values()) == {'finite'}
    conform.objective(MAKES[name], shapes={'s': (5,), 't': (5,)}, zero_terms=TERMS[key])

def test_suite_with_embeddings():
    make = lambda: CC('s', 't', widths=(5, 3), dim=4, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert set(conform.objective(make, shapes={'s': (5,), 't': (3,)}).values()) == {'finite'}
    assert [tuple(p.shape) for p in make().parameters()] == [(4, 5), (4,), (4, 3), (4,)]
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), make().parameters(), strict=True))

def test_suite_finds_wrong_twins():
    class Root(RKD):
        def compare(self, student, teacher):
            d = [(x[:, None] - x).square().sum(2).sqrt() for x in (student, teacher)]
            return {'distance': F.smooth_l1_loss(*d)}
    class OverBatch(PKT):
        def compare(self, student, teacher): return {'probability': len(student) * pkt(student, teacher)}
    with pytest.raises(AssertionError): conform.objective(lambda: Root('s', 't'), shapes={'s': (5,), 't': (5,)})
    def naive(seen): return {'probability': pkt(seen.student.features['s'].double(), seen.teachers['teacher'].features['t'].double()).item()}
    conform.objective(lambda: PKT('s', 't'), naive=naive)
    with pytest.raises(AssertionError, match='plain loop'): conform.objective(lambda: OverBatch('s', 't'), naive=naive)

def net(width, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

def test_training_brings_distances_nearer():
    student, teacher, x = net(16, 1), net(32), drawn(64, 4, dtype=torch.float32)
    y, vector = torch.randint(3, (64,), generator=torch.Generator().manual_seed(0)), Tap('2', side='input')
    def last(model): return model[1](model[0](x)).detach()
    before = alike(last(student), last(teacher))
    both = {'labels': CrossEntropy(), 'rkd': RKD(vector, vector), 'cc': CC(vector, vector, widths=(16, 32), dim=8, generator=torch.Generator().manual_seed(0))}
    made = Distillation(student, {'teacher': Teacher(teacher)}, both, {'labels': .1, 'cc': .02}, loader=Batches((x, y), 16), steps=150,
                        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), example=(x[:4], y[:4]))
    learned = [p.clone() for p in both['cc'].parameters()]
    train(made, seed=0)
    assert alike(last(student), last(teacher)) > max(.9, before)
    assert any(not torch.equal(a, b) for a, b in zip(learned, both['cc'].parameters(), strict=True))

@pytest.mark.parametrize(('wrong', 'said'), [
    (lambda: sp(torch.ones(3), torch.ones(3)), r'\(batch, \.\.\.\)'), (lambda: pkt(torch.ones(3, 2), torch.ones(4, 2)), 'not the same images'),
    (lambda: cc_pairs(torch.ones(3, 2), torch.ones(3, 4)), 'shapes differ'), (lambda: rkd_angle(torch.ones(3, 2), torch.ones(3, 2), 0), 'chunk'),
    (lambda: CC('s', 't', 'pears'), 'pairs'), (lambda: relation('pkd'), 'pkt'), (lambda: recipe('rdk', {'times': 1.}, 0), 'rkd')])
def test_bad_input_is_said(wrong, said):
    with pytest.raises(InputError, match=said): wrong()


# Study

def test_study_is_declared():
    assert sum(c.primary for c in study.claims) == 1 and {*study.arms} == {'labels', 'kd', *WEIGHTS}
    assert len({len(study.configs(arm)) for arm in study.arms}) == 1

@pytest.mark.parametrize('arm', study.arms)
def test_every_arm_runs(arm):
    found = run_arm(arm, study.configs(arm)[0], 0, 'smoke')
    assert all(map(math.isfinite, found.values())) and 0 <= found['test'] <= 1 and -1 <= found['alike'] <= 1

def test_an_arm_repeats():
    first, second = (run_arm('cc', study.configs('cc')[0], 3, 'smoke') for _ in range(2))
    assert {k: v for k, v in first.items() if 'seconds' not in k} == {k: v for k, v in second.items() if 'seconds' not in k}
