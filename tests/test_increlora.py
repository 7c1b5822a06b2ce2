"""What the page of IncreLoRA does not show: every promise of adapters and procedures, in all variants, and what is refused."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.allocation.increlora import (
    Growth, IncreLoRA, PruningAllocator, RankAllocator, orthogonality, reserve)
from lowrank_distill.core.errors import InputError, RunFailed
from lowrank_distill.shapes import conform, conform_procedure
from lowrank_distill.shapes.adapter import adapt, load_adapter
from lowrank_distill.shapes.allocation import rank_pattern
from lowrank_distill.shapes.procedure import Batches
from lowrank_distill.shapes.train import train

VARIANTS = {'advance': dict(multi_lr=True), 'cold': dict(advance=False), 'random': dict(order='random'),
            'per_element': dict(form='per_element', unit='parameters', target=45 + 34), 'pruned': dict(pruned=True)}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def make(advance=True, pruned=False, multi_lr=False, form='concatenated', steps=12, warmup=2, target=8, **options) -> Growth:
    "A small run whose ranks move; the budget ends within it."
    net, g = network(), torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=g), torch.randn(40, 3, generator=g)
    if pruned: allocator = PruningAllocator(adapt(net, IncreLoRA(rank=3, alpha=4.)), 5, start=2, stop=9, interval=2)
    else:
        allocator = RankAllocator(adapt(net, IncreLoRA(alpha=4., advance=advance)), target, warmup=warmup, interval=2, top_h=1,
                                  add_r=2, **options)
    return Growth(allocator, lambda b: F.mse_loss(net(b[0]), b[1]), Batches(data, 8), steps=steps, lr=1e-2, multi_lr=multi_lr,
                  form=form)


def test_adapter():
    conform.adapter(IncreLoRA, examples=15)


@pytest.mark.parametrize('name', VARIANTS)
def test_procedure(name):
    conform_procedure.procedure(lambda: make(**VARIANTS[name]))


@pytest.mark.parametrize('name', VARIANTS)
def test_budget(name):
    "At the end only what the budget pays for is left, in the layers and in the optimizer."
    run = make(**VARIANTS[name])
    train(run)
    parts = run.handle.layers.values()
    held = {id(p) for group in run.optimizer.param_groups for p in group['params']}
    assert held == {id(p) for p in run.handle.parameters()} == {id(p) for part in parts for p in part.parameters()}
    assert sum(p.numel() for p in run.handle.parameters()) == sum(part.spec.count(part.layer) for part in parts)
    spent = sum(run.allocator.costs[n] * part.rank_now for n, part in run.allocator.layers.items())
    cheapest = min(run.allocator.costs.values())
    assert run.allocator.target - cheapest < spent <= run.allocator.target


def test_half_grown_is_saved(tmp_path):
    "An adapter with reserves comes back with them."
    net, g, x = network(), torch.Generator().manual_seed(1), torch.randn(4, 6)
    handle = adapt(net, IncreLoRA())
    for part in handle.layers.values(): reserve(part, 2, g)
    with torch.no_grad(): [part.e[0].fill_(.3) for part in handle.layers.values()]
    out, path = net(x), handle.save(tmp_path/'half.safetensors')
    handle.remove()
    again = load_adapter(net, path)
    assert torch.equal(net(x), out) and {p.spec.reserves for p in again.layers.values()} == {2}
    assert all(not p.e[2].requires_grad and p.e[0].requires_grad for p in again.layers.values())


def test_pattern():
    "The ranks that growth found shape a fresh LoRA."
    run = make()
    train(run)
    found, pattern = run.handle.ranks(), rank_pattern(run.handle)
    assert adapt(network(), LoRA(rank=1), rank_pattern=pattern).ranks() == found and len(set(found.values())) > 1


def test_refused():
    handle = adapt(network(), IncreLoRA())
    for wrong in (dict(target=3), dict(target=8, norm='rot'), dict(target=8, order='best'), dict(target=8, unit='bytes'),
                  dict(target=8, top_h=0)):
        with pytest.raises(InputError): RankAllocator(handle, **wrong)
    with pytest.raises(InputError): PruningAllocator(handle, 3, start=0, stop=5)
    with pytest.raises(InputError): orthogonality(handle.layers.values(), 'each')
    with pytest.raises(RunFailed, match='did not move'): train(make(warmup=50))
