"""Ten methods of different kinds, each in a few lines over the public shapes: do the contracts fit methods they were not written for?

A sketch is the core of a method (equation numbers are its paper's), not its page. It uses public names only, and ends in exact statements.
A shape that makes a sketch cast, branch on the method or reach for a private name is to be changed, not the sketch.
"""
import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_distill.adapters.lora import LoRA, kaiming
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.files import load_tensors
from lowrank_distill.core.taps import Tap
from lowrank_distill.data.images import digits
from lowrank_distill.models.small import MLP, accuracy, pretrained
from lowrank_distill.shapes import conform, conform_procedure
from lowrank_distill.shapes.adapter import (
    Adapter, AdapterHandle, AdapterSpec, adapt, adapted, capabilities, load_adapter)
from lowrank_distill.shapes.artefact import (
    DataArtefact, Hard, Known, Labeller, ReplayTransform, densify, exact_pixels, label_views)
from lowrank_distill.shapes.evaluation import Lesson, Protocol, as_logits
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, Needs, Objective, Teacher, look
from lowrank_distill.shapes.procedure import (
    Batches, Optimize, Procedure, Progress, Stage, add_parameters, replace_parameter)
from lowrank_distill.shapes.statistics import SiteStatistics, collect
from lowrank_distill.shapes.train import train

def generator(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)

def randn(*shape: int, seed: int = 0, **options) -> Tensor: return torch.randn(*shape, generator=generator(seed), **options)

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


# smora: every rank is an expert, chosen token by token (an adapter that depends on its input, with a memory of its own)

@dataclass(frozen=True, kw_only=True)
class SMoRA(AdapterSpec):
    method = 'smora'
    kinds = ('linear', 'conv1d_hf')
    rank: int = 4
    active: int = 2
    alpha: float = 16.
    u: float = 1e-3

    def build(self, layer, weight, generator, statistics=None): return SMoRALayer(layer, self, generator)
    def count(self, layer): return self.rank * (2 * layer.inp + layer.out)

class SMoRALayer(Adapter):
    def __init__(self, layer, spec, generator):
        super().__init__(layer, spec)
        self.a, self.router = (nn.Parameter(kaiming((spec.rank, layer.inp), generator)) for _ in range(2))
        self.b, self.k = nn.Parameter(torch.zeros(layer.out, spec.rank)), min(spec.active, spec.rank)
        self.register_buffer('bias', torch.zeros(spec.rank))

    def gates(self, x: Tensor) -> Tensor:
        "(..., rank), k of them not 0, with sum k."
        scores = F.linear(x, self.router).sigmoid() + self.bias
        kept, index = scores.topk(self.k, -1)
        return torch.zeros_like(scores).scatter(-1, index, self.k * kept / kept.sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        if self.training: self.balance((gates != 0).flatten(0, -2).sum(0))
        return self.layer.up(self.spec.alpha / max(1, self.k) * gates * self.layer.down(x, self.a), self.b)

    @torch.no_grad()
    def balance(self, counts: Tensor): self.bias += self.spec.u * (counts.float().mean() - counts).sign()
    def delta(self): return None

def test_sketch_smora():
    net, x = nn.Sequential(nn.Linear(6, 5)), randn(3, 7, 6)
    base, handle = net(x), adapt(net, SMoRA())
    part, = handle.layers.values()
    assert torch.equal(net(x), base)  # identity at start, the bias has moved
    assert part.bias.abs().sum() > 0 and part.spec.count(part.layer) == sum(p.numel() for p in handle.parameters())
    conform.shake(handle, generator(1))
    net.eval()
    seen, gates = net(x), part.gates(x)
    assert torch.equal((gates != 0).sum(-1), torch.full((3, 7), 2))
    close(gates.sum(-1), torch.full((3, 7), 2.))
    def token(v: Tensor) -> Tensor:  # equations of the card, a token at a time
        t = torch.sigmoid(part.router @ v) + part.bias
        best = sorted(range(4), key=lambda i: -t[i])[:2]
        return sum(16 / 2 * 2 * t[i] / sum(t[j] for j in best) * part.b[:, i] * (part.a[i] @ v) for i in best)
    close(seen - base, torch.stack([token(v) for v in x.reshape(-1, 6)]).view(3, 7, 5))
    with torch.no_grad(): part.router.zero_(), part.bias.zero_()
    part.k = 4
    close(net(x) - base, 16 / 4 * x @ part.a.T @ part.b.T)  # all ranks, uniform: LoRA with alpha / r
    part.balance(torch.tensor([3, 1, 3, 1]))
    assert part.bias.tolist() == pytest.approx([-1e-3, 1e-3, -1e-3, 1e-3])
    with pytest.raises(InputError, match='depends on its input'): handle.merge()
    assert capabilities(SMoRA()) == dict(has_delta=False, mergeable=False, input_dependent=True, identity_at_start=True, base_changes=False, needs_statistics=False)
    for promise in (conform.training, conform.files, conform.functional, conform.precisions): promise(lambda r: SMoRA(rank=r, alpha=2.))


# loldu: frozen triangular factors of the weight, only the pivots train (a residual method on a base that is never changed)

@dataclass(frozen=True, kw_only=True)
class LoLDU(AdapterSpec):
    method = 'loldu'
    rank: int = 2
    alpha: float = 1.

    def build(self, layer, weight, generator, statistics=None): return LoLDULayer(layer, self, weight)
    def count(self, layer): return self.rank

class LoLDULayer(Adapter):
    def __init__(self, layer, spec, weight):
        super().__init__(layer, spec)
        p, lower, upper = torch.linalg.lu(weight.double())
        d, r = upper.diagonal(), spec.rank
        for name, t in dict(l=(p @ lower)[:, :r], u=upper[:r] / d[:r, None], z0=d[:r]).items():
            self.register_buffer(name, t.to(weight.dtype), persistent=False)  # functions of the base: no file holds them
        self.z, self.scale = nn.Parameter(self.z0.clone()), spec.alpha / max(1, r)

    def forward(self, x): return self.layer.up(self.layer.down(x, self.u), self.scale * self.l * (self.z - self.z0))
    def delta(self): return self.scale * (self.l * (self.z - self.z0)) @ self.u
    def product(self): return self.u, self.l * (self.z - self.z0), self.scale

def test_sketch_loldu(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad(): net[0].weight.copy_(torch.tensor([[2., 1.], [4., 5.]]))
    part, = adapt(net, LoLDU(rank=1)).layers.values()
    close(part.scale * (part.l * part.z) @ part.u, torch.tensor([[2., 2.5], [4., 5.]]))  # by hand, the card's check 1
    close(net[0].weight - (part.l * part.z0) @ part.u, torch.tensor([[0., -1.5], [0., 0.]]))
    net, plain, x = MLP((6, 8, 4), generator()), MLP((6, 8, 4), generator()), randn(9, 6)
    handle = adapt(net, LoLDU(rank=4))
    assert torch.equal(net(x), plain(x))
    for network in (net, plain): (network(x) - 1).square().mean().backward()
    part = handle.layers['fc2']
    close(part.z.grad, part.scale * ((part.l.T @ plain.fc2.weight.grad) * part.u).sum(1))  # check 4
    with torch.no_grad(): part.z[1] += .5
    close(part.delta(), part.scale * .5 * torch.outer(part.l[:, 1], part.u[1]))  # check 5: one pivot, one direction
    changed, path = net(x), handle.save(tmp_path/'loldu.safetensors')
    assert sorted(load_tensors(path)[0]) == ['fc1:z', 'fc2:z']  # pivots only
    handle.remove()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in net.state_dict().items())
    load_adapter(net, path, LoLDU)
    assert torch.equal(net(x), changed)
    conform.adapter(lambda r: LoLDU(rank=r), examples=3, others=())


# dmd2: three networks, two rates, a loss that one optimizer must not see (a procedure with its own randomness)

class DMD2(Procedure):
    "Generator and fake critic start as the teacher; the critic moves at each step, the generator at every `turn`-th."
    method = 'dmd2'

    def __init__(self, steps: int = 6, turn: int = 3, gan: float = .1):
        self.teacher = MLP((3, 16, 2), generator()).requires_grad_(False)
        self.fake, self.student = (copy.deepcopy(self.teacher).requires_grad_(True) for _ in range(2))
        self.head, self.noise = MLP((16, 1), generator(1)), torch.Generator().manual_seed(2)
        self.slow = torch.optim.AdamW(self.student.parameters(), 1e-2)
        self.fast = torch.optim.AdamW([*self.fake.parameters(), *self.head.parameters()], 2e-2)
        self.steps, self.turn, self.gan = steps, turn, gan

    def networks(self): return dict(teacher=self.teacher, fake=self.fake, head=self.head, student=self.student)
    def optimizers(self): return dict(generator=self.slow, critic=self.fast)
    def schedule(self): return [Optimize('generator', every=self.turn, clip=10.), Optimize('critic', clip=10.)]
    def stages(self): return [Stage('distil', self.steps, Batches(1 + .2 * randn(64, 2, seed=3), 16))]
    def weights(self, at): return dict(generator_gan=self.gan, critic_gan=self.gan)
    def draw(self, n: int) -> tuple[Tensor, Tensor]: return torch.randn(n, 2, generator=self.noise), torch.rand(n, 1, generator=self.noise) * 2 + .1

    def judge(self, x: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        "The discriminator's logits on diffused samples: a head on the fake network's hidden layer."
        taps = [Tap('fc1', name='hidden')]
        return self.head(look(self.fake, {'inputs': noised(x, z, sigma)}, taps).features['hidden'].relu())

    def losses(self, batch, at):
        z, _ = self.draw(len(batch))
        x, (noise, sigma), (other, other_sigma) = self.student(torch.cat([3 * z, torch.full((len(z), 1), 3.)], 1)), self.draw(len(batch)), self.draw(len(batch))
        fake, real = x.detach(), batch
        near = self.fake(noised(fake, other, other_sigma))
        critic = dict(denoise=((near - fake) ** 2 / other_sigma ** 2).mean(),
                      critic_gan=(F.softplus(self.judge(fake, noise, sigma)) + F.softplus(-self.judge(real, noise, sigma))).mean())
        if 'generator' not in self.due(at): return dict(critic=critic)
        with torch.no_grad(): g = toward(x, self.teacher(noised(x, noise, sigma)), self.fake(noised(x, noise, sigma)))
        return dict(critic=critic, generator=dict(matching=.5 * F.mse_loss(x, (x - g).detach()), generator_gan=F.softplus(-self.judge(x, noise, sigma)).mean()))

def noised(x: Tensor, z: Tensor, sigma: Tensor) -> Tensor: return torch.cat([x + sigma * z, sigma], 1)

def toward(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    "The matching gradient, normalised for each sample."
    return ((fake - real) / (x - real).abs().mean(1, keepdim=True)).nan_to_num()

def test_sketch_dmd2():
    x, real, fake = torch.tensor([[1., 2.]], requires_grad=True), torch.tensor([[.5, 1.]]), torch.tensor([[.8, 2.4]])
    g = toward(x.detach(), real, fake)
    loss = .5 * F.mse_loss(x, x.detach() - g)
    loss.backward()
    close(g, torch.tensor([[.4, 1.8666667]])), close(loss.item(), .9111111), close(x.grad, torch.tensor([[.2, .9333333]]))
    close(toward(*(torch.cat([t.detach(), 5 * t.detach()]) for t in (x, real, fake))), torch.cat([g, g]))  # check 3: each sample by its own size
    at = DMD2(gan=0.)
    seen = at.losses(at.stages()[0].loader.batch(0), Progress(0, 6, 'distil', 0, 6))
    assert seen['generator']['matching'].item() == 0  # fake = teacher: nothing to follow, to the bit
    assert not any(p.any() for p in torch.autograd.grad(seen['generator']['matching'], at.student.parameters()))
    made, moved = DMD2(), []
    before, teacher = [copy.deepcopy(made.student.state_dict())], copy.deepcopy(made.teacher.state_dict())
    def watch(at, losses):
        moved.append(any(not torch.equal(v, before[-1][k]) for k, v in made.student.state_dict().items()))
        before.append(copy.deepcopy(made.student.state_dict()))
    run = train(made, progress=watch)
    assert moved == [True, False, False, True, False, False] and run.moments['critic.denoise'] == list(range(6))
    assert all(torch.equal(v, teacher[k]) for k, v in made.teacher.state_dict().items())
    batch, at = randn(16, 2), Progress(0, 6, 'distil', 0, 6)
    made.step(batch, at)
    assert all(p.grad is None for net in made.networks().values() for p in net.parameters())  # no turn leaves a gradient for the other
    conform_procedure.procedure(DMD2, tries=2)


# alm: student and teacher read the same text in different tokens (chunk likelihoods instead of a common vocabulary)

PIECES = {w: 256 + i for i, w in enumerate(['the ', 'th', 'he', ' a', 'in', '. '])}

def as_bytes(text: str) -> list[bytes]: return [bytes([b]) for b in text.encode()]

def as_pieces(text: str) -> list[bytes]:
    "Greedy, longest first."
    out, rest = [], text.encode()
    while rest:
        out.append(next((w.encode() for w in PIECES if rest.startswith(w.encode())), rest[:1]))
        rest = rest.removeprefix(out[-1])
    return out

def number(token: bytes) -> int: return PIECES.get(token.decode('latin-1'), token[0])

def chunks(a: list[bytes], b: list[bytes]) -> list[tuple[slice, slice]]:
    "Where both tokenisations have read the same bytes: parts of `a` and of `b`, two pointers."
    ends = [{sum(map(len, t[:i])): i for i in range(len(t) + 1)} for t in (a, b)]
    both = sorted(ends[0].keys() & ends[1].keys())
    return [tuple(slice(e[x], e[y]) for e in ends) for x, y in zip(both, both[1:], strict=False)]

def collate(texts: list[str]) -> dict[str, Tensor]:
    "Tokens of both readers (n, length), padded with 0, and for each token the number of its chunk (-1: padding)."
    reads = {name: [cut(t) for t in texts] for name, cut in dict(student=as_bytes, teacher=as_pieces).items()}
    parts, batch = [chunks(s, t) for s, t in zip(*reads.values(), strict=True)], {}
    for side, (name, tokens) in enumerate(reads.items()):
        width = max(map(len, tokens))
        batch[name] = torch.tensor([[*map(number, t), *[0] * (width - len(t))] for t in tokens])
        owner = [[c for c, part in enumerate(p) for _ in range(part[side].start, part[side].stop)] for p in parts]
        batch[f'{name}_chunks'] = torch.tensor([[*o, *[-1] * (width - len(o))] for o in owner])
    return batch

class ChunkLikelihood(Objective):
    needs = Needs(batch=frozenset({'student', 'teacher', 'student_chunks', 'teacher_chunks'}))

    def __init__(self, temperature: float = 100.):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teachers, batch, at):
        ours, theirs = (likelihoods(f.logits, batch[n], batch[f'{n}_chunks']) for n, f in dict(student=student, teacher=teachers['teacher']).items())
        valid = torch.arange(ours.shape[1]) <= batch['student_chunks'].amax(1, keepdim=True)
        return {'chunks': binary(theirs[valid], ours[valid], self.temperature).mean()}

def likelihoods(logits: Tensor, tokens: Tensor, owner: Tensor) -> Tensor:
    "Log-likelihood of every chunk, (n, chunks); the first token has no prediction, padding does not count."
    steps = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    total = steps.new_zeros(len(tokens), int(owner.max()) + 2).scatter_add(1, owner[:, 1:] + 1, steps)
    return total[:, 1:].clamp(max=0)

def binary(teacher: Tensor, student: Tensor, temperature: float, eps: float = 1e-6) -> Tensor:
    "Cross-entropy of 'this chunk' against 'anything else', tempered; `log(1 - e^x)` stable."
    t, s = teacher / temperature - eps, student / temperature - eps
    rest = torch.where(s < -math.log(2), torch.log1p(-s.exp()), torch.log(-torch.expm1(s)))
    return -(t.exp() * s + (1 - t.exp()) * rest)

TEXTS = ['the cat in the hat. ', 'a thin hen', 'he hid in a den. ', 'the inn. ', 'then', 'at the end. ']

class Bigrams(nn.Sequential):
    def __init__(self, size: int, seed: int):
        super().__init__(nn.Embedding(size, 8), nn.Linear(8, size))
        with torch.no_grad(): [p.normal_(generator=generator(seed)) for p in self.parameters()]

def alm(steps: int = 6) -> Distillation:
    teacher = Teacher(Bigrams(262, 0), inputs=lambda b: b['teacher'])
    return Distillation(Bigrams(256, 1), {'teacher': teacher}, {'alm': ChunkLikelihood()}, loader=Batches(TEXTS, 3, collate=collate), steps=steps,
                        inputs=lambda b: b['student'], optimizer=partial(torch.optim.AdamW, lr=1e-2), example=collate(TEXTS))

def test_sketch_alm():
    found = chunks([b'Hel', b'lo', b'?', b'\n', b'\n'], [b'Hello', b'?', b'\n\n'])
    assert found == [(slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 2)), (slice(3, 5), slice(2, 3))]  # the card's check 1
    close(binary(torch.tensor(-1.), torch.tensor(-2.), 1., 0.).item(), .8276777)
    same = torch.tensor(-1.3, requires_grad=True)
    assert abs(torch.autograd.grad(binary(torch.tensor(-1.3), same, 100.), same)[0]) < 1e-6
    made, batch = alm(), collate(TEXTS)
    at, seen = Progress(0, 6, 'distil', 0, 6), look(made.student, {'inputs': batch['student']})
    def text(t: str) -> tuple[list[float], list[float]]:  # chunk by chunk, one text at a time
        sums = []
        for model, tokens, side in ((made.student, as_bytes(t), 0), (made.teachers['teacher'].source, as_pieces(t), 1)):
            ids = torch.tensor([*map(number, tokens)])
            p = model(ids[None])[0].log_softmax(-1)
            sums.append([sum(p[i - 1, ids[i]].item() for i in range(c[side].start, c[side].stop) if i) for c in chunks(as_bytes(t), as_pieces(t))])
        return tuple(sums)
    each = [binary(torch.tensor(t), torch.tensor(s), 100.) for s, t in map(text, TEXTS)]
    close(made.terms(batch, at)['alm.chunks'], torch.cat(each).mean())
    ours = likelihoods(seen.logits, batch['student'], batch['student_chunks'])
    whole = seen.logits.log_softmax(-1)[:, :-1].gather(-1, batch['student'][:, 1:, None])[..., 0]
    close(ours.sum(1), (whole * (batch['student_chunks'][:, 1:] >= 0)).sum(1))
    padded = batch | {'student': batch['student'].where(batch['student_chunks'] >= 0, torch.tensor(7))}
    assert torch.equal(made.terms(padded, at)['alm.chunks'], made.terms(batch, at)['alm.chunks'])
    assert (losses := train(alm(20)).losses['student.alm.chunks'])[-1] < losses[0]
    conform_procedure.procedure(alm, tries=2)


class Reinforced(Lesson):
    "A lesson in which an image is now and then (1 - p_r) seen plainly, with its own label: section 3 of the paper."
    p_r = .99

    def batch(self, rows: Tensor, at: Progress) -> dict[str, Tensor]:
        seen = super().batch(rows, at)
        bare = torch.rand(len(rows), generator=self.streams.generator('augment', 'p_r', at.step)) >= self.p_r
        plain = replace(self.artefact, targets=Hard(self.artefact.labels(), 10), views=None).read(rows, rows * 0)
        seen['inputs'][bare] = plain.inputs[bare]
        seen['targets'][bare] = as_logits(F.one_hot(plain.targets, 10).float(), 'probabilities')[bare]
        return seen

def test_sketch_dataset_reinforcement(tmp_path):
    "Dataset reinforcement (Faghri et al. 2023): an ensemble labels 20 views of every image once; students need it no more."
    real, members, calls = digits('train').first(200), [pretrained('digits')] * 2, []
    def ensemble(batch):
        calls.append(len(batch['inputs']))
        return torch.stack([m(batch['inputs']).softmax(1) for m in members]).mean(0).log()  # of probabilities, not of logits
    views = ReplayTransform((('crop', dict(scale=[.6, 1.])), ('shift', dict(pixels=1)), ('erase', {})), seed=1, count=20)
    plain = DataArtefact(exact_pixels(real.images), Hard(real.labels, 10), recipe=dict(method='dataset_reinforcement', top=3))
    made = label_views(plain, Teacher(ensemble), views, top=3)
    again = DataArtefact.load(made.save(tmp_path))
    assert sum(calls) == 200 * 20 and sum(made.bytes()) == sum(p.stat().st_size for p in tmp_path.iterdir())
    rows, view, t = torch.arange(199, -1, -1), torch.randint(20, (200,), generator=generator()), again.targets
    seen = again.read(rows, view)  # any order, from disk: view k of image i with the label of view k of image i
    assert torch.equal(seen.inputs, torch.cat([made.read(*pair).inputs for pair in zip(rows.split(1), view.split(1), strict=True)]))
    assert torch.equal(seen.targets, densify(t.entries[rows, view], t.index[rows, view], 10))
    with torch.no_grad(): top = members[0](seen.inputs).softmax(1).topk(3)
    torch.testing.assert_close(seen.targets.gather(1, top[1]), top[0], atol=1e-3, rtol=0)
    protocol, before = Protocol(test=digits('test'), real=real, steps=150, batch=50, optimizer='adamw', lr=3e-3), sum(calls)
    student = MLP((64, 32, 10), generator())
    losses = train(Reinforced(again, student, protocol, seed=0)).losses['student.soft.soft']
    assert sum(calls) == before and sum(losses[-20:]) < .5 * sum(losses[:20]) and accuracy(student, digits('test')) > .5
    erm = Reinforced(again, student, protocol, seed=0)
    erm.p_r = 0.  # check 6: then the images and labels of plain training
    batch = erm.batch(rows[:9], Progress(0, 1))
    assert torch.equal(batch['inputs'], plain.read(rows[:9], rows[:9] * 0).inputs) and torch.equal(batch['targets'].argmax(1), real.labels[rows[:9]])


# loram: train on a pruned base, act on the full one (an adapter changes its shape, or its base)

def pruned(net: MLP, kept: Tensor) -> MLP:
    "The perceptron with hidden units `kept` only."
    small = MLP((net.sizes[0], len(kept), net.sizes[2]), generator())
    weights = net.state_dict()
    small.load_state_dict({'fc1.weight': weights['fc1.weight'][kept], 'fc1.bias': weights['fc1.bias'][kept],
                           'fc2.weight': weights['fc2.weight'][:, kept], 'fc2.bias': weights['fc2.bias']})
    return small

def recover(handle: AdapterHandle, net: MLP, kept: Tensor) -> AdapterHandle:
    "The same adapters on the full `net`: rows of `b` before the pruned units, columns of `a` after them, zeros elsewhere."
    full = adapt(net, next(iter(handle.layers.values())).spec)
    with torch.no_grad():
        for name, part in full.layers.items():
            small, rows, columns = handle.layers[name], *((kept, slice(None)) if name == 'fc1' else (slice(None), kept))
            part.a.zero_()[:, columns], part.b.zero_()[rows] = small.a, small.b
    return full

def test_sketch_loram(tmp_path):
    whole, kept, x = MLP((6, 10, 3), generator()), torch.tensor([0, 3, 4, 8]), randn(32, 6)
    with torch.no_grad(): silent = copy.deepcopy(whole); silent.fc2.weight[:, [1, 2, 5, 6, 7, 9]] = 0
    for base in (whole, silent):
        small = pruned(base, kept)
        handle = adapt(small, LoRA(rank=2))
        with torch.no_grad(): plain = base(x)
        full = recover(handle, base, kept)
        assert torch.equal(base(x), plain)  # check 1: untrained adapters change nothing
        full.remove()
        fitted = torch.optim.AdamW(handle.parameters(), 1e-2)
        for _ in range(5): fitted.zero_grad(), (small(x) - 1).square().mean().backward(), fitted.step()
        full = recover(handle, base, kept)
        first, last = full.layers['fc1'], full.layers['fc2']
        assert torch.equal(first.b[kept], handle.layers['fc1'].b) and torch.equal(last.a[:, kept], handle.layers['fc2'].a)
        assert torch.equal(first.delta()[kept], handle.layers['fc1'].delta()) and not first.delta()[[1, 2, 5, 6, 7, 9]].any()
        merged = base(x).detach()
        full.merge()
        close(base(x), merged), full.unmerge()
    close(base(x), small(x))  # check 5: pruned units that say nothing
    masked = copy.deepcopy(whole)  # unstructured: equal shapes, other weights; the file knows both
    AdapterHandle(masked, 'default').remove()
    with torch.no_grad(): masked.fc1.weight *= masked.fc1.weight.abs() > .2
    handle = adapt(masked, LoRA(rank=2))
    conform.shake(handle, generator(2))
    path, target = handle.save(tmp_path/'pruned.safetensors'), MLP((6, 10, 3), generator())
    with pytest.raises(InputError, match='another base'): load_adapter(target, path)
    full = load_adapter(target, path, base='rebase')
    assert all(torch.equal(p.delta(), handle.layers[n].delta()) for n, p in full.layers.items())


# codyra: a sequence of tasks; ranks die while a task is learned, the rest goes into the base (tensors come, shrink and go)

@dataclass(frozen=True, kw_only=True)
class Gated(AdapterSpec):
    method = 'codyra'
    rank: int = 4

    def build(self, layer, weight, generator, statistics=None): return GatedLayer(layer, self, generator)
    def count(self, layer): return self.rank * (layer.inp + layer.out + 1)

class GatedLayer(Adapter):
    def __init__(self, layer, spec, generator):
        super().__init__(layer, spec)
        self.a, self.b = nn.Parameter(kaiming((spec.rank, layer.inp), generator)), nn.Parameter(torch.zeros(layer.out, spec.rank))
        self.gate = nn.Parameter(torch.randn(spec.rank, generator=generator))

    def forward(self, x): return self.layer.up(self.layer.down(x, self.a), self.b * self.gate)
    def delta(self): return self.b * self.gate @ self.a

    def prune(self, optimizer: torch.optim.Optimizer):
        "Ranks whose gate is 0 go, with what the optimizer knows of them."
        keep = self.gate.detach().nonzero().flatten()
        for name, dim in dict(a=0, b=1, gate=0).items():
            old = getattr(self, name)
            setattr(self, name, replace_parameter(optimizer, old, nn.Parameter(old.detach().index_select(dim, keep)), keep={dim: keep}))
        self.spec = self.spec.at(rank=len(keep))

class CoDyRA(Procedure):
    method = 'codyra'

    def __init__(self, steps: int = 6, kappa: float = .2):
        self.net, self.steps, self.kappa, self.ranks = MLP((4, 6, 3), generator()), steps, kappa, []
        self.adam = torch.optim.AdamW([dict(params=[])], 2e-2, weight_decay=0.)  # each task brings its own parameters

    def networks(self): return dict(net=self.net)
    def optimizers(self): return dict(adapter=self.adam)
    def stages(self):
        data = [(randn(24, 4, seed=k), torch.randint(3, (24,), generator=generator(9 + k))) for k in range(3)]
        return [Stage(f'task {k}', self.steps, Batches(d, 8), on_enter=partial(self.begin, k)) for k, d in enumerate(data)]
    def losses(self, batch, at): return dict(adapter=dict(labels=F.cross_entropy(self.net(batch[0]), batch[1])))

    def begin(self, task: int):
        "The last task's update into the base, a fresh adapter, a fresh optimizer."
        if task: self.finish()
        self.attach({}, task)

    def attach(self, ranks: dict[str, int], task: int = 0):
        self.handle = adapt(self.net, Gated(), rank_pattern={n: r for n, r in ranks.items()} | {'fc2': ranks.get('fc2', 3)}, seed=task)
        self.adam.param_groups[0]['params'].clear(), self.adam.state.clear()
        add_parameters(self.adam, self.handle.parameters())

    def finish(self):
        self.handle.merge()
        self.handle.remove(keep_merged=True)

    def after_step(self, at):
        "After a dense half: soft threshold, rising; ranks at 0 are taken out."
        dense = at.stage_steps // 2
        if at.stage_step < dense: return
        kappa = self.kappa * (at.stage_step - dense + 1) / (at.stage_steps - dense)
        for part in self.handle.layers.values():
            with torch.no_grad(): part.gate.copy_(part.gate.sign() * (part.gate.abs() - kappa).clamp(min=0))
            part.prune(self.adam)
        self.ranks.append([len(part.gate) for part in self.handle.layers.values()])

    def state(self): return dict(ranks=self.ranks)
    def load_state(self, state): self.ranks = state['ranks']
    def grow_to(self, shapes):
        at = 'net.', '.adapters.default.gate'
        ranks = {k.removeprefix(at[0]).removesuffix(at[1]): s[0] for k, s in shapes.items() if k.endswith(at[1])}
        if adapted(self.net): self.handle.remove()
        self.attach(ranks)

def test_sketch_codyra():
    made, at = CoDyRA(), Progress(0, 18, 'task 0', 0, 6)
    made.begin(0), made.step(made.stages()[0].loader.batch(0), at)
    part, adam = made.handle.layers['fc1'], made.adam
    knew = adam.state[part.a]['exp_avg'], adam.state[part.b]['exp_avg']
    with torch.no_grad(): part.gate[1] = 0
    part.prune(adam)  # one of the inner ranks
    assert torch.equal(adam.state[part.a]['exp_avg'], knew[0][[0, 2, 3]]) and torch.equal(adam.state[part.b]['exp_avg'], knew[1][:, [0, 2, 3]])
    made, before, x = CoDyRA(), CoDyRA().net.state_dict(), randn(9, 4)
    plain, seen = made.net(x).detach(), []
    def watch(at, losses):
        with made.handle.use():
            if at.stage_step == 0: seen.append(made.net(x).detach())
    run = train(made, progress=watch)
    assert torch.equal(seen[0], plain)  # the base of the first task is the given one, to the bit, and that of the others no longer
    assert not torch.equal(seen[1], plain) and not torch.equal(seen[2], seen[1])
    assert run.steps == 18 and made.ranks[0] != made.ranks[2] and all(min(r) >= 0 for r in made.ranks)
    assert [len(p.gate) for p in made.handle.layers.values()] == made.ranks[-1] == made.handle.table()['rank'].tolist()
    close(torch.linalg.matrix_rank(made.handle.layers['fc1'].delta()), torch.tensor(made.ranks[-1][0]))
    out, update = made.net(x), {n: p.delta() for n, p in made.handle.layers.items()}
    base = {n: made.net.get_parameter(f'{n}.weight').clone() for n in update}
    made.finish()
    close(made.net(x), out)
    assert list(made.net.state_dict()) == list(before)  # any number of tasks later: the network's own tensors
    for n, d in update.items(): close(made.net.get_parameter(f'{n}.weight'), base[n] + d)
    conform_procedure.procedure(partial(CoDyRA, 4), tries=2)


# clora: several adapters, each in a pass of its own over one latent (a sampler that switches adapters and looks inside)

class Denoiser(nn.Module):
    "Latent (n, places, width) and text (n, tokens, width) to a noise prediction; one cross-attention."
    def __init__(self, width: int = 4):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attend = nn.Softmax(-1)
        with torch.no_grad(): [p.normal_(generator=generator(3), std=.7) for p in self.parameters()]

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        return z + self.attend(self.query(z) @ self.key(text).mT) @ self.value(text)

def contrast(maps: Tensor, concept: Tensor, tau: float = .5) -> Tensor:
    "InfoNCE over attention maps (maps, places), scaled to [0, 1]; other positives are not in the denominator."
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    s = F.normalize((maps - low) / (high - low).clamp(min=1e-8), dim=1)
    s = (s @ s.T / tau).exp()
    same = concept[:, None] == concept
    negative = (s * ~same).sum(1, keepdim=True)
    pairs = same & ~torch.eye(len(maps), dtype=torch.bool)
    return -(s / (s + negative)).log()[pairs].mean()

def passes(handle: AdapterHandle, z: Tensor, texts: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    "For the base ('') and each adapter: its noise prediction, and how it attends (places, tokens)."
    found = {}
    for name, text in texts.items():
        with handle.use(*([name] if name else [])): seen = look(handle.model, {'z': z, 'text': text}, [Tap('attend')])
        found[name] = seen.logits, seen.features['attend'][0]
    return found

def compose(handle: AdapterHandle, z: Tensor, texts: dict[str, Tensor], tokens: dict[str, int], alpha: float, masks: bool, steps: int = 2) -> Tensor:
    "Denoise `z`: the latent follows the contrast of the maps, predictions are joined where their adapter looks."
    for _ in range(steps):
        z = z.detach().requires_grad_()
        seen = passes(handle, z, texts)
        if alpha:
            maps = torch.stack([seen[n][1][:, t] for n in texts for t in tokens.values()])
            z = z - alpha * torch.autograd.grad(contrast(maps, torch.arange(len(tokens)).repeat(len(texts))), z)[0]
        over = {n: seen[n][1][:, t] > .3 * seen[n][1][:, t].max() if masks else torch.ones(z.shape[1]) for n, t in tokens.items()}
        if '' in texts: over[''] = ~torch.stack([*over.values()]).any(0) if masks else torch.ones(z.shape[1])
        weight = {n: m.float()[:, None] for n, m in over.items()}
        z = z - .1 * sum(weight[n] * seen[n][0] for n in texts) / sum(weight.values())
    return z.detach()

def test_sketch_clora():
    hot = torch.eye(2)[[0, 0, 1, 1]]
    close(contrast(hot, torch.tensor([0, 0, 1, 1])).item(), math.log(math.e ** 2 + 2) - 2)  # by hand, check 1
    close(contrast(hot[[0, 0, 0, 0]], torch.tensor([0, 0, 1, 1])).item(), math.log(3.))
    net, z, texts = Denoiser(), randn(1, 6, 4), {n: randn(1, 3, 4, seed=k) for k, n in enumerate(['', 'dog', 'cat'], 5)}
    handles = {n: adapt(net, LoRA(rank=2), name=n, seed=k) for k, n in enumerate(['dog', 'cat', 'style'])}
    for k, h in enumerate(handles.values()): conform.shake(h, generator(k))
    handle, before, out = handles['dog'], copy.deepcopy(net.state_dict()), net(z, texts['dog'])
    tokens = dict(dog=0, cat=1)
    with handle.use('dog'): alone = net(z, texts['dog'])
    with handle.use(): nothing = net(z, texts[''])
    assert torch.equal(passes(handle, z, texts)['dog'][0], alone) and torch.equal(passes(handle, z, texts)[''][0], nothing)
    one = compose(handle, z, {'dog': texts['dog']}, {'dog': 0}, 0., False, steps=1)
    close(one, (z - .1 * alone).detach())  # one adapter, full mask: plain sampling
    both = compose(handle, z, texts, tokens, 0., False, steps=1)
    close(both, (z - .1 * sum(p for p, _ in passes(handle, z, texts).values()) / 3).detach())  # no update, no masks: the mean of the passes
    composed = compose(handle, z, texts, tokens, .5, True)
    assert not torch.equal(composed, compose(handle, z, texts, tokens, 0., True))
    net.double()
    wide = {n: t.double() for n, t in texts.items()}
    def value(z: Tensor) -> Tensor: return contrast(torch.stack([passes(handle, z, wide)[n][1][:, t] for n in wide for t in tokens.values()]), torch.arange(2).repeat(3))
    assert torch.autograd.gradcheck(value, z.double().requires_grad_(), atol=1e-5)
    net.float()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(net(z, texts['dog']), out)
    with handle.use('dog', 'style', weights=[1., .8]): styled = net.query(z)
    parts = [h.layers['query'].delta() for h in (handles['dog'], handles['style'])]
    close(styled, F.linear(z, net.query.weight + parts[0] + .8 * parts[1], net.query.bias))


# lora_sb: a gradient pass before the first step fixes where training may go (an adapter that needs statistics)

@dataclass(frozen=True, kw_only=True)
class LoRASB(AdapterSpec):
    method = 'lora_sb'
    needs_statistics = True
    rank: int = 2
    eta: float = 1e-3

    def build(self, layer, weight, generator, statistics=None): return LoRASBLayer(layer, self, statistics)
    def count(self, layer): return self.rank ** 2

class LoRASBLayer(Adapter):
    def __init__(self, layer, spec, statistics):
        super().__init__(layer, spec)
        step = torch.zeros(layer.out, layer.inp) if statistics is None else -spec.eta * statistics.gradient.sign()
        u, s, v = torch.linalg.svd(step, full_matrices=False)
        self.register_buffer('b', u[:, :spec.rank].contiguous()), self.register_buffer('a', v[:spec.rank].contiguous())
        self.r = nn.Parameter(s[:spec.rank].diag())

    def forward(self, x): return self.layer.up(self.layer.down(x, self.r @ self.a), self.b)
    def delta(self): return self.b @ self.r @ self.a
    def product(self): return self.r @ self.a, self.b, 1.

def entropy(model: nn.Module, batch: dict) -> Tensor: return F.cross_entropy(model(batch['inputs']), batch['labels'])

def test_sketch_lora_sb(tmp_path):
    net, x, y = MLP((6, 8, 4), generator()), randn(20, 6), torch.arange(20) % 4
    found = collect(net, [(x[:16], y[:16]), (x[16:], y[16:])], {'gradient'}, loss=entropy)  # a short last batch
    plain = MLP((6, 8, 4), generator())
    F.cross_entropy(plain(x), y).backward()
    for n in found: close(found[n].gradient, plain.get_parameter(f'{n}.weight').grad)
    handle = adapt(net, LoRASB(), statistics=found)
    for n, part in handle.layers.items():
        eye, sign = torch.eye(2), 1e-3 * found[n].gradient.sign()
        close(part.b.T @ part.b, eye), close(part.a @ part.a.T, eye)  # check 1
        close((part.delta() + sign).norm(), torch.linalg.svdvals(sign)[2:].norm())  # check 2: the best of rank 2
        assert (part.delta() * found[n].gradient).sum() < 0  # downhill
    F.cross_entropy(net(x), y).backward()
    moved = MLP((6, 8, 4), generator())
    with torch.no_grad(): [moved.get_parameter(f'{n}.weight').add_(p.delta()) for n, p in handle.layers.items()]
    F.cross_entropy(moved(x), y).backward()
    for n, part in handle.layers.items(): close(part.r.grad, part.b.T @ moved.get_parameter(f'{n}.weight').grad @ part.a.T)  # check 4
    scaled = {n: SiteStatistics(n, s.shape, s.rows, s.weight, {'gradient': 100 * s.gradient}) for n, s in found.items()}
    other = adapt(MLP((6, 8, 4), generator()), LoRASB(), statistics=scaled)
    assert all(torch.equal(other.layers[n].delta(), p.delta()) for n, p in handle.layers.items())  # check 7
    with pytest.raises(InputError, match='needs statistics'): adapt(plain, LoRASB())
    with pytest.raises(InputError, match='no .gradient.'): adapt(plain, LoRASB(), statistics=collect(plain, [x], {'second_moment'}))
    out = net(x)
    loaded = load_adapter(MLP((6, 8, 4), generator()), handle.save(tmp_path/'sb.safetensors'), LoRASB)  # a file needs no second gradient pass
    assert torch.equal(loaded.model(x), out)
    can = capabilities(LoRASB(eta=.1), statistics=lambda net, x: collect(net, [(x, torch.arange(6))], {'gradient'}, loss=entropy))
    assert can['needs_statistics'] and can['mergeable'] and not can['identity_at_start'] and not can['base_changes']


# hello: labels are a function of the image, a frozen network with a low-rank update (an artefact with a labeller)

def projector(parts: dict[str, Tensor]):
    "The embedded network with its stored low-rank update merged: from inputs to logits."
    net = pretrained('digits').eval()
    with torch.no_grad():
        for n in ('fc1', 'fc2', 'fc3'): net.get_parameter(f'{n}.weight').add_(parts[f'{n}.b'] @ parts[f'{n}.a'])
    return torch.no_grad()(net)

def test_sketch_hello(tmp_path):
    net, real, images = pretrained('digits'), digits('train').first(256), digits('train').first(20).images
    plain, weak = net(images).detach(), [MLP((64, 16, 10), generator(k)) for k in range(3)]
    handle = adapt(net, LoRA(rank=2, alpha=2.))
    assert torch.equal(net(images), plain)  # check 1: at the start it is the foundation model
    answer = Teacher(lambda b: torch.stack([w(b['inputs']) for w in weak]).mean(0))
    made = Distillation(net, {'weak': answer}, {'logits': Logits('weak'), 'truth': CrossEntropy()}, loader=Batches((real.images, real.labels), 64), steps=8,
                        optimizer=partial(torch.optim.AdamW, lr=1e-2), example=(real.images[:4], real.labels[:4]))
    train(made)
    parts = {f'{n}.{k}': t.detach() for n, p in handle.layers.items() for k, t in zip('ab', p.product()[:2], strict=True)}
    known, labels = Known(models={'projector': projector}), Labeller('projector', 10, form='logits', parts=parts)
    artefact = DataArtefact(exact_pixels(images), labels, views=ReplayTransform((('shift', dict(pixels=1)),), seed=1), known=known)
    again, rows = DataArtefact.load(artefact.save(tmp_path), known), torch.arange(20)
    seen = again.read(rows, torch.full((20,), 3))
    close(seen.targets, net(seen.inputs))  # labels of the view that is asked about, not of the stored image
    assert not torch.equal(seen.inputs, images)
    stored = sum(p.numel() for p in handle.parameters())
    assert stored == 2 * (64 + 128 + 128 + 128 + 128 + 10) and 4 * stored <= artefact.bytes().targets < 4 * stored + 2000
    more = DataArtefact(exact_pixels(real.images), labels, known=known)
    assert abs(more.bytes().targets - artefact.bytes().targets) < 100  # check 7: no label grows with images or views
    twin = copy.deepcopy(net)
    at, batch = Progress(0, 1, 'check', 0, 1), {'inputs': seen.inputs, 'targets': seen.targets}
    same = Distillation(twin, {'artefact': Teacher(lambda b: b['targets'])}, {'mse': Logits('artefact')}, steps=1)
    assert same.terms(batch, at)['mse.mse'] < 1e-9  # check 8: a student that is the projector

class Logits(Objective):
    "Mean squared error of logits."
    def __init__(self, teacher: str):
        super().__init__()
        self.teacher, self.needs = teacher, Needs(teachers={teacher: ()})

    def forward(self, student, teachers, batch, at): return {'mse': F.mse_loss(student.logits, teachers[self.teacher].logits)}
