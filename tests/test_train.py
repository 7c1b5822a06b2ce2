"""Training: a run that is stopped anywhere and resumed ends with the bits of the undisturbed one; what is wrong is said in one line.

The procedure below has all that makes resuming hard: dropout, Adam, two optimizers at two rates, accumulated gradients, stages with different
data and a shuffling loader of torch's own, a parameter that grows, one that is added, an average, a generator, a state of its own."""
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.core.errors import DamagedFile, InputError, Interrupted, RunFailed
from lowrank_distill.core.files import load_tensors
from lowrank_distill.core.recording import Recorder, read
from lowrank_distill.core.streams import Streams
from lowrank_distill.shapes import conform_procedure as conform
from lowrank_distill.shapes.adapter import adapt
from lowrank_distill.shapes.procedure import (
    Batches, Optimize, Procedure, Progress, Stage, add_parameters, descend, only, parameters, replace_parameter)
from lowrank_distill.shapes.train import Bar, latest, optimizer_tree, load_optimizer, pack, train, unpack

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
DATA = X, X[:, :1] * X[:, 1:2]

def seeded(make, seed=0):
    "A module that `make()` builds, the same at each call."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()

def small(seed=0): return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.2), nn.Linear(6, 1)), seed)

class Grows(nn.Module):
    "A product of two factors of some rank, with a bias that is not there at first."
    def __init__(self, rank=1):
        super().__init__()
        self.down, self.up, self.bias = (nn.Parameter(torch.ones(s) / 3) for s in ((rank, 4), (1, rank), (0,)))
        self.dropout = nn.Dropout(.3)
    def forward(self, x): return self.dropout(x @ self.down.T) @ self.up.T + self.bias.sum()

class Everything(Procedure):
    "Twenty steps of all at once."
    method = 'everything'
    def __init__(self, rank=1):
        self.net, self.critic, self.average = Grows(rank), small(1), small(1).requires_grad_(False)
        self.opts = dict(critic=torch.optim.Adam(self.critic.parameters(), lr=.01), net=torch.optim.AdamW([self.net.down, self.net.up], lr=.02))
        self.noise, self.allocated, self.curve = Streams(0).generator('method'), 0, torch.zeros(2)
        self.must_advance('allocator', lambda: self.allocated)
    def networks(self): return dict(net=self.net, critic=self.critic, average=self.average)
    def optimizers(self): return self.opts
    def schedule(self): return [Optimize('critic', accumulate=3, clip=.5), Optimize('net', every=2, steps_after=1, schedule=lambda at: 1 - at.fraction)]
    def loader(self): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA), 5, shuffle=True)
    def frozen_average(self): self.average.eval()
    def stages(self):
        return [Stage('first', 8, Batches(DATA, 7)), Stage('second', 7, self.loader, trainable=['critic.3.*', 'net.*'], on_enter=self.frozen_average),
                Stage('third', 5, Batches([(a, b) for a, b in zip(*DATA, strict=True)], 6, drop_last=False, seed=5), on_exit=self.finish)]
    def losses(self, batch, at):
        x, y = batch
        x = x + .05 * torch.randn(x.shape, generator=self.noise)
        out = self.net(x)
        return dict(net=dict(fit=(out - y).square().mean(), chase=(out - self.critic(x)).square().mean()), critic=dict(fit=(self.critic(x) - y).square().mean()))
    def weights(self, at): return dict(chase=.2)
    def before_step(self, at): self.curve = self.curve * .9 + at.step
    def after_step(self, at):
        with torch.no_grad():
            for a, c in zip(self.average.parameters(), self.critic.parameters(), strict=True): a.lerp_(c, .2)
        if at.step in (4, 10, 16): self.grow(1)
        if at.step == 12: self.add_bias()
    def grow(self, more):
        net, opt = self.net, self.opts['net']
        net.down = replace_parameter(opt, net.down, nn.Parameter(torch.cat([net.down.detach(), torch.full((more, 4), .1)])))
        net.up = replace_parameter(opt, net.up, nn.Parameter(torch.cat([net.up.detach(), torch.full((1, more), .1)], 1)))
        self.allocated += 1
    def add_bias(self):
        self.net.bias = nn.Parameter(torch.zeros(1))
        add_parameters(self.opts['net'], [self.net.bias], lr=.1)
    def grow_to(self, shapes):
        self.grow(shapes['net.down'][0] - len(self.net.down))
        if shapes['net.bias'] == (1,): self.add_bias()
    def finish(self):
        with torch.no_grad(): self.net.up.mul_(2)
    def state(self): return dict(curve=self.curve, allocated=self.allocated, pair=(1, [math.inf, None]))
    def load_state(self, state): self.curve, self.allocated = state['curve'].clone(), state['allocated']

def state_of(procedure):
    "All that a run leaves: networks, optimizers, state(), generators."
    kept, names = {}, {id(p): k for k, p in parameters(procedure).items()}
    for n, net in procedure.networks().items(): kept |= {f'{n}.{k}': v.clone() for k, v in net.state_dict().items()}
    trees = [pack(optimizer_tree(o, names), kept, n) for n, o in procedure.optimizers().items()] + [pack(procedure.state(), kept, 'state')]
    modes = {f'{n}.{k}': m.training for n, net in procedure.networks().items() for k, m in net.named_modules()}
    return kept | {k: g.get_state() for k, g in procedure.generators().items()}, [trees, modes, {k: p.requires_grad for k, p in parameters(procedure).items()}]

def gap(a, b):
    "Largest difference of any tensor of two runs, after the check that all else is equal."
    (mine, rest), (other, same) = state_of(a), state_of(b)
    assert rest == same and {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    return max((mine[k].double() - other[k].double()).abs().max().item() for k in mine if mine[k].numel())

class Stop(Exception): "The end of a run."

def stopped(procedure, step, where):
    "Let `procedure` raise at `step`: in one of its functions, or when the step is done; returns what to give as progress."
    def raises(call, at_place):
        def broken(*args):
            if args[at_place].step == step: raise Stop
            return call(*args)
        return broken
    for name, place in dict(losses=1, before_step=0, after_step=0).items():
        if name == where: setattr(procedure, name, raises(getattr(procedure, name), place))
    return raises(lambda *args: None, 0) if where == 'progress' else None

# --- Resume

def test_resume_after_exceptions(tmp_path):
    whole, luck, resumes, differences = Everything(), random.Random(0), 0, []
    trained = train(whole, seed=3)
    assert trained.steps == 20 and whole.net.down.shape == (4, 4) and len(whole.opts['net'].param_groups) == 2
    for k in range(30):
        folder, every = tmp_path/str(k), luck.choice([1, 1, 2, 3, 5])
        for step in sorted(luck.sample(range(20), luck.randint(1, 3))):
            once = Everything()
            place = luck.choice(['losses', 'before_step', 'after_step', 'progress'])
            with pytest.raises(Stop): train(once, seed=3, checkpoint=folder, every=every, progress=stopped(once, step, place))
            resumes += 1
        resumed = Everything()
        again = train(resumed, seed=3, checkpoint=folder, every=every)
        differences.append(gap(whole, resumed))
        assert again.losses == trained.losses and again.moments == trained.moments
    assert resumes >= 45 and differences == [0.] * 30

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)
from test_train import Everything, gap
from lowrank_distill.shapes.train import latest, train
p = torch.nn.Parameter(torch.zeros(1))
p.grad = torch.ones(1)
torch.optim.Adam([p]).step()  # torch's first optimizer imports for seconds: once here, not in each child
luck, folder, starts = random.Random(1), Path(sys.argv[2]), []
def slow(at, losses): time.sleep(.004)
for run in range(5):  # all children first: a process that has run backward must not fork
    for to in (luck.randint(1, 9), luck.randint(10, 18)):
        if not (child := os.fork()):
            train(Everything(), checkpoint=folder/str(run), every=1, progress=slow)
            os._exit(0)
        while latest(folder/str(run)) < to: time.sleep(.001)
        time.sleep(luck.uniform(0, .008))
        os.kill(child, signal.SIGKILL)
        starts.append([os.waitpid(child, 0)[1], latest(folder/str(run))])
whole, differences = Everything(), []
train(whole)
for run in range(5):
    resumed = Everything()
    train(resumed, checkpoint=folder/str(run))
    differences.append(gap(whole, resumed))
print(json.dumps([starts, differences]))
"""

def test_resume_after_sigkill(tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLER, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    starts, differences = json.loads(done.stdout)
    assert [code for code, _ in starts] == [signal.SIGKILL] * 10 and all(1 <= step for _, step in starts)
    assert sum(step < 20 for _, step in starts) >= 5, 'too few were killed under way'
    assert differences == [0.] * 5

def test_finished_run_is_not_repeated(tmp_path):
    first, second = Everything(), Everything()
    trained = train(first, checkpoint=tmp_path)
    def never(at, losses): raise AssertionError
    again = train(second, checkpoint=tmp_path, progress=never)
    assert gap(first, second) == 0 and again.losses == trained.losses and latest(tmp_path) == 20

def test_start_again_without_resume(tmp_path):
    once = Everything()
    with pytest.raises(Stop): train(once, checkpoint=tmp_path, every=1, progress=stopped(once, 12, 'progress'))
    anew = Everything()
    with pytest.raises(Stop): train(anew, checkpoint=tmp_path, every=1, resume=False, progress=stopped(anew, 4, 'progress'))
    assert latest(tmp_path) == 4, 'the checkpoints of the first run are gone'

@pytest.mark.parametrize('where', ['losses', 'before_step', 'after_step', 'progress'])
def test_keyboard_interrupt(tmp_path, where):
    "Raised between two steps it is saved there; inside a step the last checkpoint stands."
    whole, once, resumed = Everything(), Everything(), Everything()
    train(whole)
    progress = stopped(once, 9, where)
    def interrupt(call):
        def wrapped(*args):
            try: return call(*args)
            except Stop: raise KeyboardInterrupt from None
        return wrapped
    if where != 'progress': setattr(once, where, interrupt(getattr(once, where)))
    with pytest.raises(Interrupted) as caught: train(once, checkpoint=tmp_path, every=4, progress=interrupt(progress) if progress else None)
    assert latest(tmp_path) == (10 if where == 'progress' else 8) and f'checkpoint of step {latest(tmp_path)}' in str(caught.value)
    train(resumed, checkpoint=tmp_path)
    assert gap(whole, resumed) == 0

def test_ctrl_c_waits_for_the_step(tmp_path):
    whole, once, resumed = Everything(), Everything(), Everything()
    train(whole)
    losses, before = once.losses, signal.getsignal(signal.SIGINT)
    def pressed(batch, at):
        if at.step == 7: signal.raise_signal(signal.SIGINT)  # the last step of a stage: saved after on_exit, which is not run again
        return losses(batch, at)
    once.losses = pressed
    with pytest.raises(Interrupted): train(once, checkpoint=tmp_path)
    assert latest(tmp_path) == 8 and signal.getsignal(signal.SIGINT) is before
    train(resumed, checkpoint=tmp_path)
    assert gap(whole, resumed) == 0

def test_own_generator_of_a_loader(tmp_path):
    "A DataLoader that shuffles by a generator of the procedure goes on where it was."
    class Own(Everything):
        def __init__(self): super().__init__(); self.order = Streams(0).generator('data')
        def loader(self): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA), 5, sampler=torch.utils.data.RandomSampler(DATA[0], generator=self.order))
    whole, once, resumed = Own(), Own(), Own()
    train(whole)
    with pytest.raises(Stop): train(once, checkpoint=tmp_path, every=1, progress=stopped(once, 12, 'progress'))
    train(resumed, checkpoint=tmp_path)
    assert gap(whole, resumed) == 0

# --- What is wrong

def test_damaged_checkpoints_change_nothing(tmp_path):
    train(Everything(), checkpoint=tmp_path/'good')
    path, luck = max((tmp_path/'good').iterdir()), random.Random(0)
    content, bad = path.read_bytes(), tmp_path/'bad'/path.name
    bad.parent.mkdir()
    fresh, procedure = Everything(), Everything()
    for k in range(60):
        altered = bytearray(content)
        if k % 3: altered[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
        else: del altered[luck.randrange(len(content)):]
        bad.write_bytes(altered)
        with pytest.raises(DamagedFile): train(procedure, checkpoint=bad.parent)
    assert gap(fresh, procedure) == 0 and max(bad.parent.iterdir()) == bad

@pytest.mark.parametrize('tensors, header', [({}, {}), ({}, dict(kind='training', schema=1)), ({}, dict(kind='training', schema=2)), ({}, dict(kind='training', schema=1, about=[]))])
def test_foreign_files(tmp_path, tensors, header):
    from lowrank_distill.core.files import save_tensors
    save_tensors(tmp_path/'step-000000000007.safetensors', tensors, header)
    fresh, procedure = Everything(), Everything()
    with pytest.raises(InputError): train(procedure, checkpoint=tmp_path)
    assert gap(fresh, procedure) == 0

def test_checkpoint_of_another_procedure(tmp_path):
    train(Everything(), checkpoint=tmp_path)
    class Other(Everything): method = 'other'
    class Configured(Everything):
        def config(self): return dict(rank=2)
    class Longer(Everything):
        def stages(self): return [*super().stages()[:2], Stage('third', 6, Batches(DATA, 6), on_exit=self.finish)]
    class Sgd(Everything):
        def __init__(self): super().__init__(); self.opts['critic'] = torch.optim.SGD(self.critic.parameters(), lr=.1)
    class Rigid(Everything): grow_to = Procedure.grow_to
    class GrowsWrong(Everything):
        def grow_to(self, shapes): "Does nothing."
    class MoreGenerators(Everything):
        def __init__(self): super().__init__(); self.other = Streams(1).generator('method')
    for kind, said in {Other: 'method differs', Configured: 'config differs', Longer: 'stages differs', Sgd: 'optimizers differs', Rigid: 'no grow_to',
                       GrowsWrong: 'also after grow_to'}.items():
        with pytest.raises(InputError, match=said): train(kind(), checkpoint=tmp_path)
    with pytest.raises(InputError, match='seed differs'): train(Everything(), checkpoint=tmp_path, seed=1)
    with pytest.raises(InputError, match='other generators; given: other'): train(MoreGenerators(), checkpoint=tmp_path)

class Simple(Procedure):
    "One network, one optimizer."
    def __init__(self, loader=None, steps=6, trainable=None): self.net, self.loader, self.steps, self.trainable = small(), loader, steps, trainable; self.opt = torch.optim.Adam(self.net.parameters())
    def networks(self): return dict(net=self.net)
    def optimizers(self): return dict(net=self.opt)
    def stages(self): return [Stage('all', self.steps, self.loader or Batches(DATA, 8), trainable=self.trainable)]
    def losses(self, batch, at): return dict(net=dict(fit=(self.net(batch[0]) - batch[1]).square().mean()))

def changed(**parts):
    "A `Simple` with some of its functions replaced."
    made = Simple()
    for k, v in parts.items(): setattr(made, k, v)
    return made

@pytest.mark.parametrize('make, said', [
    (lambda: changed(stages=list), 'no stage'),
    (lambda: changed(stages=lambda: [Stage('a', 1), Stage('a', 1)]), 'stages has a name twice'),
    (lambda: Simple(steps=0), 'steps is not a whole number; given: 0'),
    (lambda: Simple(trainable='net.3.wieght'), "matches 'net.3.wieght'; nearest: 'net.3.weight'"),
    (lambda: Simple(trainable=[]), 'trains nothing'),
    (lambda: changed(networks=lambda: {}), 'networks\\(\\) returns none'),
    (lambda: changed(networks=lambda: dict(net=small())), "makes a new 'net' at each call"),
    (lambda: changed(schedule=lambda: [Optimize('nett')]), "unknown optimizer; given: nett; nearest: 'net'"),
    (lambda: changed(schedule=list), "'net' is not in schedule"),
    (lambda: changed(schedule=lambda: [Optimize('net', steps_after=6)]), 'never steps in 6 steps'),
    (lambda: changed(schedule=lambda: [Optimize('net', every=0)]), 'every is not a whole number'),
    (lambda: changed(schedule=lambda: [Optimize('net', clip=0)]), 'clip'),
    (lambda: changed(losses=lambda b, at: dict(nett={})), "unknown optimizer; given: nett; nearest: 'net'"),
    (lambda: changed(losses=lambda b, at: {}), "nothing for 'net', which is due at step 0 of 6"),
    (lambda: changed(losses=lambda b, at: dict(net=dict(fit=1.))), 'net.fit is no scalar tensor'),
    (lambda: changed(losses=lambda b, at: dict(net=dict(fit=torch.ones((), requires_grad=True)))), 'no parameter of .net. is reached'),
    (lambda: Simple(lambda: [DATA] * 3), 'its loader has 3 batches; expected: 6'),
    (lambda: Simple([DATA] * 9), 'loader; given: list'),
    (lambda: Simple(Batches(DATA, 41)), 'no batch; given: 40 samples; expected: at least 41'),
    (lambda: Simple(Batches((X, X[:3]), 2)), 'unequal length'),
    (lambda: Simple(Batches(iter([]), 2)), 'not a map-style dataset'),
    (lambda: changed(config=lambda: dict(a=torch.ones(1))), 'not JSON')])
def test_bad_input(make, said):
    with pytest.raises(InputError, match=said) as caught: train(make())
    assert '\n' not in str(caught.value)

def test_bad_arguments(tmp_path):
    (tmp_path/'file').write_text('')
    for options, said in ((dict(every=0), 'every'), (dict(device='cuda:99'), 'device cannot be used'), (dict(device='nonsense'), 'device cannot be used'),
                          (dict(checkpoint=tmp_path/'file'), 'cannot write into'), (dict(seed='a'), 'seed')):
        with pytest.raises(InputError, match=said): train(Simple(), **options)

def test_loader_that_ends():
    with pytest.raises(RunFailed, match="'all' ended after 3 of 6 batches"): train(Simple(lambda: iter([DATA] * 3)))

def test_stage_is_checked_when_it_starts_if_a_callback_comes_before():
    made, entered = Simple(), []
    made.stages = lambda: [Stage('a', 1, Batches(DATA, 8), on_enter=lambda: entered.append(1)), Stage('b', 1, Batches(DATA, 8), trainable='other.*')]
    with pytest.raises(InputError, match="stage 'b': no trained parameter matches 'other"): train(made)
    assert entered == [1]

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_non_finite_loss(value, tmp_path):
    before, once, shorter = Simple(), Simple(), Simple()
    good = once.losses
    once.losses = lambda batch, at: {'net': {'fit': good(batch, at)['net']['fit'], 'extra': torch.tensor(value if at.step == 4 else 0.)}}
    with pytest.raises(RunFailed, match=rf"net\.extra is {value} at step 4 of 6 \(stage 'all', 4 of 6\)"): train(once, checkpoint=tmp_path, every=2)
    with pytest.raises(Stop): train(shorter, progress=stopped(shorter, 3, 'progress'))
    assert all(torch.equal(p, q) for p, q in zip(once.net.parameters(), shorter.net.parameters(), strict=True))
    assert latest(tmp_path) == 4 and not all(torch.equal(p, q) for p, q in zip(once.net.parameters(), before.net.parameters(), strict=True))

def test_unreached_adapters():
    "An adapter on a layer that is never called is an error at the first step, and nothing has moved."
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        def forward(self, x): return self.head(nn.functional.linear(x, self.fc.weight))
    class Adapted(Simple):
        def __init__(self, targets): super().__init__(); self.net = seeded(Reads); self.handle = adapt(self.net, LoRA(rank=1), targets); self.opt = torch.optim.Adam(self.handle.parameters(), lr=.1)
    base = seeded(Reads).state_dict()
    lost, fine = Adapted(['fc', 'head']), Adapted(['head'])
    before = [p.clone() for p in lost.handle.parameters()]
    with pytest.raises(InputError, match="1 of 2 adapted layers are not reached by the losses; given: net.fc"): train(lost)
    assert all(torch.equal(p, q) for p, q in zip(before, lost.handle.parameters(), strict=True))
    train(fine)
    assert all(torch.equal(fine.net.state_dict()[k], v) for k, v in base.items()) and not torch.equal(fine.net.head.adapters.default.b, torch.zeros(1, 1))

def test_object_in_an_optimizer(tmp_path):
    class Objects(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group['params']: self.state[p]['projector'] = object()
    made = Simple()
    made.opt = Objects(made.net.parameters(), lr=.1)
    with pytest.raises(InputError, match='projector is neither tensor nor JSON; given: object'): train(made, checkpoint=tmp_path)
    assert latest(tmp_path) == 0

# --- Parts

def test_flags_are_restored():
    made = Simple()
    made.net[0].bias.requires_grad_(False)
    before = {k: p.requires_grad for k, p in parameters(made).items()}
    with pytest.raises(Stop), only(made, Stage('a', 1, trainable='net.3.*')) as names:
        assert {k for k, p in parameters(made).items() if p.requires_grad} == names == {'net.3.weight', 'net.3.bias'}
        raise Stop
    assert {k: p.requires_grad for k, p in parameters(made).items()} == before

@pytest.mark.parametrize('n, size, drop', [*itertools.product((1, 5, 6), (1, 2, 3), (True, False))])
def test_batches(n, size, drop):
    if drop and n < size: return
    batches = Batches(torch.arange(n), size, drop_last=drop)
    epoch = [batches.batch(k).tolist() for k in range(len(batches))]
    rows = sum(epoch, [])
    assert len(set(rows)) == len(rows) == (n // size * size if drop else n)
    for k in reversed(range(3 * len(batches))):
        assert torch.equal(Batches(torch.arange(n), size, drop_last=drop).batch(k), batches.batch(k)), 'not a function of the step'
    columns = Batches(dict(x=torch.arange(n), y=-torch.arange(n)), size, drop_last=drop).batch(0)
    assert columns['x'].tolist() == epoch[0] and torch.equal(columns['x'], -columns['y'])
    assert Batches(list(range(n)), size, drop_last=drop).batch(0).tolist() == epoch[0]

def test_order_follows_from_seed_and_stage():
    b = Batches(torch.arange(50), 50)
    orders = [b.batch(k, seed, stage).tolist() for k, seed, stage in ((0, 0, 'a'), (1, 0, 'a'), (0, 1, 'a'), (0, 0, 'b'))]
    assert len({*map(tuple, orders)}) == 4
    assert Batches(torch.arange(50), 50, seed=1).batch(0, 0, 'a').tolist() == orders[2]

@pytest.mark.parametrize('every, after, accumulate', [*itertools.product((1, 2, 5), (0, 3), (1, 2, 4))])
def test_optimize_counts(every, after, accumulate):
    "`turn` against counting by hand over two stages of 11 and 7 steps."
    o = Optimize('x', every=every, steps_after=after, accumulate=accumulate)
    for start, stop in ((0, 11), (11, 18)):
        due = [k for k in range(start, stop) if k >= after and (k - after) % every == 0]
        for k in range(start, stop):
            at = Progress(k, 18, 's', k - start, stop - start)
            assert o.due(at) == (k in due)
            if k in due: assert o.turn(at) == (due.index(k) % accumulate + 1, due.index(k) % accumulate == accumulate - 1 or k == due[-1])

def test_other_losses_leave_no_gradient():
    "A generator's loss that runs through the critic does not move the critic."
    made = Everything()
    at = Progress(1, 20, 'first', 1, 8)
    losses = made.losses(DATA, at)
    before = [p.clone() for p in made.critic.parameters()]
    descend(made, {'net': losses['net']}, at)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(made.critic.parameters(), before, strict=True))

def test_replace_parameter():
    p, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    opt = torch.optim.Adam([p, other])
    (p.sum() + other.sum()).backward(); opt.step()
    kept = opt.state[other]['exp_avg']
    smaller = replace_parameter(opt, p, nn.Parameter(torch.zeros(1, 4)))
    assert opt.state[smaller]['exp_avg'].shape == (1, 4) and opt.state[smaller]['exp_avg'][0, 3] == 0 and opt.state[other]['exp_avg'] is kept and p not in opt.state
    assert opt.param_groups[0]['params'][0] is smaller and torch.equal(smaller.grad, torch.tensor([[1., 1, 1, 0]]))
    with pytest.raises(InputError, match='does not hold'): replace_parameter(opt, p, smaller)
    with pytest.raises(InputError, match='no corner'): replace_parameter(opt, smaller, nn.Parameter(torch.zeros(4)))
    fresh = replace_parameter(opt, smaller, nn.Parameter(torch.zeros(4)), state='fresh')
    assert fresh not in opt.state
    with pytest.raises(InputError, match='holds it already'): add_parameters(opt, [fresh])
    add_parameters(opt, [nn.Parameter(torch.zeros(1))], lr=7.)
    assert [g['lr'] for g in opt.param_groups] == [1e-3, 7.]

def test_state_keeps_its_type():
    "torch's load_state_dict would round an average in single precision to the weights' half precision."
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = torch.optim.SGD([p], lr=.1)
    opt.state[p] = dict(average=torch.full((3,), 1.001), step=4, nested=[torch.ones(1, dtype=torch.float64)])
    tensors, fresh = {}, torch.optim.SGD([p], lr=.5)
    load_optimizer(fresh, unpack(json.loads(json.dumps(pack(optimizer_tree(opt, {id(p): 'p'}), tensors, 'o'))), tensors), {'p': p})
    assert fresh.state[p]['average'].dtype == torch.float32 and torch.equal(fresh.state[p]['average'], opt.state[p]['average'])
    assert fresh.state[p]['nested'][0].dtype == torch.float64 and fresh.param_groups[0]['lr'] == .1

def test_device_says_where(capsys):
    here, there = Everything(), Everything()
    train(here)
    train(there, device='cpu')
    assert gap(here, there) == 0 and capsys.readouterr() == ('', ''), 'nothing is printed'

def test_bar(capsys):
    train(Simple(), progress=Bar(ascii=True, mininterval=0))
    assert '6/6' in capsys.readouterr().err

def test_recorded_rows_have_no_seam(tmp_path):
    def rows(folder, name, step): return Recorder(folder, name, 0, resume_at=step)
    with rows(tmp_path/'whole', 'run', None) as recorder: train(Everything(), recorder=recorder)
    once = Everything()
    with pytest.raises(Stop), rows(tmp_path/'two', 'run', None) as recorder:
        train(once, recorder=recorder, checkpoint=tmp_path/'c', every=5, progress=stopped(once, 13, 'progress'))
    with rows(tmp_path/'two', 'run', latest(tmp_path/'c')) as recorder: train(Everything(), recorder=recorder, checkpoint=tmp_path/'c')
    whole, two = read(tmp_path/'whole').frame, read(tmp_path/'two').frame
    assert whole.equals(two) and set(whole['name']) == {'loss_critic_fit', 'loss_net_fit', 'loss_net_chase'}

def test_checkpoints_are_tensors_and_json(tmp_path):
    train(Everything(), checkpoint=tmp_path, every=3)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 2, 'the last two are kept'
    tensors, header = load_tensors(paths[-1])
    assert header['kind'] == 'training' and json.loads(json.dumps(header, allow_nan=False)) == header
    assert {k.split('/')[0] for k in tensors} == {'network', 'optimizer', 'random', 'history', 'state'}

# --- The suite

UPDATES = ['average.*']

def test_conformance(): conform.procedure(Everything, tries=4, updates=UPDATES)

def test_conformance_of_the_simple(): conform.procedure(Simple, tries=3)

@pytest.mark.parametrize('name, said', [('forgets', 'give state\\(\\) back'), ('hidden', 'resumed, .* differ'), ('frozen', 'does not train and changes'), ('object', 'neither tensor nor JSON')])
def test_conformance_fails(name, said):
    class Wrong(Everything):
        if name == 'forgets':
            def load_state(self, state): self.allocated = state['allocated']
        if name == 'hidden':
            def generators(self): return {}
        if name == 'frozen':
            def after_step(self, at):
                super().after_step(at)
                with torch.no_grad(): self.critic[0].weight.mul_(.9)
        if name == 'object':
            def state(self): return super().state() | dict(noise=self.noise)
    with pytest.raises((AssertionError, InputError), match=said): conform.procedure(Wrong, tries=4, updates=UPDATES)
