"""CRD: the suites hold, the loss is that of plain loops, banks remember what they should and nothing else, wrong twins are found."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import Tap
from lowrank_distill.distillation.contrastive import MODES, CRD, draw, embed, nce, normaliser, refreshed, study
from lowrank_distill.distillation.features import Pair
from lowrank_distill.shapes import conform_objective, conform_procedure
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, Forward, Teacher
from lowrank_distill.shapes.procedure import Batches, Progress
from lowrank_distill.shapes.train import train

AT, N = Progress(0, 10, 'distil', 0, 10), 12
PAIR, SHAPES = Pair('a', 'b', (5,), (7,)), {'a': (5,), 'b': (7,)}

def case(rows, labels, seed=0, dtype=torch.float32):
    "Passes and batch for some rows."
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(len(rows), n, generator=g, dtype=torch.float64).to(dtype) for n in (5, 7))
    return Forward(None, None, {'a': a}), {'teacher': Forward(None, None, {'b': b})}, {'index': torch.tensor(rows), 'labels': torch.tensor(labels)}, AT

def make(kind=CRD, **options): return kind(PAIR, N, **dict(size=6, negatives=4) | options)

def warmed(kind=CRD, **options):
    "One that has seen rows 6 to 11, and so has its Z."
    made = make(kind, **options)
    made(*case(range(6, 12), [0, 1, 2, 0, 1, 2], seed=1))
    return made

def naive(mode):
    "Terms by loops over images and rows, with the exponentials of the official formula."
    def one(v, row, bank, log_z, k):
        h = [math.exp(sum(x * y for x, y in zip(v, bank[r].tolist(), strict=True)) / .07 - log_z) for r in row]
        return -math.log(h[0] / (h[0] + k / N + 1e-7)) - sum(math.log(k / N / (x + k / N + 1e-7)) for x in h[1:])
    def loss(seen):
        o, rows, labels = warmed(mode=mode).double(), seen.batch['index'], seen.batch['labels']
        picked = o.pick(rows, labels, o.classes.index_copy(0, rows, labels)).tolist()
        passes = {'student': (seen.student.features['a'], o.student_map, o.teacher_bank), 'teacher': (seen.teachers['teacher'].features['b'], o.teacher_map, o.student_bank)}
        found = {}
        for (name, (f, m, bank)), log_z in zip(passes.items(), o.log_z.tolist(), strict=True):
            v = [m.weight @ x + m.bias for x in f]
            found[name] = sum(one((x / x.norm()).tolist(), row, bank, log_z, 4) for x, row in zip(v, picked, strict=True)) / len(f)
        return found
    return loss

@pytest.mark.parametrize('mode', MODES)
def test_suite(mode):
    did = conform_objective.objective(lambda: warmed(mode=mode), shapes=SHAPES, naive=naive(mode), temperature=lambda T: warmed(mode=mode, tau=T))
    assert set(did.values()) == {'finite'}

def test_naive_finds_another_tau():
    with pytest.raises(AssertionError, match='the plain loop says'): conform_objective.equals(warmed(tau=.08), conform_objective.classification(make(), SHAPES), naive('exact'))

def test_by_hand():
    h = torch.tensor([[3 / 2, 1 / 2, 1 / 6]], dtype=torch.float64)
    assert abs(nce(h.log(), 0., 4, 1.).item() + 2 * math.log(3 / 4) + math.log(1 / 2)) < 1e-6
    assert abs(normaliser(h.log(), 4, 1.).exp().item() - 4 * h.mean().item()) < 1e-12
    assert nce(h[:0], 0., 4).item() == 0

@pytest.mark.parametrize('shape', [(3, 1), (3,), (3, 0)])
def test_no_negatives(shape):
    with pytest.raises(InputError, match='at least one negative'): nce(torch.zeros(shape), 0., 4)

def test_momentum_by_hand_and_no_gradient():
    bank, v = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[0., 1.]], requires_grad=True)
    moved = refreshed(bank, torch.tensor([0]), v)
    torch.testing.assert_close(moved, torch.tensor([[.5 ** .5, .5 ** .5], [0., 1.]]))
    assert not moved.requires_grad and bank[0, 0] == 1
    torch.testing.assert_close(refreshed(bank, torch.tensor([0]), v, .75)[0], F.normalize(torch.tensor([.75, .25]), dim=0))

def test_banks_by_sample():
    "Exactly the rows of the batch move, to half way between the row and the vector; the loss reads the rows before."
    crd, (s, t, batch, at) = make(), case([3, 0], [1, 0])
    before = {k: v.clone() for k, v in crd.state_dict().items()}
    crd(s, t, batch, at)
    for name, f, m in (('student_bank', s.features['a'], crd.student_map), ('teacher_bank', t['teacher'].features['b'], crd.teacher_map)):
        expected = before[name].clone()
        expected[[3, 0]] = F.normalize(.5 * before[name][[3, 0]] + .5 * embed(f, m), dim=1).detach()
        torch.testing.assert_close(getattr(crd, name), expected)
    assert crd.classes.tolist() == [0, -1, -1, 1, *[-1] * 8]

def test_gradients():
    "The student's term reaches its features and map, the teacher's term the other map; banks reach nothing."
    crd, (s, t, batch, at) = warmed(), case([0, 1, 2], [0, 1, 2])
    s.features['a'].requires_grad_()
    terms = crd(s, t, batch, at)
    reached = [[g is not None for g in torch.autograd.grad(terms[k], [s.features['a'], crd.student_map.weight, crd.teacher_map.weight], allow_unused=True)] for k in ('student', 'teacher')]
    assert reached == [[True, True, False], [False, False, True]]
    assert not any(b.requires_grad for b in crd.buffers())

def test_z_is_set_once():
    crd = make()
    crd(*case([0, 1], [0, 1]))
    z = crd.log_z.clone()
    crd(*case([2, 3], [0, 1], seed=5))
    assert crd.z_is_set and torch.equal(z, crd.log_z) and (z != 0).all()

def test_z_of_the_first_batch():
    crd, given = make(), case([0, 1], [0, 1])
    twin = copy.deepcopy(crd)
    picked = twin.pick(given[2]['index'], given[2]['labels'], twin.classes.index_copy(0, given[2]['index'], given[2]['labels']))
    cosines = [(embed(f, m) @ bank.T).gather(1, picked) for f, m, bank in ((given[0].features['a'], twin.student_map, twin.teacher_bank), (given[1]['teacher'].features['b'], twin.teacher_map, twin.student_bank))]
    crd(*given)
    torch.testing.assert_close(crd.log_z.exp(), torch.stack([N * (c / .07).exp().mean() for c in cosines]).detach())

@pytest.mark.parametrize('still', ['no_grad', 'eval'])
def test_a_look_changes_nothing(still):
    crd = make().train(still != 'eval')
    before, drawn = {k: v.clone() for k, v in crd.state_dict().items()}, crd.generator.get_state()
    with torch.set_grad_enabled(still != 'no_grad'): first, again = (crd(*case([0, 1], [0, 1])) for _ in range(2))
    assert all(torch.equal(v, before[k]) for k, v in crd.state_dict().items()) and torch.equal(crd.generator.get_state(), drawn)
    assert all(torch.equal(first[k], again[k]) for k in first)

def test_draws():
    g, kinds = torch.Generator().manual_seed(0), torch.tensor([0, 0, 1, 1, 2, 2])
    allowed = kinds != kinds[[0, 2], None]
    assert [sorted(r) for r in draw(allowed, 4, g).tolist()] == [[2, 3, 4, 5], [0, 1, 4, 5]]
    assert all(set(r) <= {2, 3, 4, 5} for r in draw(allowed[:1], 50, g).tolist()) and draw(allowed[:0], 3, g).shape == (0, 3)
    with pytest.raises(InputError, match='nothing to draw from'): draw(torch.zeros(1, 4, dtype=torch.bool), 2, g)

@pytest.mark.parametrize('mode', MODES)
def test_positives_are_no_negatives(mode):
    crd, labels = make(mode=mode, negatives=8), torch.arange(N) % 3
    for _ in range(20):
        rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:6]
        picked = crd.pick(rows, labels[rows], labels)
        assert (picked[:, 1:] != rows[:, None]).all()
        assert mode == 'instances' or (labels[picked[:, 1:]] != labels[rows, None]).all()
        assert (labels[picked[:, 0]] == labels[rows]).all() if mode == 'relax' else torch.equal(picked[:, 0], rows)
    others = {tuple(crd.pick(rows, labels[rows], labels)[:, 0].tolist()) for _ in range(10)}
    assert (len(others) > 1) == (mode == 'relax')

def test_state_dict_holds_everything():
    first, second = warmed(), make(seed=7)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for seed in (3, 4):
        given = case([0, 1, 2], [0, 1, 2], seed)
        assert all(torch.equal(a, b) for a, b in zip(first(*given).values(), second(*given).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))

def test_seeds():
    assert torch.equal(make(seed=1).student_bank, make(seed=1).student_bank) and not torch.equal(make(seed=1).student_bank, make(seed=2).student_bank)
    assert not torch.equal(make().student_bank, make().teacher_bank)
    torch.testing.assert_close(make().student_bank.norm(dim=1), torch.ones(N))


# Within a distillation

def layers(width):
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3

def distillation(mode='exact', kind=CRD, steps=12, **options):
    crd = kind(Pair('1', Tap('1'), (5,), (9,)), 24, size=4, mode=mode, **dict(negatives=7) | options)
    return Distillation(layers(5), {'teacher': Teacher(layers(9))}, {'labels': CrossEntropy(), 'crd': crd}, {'crd': .8}, loader=Batches((X, Y, torch.arange(24)), 6), steps=steps,
                        example=(X[:4], Y[:4], torch.arange(4)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))

@pytest.mark.parametrize('mode', MODES)
def test_resume(mode): conform_procedure.procedure(lambda: distillation(mode), tries=3)

class Forgetful(CRD):
    "Its generator is no attribute, and its state is not kept."
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.hidden = [self.generator]
        del self.generator

    def __getattr__(self, name): return self.__dict__['hidden'][0] if name == 'generator' else super().__getattr__(name)
    def get_extra_state(self): return torch.zeros(1)
    def set_extra_state(self, state): return

def test_a_hidden_generator_is_found():
    with pytest.raises(AssertionError, match='resumed'): conform_procedure.resumes(lambda: distillation(kind=Forgetful), tries=3)
    with pytest.raises(AssertionError, match='no buffer'): conform_objective.remembers(lambda: warmed(Forgetful), conform_objective.classification(make(), SHAPES))

def test_building_changes_no_bank():
    fresh = CRD(Pair('1', '1', (5,), (9,)), 24, size=4, negatives=7)
    built = distillation().objectives['crd']
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert list(distillation().generators()) == ['objectives.crd.generator']

class ByPlace(CRD):
    def forward(self, student, teachers, batch, at): return super().forward(student, teachers, {**batch, 'index': torch.arange(len(batch['index']))}, at)

def own_is_nearest(kind):
    "How often a student's row of the banks' order is nearest to its own teacher's row, after training."
    made = distillation('instances', kind, steps=400, tau=.2)
    train(made, seed=0)
    crd, x = made.objectives['crd'], made.student[1](made.student[0](X))
    t = made.teachers['teacher'].source
    return ((embed(x, crd.student_map) @ embed(t[1](t[0](X)), crd.teacher_map).T).argmax(1) == torch.arange(24)).float().mean().item()

def test_rows_by_place_learn_nothing():
    right, twin = own_is_nearest(CRD), own_is_nearest(ByPlace)
    assert right > .5 > .25 > twin, (right, twin)


# What does not fit

@pytest.mark.parametrize(('batch', 'said'), [
    ({'labels': torch.zeros(2, dtype=torch.long)}, "no 'index'"), ({'index': torch.tensor([0, 1])}, "no 'labels'"),
    ({'index': torch.tensor([0, 12]), 'labels': torch.zeros(2, dtype=torch.long)}, 'beyond the banks'), ({'index': torch.tensor([-1, 1]), 'labels': torch.zeros(2, dtype=torch.long)}, 'beyond the banks'),
    ({'index': torch.tensor([0., 1.]), 'labels': torch.zeros(2, dtype=torch.long)}, 'whole numbers'), ({'index': torch.tensor([0]), 'labels': torch.zeros(2, dtype=torch.long)}, r'expected: \(2,\)'),
    ({'index': torch.tensor([0, 1]), 'labels': torch.tensor([-100, 1])}, 'without a label')])
def test_batches(batch, said):
    s, t, _, at = case([0, 1], [0, 1])
    with pytest.raises(InputError, match=said): make()(s, t, batch, at)

def test_instances_need_no_labels():
    s, t, _, at = case([0, 1], [0, 1])
    crd = make(mode='instances')
    assert crd.needs.batch == {'index'} and all(v.isfinite() for v in crd(s, t, {'index': torch.tensor([0, 1])}, at).values())

@pytest.mark.parametrize('options', [dict(tau=0.), dict(momentum=1.), dict(mode='exakt'), dict(negatives=0), dict(size=0), dict(negatives=2.5)])
def test_settings(options):
    with pytest.raises(InputError): make(**options)

def test_features_and_shapes():
    with pytest.raises(InputError, match='no shapes'): CRD(Pair('a', 'b'), N)
    s, t, batch, at = case([0, 1], [0, 1])
    with pytest.raises(InputError, match='another length'): make()(Forward(None, None, {'a': torch.zeros(2, 4)}), t, batch, at)
    maps = CRD(Pair('a', 'b', (5, 1, 1), (7,)), N, size=6, negatives=4)
    flat, mapped = make()(s, t, batch, at), maps(Forward(None, None, {'a': s.features['a'][:, :, None, None]}), t, batch, at)
    assert all(torch.equal(flat[k], mapped[k]) for k in flat)

def test_smoke():
    for arm, space in study.space.items():
        found = study.run(arm, {k: v[0] for k, v in space.items()}, 0, 'smoke', 'cpu')
        assert all(math.isfinite(v) for v in found.values()) and 0 <= found['neighbours'] <= 1
