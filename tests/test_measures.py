"""Spectra and calibration against brute force, and what must be refused."""
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowrank_distill.adapters.dylora import DyLoRA
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.analysis.calibration import (
    agreement, class_gaps, entropy, fit_temperature, honest_ece, reliability)
from lowrank_distill.analysis.spectra import (
    adapter_updates, gradients, leading_overlap, mean_gradients, updates, weights)
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.linalg import energy_rank
from lowrank_distill.shapes.adapter import adapt

def drawn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


# Spectra

def test_weights_are_those_of_the_matrices():
    net = nets()
    found = weights(net)
    assert torch.allclose(found.singular['0'], torch.linalg.svdvals(net[0].weight.detach().double().reshape(4, 9))) and found.shapes['0'] == (4, 9)
    row = found.table(rank=1).iloc[1]
    s = torch.linalg.svdvals(net[3].weight.detach().double())
    assert row.energy_rank == int(energy_rank(s)) and math.isclose(row.norm, s.norm().item()) and math.isclose(row.stable_rank, (s.square().sum() / s[0] ** 2).item())
    assert math.isclose(row.top, (s[0] ** 2 / s.square().sum()).item()) and math.isnan(row.noise)

def test_gradients_are_averages_and_leave_nothing():
    net = nets()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    batches = [drawn(4, 1, 8, 8, seed=i) for i in range(3)]
    def loss(x): return net(x).square().mean()
    found = mean_gradients(net, loss, batches)
    assert not net[0].weight.requires_grad and (net[3].weight.grad == 1).all() and net[0].weight.grad is None
    net[0].weight.requires_grad_()
    by_hand = sum(torch.autograd.grad(loss(x), net[0].weight)[0] for x in batches) / 3
    torch.testing.assert_close(found['0'].float(), by_hand.reshape(4, 9))

def test_the_rank_of_a_gradient_is_at_most_the_batch():
    layer, x = nn.Linear(20, 30), drawn(5, 20)
    s = gradients(layer, lambda b: layer(b).tanh().square().sum(), [x]).singular['']
    assert s[4] > 1e-6 * s[0] > 0 and (s[5:] < 1e-6 * s[0]).all()

@pytest.mark.parametrize('spec', [LoRA(rank=2), LoRA(rank=3, rslora=True), DyLoRA(max_rank=2, min_rank=1)], ids=['lora', 'rslora', 'dylora'])
def test_updates_of_adapters_are_those_of_the_merged_weights(spec):
    net, base = nets(), nets()
    handle = adapt(net, spec)
    with torch.no_grad(): [p.normal_(generator=torch.Generator().manual_seed(i)) for i, p in enumerate(handle.parameters())]
    thin = adapter_updates(handle)
    handle.merge()
    dense = updates(net, base)
    for n, s in thin.singular.items():
        torch.testing.assert_close(s, dense.singular[n][:len(s)], rtol=1e-4, atol=1e-4)
        assert (dense.singular[n][len(s):] < 1e-5 * s[0]).all() and thin.shapes[n] == dense.shapes[n]

def test_a_language_model_and_its_embedding():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    found = gradients(model, lambda b: model(b, labels=b).loss, [tokens], ['*.attn.*', '*.wte'])
    assert set(found.shapes) == {'transformer.h.0.attn.c_attn', 'transformer.h.0.attn.c_proj', 'transformer.wte'} and found.shapes['transformer.wte'] == (8, 20)
    fig, frame = found.figure(torch.Generator().manual_seed(0))
    assert set(frame.layer) == set(found.shapes) and frame.kept.between(0, 1 + 1e-9).all() and fig.layout.title.text

def test_noise_looks_like_noise():
    net = nn.Linear(60, 60)
    with torch.no_grad(): net.weight.copy_(drawn(60, 60))
    row = weights(net).table(generator=torch.Generator().manual_seed(1)).iloc[0]
    assert abs(row.energy_rank - row.noise) <= 2

def test_overlap_of_spans():
    a = drawn(10, 6)
    assert math.isclose(leading_overlap(a, a @ drawn(6, 6, seed=1), 6)[0], 1, abs_tol=1e-9)
    q = torch.linalg.qr(drawn(10, 10))[0]
    assert leading_overlap(q[:, :3], q[:, 3:6], 3)[0] < 1e-9 and leading_overlap(a, a, 4)[1] == .4

@pytest.mark.parametrize(('wrong', 'says'), [
    (lambda: weights(nets(), 'nothing'), 'nothing'), (lambda: updates(nets(), nets()[:2]), "no layer '3'"),
    (lambda: gradients(nets(), lambda b: b.sum(), []), 'no batch'), (lambda: weights(nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight.fill_(math.nan))), 'not finite')])
def test_spectra_refused(wrong, says):
    with pytest.raises(InputError, match=says): wrong()


# Calibration

def loop_ece(logits, labels, bins):
    "Bin by bin, image by image."
    p = logits.double().softmax(1)
    total = 0.
    for b in range(bins):
        here = [i for i in range(len(p)) if (b / bins < p[i].max() <= (b + 1) / bins)]
        if here: total += abs(sum((p[i].argmax() == labels[i]).item() for i in here) - sum(p[i].max().item() for i in here)) / len(p)
    return total

@pytest.mark.parametrize('bins', [1, 3, 15])
def test_ece_is_the_plain_loop(bins):
    logits, labels = 2 * drawn(200, 4), torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))
    found = reliability(logits, labels, bins)
    assert math.isclose(found.ece, loop_ece(logits, labels, bins), abs_tol=1e-12) and found.bins['count'].sum() == 200 and found.worst >= found.ece - 1e-12

def test_bins_of_equal_mass():
    found = reliability(drawn(100, 5), torch.zeros(100, dtype=torch.long), 10, 'mass')
    assert found.bins['count'].between(9, 11).all()

def test_extreme_logits_are_finite():
    logits = torch.tensor([[1e4, -1e4], [0., 0.], [-1e4, 1e4]])
    found = reliability(logits, torch.tensor([0, 1, 0]))
    assert math.isfinite(found.ece) and entropy(logits).isfinite().all() and math.isfinite(agreement(logits, logits.flip(1), torch.tensor([0, 1, 0]))['distance'])

def test_honest_logits_are_within_their_own_null():
    logits = 2 * drawn(2000, 6)
    g = torch.Generator().manual_seed(7)
    honest = [reliability(logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]).ece for _ in range(40)]
    null = honest_ece(logits, torch.Generator().manual_seed(4), 100)
    assert abs(sum(honest) / 40 / null.mean() - 1) < .15
    assert reliability(3 * logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]).ece > 2 * null.max()

def test_temperature_is_the_minimum():
    logits = 5 * drawn(500, 4)
    labels = torch.multinomial((logits / 5).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    T = fit_temperature(logits, labels)
    def cost(t): return nn.functional.cross_entropy(logits.double() / t, labels).item()
    assert all(cost(T) <= cost(t) for t in (T * .98, T * 1.02, 1., 5.)) and abs(T - 5) < 1

def test_agreement_by_brute_force():
    a, b, labels = drawn(300, 3), drawn(300, 3, seed=1), torch.randint(3, (300,), generator=torch.Generator().manual_seed(2))
    found, x, y = agreement(a, b, labels), a.argmax(1), b.argmax(1)
    chance = 0.
    for c in range(3):
        here = labels == c
        chance += here.double().mean().item() * sum((x[here] == k).double().mean().item() * (y[here] == k).double().mean().item() for k in range(3))
    assert math.isclose(found['agree'], (x == y).double().mean().item()) and math.isclose(found['chance'], chance)
    assert abs(found['kappa']) < .15 and math.isclose(found['same_mistakes'], (x == y)[x != labels].double().mean().item())

def test_gaps_sum_to_the_gap():
    s, t, labels = drawn(500, 4), drawn(500, 4, seed=1), torch.randint(3, (500,), generator=torch.Generator().manual_seed(2))
    gaps = class_gaps(s, t, labels, list('abcd'))
    total = (s.argmax(1) == labels).double().mean() - (t.argmax(1) == labels).double().mean()
    assert list(gaps.name) == list('abc') and math.isclose((gaps.gap * gaps.images).sum() / 500, total.item(), abs_tol=1e-12)

@pytest.mark.parametrize(('wrong', 'says'), [
    (lambda: reliability(torch.zeros(3), torch.zeros(3)), 'logits and labels'), (lambda: reliability(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), 'no sample'),
    (lambda: reliability(torch.zeros(2, 2), torch.tensor([0, 2])), 'no class'), (lambda: reliability(torch.zeros(2, 2), torch.tensor([0, 1]), 0), 'bins'),
    (lambda: agreement(torch.zeros(2, 2), torch.zeros(2, 3), torch.tensor([0, 1])), '2 and 3'), (lambda: class_gaps(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 1]), ['a']), 'names')])
def test_calibration_refused(wrong, says):
    with pytest.raises(InputError, match=says): wrong()
