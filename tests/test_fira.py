"""Fira: what it adds to GaLore, its ablations, and its state."""
import copy

import pytest
import torch
from lowrank_distill.core.errors import InputError
from lowrank_distill.optimizers.fira import Fira, factors, limit, residual, stretch
from lowrank_distill.optimizers.galore import GaLore, adam, basis, galore_groups, project, side
from lowrank_distill.shapes.train import train
from test_galore import SHAPES, Model, Stop, Words, assert_same, followed, gradients, walk
from torch import nn

def official(grads: list[torch.Tensor], *, rank: int, gap: int, lr: float, alpha: float, gamma: float = 1.01, betas=(.9, .999)) -> torch.Tensor:
    "The update as the official code writes it, with loops over columns or rows, from a matrix of ones."
    w, m, v, rho = torch.ones_like(grads[0]), 0., 0., None
    for t, grad in enumerate(grads):
        if t % gap == 0: held = basis(grad, rank)
        low = project(grad, held)
        m, v = betas[0] * m + (1 - betas[0]) * low, betas[1] * v + (1 - betas[1]) * low**2
        n = m / (v.sqrt() + 1e-6)
        size = lr * (1 - betas[1]**(t + 1))**.5 / (1 - betas[0]**(t + 1))
        def up(x, held=held): return alpha * (x @ held['right'] if 'right' in held else held['left'] @ x)
        s = grad - up(low)
        if low.shape[0] < low.shape[1]: s = torch.stack([s[:, j] * n[:, j].norm() / (low[:, j].norm() + 1e-8) for j in range(s.shape[1])], 1)
        else: s = torch.stack([s[i] * n[i].norm() / (low[i].norm() + 1e-8) for i in range(len(s))])
        if rho is not None: s = s / (max(s.norm() / (rho + 1e-8), gamma) / gamma)
        rho = s.norm()
        w = w - size * (up(n) + s)
    return w

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('alpha', [.25, 1.])
def test_step_by_step_as_written_with_loops(shape, alpha):
    grads = gradients(shape, 8)
    ours, _ = followed(lambda p: Fira(p, .01, rank=2, gap=3, scale=alpha), grads)
    torch.testing.assert_close(ours.detach(), official(grads, rank=2, gap=3, lr=.01, alpha=alpha), atol=1e-5, rtol=0)

@pytest.mark.parametrize('shape', [(9, 5), (5, 9)])
def test_full_rank_is_galore(shape):
    grads, options = gradients(shape, 6), dict(rank=5, scale=1., gap=2)
    torch.testing.assert_close(followed(lambda p: Fira(p, .01, **options), grads)[0], followed(lambda p: GaLore(p, .01, **options), grads)[0], atol=1e-6, rtol=0)

@pytest.mark.parametrize('option', [dict(residual='none'), dict(residual='paper'), dict(level='none'), dict(level='matrix'), dict(gamma=None)])
def test_every_ablation_changes_the_steps(option):
    grads = gradients((9, 5), 6)
    plain, changed = followed(lambda p: Fira(p, .01, rank=2, gap=3), grads)[0], followed(lambda p: Fira(p, .01, rank=2, gap=3, **option), grads)[0]
    assert (plain - changed).abs().max() > 1e-4
    if option == dict(residual='none'): assert torch.equal(changed, followed(lambda p: GaLore(p, .01, rank=2, gap=3), grads)[0])

@pytest.mark.parametrize('shape', SHAPES)
def test_the_outside_stays_outside(shape):
    grad, = gradients(shape, 1)
    held = basis(grad, 2)
    low = project(grad, held)
    n, _ = adam(low, dict(step=1), dict(lr=1.) | GaLore.OPTIONS)
    rest = residual(grad, low, held)
    s = factors(n, low, side(shape)) * rest
    assert project(s, held).norm() < 1e-5 < rest.norm()
    assert factors(n, low, side(shape)).shape == ((1, 9) if shape == (5, 9) else (shape[0], 1))

def test_limiter_remembers_the_limited_norm():
    rho, norms = torch.zeros(()), []
    for norm in (1., 1.5, 1.005, 3., .2, 0., 7.):
        s, rho = limit(torch.tensor([norm, 0.]), rho)
        norms.append(rho.item())
        assert s.norm().item() == pytest.approx(norms[-1])
    assert norms == pytest.approx([1., 1.01, 1.005, 1.01505, .2, 0., 7.])

def test_zero_gradients_do_not_block_for_long():
    grads = gradients((9, 5), 4)
    w, opt = followed(lambda p: Fira(p, .01, rank=2), [grads[0], torch.zeros(9, 5), torch.zeros(9, 5)])
    assert w.isfinite().all() and opt.state[w]['rho'] == 0
    w.grad = grads[1]
    opt.step()
    assert opt.state[w]['rho'] > .1

def test_a_small_first_residual_throttles():
    grads = [g * (1e-4 if i == 0 else 1) for i, g in enumerate(gradients((9, 5), 5))]
    _, opt = followed(lambda p: Fira(p, .01, rank=2, betas=(0., 0.)), grads)
    assert next(iter(opt.state.values()))['rho'] > 0

def test_state_is_galores_and_one_number():
    grads = gradients((9, 5), 1)
    (w, plain), (u, fira) = followed(lambda p: GaLore(p, rank=2), grads), followed(lambda p: Fira(p, rank=2), grads)
    extra = set(fira.state[u]) - set(plain.state[w])
    assert extra == {'rho'} and fira.state[u]['rho'].shape == ()
    assert all(v.shape != (9, 5) for v in fira.state[u].values() if isinstance(v, torch.Tensor))

@pytest.mark.parametrize('factor', [1e-2, 1e3])
def test_loss_scale_does_not_matter(factor):
    grads = gradients((9, 5), 8)
    ends = [followed(lambda p: Fira(p, .01, rank=2, gap=3, eps=1e-12), [f * g for g in grads])[0] for f in (1., factor)]
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)

def test_rank_of_one_update():
    grads = [g.double() for g in gradients((9, 5), 1)]
    ranks = [int(torch.linalg.matrix_rank(followed(lambda p, c=c: c(p, rank=2), grads)[0].detach() - 1, atol=1e-9)) for c in (GaLore, Fira)]
    assert ranks == [2, 5]

@pytest.mark.parametrize(('option', 'says'), [(dict(residual='papper'), "nearest: 'paper'"), (dict(level='column'), 'level'), (dict(gamma=1.), 'gamma'),
                                              (dict(kind='full'), 'two-sided'), (dict(rho=1.), "no option 'rho'")])
def test_errors_name_the_option(option, says):
    with pytest.raises(InputError) as e: Fira(galore_groups(Model(), 2), **option)
    assert says in str(e.value)

def test_two_sided_with_one_factor_a_matrix():
    w, opt = followed(lambda p: Fira(p, rank=2, kind='full', level='matrix'), gradients((9, 5), 3))
    assert {'left', 'right', 'rho'} <= set(opt.state[w]) and w.isfinite().all()

def test_kernels_and_bfloat16():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3)).bfloat16()
    opt, before = Fira(galore_groups(model, 2)), copy.deepcopy(model)
    model(torch.randn(2, 3, 4, 4).bfloat16()).float().square().mean().backward()
    opt.step()
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))

def test_stretch_is_what_the_step_used():
    "Measured after a step: norms of N over norms of R; for full Adam the same of the whole gradient."
    grads = gradients((9, 5), 3)
    for rank in (2, None):
        w, opt = followed(lambda p, r=rank: Fira(p, rank=r, gap=None), grads)
        whole, rows = stretch(opt, w)
        state = opt.state[w]
        low = project(w.grad, dict(right=state['right'])) if rank else w.grad
        n = state['m'] / (state['v'].sqrt() + 1e-6)
        assert whole == pytest.approx((n.norm() / low.norm()).item(), rel=1e-5)
        torch.testing.assert_close(rows, n.norm(dim=1) / low.norm(dim=1))

def test_state_resumes():
    start = Model()
    whole, stopped, resumed = (copy.deepcopy(start) for _ in range(3))
    opts = [Fira(galore_groups(m, 2, gap=3)) for m in (whole, stopped, resumed)]
    walk(whole, opts[0], range(9))
    walk(stopped, opts[1], range(4))
    resumed.load_state_dict(stopped.state_dict())
    opts[2].load_state_dict(opts[1].state_dict())
    walk(resumed, opts[2], range(4, 9))
    assert_same(whole, opts[0], resumed, opts[2])

@pytest.mark.parametrize('at', [1, 5, 9])
def test_a_killed_training_goes_on_to_the_same_bits(at, tmp_path):
    whole = Words(Fira, refresh='randomized')
    train(whole)
    def kill(progress, losses):
        if progress.step == at: raise Stop
    with pytest.raises(Stop): train(Words(Fira, refresh='randomized'), checkpoint=tmp_path, every=1, progress=kill)
    again = Words(Fira, refresh='randomized')
    train(again, checkpoint=tmp_path, every=1)
    assert_same(whole.net, whole.opt, again.net, again.opt)
