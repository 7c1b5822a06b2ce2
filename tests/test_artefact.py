"""Small data sets: views that replay, targets that mix, a folder that is whole or not there, a judge that cannot be flattered, trajectories."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_distill.core.errors import DamagedFile, InputError, RunFailed
from lowrank_distill.core.files import fingerprint, read_json, save_tensors, write_json
from lowrank_distill.core.streams import Streams
from lowrank_distill.data.images import Labelled, digits
from lowrank_distill.models.small import MLP, accuracy, pretrained
from lowrank_distill.shapes import artefact as module, evaluation
from lowrank_distill.shapes import conform_artefact as conform
from lowrank_distill.shapes import conform_procedure
from lowrank_distill.shapes.artefact import (
    OPS, DataArtefact, Decoder, Generated, Hard, Known, Labeller, Normalisation, Pixels, ReplayTransform, Soft,
    Stored, Subset, Vector, bilinear, densify, drawn, exact_pixels, label_views, mark, mix64, sign, standardise,
    subset, zca)
from lowrank_distill.shapes.evaluation import Lesson, Protocol, arms, as_logits, evaluate, random_subset, score
from lowrank_distill.shapes.objective import Teacher
from lowrank_distill.shapes.procedure import Progress
from lowrank_distill.shapes.train import train
from lowrank_distill.shapes.trajectories import Trajectories, flat, layout, unflat

REAL, TEST = digits('train'), digits('test')
ROWS = torch.arange(30)

def generator(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)

def network(g: torch.Generator) -> nn.Module: return MLP((64, 16, 10), g)

def protocol(**options) -> Protocol:
    given = dict(test=TEST, real=REAL, steps=8, batch=10, optimizer='adamw', lr=3e-3)
    return Protocol(**(given | options))

def plain(**options) -> DataArtefact:
    given = dict(images=exact_pixels(REAL.images[ROWS]), targets=Hard(REAL.labels[ROWS], 10), recipe=dict(method='plain'))
    return DataArtefact(**(given | options))

def soft(**options) -> DataArtefact:
    logits = torch.randn(30, 10, generator=generator())
    return plain(targets=Soft(logits, 'logits', REAL.labels[ROWS]), **options)

def stored(count: int = 4, top: int | None = 3, **options) -> DataArtefact:
    views = ReplayTransform((('shift', dict(pixels=1)), ('rotate', {})), seed=3, count=count)
    return label_views(plain(**options), Teacher(pretrained('digits')), views, top=top)


# The suite, on every kind of part

DATA = conform.ordinary(6)
HALF = DATA.images.half()
KNOWN = Known(data={'given': DATA}, models={'net': lambda parts: lambda x: (x.flatten(1).double() @ parts['w'].double()).float()})
LOGITS = torch.randn(6, 4, 3, generator=generator(1))
IMAGES = {
    'half': Pixels(HALF), 'bytes': Pixels((DATA.images.clamp(0, 1) * 255).to(torch.uint8)),
    'subset': Subset(torch.arange(6), 'given', mark(DATA)),
    'basis': Generated(dict(coefficients=torch.randn(6, 2, generator=generator()), basis=DATA.images[:2], mean=DATA.images[0]), 'basis'),
    'enlarge': Generated(dict(small=HALF[..., :4, :4]), 'enlarge', dict(factor=2)),
    'extremes': Pixels(torch.tensor([65504., -65504., 6e-8, 6e-5, 0., -0., 1., -1.]).half().repeat(48).view(6, 1, 8, 8))}
TARGETS = {
    'hard': Hard(DATA.labels, 3), 'logits': Soft(LOGITS[:, 0].half(), 'logits', DATA.labels),
    'probabilities': Soft(LOGITS[:, 0].softmax(1).half(), 'probabilities'), 'vector': Vector(LOGITS[:, 0]),
    'stored': Stored(LOGITS, 'logits', 3), 'labeller': Labeller('net', 3, parts=dict(w=torch.ones(64, 3))),
    'some': Stored(LOGITS.softmax(2), 'probabilities', 3, views=torch.tensor([[2, 0, -1, -1]]).repeat(6, 1), labels=DATA.labels),
    'largest': Stored(LOGITS.softmax(2).topk(2)[0].half(), 'probabilities', 3, 'smooth', LOGITS.topk(2)[1].to(torch.uint8))}
VIEWS = ReplayTransform((('crop', dict(scale=[.3, 1.])), ('light', {}), ('mixup', dict(alpha=.4))), 5, 4)
TABLE = ReplayTransform((('shift', {}),), 0, 4, torch.rand(6, 4, 2, generator=generator()))
WHITE = zca(DATA, applied=False)

@pytest.mark.parametrize('kind', IMAGES)
def test_images_keep_every_promise(kind):
    for promise in conform.PROMISES: promise(DataArtefact(IMAGES[kind], TARGETS['hard'], TABLE, None, .1, dict(method='x', depth=[1, 2]), KNOWN))

@pytest.mark.parametrize('kind', TARGETS)
def test_targets_keep_every_promise(kind):
    for views, normal in ((VIEWS, None), (TABLE, WHITE)):
        for promise in conform.PROMISES: promise(DataArtefact(IMAGES['half'], TARGETS[kind], views, normal, known=KNOWN))

def test_hostile_data():
    def make(data): return DataArtefact(Pixels(data.images.half().clamp(-6e4, 6e4)), Hard(data.labels, len(data.classes)), VIEWS, standardise(data))
    conform.artefact(make, refuses=False)
    def refuses(data):
        if len(data) < 12: raise InputError('too few')
        return make(data)
    conform.artefact(refuses)
    with pytest.raises(AssertionError, match='refused'): conform.artefact(refuses, refuses=False)


# Views

def test_the_numbers_are_splitmix64():
    seeds = np.array([1234567], np.uint64) + np.arange(1, 4, dtype=np.uint64) * np.uint64(module.GAMMA)
    assert mix64(seeds).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]

def test_the_numbers_never_change():
    "Labels on somebody's disk belong to these numbers: the page's formula, in whole numbers of any size."
    def whole(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    def number(seed, image, view, k):
        s = whole((seed + module.GAMMA) % 2**64)
        for part in (image, view): s = whole((s + part + module.GAMMA) % 2**64)
        return (whole((s + k * module.GAMMA) % 2**64) >> 40) / 2**24
    for seed, image, view in ((0, 0, 0), (7, 12, 3), (2**62, 2**40, 2**31)):
        found = drawn(seed, torch.tensor([image]), torch.tensor([view]), 3)[0].tolist()
        assert found == [number(seed, image, view, k) for k in (1, 2, 3)]

def test_the_numbers_are_spread_evenly():
    "Over images, over views and over draws: means, neighbours uncorrelated, no two views alike."
    for rows, views in ((torch.arange(20000), torch.zeros(20000)), (torch.zeros(20000), torch.arange(20000))):
        u = drawn(7, rows.long(), views.long(), 3)
        assert (u.mean(0) - .5).abs().max() < .01 and (u.var(0) - 1 / 12).abs().max() < .003
        c = torch.corrcoef(torch.cat([u[:-1], u[1:]], 1).T) - torch.eye(6)
        assert c.abs().max() < .03 and len(u[:, 0].unique()) > 19900 and u.min() >= 0 and u.max() < 1
    assert not torch.equal(drawn(0, torch.tensor([1]), torch.tensor([2]), 2), drawn(0, torch.tensor([2]), torch.tensor([1]), 2))
    assert not torch.equal(drawn(0, torch.tensor([1]), torch.tensor([2]), 2), drawn(1, torch.tensor([1]), torch.tensor([2]), 2))

def step(name: str, images: torch.Tensor, u: list[float], **options): return OPS[name].apply(images, torch.tensor([u] * len(images)), **options)

def test_steps_of_a_view():
    x = torch.rand(3, 2, 6, 6, generator=generator())
    assert torch.equal(step('flip', x, [.4]), x.flip(-1)) and torch.equal(step('flip', x, [.6]), x)
    moved = step('shift', x, [.99, .01], pixels=2)  # two down, two left
    assert torch.equal(moved[..., 2:, :4], x[..., :4, 2:]) and not moved[..., :2, :].any() and not moved[..., 4:].any()
    assert torch.equal(step('crop', x, [.3, .5, .2, .9], scale=[1, 1], ratio=[1, 1]), x)
    quarter = step('crop', x, [0., .5, .999, 0.], scale=[.25, 1], ratio=[1, 1])  # lower left, 3 x 3, to 6 x 6
    torch.testing.assert_close(quarter, F.interpolate(x[..., 3:, :3], scale_factor=2, mode='bilinear'))
    torch.testing.assert_close(step('rotate', x, [1.], degrees=90), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(step('light', x, [1., 0.], brightness=.1, contrast=.5), x * 1.5 - .1)
    hole = step('erase', x + 1, [.1, 0., .999], p=.5, area=.25)  # top right, 3 x 3
    assert not hole[..., :3, 3:].any()
    assert (hole != 0).sum() == 3 * 2 * 27
    assert torch.equal(step('erase', x, [.6, 0., 0.], p=.5), x)

def test_steps_that_mix():
    a, b = torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    def mixed(name, u, **options): return OPS[name].apply(a, b, torch.tensor([u] * 4), **options)
    images, share = mixed('mixup', [.2, .25])
    assert torch.allclose(images, torch.full_like(a, .75)) and torch.allclose(share, torch.full((4,), .25))
    images, share = mixed('cutmix', [.2, .7, .5, .5])
    assert torch.allclose(1 - images.flatten(1).mean(1), share) and 0 < share[0] < 1
    for name, rest in dict(mixup=[.3], cutmix=[.3, .5, .5]).items(): assert torch.equal(mixed(name, [.6, *rest], p=.5)[0], a) and mixed(name, [.6, *rest], p=.5)[1].eq(1).all()

def test_bilinear_is_that_of_torch():
    x = torch.rand(2, 3, 5, 7, generator=generator())
    ys, xs = torch.rand(2, 4, 4, generator=generator(1)) * 8 - 1.5, torch.rand(2, 4, 4, generator=generator(2)) * 10 - 1.5
    grid = torch.stack([(2 * xs + 1) / 7 - 1, (2 * ys + 1) / 5 - 1], -1)
    torch.testing.assert_close(bilinear(x, ys, xs), F.grid_sample(x, grid, align_corners=False))

def test_mixed_images_have_mixed_targets():
    "Images and targets are mixed with one share and one partner, in one view; labels of views are left alone."
    views = ReplayTransform((('flip', {}), ('mixup', {})), 4, 9)
    for targets in (Hard(REAL.labels[ROWS], 10), soft().targets, Vector(torch.randn(30, 5, generator=generator()))):
        a = plain(targets=targets, views=views)
        seen, u = a.read(ROWS, ROWS % 9), drawn(4, ROWS, ROWS % 9, 4)
        partner, share = (u[:, 1] * 30).long(), u[:, 3]
        def flipped(rows): return plain(views=replace(views, ops=(('flip', {}),))).read(rows, ROWS % 9).inputs
        every = F.one_hot(targets.labels, 10).float() if targets.kind == 'hard' else targets.entries
        s = share[:, None, None, None]
        # the first number is the image's own flip, the partner's flip follows from the partner's own numbers
        torch.testing.assert_close(seen.inputs, s * flipped(ROWS) + (1 - s) * flipped(partner), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.targets, share[:, None] * every + (1 - share[:, None]) * every[partner])
    assert plain(views=views).form == 'probabilities'

def test_a_transform_is_an_augmentation():
    x = REAL.images[:50]
    views = ReplayTransform((('flip', {}),))
    got = views(x, generator())
    same = (got == x).flatten(1).all(1)
    assert 10 < same.sum() < 45
    assert torch.equal(got[~same], x[~same].flip(-1))
    assert torch.equal(got, views(x, generator()))
    with pytest.raises(InputError, match='mixed images need mixed targets'): ReplayTransform((('mixup', {}),))(x, generator())


# Targets

def test_densify():
    kept, index = torch.tensor([.55, .20, .10]), torch.tensor([0, 2, 3])
    torch.testing.assert_close(densify(kept, index, 6), torch.tensor([.55, .05, .20, .10, .05, .05]))
    whole = torch.tensor([.7, .2, .1])
    for tail in ('smooth', 'renormalise'): torch.testing.assert_close(densify(whole, torch.arange(3), 3, tail), whole)
    above = torch.tensor([.8, .2003])  # rounded to half precision a sum may be a little above 1
    assert torch.equal(densify(above, torch.tensor([0, 1]), 4), torch.tensor([.8, .2003, 0, 0]))

def test_zero_stays_zero_at_any_temperature():
    p = torch.tensor([[.9, .1, 0.]])
    for t in (1, 20, 1000): assert (as_logits(p, 'probabilities') / t).softmax(1)[0, 2] == 0
    torch.testing.assert_close(as_logits(p, 'probabilities').softmax(1), p)

def test_stored_views_are_drawn_evenly():
    views = torch.tensor([[5, 0, 7, -1], [3, -1, -1, -1]])
    t = Stored(torch.rand(2, 4, 3), 'logits', 3, views=views)
    seen = t.draw(torch.tensor([0, 1] * 3000), 9, generator()).view(-1, 2)
    assert seen[:, 1].unique().tolist() == [3]
    values, counts = seen[:, 0].unique(return_counts=True)
    assert values.tolist() == [0, 5, 7] and (counts / 3000 - 1 / 3).abs().max() < .04

def test_labels_of_soft_targets():
    a = stored()
    assert torch.equal(a.labels(), REAL.labels[ROWS])
    guessed = replace(a, targets=replace(a.targets, labels=None)).labels()
    dense = densify(a.targets.entries, a.targets.index, 10).mean(1)
    assert torch.equal(guessed, dense.argmax(1)) and not torch.equal(guessed, a.labels())
    with pytest.raises(InputError, match='no class'): plain(targets=Vector(torch.ones(30, 2))).labels()

def test_labels_of_views_are_those_of_the_teacher():
    "In any batch, for every view; nothing is asked again when they are read."
    asked = []
    def teacher(batch):
        asked.append(len(batch['inputs']))
        return pretrained('digits')(batch['inputs'])
    views = ReplayTransform((('shift', {}),), 1, 5)
    a = label_views(plain(), Teacher(teacher), views, dtype=torch.float32, batch=7)
    assert sum(asked) == 150
    for v in range(5):
        seen = a.read(ROWS, torch.full((30,), v))
        with torch.no_grad(): torch.testing.assert_close(seen.targets, pretrained('digits')(seen.inputs).softmax(1))
    evaluate(a, network, protocol(), [0])
    assert sum(asked) == 150


# What does not fit together

@pytest.mark.parametrize(('wrong', 'said'), [
    (lambda: Hard(torch.tensor([0, 3]), 3), 'given: 3 at image 1'),
    (lambda: Hard(torch.tensor([0, -1]), 3), 'given: -1 at image 1'),
    (lambda: Hard(torch.tensor([0., 1.]), 3), 'float32'),
    (lambda: Hard(torch.tensor([], dtype=torch.long), 3), 'shape'),
    (lambda: Hard([0], 3), 'no tensor'),
    (lambda: Soft(torch.randn(2, 3), 'probabilities'), 'no probabilities'),
    (lambda: Soft(torch.rand(2, 3), 'logit'), "nearest: 'logits'"),
    (lambda: Soft(torch.rand(2, 3), 'logits', torch.tensor([0, 3])), 'no class'),
    (lambda: Vector(torch.tensor([[math.inf]])), 'infinity'),
    (lambda: Stored(torch.rand(2, 4, 3), 'logits', 4), 'index='),
    (lambda: Stored(torch.rand(2, 4, 2), 'logits', 4, index=torch.zeros(2, 4, 2, dtype=torch.long)), 'in part'),
    (lambda: Stored(torch.rand(2, 4, 2) / 2, 'probabilities', 4, index=torch.zeros(2, 4, 2, dtype=torch.long)), 'twice'),
    (lambda: Stored(torch.rand(2, 4, 1), 'probabilities', 4, index=torch.full((2, 4, 1), 4)), 'is no class'),
    (lambda: Stored(torch.rand(2, 4, 3), 'logits', 3, views=torch.tensor([[-1, 1, 2, 3]] * 2)), '-1 at the end'),
    (lambda: Pixels(torch.rand(3, 8, 8)), '4 dimensions'),
    (lambda: Pixels(torch.full((1, 1, 2, 2), math.nan)), 'NaN'),
    (lambda: Pixels(torch.ones(1, 1, 2, 2, dtype=torch.int64)), 'int64'),
    (lambda: Normalisation([0.], [0.]), 'std'),
    (lambda: Normalisation([0., 0.], [1.]), 'unlike'),
    (lambda: Normalisation([0.], [1.], True, torch.eye(3)), 'go together'),
    (lambda: ReplayTransform((('flip',),)), 'ops'),
    (lambda: ReplayTransform((), -1), 'seed'),
    (lambda: ReplayTransform((), 0, 0), 'count'),
    (lambda: plain(targets=Hard(torch.zeros(3, dtype=torch.long), 2)), 'given: 30 images, 3 targets'),
    (lambda: plain(images=None), 'images'),
    (lambda: plain(targets=Pixels(torch.rand(1, 1, 2, 2))), 'targets'),
    (lambda: plain(views=ReplayTransform((('flop', {}),))), "nearest: 'flip'"),
    (lambda: plain(views=ReplayTransform((('flip', dict(q=1)),))), "no option 'q'"),
    (lambda: plain(views=ReplayTransform((('crop', dict(scale=.5)),))), 'two numbers'),
    (lambda: plain(views=ReplayTransform((('flip', dict(p='x')),))), 'flip, p'),
    (lambda: plain(views=ReplayTransform((('mixup', {}), ('flip', {})))), 'the last one'),
    (lambda: plain(views=replace(TABLE, count=4)), 'table'),
    (lambda: plain(learning_rate=0.), 'learning rate'),
    (lambda: plain(learning_rate=True), 'learning rate'),
    (lambda: plain(recipe={}), 'recipe'),
    (lambda: plain(recipe=dict(method='x', t=torch.ones(1))), 'not JSON'),
    (lambda: plain(images=subset('digits/train', torch.tensor([1097] * 30))), 'expected: 0 to 1096'),
    (lambda: plain(images=Subset(ROWS, 'digits/test', mark(REAL))), 'not those that were chosen from'),
    (lambda: plain(images=Subset(ROWS, 'digit/train', '')), "nearest: 'digits/train'"),
    (lambda: plain(images=Generated(dict(x=torch.ones(1)), 'pca')), "has no 'pca'"),
    (lambda: plain(images=Generated(dict(x=torch.ones(1)), 'basis')), 'cannot use these parts'),
    (lambda: plain(images=Generated(dict(small=torch.ones(30, 1, 4, 4)), 'enlarge', dict(factor=2, mode='x'))), 'options'),
    (lambda: plain(targets=Labeller('nobody', 10)), "has no 'nobody'"),
    (lambda: replace(stored(), views=None), 'without views'),
    (lambda: replace(stored(), views=replace(stored().views, count=9)), 'given: 9 views, labels for 4'),
    (lambda: plain(normalisation=Normalisation([0.] * 3, [1.] * 3)), 'channels'),
    (lambda: plain(normalisation=replace(WHITE, matrix=torch.eye(9), centre=torch.zeros(9))), 'size of an image')])
def test_wrong_parts(wrong, said):
    with pytest.raises(InputError) as caught: wrong()
    assert said in str(caught.value) and '\n' not in str(caught.value)


# On disk

def test_a_killed_save_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = plain(), soft()
    old.save(tmp_path)
    with monkeypatch.context() as patch:
        def killed(path, value): raise KeyboardInterrupt
        patch.setattr(module, 'write_json', killed)
        with pytest.raises(KeyboardInterrupt): new.save(tmp_path)
    assert DataArtefact.load(tmp_path).form == 'labels'
    new.save(tmp_path)
    assert DataArtefact.load(tmp_path).form == 'logits'
    assert sorted(p.name.split('-')[0] for p in tmp_path.iterdir()) == ['artefact.json', 'images', 'targets']

def test_other_files_are_left_alone(tmp_path):
    (tmp_path/'notes-0123456789abcdef.safetensors').write_text('mine')
    plain().save(tmp_path)
    soft().save(tmp_path)
    assert (tmp_path/'notes-0123456789abcdef.safetensors').read_text() == 'mine'

def test_names_are_the_readers_affair(tmp_path):
    "What the reader does not know is no damage; a decoder of one's own is found, and other data than were chosen from are not taken."
    double = Decoder(lambda parts, options: len(parts['x']), lambda parts, options, rows: parts['x'][rows] * options['factor'], ('factor',))
    known = Known(data={'mine': REAL}, decoders={'double': double})
    a = plain(images=Generated(dict(x=REAL.images[ROWS]), 'double', dict(factor=2)), known=known)
    a.save(tmp_path)
    assert torch.equal(DataArtefact.load(tmp_path, known).read(ROWS, ROWS * 0).inputs, 2 * REAL.images[ROWS])
    with pytest.raises(InputError, match="decoders has no 'double'") as caught: DataArtefact.load(tmp_path)
    assert not isinstance(caught.value, DamagedFile)
    plain(images=subset('mine', ROWS, known), known=known).save(tmp_path)
    with pytest.raises(InputError, match='not those that were chosen from') as caught: DataArtefact.load(tmp_path, Known(data={'mine': TEST}))
    assert not isinstance(caught.value, DamagedFile)

def test_files_of_another_artefact_are_refused(tmp_path):
    plain().save(tmp_path/'a')
    soft().save(tmp_path/'b')
    says = read_json(tmp_path/'a'/'artefact.json')
    other = next((tmp_path/'b').glob('targets-*'))
    other.rename(tmp_path/'a'/other.name)
    write_json(tmp_path/'a'/'artefact.json', sign(says | dict(files=says['files'] | dict(targets=other.name))))
    with pytest.raises(DamagedFile): DataArtefact.load(tmp_path/'a')
    for name in ('../b/x.safetensors', 7):
        write_json(tmp_path/'a'/'artefact.json', sign(says | dict(files=says['files'] | dict(images=name))))
        with pytest.raises(DamagedFile, match='files'): DataArtefact.load(tmp_path/'a')

def test_newer_and_foreign_folders(tmp_path):
    with pytest.raises(InputError, match='cannot read'): DataArtefact.load(tmp_path)
    plain().save(tmp_path)
    says = read_json(tmp_path/'artefact.json')
    write_json(tmp_path/'artefact.json', sign(says | dict(schema=2)))
    with pytest.raises(InputError, match='newer version'): DataArtefact.load(tmp_path)
    write_json(tmp_path/'artefact.json', [])
    with pytest.raises(DamagedFile, match='not a data artefact'): DataArtefact.load(tmp_path)

def test_bytes_count_what_is_stored():
    "A byte a pixel, two bytes a half; a subset costs its indices, a labeller its tensors; overheads are the files'."
    sizes = {dtype: plain(images=Pixels(torch.zeros(30, 1, 64, 64, dtype=dtype))).bytes().images for dtype in (torch.uint8, torch.float16, torch.float32)}
    assert sizes[torch.float16] - sizes[torch.uint8] == pytest.approx(30 * 64 * 64, abs=32)
    assert sizes[torch.float32] - sizes[torch.float16] == pytest.approx(30 * 64 * 64 * 2, abs=32)
    assert plain(images=subset('digits/train', ROWS)).bytes().images < 30 * 8 + 400
    assert stored(top=3).bytes().targets < stored(top=None).bytes().targets

def test_normalisation_is_undone_by_nobody():
    "Stored as they are: applied images are not normalised again, raw ones are; test images always."
    standard = standardise(REAL)
    raw, done = plain(normalisation=standard), plain(images=Pixels(standard(REAL.images[ROWS])), normalisation=replace(standard, applied=True))
    assert torch.equal(raw.read(ROWS, ROWS * 0).inputs, done.read(ROWS, ROWS * 0).inputs)
    assert torch.equal(raw.prepare(TEST.images), standard(TEST.images))
    x = standard(REAL.images)
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-4
    white = zca(REAL, eps=1e-4)(REAL.images).flatten(1)
    covariance = torch.cov(white.T)
    strong = REAL.images.flatten(1).var(0) > .01
    assert (covariance.diagonal()[strong] - 1).abs().max() < .1


# The judge

def test_arms_of_every_kind():
    teacher = Teacher(pretrained('digits'))
    four = ['artefact', 'artefact, hard labels', 'random subset', 'random subset, hard labels']
    assert list(arms(plain(), protocol(), 0)) == ['artefact', 'random subset']
    assert list(arms(soft(), protocol(), 0)) == [four[0], four[1], four[3]]
    vector = plain(targets=Vector(torch.rand(30, 10, generator=generator())))
    assert list(arms(vector, protocol(teacher=teacher), 0)) == ['artefact', 'random subset']
    own = plain(targets=Labeller('digits', 10))
    assert list(arms(own, protocol(), 0)) == four
    for made in (soft(), stored()):
        found = arms(made, protocol(teacher=teacher), 0)
        assert list(found) == four
        rival = found['random subset']
        assert rival.targets.kind == made.targets.kind
        assert rival.form == made.form
        assert rival.targets.form == made.targets.form
        assert torch.equal(rival.labels(), made.labels())
        assert torch.equal(found['random subset, hard labels'].images.tensor, rival.images.tensor)
        assert rival.bytes().targets == made.bytes().targets

def test_a_random_subset_is_random_real_and_paired():
    a = plain(normalisation=standardise(REAL, applied=True), images=Pixels(standardise(REAL)(REAL.images[ROWS])))
    one, two = (random_subset(a, REAL, generator(seed)) for seed in (0, 1))
    held = {fingerprint(x) for x in REAL.images}
    raw = one.images.read(ROWS, one.known)
    assert all(fingerprint(x) in held for x in raw) and len({fingerprint(x) for x in raw}) == 30
    assert torch.equal(one.labels(), a.labels()) and not torch.equal(one.images.tensor, two.images.tensor)
    torch.testing.assert_close(one.read(ROWS, ROWS * 0).inputs, a.prepare(raw))
    few = Labelled(REAL.images[:20], REAL.labels[:20], REAL.classes)
    with pytest.raises(InputError, match='too few real images of class'): random_subset(a, few, generator())

def test_evaluate_is_repeatable_and_quiet():
    before = torch.get_rng_state()
    one, two = (evaluate(soft(), network, protocol(teacher=Teacher(pretrained('digits'))), [0, 1]) for _ in range(2))
    assert one.equals(two) and torch.equal(before, torch.get_rng_state())
    assert list(one.columns) == ['seed', 'arm', 'accuracy', 'images', 'targets', 'images_bytes', 'targets_bytes', 'extra_bytes']
    assert len(one) == 8
    assert one.images.eq(30).all() and one.accuracy.between(0, 1).all() and one.accuracy.nunique() > 2

def test_more_measures():
    "Each network, trained, with what brings raw images to it."
    a, shifted = plain(normalisation=standardise(REAL)), TEST.images[:50].roll(1, -1)
    def robust(net, prepare): return accuracy(net, Labelled(prepare(shifted), TEST.labels[:50], TEST.classes))
    table = evaluate(a, network, protocol(measures=dict(robust=robust, mean=lambda net, prepare: prepare(REAL.images).mean())), [0])
    assert table['mean'].abs().max() < 1e-5 and table.robust.between(0, 1).all() and len(table) == 2

def test_test_images_are_normalised_as_the_artefact_is():
    "The network gets them prepared, whether the stored images are so already or not, and so does a probe."
    class Looks(nn.Module):
        def __init__(self): super().__init__(); self.layer, self.seen = nn.Linear(64, 10), []
        def forward(self, x): self.seen.append(x); return self.layer(x.flatten(1))
    for applied in (True, False):
        a, net = plain(normalisation=standardise(REAL, applied)), Looks()
        score(a, net, protocol(measure='probe', probe=REAL.first(40)))
        assert torch.equal(net.seen[0], standardise(REAL)(REAL.images[:40]))
        assert torch.equal(torch.cat(net.seen[1:]), standardise(REAL)(TEST.images))

def test_arms_differ_in_one_thing_only():
    "An artefact that is its own random subset scores as that one does, for every seed: same network, order, views."
    views = ReplayTransform((('shift', dict(pixels=1)),), 0, 7)
    for seed in (0, 1):
        twin = random_subset(plain(views=views), REAL, Streams(seed).generator('method', 'random subset'))
        table = evaluate(twin, network, protocol(steps=30), [seed])
        assert table.accuracy.nunique() == 1 and len(table) == 2

@pytest.mark.parametrize(('make', 'options', 'loss'), [
    (lambda: plain(), {}, lambda out, t: F.cross_entropy(out, t)),
    (lambda: soft(), dict(temperature=4.), lambda out, t: F.kl_div((out / 4).log_softmax(1), (t / 4).softmax(1), reduction='batchmean')),
    (lambda: soft(), dict(temperature=4., scale_t2=True), lambda out, t: 16 * F.kl_div((out / 4).log_softmax(1), (t / 4).softmax(1), reduction='batchmean')),
    (lambda: soft(), dict(loss='mse', hard_weight=.5), lambda out, t: F.mse_loss(out, t) + .5 * F.cross_entropy(out, REAL.labels[:10])),
    (lambda: stored(), {}, lambda out, t: F.kl_div(out.log_softmax(1), t, reduction='batchmean')),
    (lambda: plain(targets=Vector(torch.rand(30, 10, generator=generator()))), {}, lambda out, t: F.mse_loss(out, t))])
def test_the_loss_is_that_of_the_form(make, options, loss):
    a, net, at = make(), network(generator()), Progress(0, 8)
    lesson = Lesson(a, net, protocol(**options), 0)
    rows = torch.arange(10)
    terms = lesson.losses(rows, at)['student']
    weights = lesson.weights(at)
    seen = a.read(rows, a.draw(rows, Streams(0).generator('augment', 0)))
    torch.testing.assert_close(sum(weights[k] * v for k, v in terms.items()), loss(net(seen.inputs), seen.targets))

def test_a_lesson_resumes_to_the_bit():
    a = stored()
    conform_procedure.procedure(lambda: Lesson(a, network(generator()), protocol(), 0), tries=2)

def test_rates_schedules_and_augmentation():
    "The artefact's own rate where the protocol has none; epochs count passes; an augmentation changes what is seen, and a labeller is asked about it."
    a = plain(learning_rate=.07)
    assert Lesson(a, network(generator()), protocol(lr=None, optimizer='sgd'), 0).optimizer.param_groups[0]['lr'] == .07
    assert Lesson(a, network(generator()), protocol(), 0).optimizer.param_groups[0]['lr'] == 3e-3
    assert protocol(steps=None, epochs=5, batch=7).length(30) == 25
    assert protocol(steps=None, epochs=5, batch=100).length(30) == 5
    lr = []
    lesson = Lesson(a, network(generator()), protocol(schedule='step'), 0)
    train(lesson, progress=lambda at, _: lr.append(lesson.optimizer.param_groups[0]['lr']))
    assert lr == pytest.approx([3e-3] * 4 + [3e-4] * 4)
    asked = []
    known = Known(models={'sum': lambda parts: lambda x: asked.append(x) or x.flatten(1)[:, :10]})
    own = plain(targets=Labeller('sum', 10), known=known)
    lesson = Lesson(own, network(generator()), protocol(augmentation=lambda x, g: x + torch.rand(1, generator=g)), 0)
    batch = lesson.batch(torch.arange(5), Progress(0, 8))
    assert torch.equal(batch['inputs'], asked[-1])
    assert torch.equal(batch['targets'], asked[-1].flatten(1)[:, :10])
    assert not torch.equal(batch['inputs'], REAL.images[:5])

def test_a_probe_reads_vectors():
    "Outputs that are no classes: a ridge on them; features that hold the class are read out, and a class cannot be read from noise."
    vectors = F.one_hot(REAL.labels[ROWS], 10).float() @ torch.randn(10, 24, generator=generator())
    p = protocol(teacher=Teacher(lambda batch: torch.zeros(len(batch['inputs']), 24)), measure='probe', probe=REAL.first(300), steps=60)
    table = evaluate(plain(targets=Vector(vectors)), lambda g: MLP((64, 32, 24), g), p, [0])
    assert table.arm.tolist() == ['artefact', 'random subset'] and table.accuracy[0] > .7

@pytest.mark.parametrize(('make', 'options', 'said'), [
    (lambda: plain(), dict(lr=None), 'no learning rate'),
    (lambda: plain(), dict(network=lambda g: MLP((784, 10), g)), 'cannot take an image of shape (1, 8, 8)'),
    (lambda: plain(), dict(network=lambda g: MLP((64, 9), g)), 'given: (2, 9)'),
    (lambda: plain(), dict(network=lambda g: 3), 'a module'),
    (lambda: plain(), dict(seeds=[]), 'no seed'),
    (lambda: plain(), dict(seeds=[.5]), 'a seed'),
    (lambda: plain(targets=Hard(REAL.labels[ROWS], 12)), {}, 'other classes'),
    (lambda: plain(images=Pixels(torch.rand(30, 1, 9, 9))), {}, 'another shape'),
    (lambda: plain(targets=Vector(torch.rand(30, 10))), {}, 'vectors of random images'),
    (lambda: stored(), dict(augmentation=lambda x, g: x), 'belongs to its view'),
    (lambda: plain(targets=Vector(torch.rand(30, 5))), dict(teacher=Teacher(pretrained('digits')), network=lambda g: MLP((64, 5), g)), "measure='probe'"),
    (lambda: plain(targets=Soft(torch.full((30, 10), .1), 'probabilities')), dict(loss='mse'), 'need logits'),
    (lambda: plain(), dict(real=TEST), 'the real data are the test data'),
    (lambda: plain(images=exact_pixels(TEST.images[ROWS])), {}, 'image 0 and 29 more'),
    (lambda: plain(images=Pixels(torch.cat([REAL.images[:29], TEST.images[7:8]]).half())), {}, 'image 29 and 0 more'),
    (lambda: plain(images=subset('digits/test', ROWS)), {}, 'test images'),
    (lambda: plain(images=Pixels(standardise(REAL)(TEST.images[ROWS]).half()), normalisation=standardise(REAL, applied=True)), {}, 'test images')])
def test_the_judge_refuses_before_it_trains(make, options, said, monkeypatch):
    monkeypatch.setattr(evaluation, 'train', lambda *_, **__: pytest.fail('it trains'))
    options = dict(options)
    net, seeds = options.pop('network', network), options.pop('seeds', [0])
    with pytest.raises(InputError) as caught: evaluate(make(), net, protocol(**options), seeds)
    assert said in str(caught.value) and '\n' not in str(caught.value)

@pytest.mark.parametrize('options', [dict(steps=None), dict(epochs=3), dict(steps=0), dict(batch=0), dict(optimizer='adam'), dict(schedule='x'), dict(loss='ce'), dict(lr=0.), dict(temperature=0.), dict(hard_weight=-1.),
                                     dict(measure='probe'), dict(probe=REAL), dict(test=None), dict(teacher=3), dict(measures=dict(a=1))])
def test_wrong_protocols(options):
    with pytest.raises(InputError, match='protocol'): protocol(**options)

def test_a_table_belongs_to_its_images():
    "The rivals of an artefact with a table of views get views of the same kind, by seed."
    table = ReplayTransform((('shift', {}),), 0, 4, torch.rand(30, 4, 2, generator=generator()))
    assert random_subset(plain(views=table), REAL, generator()).views.table is None


# Trajectories

def experts(folder, *, about=None, count=2, epochs=3, run=None, seen=None):
    def walk(expert):
        if seen is not None: seen.append(expert)
        net = MLP((4, 3), generator(expert))
        for epoch in range(epochs + 1):
            with torch.no_grad(): net.fc1.bias.fill_(epoch)
            yield net
    return Trajectories.record(folder, about or dict(network='mlp', data=REAL, recipe=dict(lr=.1)), count, epochs, run or walk)

def test_trajectories_are_what_was_walked(tmp_path):
    t = experts(tmp_path)
    assert torch.equal(t[1, 2], torch.cat([MLP((4, 3), generator(1)).fc1.weight.flatten().detach(), torch.full((3,), 2.)]))
    assert torch.equal(t[0, 1:3], torch.stack([t[0, 1], t[0, 2]]))
    assert t[0, :].shape == (4, 15)
    assert t[0, 2:2].shape == (0, 15)
    net = t.put(MLP((4, 3), generator(9)), 1, 3)
    assert torch.equal(flat(net), t[1, 3]) and layout(net) == dict(t.shapes)
    again = Trajectories.open(tmp_path, dict(network='mlp', data=REAL, recipe=dict(lr=.1)))
    assert torch.equal(again[1, 0], t[1, 0])
    vector = t[0, 0].requires_grad_()
    torch.func.functional_call(net, unflat(vector, t.shapes), (torch.ones(2, 4),)).sum().backward()
    assert torch.equal(vector.grad[-3:], torch.full((3,), 2.))
    for at in ((2, 0), (0, 4), (-1, 0), (0, True)):
        with pytest.raises(InputError): t[at]
    with pytest.raises(InputError, match='other parameters'): t.put(MLP((5, 3), generator()), 0, 0)

def test_a_stopped_recording_goes_on(tmp_path):
    seen = []
    def stops(expert):
        if expert == 1: raise KeyboardInterrupt
        seen.append(expert)
        yield from (MLP((4, 3), generator(expert)) for _ in range(4))
    with pytest.raises(KeyboardInterrupt): experts(tmp_path, run=stops)
    part = Trajectories.open(tmp_path)
    assert part.missing() == [1] and part[0, 3].shape == (15,)
    with pytest.raises(InputError, match='expert 1 is not recorded yet'): part[1, 0]
    assert experts(tmp_path, seen=seen).missing() == [] and seen == [0, 1]
    assert experts(tmp_path, count=4, seen=seen).experts == 4 and seen == [0, 1, 2, 3]
    assert experts(tmp_path, count=1, seen=seen).experts == 4 and len(seen) == 4
    with pytest.raises(InputError, match='epochs'): experts(tmp_path, epochs=5)

@pytest.mark.parametrize(('change', 'said'), [(dict(data=TEST), 'data differs'), (dict(recipe=dict(lr=.2)), 'recipe differs'), (dict(network='conv'), 'network differs'), (dict(more=1), 'more differs')])
def test_stale_trajectories(tmp_path, change, said):
    about = dict(network='mlp', data=REAL, recipe=dict(lr=.1))
    experts(tmp_path)
    for use in (lambda: Trajectories.open(tmp_path, about | change), lambda: experts(tmp_path, about=about | change)):
        with pytest.raises(InputError, match=said): use()

def test_poisoned_trajectories(tmp_path):
    t = experts(tmp_path)
    path, index = t.path(0), tmp_path/'trajectories.json'
    data, text = path.read_bytes(), index.read_text()
    assert t[0, 3].any()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(DamagedFile, match='epoch 3'): t[0, 3]
    assert t[0, 2].shape == (15,)  # the other moments are good
    for bad in (data[:-1], data[:40], b'', data[:8] + bytes([data[8] ^ 1]) + data[9:], t.path(1).read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(DamagedFile): t[0, 3]
    save_tensors(path, {'parameters': torch.zeros(4, 15)})
    with pytest.raises(DamagedFile): t[0, 3]
    save_tensors(path, {'parameters': torch.zeros(4, 15)}, dict(kind='trajectory', about='0', expert=0, rows=[fingerprint(torch.zeros(15), 32)] * 4))
    with pytest.raises(DamagedFile, match='something else'): t[0, 3]
    for bad in (text.replace('"epochs": 3', '"epochs": 2'), text[:-9], '[]'):
        index.write_text(bad)
        with pytest.raises(DamagedFile): Trajectories.open(tmp_path)
    index.write_text(json.dumps(sign(json.loads(text) | dict(schema=2))))
    with pytest.raises(InputError, match='newer'): Trajectories.open(tmp_path)

def test_recordings_that_cannot_be(tmp_path):
    def diverges(expert):
        net = MLP((4, 3), generator())
        for epoch in range(4):
            if epoch == 2: net.fc1.weight.data[0, 0] = math.nan
            yield net
    with pytest.raises(RunFailed, match='expert 0 is not finite after epoch 2 of 3'): experts(tmp_path, run=diverges)
    for many in (3, 9):
        with pytest.raises(InputError, match='moments'): experts(tmp_path, run=lambda _: (MLP((4, 3), generator()) for _ in range(many)))  # noqa: B023
    with pytest.raises(InputError, match='other parameters'): experts(tmp_path, run=lambda e: (MLP((4, 3 + e), generator()) for _ in range(4)))
    with pytest.raises(InputError, match='buffers'): flat(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match='about'): experts(tmp_path, about=[1])

READS_ONE = r'''
import re, sys
from pathlib import Path
from lowrank_distill.shapes.trajectories import Trajectories
Trajectories.open(sys.argv[2])[0, 0].sum()  # what is loaded at the first use
t = Trajectories.open(sys.argv[1])
def peak(): return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])
before = peak()
t[1, 30].sum()
print(peak() - before)
'''

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_reading_a_moment_reads_nothing_else(tmp_path):
    "A file of 60 MB, of which one moment has 1 MB: the process grows by little (kB)."
    class Big(nn.Module):
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(250_000))
    def walk(expert):
        net = Big()
        for _ in range(60): yield net
    Trajectories.record(tmp_path, dict(network='big'), 2, 59, walk)
    experts(tmp_path/'small')
    done = subprocess.run([sys.executable, '-c', READS_ONE, str(tmp_path), str(tmp_path/'small')], capture_output=True, text=True, env=os.environ, check=True)
    assert (tmp_path/'expert-00001.safetensors').stat().st_size > 59e6 and int(done.stdout) < 15_000, done.stdout
