"""Objectives and distillation: the suite holds for ours, wrong twins are found, and what does not fit is refused when it is built."""
import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import Tap
from lowrank_distill.shapes import conform_objective as conform
from lowrank_distill.shapes import conform_procedure
from lowrank_distill.shapes.adapter import adapt
from lowrank_distill.shapes.objective import (
    EMA, AdaptersOff, CrossEntropy, Distillation, Needs, Objective, SoftTargets, Teacher, kl)
from lowrank_distill.shapes.procedure import Batches, Progress, Stage
from lowrank_distill.shapes.train import train

AT = Progress(0, 10, 'distil', 0, 10)

def seeded(make, seed=0):
    "What `make()` builds, the same at each call."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()

def net(width=8, classes=3, seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(.2), nn.Linear(width, classes)), seed)

def data(n=48):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


# The suite on what floor 1 has

class Hint(Objective):
    "A projected feature of the student against the teacher's, with a running scale: parameters and buffers."
    needs = Needs(student=('1',), teachers={'teacher': (Tap('1'),)})

    def __init__(self, width=6):
        super().__init__()
        self.project = seeded(lambda: nn.Linear(width, width))
        self.register_buffer('scale', torch.ones(()))

    def forward(self, student, teachers, batch, at):
        f, t = student.features['1'], teachers['teacher'].features['1']
        if self.training and len(t): self.scale = .9 * self.scale + .1 * t.detach().float().abs().mean().clamp(min=1e-3)
        difference = self.project(f.to(self.project.weight.dtype)) - t.to(self.project.weight.dtype)
        return {'hint': (difference / self.scale).square().sum() / max(1, difference.numel())}

@pytest.mark.parametrize(('make', 'options'), [
    (CrossEntropy, {}), (SoftTargets, dict(zero_terms=['soft'], temperature=SoftTargets)),
    (lambda: SoftTargets(2., 'token', chunk=2), dict(zero_terms=['soft'])), (Hint, {})], ids=['labels', 'soft', 'chunked', 'hint'])
def test_suite(make, options): conform.objective(make, **options)

def loop(seen, T=2.):
    "KL sample by sample and class by class."
    p, q = (x.softmax(-1) for x in (seen.teachers['teacher'].logits / T, seen.student.logits / T))
    return {'soft': T * T * sum((p[i, c] * (p[i, c] / q[i, c]).log()).item() for i in range(len(p)) for c in range(p.shape[1])) / len(p)}

def test_soft_targets_are_the_plain_loop():
    conform.objective(lambda: SoftTargets(2.), naive=loop)
    with pytest.raises(AssertionError, match='the plain loop says'): conform.objective(lambda: SoftTargets(2., scale_t2=False), naive=loop)

@pytest.mark.parametrize('reduction', ['batchmean', 'token', 'mean'])
@pytest.mark.parametrize('shape', [(3, 5), (2, 4, 5)])
def test_chunks_are_one_function(shape, reduction):
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(shape, generator=g, dtype=torch.double) for _ in range(2))
    mask = torch.rand(shape[:-1], generator=g) > .3
    made = []
    for chunk in (None, 1, 2, 99):
        x = s.clone().requires_grad_()
        value = kl(x, t, 3., reduction, mask=mask, chunk=chunk)
        made.append((value.item(), torch.autograd.grad(value, x)[0]))
    for value, grad in made[1:]:
        assert abs(value - made[0][0]) < 1e-14
        torch.testing.assert_close(grad, made[0][1], atol=1e-15, rtol=1e-12)


# A distillation is a procedure

def hinted():
    student = net(6, seed=1)
    x, y = data()
    return Distillation(student, {'teacher': Teacher(net(6, seed=2)), 'slow': EMA(student, .5)},
                        {'hard': CrossEntropy(), 'kd': SoftTargets(2.), 'hint': Hint(), 'self': SoftTargets(1., teacher='slow')},
                        {'kd': lambda at: 1 - at.fraction, 'hint': .1}, loader=Batches((x, y), 8), steps=9, example=(x[:4], y[:4]),
                        optimizer=lambda p: torch.optim.Adam(p, lr=.01))

def test_distillation_is_a_procedure():
    conform_procedure.procedure(hinted, updates=['average of slow.*'], tries=4)

def test_projector_learns_and_teacher_does_not():
    made = hinted()
    teacher = made.teachers['teacher'].source
    before = copy.deepcopy([*teacher.state_dict().values()]), made.objectives['hint'].project.weight.detach().clone()
    train(made)
    assert all(torch.equal(a, b) for a, b in zip(before[0], teacher.state_dict().values(), strict=True))
    assert not torch.equal(before[1], made.objectives['hint'].project.weight) and all(p.grad is None for p in teacher.parameters())

def test_rate_is_a_factor_of_the_learning_rate():
    x, y = data()
    def moved(**rate):
        student = net()
        made = Distillation(student, {}, {'hard': CrossEntropy()}, loader=Batches((x, y), 48), steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=.1), **rate)
        rates = []
        train(made, progress=lambda at, losses: rates.append(made.optimizer.param_groups[0]['lr']))
        return rates
    assert moved() == [.1, .1] and moved(rate=lambda at: 1 - at.fraction) == [.1, .05]

def test_weights_follow_progress_and_names():
    made = hinted()
    made.terms(data()[:2], AT)
    assert made.weights(AT) == {'hard.labels': 1., 'kd.soft': 1., 'hint.hint': .1, 'self.soft': 1.}
    assert made.weights(AT._replace(step=5))['kd.soft'] == .5


# Teachers

def test_a_teacher_is_asked_in_eval_mode_without_graph_and_put_back():
    teacher = net().train()
    teacher[1].eval()
    one, two = (Teacher(teacher)({'inputs': data()[0]}, ['1']) for _ in range(2))
    assert torch.equal(one.logits, two.logits) and not one.logits.requires_grad and not one.features['1'].requires_grad
    assert teacher[2].training and not teacher[1].training

def test_until_runs_no_further():
    teacher, ran = net(), []
    teacher[3].register_forward_hook(lambda *_: ran.append(1))
    seen = Teacher(teacher, until='1')({'inputs': data()[0]}, ['1'])
    assert not ran and seen.logits is None and set(seen.features) == {'1'}

def test_adapters_off_is_the_network_that_it_was():
    model = net().eval()
    before = model(data()[0])
    handle = adapt(model, LoRA(rank=2))
    with torch.no_grad(): [p.fill_(.3) for p in handle.parameters()]
    teacher = AdaptersOff(handle)
    assert torch.equal(teacher({'inputs': data()[0]}).logits, before) and not torch.equal(model(data()[0]), before)
    made = Distillation(model, {'teacher': teacher}, {'kd': SoftTargets(1.)}, loader=Batches(data(), 8), steps=5,
                        optimizer=lambda p: torch.optim.SGD(p, lr=.1), example=data())
    losses = train(made).losses['student.kd.soft']
    assert losses[-1] < losses[0]


# Networks of others

def language_model(vocab=40, layers=1, seed=0):
    config = GPT2Config(vocab_size=vocab, n_positions=16, n_embd=8, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0)
    return seeded(lambda: GPT2LMHeadModel(config), seed)

def test_language_models_with_masks():
    tokens = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'labels': tokens.where(tokens > 5, -100), 'mask': tokens > 5}
    model = language_model()
    made = Distillation(model, {'teacher': Teacher(language_model(layers=2, seed=1))}, {'hard': CrossEntropy(), 'kd': SoftTargets(2., 'token', chunk=5)}, example=batch)
    terms = made.terms(batch, AT)
    assert terms['kd.soft'].isfinite() and terms['hard.labels'].isfinite()

def test_shifted_labels_are_the_loss_of_transformers():
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    model = language_model().eval()
    batch = {'input_ids': tokens, 'labels': tokens.where(tokens > 5, -100)}
    made = Distillation(model, {}, {'shifted': CrossEntropy(shift=1), 'in place': CrossEntropy()}, example=batch)
    terms = made.terms(batch, AT)
    torch.testing.assert_close(terms['shifted.labels'], model(**batch).loss)
    assert terms['in place.labels'] != terms['shifted.labels']

def vision(size=8, classes=3):
    return seeded(lambda: ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=size,
                                                              patch_size=4, num_channels=1, num_labels=classes)))

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])

class Reads(Objective):
    "Wants a batch with two names and a tap of the teacher."
    needs = Needs(student=('0',), teachers={'teacher': ('nothing',)}, batch=frozenset({'labels'}))
    def forward(self, student, teachers, batch, at): return {'x': student.logits.sum()}

X, Y = data()
WRONG = {
    'class counts': (lambda: Distillation(net(), {'teacher': Teacher(net(classes=5))}, {'kd': SoftTargets()}, example=(X, Y)), '3 and 5'),
    'vocabularies': (lambda: Distillation(language_model(40), {'teacher': Teacher(language_model(50))}, {'kd': SoftTargets()}, example={'input_ids': torch.zeros(2, 4, dtype=torch.long)}), '40 and 50'),
    'a tap of nothing': (lambda: Distillation(net(), {'teacher': Teacher(net())}, {'r': Reads()}), "'nothing'"),
    'a tap of a function': (lambda: Distillation(net(), {'teacher': Teacher(lambda b: b['inputs'])}, {'r': Reads()}), 'only a network has taps'),
    'a teacher without its input': (lambda: Distillation(net(), {'teacher': Teacher({0: torch.zeros(3)})}, {'kd': SoftTargets()}, example=(X, Y)), 'sample index'),
    'a teacher with another input': (lambda: Distillation(net(), {'teacher': Teacher(language_model())}, {'kd': SoftTargets()}, example=(X, Y)), "teacher 'teacher' cannot run"),
    'a teacher whose input has another name': (lambda: Distillation(net(), {'teacher': Teacher(vision(), inputs=lambda b: {'images': b['inputs']})}, {'kd': SoftTargets()}, example=IMAGES[:1]), 'cannot run'),
    'labels missing': (lambda: Distillation(net(), {}, {'hard': CrossEntropy()}, example=X), "needs 'labels'"),
    'wrong image size': (lambda: Distillation(vision(16), {}, {'hard': CrossEntropy()}, example=IMAGES), 'the student cannot run'),
    'wrong image size of a teacher': (lambda: Distillation(vision(8), {'teacher': Teacher(vision(16))}, {'kd': SoftTargets()}, example=IMAGES), "teacher 'teacher' cannot run"),
    'no teacher of that name': (lambda: Distillation(net(), {'techer': Teacher(net())}, {'kd': SoftTargets()}), "nearest: 'techer'"),
    'a teacher nobody asks': (lambda: Distillation(net(), {'teacher': Teacher(net())}, {'hard': CrossEntropy()}), 'no objective asks'),
    'a weight of nothing': (lambda: Distillation(net(), {}, {'hard': CrossEntropy()}, {'hrd': 1.}), "nearest: 'hard'"),
    'a weight of no term': (lambda: Distillation(net(), {}, {'hard': CrossEntropy()}, {'hard.label': 1.}, example=(X, Y)), "nearest: 'hard.labels'"),
    'a temperature of 0': (lambda: Distillation(net(), {'teacher': Teacher(net())}, {'kd': SoftTargets(0.)}, example=(X, Y)), 'temperature'),
    'no objective': (lambda: Distillation(net(), {}, {}), 'no objective')}

@pytest.mark.parametrize('what', WRONG)
def test_refused_when_built(what):
    make, says = WRONG[what]
    with pytest.raises(InputError) as caught: make()
    assert says in str(caught.value) and '\n' not in str(caught.value), str(caught.value)

def test_a_student_without_anything_to_train_is_refused():
    frozen = net().requires_grad_(False)
    with pytest.raises(InputError, match='nothing to train'): train(Distillation(frozen, {}, {'hard': CrossEntropy()}, loader=Batches((X, Y), 8), steps=2))

def test_a_stage_that_trains_nothing_is_refused_before_any_step():
    class Staged(Distillation):
        def stages(self): return [Stage('none', 2, self.loader, trainable=['teacher.*'])]
    student = net()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(InputError, match='no trained parameter matches'): train(Staged(student, {}, {'hard': CrossEntropy()}, loader=Batches((X, Y), 8), steps=2))
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())

def test_teachers_move_with_the_student():
    "A teacher that is a network goes where `train(device=)` sends the student, and is no part of a checkpoint."
    from lowrank_distill.shapes.train import place
    teacher, shadow, student = net(seed=1), net(seed=2), net()
    run = Distillation(student, {'teacher': Teacher(teacher), 'average': Teacher(shadow), 'known': Teacher({0: torch.zeros(3)})},
                       {n: SoftTargets(2., teacher=n) for n in ('teacher', 'average', 'known')}, steps=1)
    place(run, 'meta')
    assert {p.device.type for m in (teacher, shadow, student) for p in m.parameters()} == {'meta'}
    assert list(run.networks()) == ['student', 'objectives'] and run.fixed() == [teacher, shadow]
