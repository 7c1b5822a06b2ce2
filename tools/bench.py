"""Ratios, measured side by side in one process: `make bench`, or `python tools/bench.py [NAMES] [--device cuda] [--repeats 20]`.

Two ways of doing one thing take turns, at least twenty times after a warm-up; what counts is the median of the ratios of neighbours, with its quartiles.
Memory is the bytes that autograd keeps for the backward pass, each storage once, which is the same in every run. Results go to benchmarks/DEVICE.json,
with what they were measured on; they are figures to look at, and no test asserts them."""
import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.analysis.cka import compare, gram, grams
from lowrank_distill.core.files import write_json
from lowrank_distill.core.recording import Recorder
from lowrank_distill.core.runs import processor, resolve_device
from lowrank_distill.explorers.app import serving
from lowrank_distill.explorers.cka import CKAExplorer, record_grams
from lowrank_distill.models.teachers import embedded
from lowrank_distill.shapes.adapter import adapt
from lowrank_distill.shapes.objective import kl

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ratio:
    "`name`: what is compared with what; the ratio (below 1: ours is less), its quartiles (equal for bytes), and the aim."
    name: str
    unit: str
    ratio: float
    low: float
    high: float
    aim: str


def timed(call: Callable, device: str) -> float:
    "Seconds of one call, to the end of its work on the device."
    start = time.perf_counter()
    call()
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - start

def beside(name: str, ours: Callable, theirs: Callable, device: str, repeats: int, aim: str) -> Ratio:
    "Let two calls take turns; the order changes from pair to pair."
    for call in (ours, theirs, ours, theirs): timed(call, device)
    found = []
    for i in range(repeats):
        pair = {call: timed(call, device) for call in ((ours, theirs) if i % 2 else (theirs, ours))}
        found.append(pair[ours] / pair[theirs])
    low, middle, high = statistics.quantiles(found, n=4)
    return Ratio(name, 'time', middle, low, high, aim)

def kept_bytes(forward: Callable, given: tuple[Tensor, ...] = ()) -> int:
    "Bytes that autograd keeps between forward and backward, without parameters and what was `given`; a storage that is kept twice counts once."
    found: dict[int, int] = {}
    def keep(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter): found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = forward()  # noqa: F841 (alive, so that nothing is reused)
    return sum(n for place, n in found.items() if place not in {t.untyped_storage().data_ptr() for t in given})

def less(name: str, ours: Callable, theirs: Callable, aim: str) -> Ratio:
    ratio = kept_bytes(ours) / kept_bytes(theirs)
    return Ratio(name, 'bytes kept', ratio, ratio, ratio, aim)


def lora_step(device: str, repeats: int) -> list[Ratio]:
    "A linear layer of 768 with an adapter of rank 8, forward and backward, 32 x 128 rows: against PEFT's, and against the layer alone."
    x = torch.randn(32, 128, 768, device=device, requires_grad=True)
    base = nn.Sequential(nn.Linear(768, 768)).requires_grad_(False).to(device)
    ours, alone = copy.deepcopy(base), copy.deepcopy(base)
    adapt(ours, LoRA(rank=8), '*')
    def step(net: nn.Module) -> Callable: return lambda: net(x).sum().backward()
    rows = [beside('LoRA linear, forward and backward / frozen layer', step(ours), step(alone), device, repeats, '<= 1.10, GPU 1.15')]
    try: import peft
    except ImportError: return rows
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=['0']), copy.deepcopy(base))
    return [*rows, beside('LoRA linear, forward and backward / PEFT', step(ours), step(theirs.to(device)), device, repeats, '<= 1.00')]

def adapter_bytes(device: str, repeats: int) -> list[Ratio]:
    "What a backward pass has to keep: an adapted network against the network trained in full."
    rows = []
    for name in ('resnet', 'vit'):
        full = embedded(name).to(device).train().requires_grad_(True)
        ours, x = copy.deepcopy(full).requires_grad_(False), torch.rand(16, *full.image, device=device)
        adapt(ours, LoRA(rank=4), '*')
        rows.append(less(f'LoRA on all layers of the {name} / full training', lambda ours=ours, x=x: ours(x), lambda full=full, x=x: full(x), '<= 1.05'))
    return rows

def chunked_kl(device: str, repeats: int) -> list[Ratio]:
    "KD on 512 tokens of a vocabulary of 32,000, 64 at a time, against all at once: beyond the logits themselves."
    s, t = (torch.randn(512, 32_000, device=device) for _ in range(2))
    s.requires_grad_()
    def loss(chunk: int | None) -> Callable: return lambda: kl(s, t, 2., chunk=chunk)
    def both(chunk: int | None) -> Callable: return lambda: loss(chunk)().backward()
    dense, parts = (kept_bytes(loss(c), (s, t)) for c in (None, 64))
    ratio = parts / dense
    return [Ratio('KL at 32k classes in chunks of 64 tokens, beyond the logits / dense', 'bytes kept', ratio, ratio, ratio, '<= 1.1 x 64 / 512'),
            beside('KL at 32k classes in chunks of 64 tokens / dense', both(64), both(None), device, max(5, repeats // 4), '<= 1.15')]

def cka_maps(device: str, repeats: int) -> list[Ratio]:
    "A map of 16 x 16 layers, 256 inputs, 4,096 features: against a loop that makes both Grams anew for each pair, and against the Grams alone."
    layers = {f'l{i}': torch.randn(256, 4096, device=device) for i in range(16)}
    holder = nn.ModuleDict({k: nn.Identity() for k in layers})
    class Gives(nn.Module):
        def __init__(self): super().__init__(); self.layers = holder
        def forward(self, x): return [self.layers[k](v) for k, v in layers.items()][-1]
    net = Gives()
    def ours(): return compare(grams(net, [dict(inputs=torch.zeros(256, 1, device=device))], [f'layers.{k}' for k in layers]))
    def pure(): return [gram(v) for v in (*layers.values(), *layers.values())]
    def naive():
        return [[(lambda a, b: (a * b).sum() / (a.norm() * b.norm()))(gram(a), gram(b)) for b in layers.values()] for a in layers.values()]
    few = max(5, repeats // 4)
    return [beside('CKA map of 16 x 16 layers / the 32 Grams alone', ours, pure, device, few, '<= 2'), beside('CKA map of 16 x 16 layers / a loop over pairs', ours, naive, device, 5, '<= 0.1')]


def recorded(folder: str, steps: int):
    "Record 64 layers of 96 rows at `steps` steps, for maps of 64 x 64."
    net, rows = nn.Sequential(), torch.randn(96, 32)
    for i in range(64): net.add_module(f'layer_{i}', nn.Linear(32, 32))
    with Recorder(folder, 'run', 0) as recorder:
        for step in range(steps):
            for p in net.parameters(): nn.init.normal_(p, std=32**-.5)
            record_grams(recorder, net, rows, step=step)

def against(name: str, times: list[float], aim: float) -> Ratio:
    "The 95th percentile of `times` (seconds) over `aim`, with median and most."
    times = [t / aim for t in times]
    high = statistics.quantiles(times, n=20, method='inclusive')[-1] if len(times) > 1 else times[0]
    return Ratio(f'{name}: 95th percentile / {1000 * aim:.0f} ms (then median and most)', 'time', high, statistics.median(times), max(times), '<= 1')

def explorer_views(device: str, repeats: int) -> list[Ratio]:
    "The CKA explorer on 64 x 64 layers: from a change of its state to the new figure; a step seen for the first time, and one seen before."
    with tempfile.TemporaryDirectory() as folder:
        recorded(folder, steps := max(20, repeats))
        explorer = CKAExplorer(folder)
        def show(step: int):
            explorer.change(step=step)
            explorer.draw(*explorer.shown())
        show(steps - 1)
        times = {name: [timed(lambda step=step: show(step), 'cpu') for step in range(steps - 1)] for name in ('first time', 'seen before')}
    return [against(f'CKA explorer, 64 x 64 layers, a step {name}', t, .1) for name, t in times.items()]

WATCH = """() => { window.waits = []; window.since = null; const map = document.querySelector('.heatmaplayer');
    document.addEventListener('keydown', () => { window.since = performance.now(); }, true);
    new MutationObserver(() => { if (window.since) { window.waits.push(performance.now() - window.since); window.since = null; } })
        .observe(map, {subtree: true, childList: true, attributes: true}); }"""

def explorer_browser(device: str, repeats: int) -> list[Ratio]:
    "The same map in the app, in chromium: from a key on the step's slider to the changed map, and from the request to the first paint and to the map (a kernel starts between them)."
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        recorded(folder, max(20, repeats))
        with serving(folder) as (address, _):
            page = playwright.chromium.launch(executable_path=os.environ.get('CHROMIUM') or shutil.which('chromium'), args=['--no-sandbox', '--disable-gpu']).new_page()
            start = time.perf_counter()
            page.goto(address, wait_until='commit', timeout=120_000)
            page.locator('.heatmaplayer image').first.wait_for(timeout=120_000)
            whole = time.perf_counter() - start
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
            page.evaluate(WATCH)
            page.locator('.widget-slider', has_text='step').locator('.noUi-handle').first.focus()
            for key in ['ArrowLeft'] * (repeats - 1) + ['ArrowRight'] * (repeats - 1):
                known = page.evaluate('window.waits.length')
                page.keyboard.press(key)
                page.wait_for_function('n => window.waits.length > n', arg=known, timeout=20_000)
                page.wait_for_timeout(300)
            waits = [w / 1000 for w in page.evaluate('window.waits')]
    first, again = waits[:repeats - 1], waits[repeats - 1:2 * repeats - 2]
    return [against('app, first paint', [paint], 1.5), against('app, 64 x 64 map on the screen, kernel and imports included', [whole], 1.5),
            against('app, slider to redraw, a step seen for the first time', first, .1), against('app, slider to redraw, a step seen before', again, .1)]


BENCHMARKS: dict[str, Callable[[str, int], list[Ratio]]] = dict(lora=lora_step, bytes=adapter_bytes, kl=chunked_kl, cka=cka_maps, explorer=explorer_views, browser=explorer_browser)

def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help=f'of {", ".join(BENCHMARKS)}; none: all')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=20)
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(BENCHMARKS): parser.error(f'no benchmark {sorted(unknown)[0]!r}; there are {", ".join(BENCHMARKS)}')
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device, slug = resolve_device('smoke' if given.device == 'cpu' else 'gpu', given.device)
    path = ROOT/'benchmarks'/f'{slug}.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    where = dict(date=datetime.now(UTC).date().isoformat(), processor=processor(), torch=torch.__version__.partition('+')[0], python=platform.python_version())
    for name in given.names or BENCHMARKS:
        rows = BENCHMARKS[name](device, given.repeats)
        known[name] = where | dict(ratios=[{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows])
        for r in rows: print(f'{r.ratio:7.3f}  [{r.low:.3f}, {r.high:.3f}]  {r.unit:10}  {r.name}  (aim {r.aim})')
        path.parent.mkdir(exist_ok=True)
        write_json(path, known)
    return 0

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
