"""What an accelerator may change, and what it may not; all of it is skipped where torch sees no CUDA device.

Outputs agree with the CPU's to single precision, where TF32 is switched off; merging back, saving and resuming are exact on either."""
import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_distill.adapters.dylora import DyLoRA
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.analysis.cka import cka_map
from lowrank_distill.core import catalog
from lowrank_distill.core.runs import resolve_device
from lowrank_distill.data.images import fashion_mnist
from lowrank_distill.models.teachers import embedded
from lowrank_distill.models.vision import build
from lowrank_distill.shapes.adapter import adapt
from lowrank_distill.shapes.objective import CrossEntropy, Distillation, SoftTargets, Teacher
from lowrank_distill.shapes.procedure import Batches
from lowrank_distill.shapes.statistics import collect
from lowrank_distill.shapes.train import train

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'), pytest.mark.filterwarnings('ignore:.*deterministic.*')]
STUDIES = [p.key for p in catalog.pages() if p.state != 'planned' and not p.module.startswith('tutorials.') and hasattr(catalog.load(p.key), 'study')]
ATOL = 2e-4

@pytest.fixture(autouse=True)
def _single_precision():
    "Convolutions on the device use TF32 by default, which has ten bits; comparisons here are for the full 23."
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before

def garments(n=32): return fashion_mnist('train').first(n)

def start(network='resnet', seed=0, **chosen): return build(network, (1, 28, 28), 10, torch.Generator().manual_seed(seed), **chosen)

def distilled(device, steps=6):
    "A student after some steps under an embedded teacher."
    data = garments(64)
    columns = {'inputs': data.images, 'labels': data.labels}
    run = Distillation(start('conv', width=8), {'teacher': Teacher(embedded('resnet'))}, {'labels': CrossEntropy(), 'soft': SoftTargets(4.)}, loader=Batches(columns, 16),
                       steps=steps, optimizer=lambda p: torch.optim.SGD(p, lr=.05))
    return run, train(run, device=device)

@pytest.mark.parametrize('spec', [LoRA(rank=3), DyLoRA(max_rank=3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize('network', ['conv', 'resnet', 'vit', 'mixer'])
def test_adapter(network, spec, tmp_path):
    "Attached to a network on the device its numbers lie there; outputs are those of the CPU; merging back and files are exact."
    x, here = garments(8).images, start(network)
    there = copy.deepcopy(here).cuda()
    before = {k: v.clone() for k, v in there.state_dict().items()}
    handles = []
    for net in (here, there):
        handles.append(adapt(net, spec, '*'))
        drawn = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for n, p in net.named_parameters():
                if 'adapters' in n: p.copy_(torch.randn(p.shape, generator=drawn) * .1)
        net.eval()
    assert all(p.is_cuda for p in there.parameters())
    handle = handles[1]
    with torch.no_grad():
        assert torch.allclose(here(x), there(x.cuda()).cpu(), atol=ATOL)
        handle.save(tmp_path/'a.safetensors')
        free = there(x.cuda())
        handle.merge()
        assert torch.allclose(there(x.cuda()), free, atol=ATOL)
        handle.unmerge()
        assert torch.equal(there(x.cuda()), free)
    with handle.hidden(): assert all(torch.equal(v, before[k]) for k, v in there.state_dict().items())
    handle.remove()

def test_trained_as_on_the_cpu():
    (a, one), (b, two) = distilled('cpu'), distilled('cuda')
    assert all(p.is_cuda for p in b.student.parameters())
    for name, values in one.losses.items(): assert values == pytest.approx(two.losses[name], abs=5e-3)
    for (name, p), q in zip(a.student.named_parameters(), b.student.parameters(), strict=True): assert torch.allclose(p, q.cpu(), atol=5e-3), name

def test_resumed_to_the_bit(tmp_path):
    "In torch's deterministic mode a run that is stopped and resumed on the device ends with the bits of the undisturbed one."
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
    class Stop(Exception): pass
    def stop(at, losses):
        if at.step == 5: raise Stop
    def made():
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Dropout(.3), nn.Linear(20, 10))
        with torch.no_grad():
            for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * .05)
        data = garments(64)
        return Distillation(net, {}, {'labels': CrossEntropy()}, loader=Batches({'inputs': data.images, 'labels': data.labels}, 16), steps=12)
    torch.use_deterministic_algorithms(True)
    try:
        whole, parts = made(), made()
        train(whole, device='cuda', seed=3)
        with pytest.raises(Stop): train(made(), device='cuda', seed=3, checkpoint=tmp_path, every=2, progress=stop)
        train(parts, device='cuda', seed=3, checkpoint=tmp_path, every=2)
    finally: torch.use_deterministic_algorithms(False)
    assert all(torch.equal(p, q) for p, q in zip(whole.student.parameters(), parts.student.parameters(), strict=True))

def test_statistics():
    data = garments(32)
    def loss(model, batch): return F.cross_entropy(model(batch['inputs']), batch['labels'])
    def found(device):
        columns = {'inputs': data.images.to(device), 'labels': data.labels.to(device)}
        return collect(start('vit').to(device), Batches(columns, 8), {'second_moment', 'gradient'}, loss=loss)
    one, two = found('cpu'), found('cuda')
    for name in one:
        for kind in ('second_moment', 'gradient'):
            a, b = (getattr(s[name], kind) for s in (one, two))
            assert (a is None) == (b is None)
            if a is not None: assert torch.allclose(a.cpu(), b.cpu(), atol=1e-3, rtol=1e-3), (name, kind)

def test_cka():
    x = garments(64).images
    one, two = (cka_map(start('conv').to(device), x.to(device), taps=['blocks.0', 'blocks.1', 'blocks.2']) for device in ('cpu', 'cuda'))
    assert torch.allclose(one.matrix.cpu(), two.matrix.cpu(), atol=1e-4)

def test_name_of_the_device():
    assert resolve_device('gpu', 'auto')[1] not in ('', 'cpu')

@pytest.mark.parametrize('key', STUDIES)
def test_study(key):
    "Every study's smoke runs on the device."
    study = catalog.load(key).study
    assert study.execute('smoke', 'cuda').missing == 0
