"""Contributor's tools: skeletons that lack only what their author must give, checks that each find their fault, a doctor that answers whatever is broken.

Nothing here executes a page but `test_the_finished_page_passes`, which is the promise of `check` itself."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

from lowrank_distill import shapes
from lowrank_distill.cli import main
from lowrank_distill.core import catalog, runs
from lowrank_distill.core.evidence import Claim, Study
from lowrank_distill.reports import contribute
from lowrank_distill.reports.contribute import FORM, Draft, _tried, draft_of, form, new
from lowrank_distill.reports.inplace import code_stamp
from lowrank_distill.shapes.objective import Objective, kl

SMALL = ('pyproject.toml', 'nbs/adapters/00_lora.ipynb', 'nbs/adapters/01_dylora.ipynb', 'nbs/core/02_linalg.ipynb',
         'lowrank_distill/adapters/dylora.py')
PLANNED = [m for m in catalog.methods() if m.state == 'planned']
ADAPTER, OTHER = (next(m for m in PLANNED if (m.family in contribute.ADAPTER_FAMILIES) is kind) for kind in (True, False))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A small checkout, which the commands take for theirs."
    for name in SMALL:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    monkeypatch.setattr(contribute, 'checkout', lambda: tmp_path)
    return tmp_path

def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b'' for p in folder.rglob('*')}


# new

def test_every_planned_method_gets_a_skeleton(tree):
    "Valid, the same each time, and lacking only what its author must give; the author's parts say so."
    for method in PLANNED:
        path = new(method.key, method.family)
        text = path.read_text(encoding='utf-8')
        nb = json.loads(text)
        nbformat.validate(nbformat.from_dict(nb))
        found = list(form(draft_of(method.key)))
        assert [c.name for c in found if c.status != 'ok'] == ['finished', 'minutes', 'outputs'], [str(c) for c in found]
        assert '<<' not in text and method.arxiv in text and method.claim in text and all(page in text for page in method.requires)
        path.unlink()
        assert new(method.key).read_text(encoding='utf-8') == text
        path.unlink()

def test_number_is_the_next_one_and_links_follow_the_tree(tree):
    shutil.copy(tree/'nbs/adapters/01_dylora.ipynb', tree/'nbs/adapters/07a_other.ipynb')
    assert new('nola').name == '08_nola.ipynb'
    first = new('sora')
    assert first == tree/'nbs/allocation/01_sora.ipynb' and '[dylora](../adapters/01_dylora.ipynb)' in first.read_text()
    assert '`nola` (planned)' not in new('randlora').read_text() and '`cda` (planned)' in new('hello').read_text()

@pytest.mark.parametrize('method', [ADAPTER, OTHER], ids=lambda m: m.key)
def test_a_skeleton_exports_and_is_linted(tree, method):
    new(method.key)
    draft = draft_of(method.key)
    assert _tried('module', contribute.module, draft).said == 'not exported yet: nbdev-export'
    draft.module.parent.mkdir(parents=True, exist_ok=True)
    draft.module.write_bytes(contribute.exported(draft))
    assert [_tried('', look, draft).status for look in (contribute.module, contribute.lint)] == ['ok', 'ok']
    assert f"Study('{method.key}'" in draft.module.read_text()

MISTAKES = ['new dilora', 'new dylora', 'new core.linalg', 'new', f'new {OTHER.key} --family adapters', f'new {ADAPTER.key} --family adaptors',
            'check dilora', 'check', f'check {ADAPTER.key}', 'check core.linalg', 'doctor now', 'new lora_lego', 'check damaged']

@pytest.mark.parametrize('line', MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(tree, line, capsys):
    (tree/'nbs/merging').write_text('a file where the folder of a family should be')
    if line == 'check damaged':
        (tree/'nbs/adapters/01_dylora.ipynb').write_text('{"cells": [')
        line = 'check dylora'
    before = everything(tree)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('lowrank-distill: ') and err.count('\n') == 1 and everything(tree) == before

@pytest.mark.parametrize('line', [f'new {ADAPTER.key}', 'check dylora'])
def test_without_a_checkout(tmp_path, line, capsys, monkeypatch):
    monkeypatch.setattr(contribute, 'asset', lambda name: tmp_path/'lowrank_distill'/'assets')
    assert main(line.split()) == 2
    assert 'source checkout' in capsys.readouterr().err and not everything(tmp_path)

def test_new_says_what_is_next(tree, capsys, monkeypatch):
    monkeypatch.chdir(tree/'nbs')
    assert main(['new', 'nola', '--family', 'adapters']) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == 'adapters/02_nola.ipynb' and 'lowrank-distill check nola' in second and (tree/'nbs'/first).is_file()


# check: what reads

@pytest.fixture
def finished(tree: Path) -> Draft:
    "DyLoRA's page in a small checkout, its outputs stamped as those of its code."
    return stamped(draft_of('dylora'))

def stamped(draft: Draft) -> Draft:
    draft.nb['metadata']['lowrank'] = {'outputs_of': code_stamp(draft.nb)}
    return draft

def source(cell: dict) -> str: return ''.join(cell['source'])
def tags(cell: dict) -> list[str]: return cell['metadata'].setdefault('tags', [])
def tagged(nb: dict, tag: str) -> list[dict]: return [c for c in nb['cells'] if tag in tags(c)]

def write(index: int | str, old: str, new: str) -> Callable[[dict], None]:
    "Replace text in a cell, given by its place or its tag."
    def change(nb: dict):
        cell = nb['cells'][index] if isinstance(index, int) else tagged(nb, index)[0]
        assert old in source(cell), 'the page that is spoiled has changed: adapt this test'
        cell['source'] = source(cell).replace(old, new)
    return change

def untag(tag: str, keep: int = 0) -> Callable[[dict], None]:
    def change(nb: dict):
        for c in tagged(nb, tag)[keep:]: tags(c).remove(tag)
    return change

def output(nb: dict, **o): next(c for c in nb['cells'] if c.get('outputs'))['outputs'].append(o)
def shown(kind: str, text: str) -> Callable[[dict], None]:
    return lambda nb: output(nb, output_type='display_data', metadata={}, data={kind: text})

def retimed(nb: dict): nb['cells'][3]['source'] = re.sub(r'Read (\d+) min', r'Read 1\1 min', source(nb['cells'][3]))

FAULTS = [  # the checks that must complain, all others being content
    ('finished', write(3, '**Question.**', '**Question.** FILL:')),
    ('finished', write('exact:3', 'assert', '# FILL: the bound\nassert')),
    ('title', write(0, '\n\n> ', '\n\nText that nbdev drops.\n\n> ')),
    ('title', write(0, '\n\n> ', '\n\n')),
    ('opening', write(3, '**Question.**', 'Question.')),
    ('opening', write(3, '(https://arxiv.org/abs/2210.07558)', '')),
    ('opening', write(3, '](00_lora.ipynb)', '](lora.ipynb)')),
    ('opening', write(3, '[adapters.lora](00_lora.ipynb)', 'adapters.lora')),
    ('opening', write(3, 'Marks:', 'And [linalg](../core/02_linalg.ipynb). Marks:')),
    ('minutes', write(3, ' on a laptop', '')),
    ('minutes', retimed),
    ('parameters', untag('parameters')),
    ('parameters', lambda nb: tags(nb['cells'][4]).append('parameters')),
    ('parameters', lambda nb: tags(nb['cells'][2]).remove('hide-input')),
    ('parameters', write(2, 'scale: str = "cpu"', 'scale: str = "smoke"')),
    ('parameters', write(2, 'smoke | cpu | gpu', 'smoke | cpu')),
    ('parameters', write(2, 'max_rank: int = 8', 'max_rank = 8')),
    ('parameters', lambda nb: nb['cells'][2].update(source=source(nb['cells'][2]).partition('max_rank')[0])),
    ('parameters', write(1, 'adapters.dylora', 'adapters.dilora')),
    ('cells', lambda nb: nb['cells'][4].update(id=nb['cells'][5]['id'])),
    ('cells', lambda nb: tagged(nb, 'solution')[0]['metadata'].pop('jupyter')),
    ('cells', write('exact:2', 'by_hand, x =', 'import os\nby_hand, x =')),
    ('cells', lambda nb: tagged(nb, 'exact:2')[0].update(source=source(tagged(nb, 'exact:2')[0]) + '\n' * 60)),
    ('cells', lambda nb: nb['cells'][7].update(source='%timeit 1')),
    ('exact', untag('exact:3')),
    ('exact', lambda nb: [tags(c).remove(t) for c in nb['cells'] for t in list(tags(c)) if t.startswith('exact:')]),
    ('exact', write('exact:3', 'assert max(apart.values()) < 1e-12', 'max(apart.values())')),
    ('predictions', untag('hide-output', keep=1)),
    ('solutions', untag('solution', keep=1)),
    ('solutions', untag('hide-cell', keep=1)),
    ('solutions', lambda nb: tagged(nb, 'solution')[0].update(source='x = 1')),
    ('size', lambda nb: nb['metadata'].update(widgets={'state': {}})),
    ('size', shown('text/html', '<script>/* plotly.js v3 */</script>')),
    ('outputs', lambda nb: [c.update(outputs=[]) for c in nb['cells'] if 'outputs' in c]),
    ('outputs', lambda nb: output(nb, output_type='error', ename='E', evalue='', traceback=[])),
    ('outputs', shown('text/plain', 'written to /ho' 'me/somebody/x.json')),
]

@pytest.mark.parametrize(('name', 'spoil'), FAULTS, ids=[f'{name}{i}' for i, (name, _) in enumerate(FAULTS)])
def test_check_finds_the_fault(finished, name, spoil):
    "The check of that name complains on one line, and no other does."
    spoil(finished.nb)
    found = [c for c in form(stamped(finished)) if c.status != 'ok']
    assert [c.name for c in found] == [name], [str(c) for c in found]
    assert found[0].status == 'problem' and found[0].said and '\n' not in str(found[0])

def test_check_finds_what_is_no_change_of_a_cell(finished):
    assert [c.name for c in form(finished) if c.status == 'ok'] == list(FORM)
    assert [c.name for c in form(replace(finished, size=250_001)) if c.status == 'problem'] == ['size']
    write('exact:3', '1e-12', '1e-11')(finished.nb)  # and the outputs are still stamped as those of the line before
    assert [c.name for c in form(finished) if c.status == 'problem'] == ['outputs']
    for tag in ('exact:2', 'solution'):
        write(tag, '\n', '\n%matplotlib\n')(finished.nb)
        assert 'not plain Python' in _tried(tag, FORM['exact' if ':' in tag else 'solutions'], finished).said
    finished.nb['cells'] = [c for c in finished.nb['cells'][:20] if '%matplotlib' not in source(c)]
    assert _tried('cells', FORM['cells'], finished).status == 'note'

def test_a_planned_prerequisite_must_be_named(tree):
    draft = draft_of(new('hello') and 'hello')
    assert _tried('opening', contribute.opening, draft).status == 'ok'
    write(3, '`cda`', 'that page')(draft.nb)
    assert '`cda`' in _tried('opening', contribute.opening, draft).said


# check: what executes, without executing

def broken_class(nb: dict): next(c for c in nb['cells'] if 'class DyLoRA(' in source(c))['source'] = '#| exports\nclass DyLoRA('

@pytest.mark.parametrize(('spoil', 'said'), [
    (lambda draft: draft.module.write_text(draft.module.read_text() + '# by hand\n'), 'differs from the notebook'),
    (lambda draft: draft.module.unlink(), 'not exported yet'),
    (lambda draft: broken_class(draft.nb), 'not Python'),
    (lambda draft: write(1, 'adapters.dylora', 'adapters.dilora')(draft.nb), 'exports no lowrank_distill/adapters/dylora.py'),
    (lambda draft: [c.update(source=source(c).replace('#| export', '# export')) for c in draft.nb['cells']], 'exports no '),
])
def test_module_is_compared(finished, spoil, said):
    before = everything(finished.root)
    assert _tried('module', contribute.module, finished).status == 'ok' and everything(finished.root) == before
    spoil(finished)
    assert (found := _tried('module', contribute.module, finished)).status == 'problem' and said in found.said and Path.cwd() == ROOT

def test_ruff_reads_notebook_and_module(finished, monkeypatch):
    finished.module.write_text('import os\n')
    assert 'F401' in _tried('ruff', contribute.lint, finished).said
    finished.module.unlink()
    assert _tried('ruff', contribute.lint, finished).status == 'ok'
    write('exact:3', 'assert', 'lambda: nowhere\nassert')(finished.nb)
    finished.path.write_text(json.dumps(finished.nb))
    assert 'F821' in _tried('ruff', contribute.lint, finished).said
    monkeypatch.setattr(contribute, 'find_spec', lambda name: None)
    assert 'not installed' in _tried('ruff', contribute.lint, finished).said

class Spec:
    method = 'dylora'
    def build(self): pass

@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Draft]:
    "Makes `import_module` give a module with these names, and `shapes.conform` one that says what it is told to."
    def load(conform: Exception | None = None, **names) -> Draft:
        module = ModuleType('lowrank_distill.adapters.dylora')
        vars(module).update(names)
        def adapter(spec, examples, others):
            tried.append((spec, examples))
            if conform: raise conform
        monkeypatch.setattr(contribute, 'import_module', lambda name: module)
        monkeypatch.setattr(shapes, 'conform', SimpleNamespace(adapter=adapter), raising=False)
        return Draft(catalog.page('dylora'), ROOT/'x.ipynb', ROOT, {}, 0)
    tried: list = []
    load.tried = tried
    return load

def test_spec_is_tried_against_its_contract(loaded):
    Spec.__module__ = 'lowrank_distill.adapters.dylora'
    other = type('Other', (Spec,), {'__module__': 'lowrank_distill.adapters.lora'})
    for names in ({}, {'LoRA': other}): assert _tried('spec', contribute.conformance, loaded(**names)).status == 'note' and not loaded.tried
    assert _tried('spec', contribute.conformance, replace(loaded(), page=catalog.page('pela'))).said == 'no adapter and no objective'
    assert _tried('spec', contribute.conformance, loaded(LoRA=other, Spec=Spec)).status == 'ok' and loaded.tried == [(Spec, 10)]
    for error, said in (AssertionError('merged is\nnot unmerged'), 'Spec: merged is not unmerged'), (KeyError('a'), "Spec: KeyError: 'a'"):
        found = _tried('spec', contribute.conformance, loaded(error, Spec=Spec))
        assert (found.status, found.said) == ('problem', said)

def test_objectives_are_tried_against_theirs(loaded):
    class Right(Objective):
        __module__ = 'lowrank_distill.adapters.dylora'
        def forward(self, student, teachers, batch, at): return {'soft': kl(student.logits, teachers['teacher'].logits)}
    class Wrong(Right):
        __module__ = Right.__module__
        def forward(self, student, teachers, batch, at): return {'soft': student.logits.mean(1)}
    class Wants(Right):
        __module__ = Right.__module__
        def __init__(self, width): super().__init__()
    page = dict(page=catalog.page('pela'))
    assert _tried('spec', contribute.conformance, replace(loaded(Right=Right), **page)).said == 'Right keeps the contract'
    found = _tried('spec', contribute.conformance, replace(loaded(Right=Right, Wrong=Wrong), **page))
    assert (found.status, found.said) == ('problem', "Wrong: term 'soft' is no scalar tensor")
    found = _tried('spec', contribute.conformance, replace(loaded(Wants=Wants), **page))
    assert found.status == 'note' and 'Wants' in found.said

def study(key: str = 'dylora', metric: str = 'test') -> Study:
    return Study(key, run=lambda arm, config, seed, scale, device: {'validation': .5, metric: 1 / (seed >= 0)}, arms=['new', 'old'],
                 claims=[Claim(key='better', primary=True, treatment='new:test', baseline='old:test', delta=.1, text='better')])

def test_arms_run(loaded):
    ready = loaded(study=study())
    for _ in range(2): assert '4 runs' in _tried('run_arm', contribute.arms, ready).said  # it runs, and reads nothing that ran before
    assert 'export a study' in _tried('run_arm', contribute.arms, loaded()).said
    assert "called 'dilora'" in _tried('run_arm', contribute.arms, loaded(study=study('dilora'))).said
    for bad in (study(metric='tset'), study(metric=None)):
        found = _tried('run_arm', contribute.arms, loaded(study=bad))
        assert found.status == 'problem' and 'lowrank-distill evidence dylora --scale smoke' in found.said
    root = replace(loaded(), page=catalog.page('adapters.lora'))
    assert _tried('run_arm', contribute.arms, root).status == 'ok'

def test_import_that_fails_is_a_line(monkeypatch):
    def fail(name): raise ImportError('cannot import\nname x')
    monkeypatch.setattr(contribute, 'import_module', fail)
    draft = Draft(catalog.page('dylora'), ROOT, ROOT, {}, 0)
    for look in (contribute.arms, contribute.conformance):
        assert _tried('', look, draft).said == 'the module cannot be imported: ImportError: cannot import name x'

def test_page_that_stops_is_a_line(finished, monkeypatch):
    from lowrank_distill.reports import run
    given = []
    def stop(nb, parameters, tell, **more): given.append(parameters); return nb, ends.pop()
    ends = [None, run.Event(7, 63, 'id', 'A cut', 'failed', error='NameError: x\ntraceback')]
    monkeypatch.setattr(run, 'execute_cells', stop)
    assert str(_tried('page', contribute.smoke, finished)) == 'problem  page         cell 7 of 63 (A cut): NameError: x'
    assert _tried('page', contribute.smoke, finished).status == 'ok' and given == 2 * [{'scale': 'smoke'}]

@pytest.mark.parametrize(('state', 'fresh', 'status', 'said'), [
    ('built', None, 'note', '--jobs 2'), ('evidence', 'own-stale', 'note', '--stale'), ('evidence', 'deps-stale', 'ok', 'deps-stale'), ('evidence', 'fresh', 'ok', 'fresh')])
def test_evidence_is_told_and_fails_nothing(monkeypatch, state, fresh, status, said):
    monkeypatch.setattr(catalog.Page, 'state', state)
    monkeypatch.setattr(catalog.Page, 'freshness', fresh)
    found = _tried('evidence', contribute.evidence, Draft(catalog.page('dylora'), ROOT, ROOT, {}, 0))
    assert found.status == status and said in found.said

def test_check_waits_for_the_module_and_ends_in_its_code(finished, capsys, monkeypatch):
    monkeypatch.setattr('lowrank_distill.reports.run.execute_cells', lambda nb, parameters, tell, **more: (nb, None))
    finished.path.write_text(json.dumps(finished.nb))
    assert main(['check', 'dylora', '--quick']) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [*FORM, 'module', 'ruff', 'evidence']
    finished.module.unlink()
    assert main(['check', 'dylora']) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [*FORM, 'module', 'ruff', 'spec', 'run_arm', 'page', 'evidence']
    assert [name for name, line in lines.items() if line.startswith('problem')] == ['module'] and lines['page'].startswith('ok')
    assert all(lines[name].startswith('note') and 'not tried' in lines[name] for name in ('spec', 'run_arm'))

def test_the_finished_page_passes(capsys):
    "The page that CONTRIBUTING.md calls finished, with everything executed."
    code, out = main(['check', 'dylora']), capsys.readouterr().out
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == [*FORM, 'module', 'ruff', *contribute.TRIALS, 'evidence'], out


# doctor

def test_doctor_runs(capsys):
    assert main(['doctor', '--json']) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    names = [c['name'] for c in found]
    assert {'python', 'torch', 'peft', 'requirements', 'torchvision', 'threads', 'cores', 'memory', 'disk', 'evidence'} <= set(names)
    assert len(set(names)) == len(names) and all(c['said'] and '\n' not in c['said'] for c in found)

def test_doctor_answers_where_torch_is_broken(tmp_path):
    "In a process of its own; torchvision is broken as well."
    (tmp_path/'torch.py').write_text('raise OSError("libtorch.so: cannot open shared object file\\nand more")')
    (tmp_path/'torchvision.py').write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    done = subprocess.run([sys.executable, '-c', 'import sys; from lowrank_distill.cli import main; sys.exit(main(["doctor"]))'], capture_output=True, text=True, check=False,
                          env=os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}', 'LOWRANK_DISTILL_EVIDENCE': str(tmp_path/'torch.py'/'x')})
    problems = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith('problem')}
    assert done.returncode == 1 and done.stderr == '' and list(problems) == ['torchvision', 'import', 'evidence'], done.stdout + done.stderr
    assert 'nms' in problems['torchvision'] and 'cannot open shared object file and more' in problems['import']

def test_evidence_folder_is_that_of_the_runs(tmp_path, monkeypatch):
    assert contribute.store().status == 'ok'
    monkeypatch.setenv(runs.ENVIRONMENT, str(tmp_path/'new'/'folder'))
    assert runs.ENVIRONMENT in contribute.store().said and contribute.store().status == 'ok' and not everything(tmp_path)
    (tmp_path/'new').write_text('')
    (tmp_path/'new').chmod(0o777)  # a file that may be written is no folder
    assert contribute.store().status == 'problem'

@pytest.mark.parametrize(('asked', 'status', 'said'), [
    (['numpy>=1'], 'ok', 'all 1'), (['numpy>=999.1'], 'problem', 'too old: numpy'), (['no-such>=1', 'numpy'], 'problem', 'missing: no-such;'),
    (['no-such; extra == "dev"', 'numpy<99,>=1.2'], 'ok', 'all 1'), ([], 'note', 'unknown')])
def test_requirements(monkeypatch, asked, status, said):
    monkeypatch.setattr(contribute.metadata, 'requires', lambda name: asked)
    assert contribute.requirements().status == status and said in contribute.requirements().said

def fake_torch(cuda: int, works: bool = True) -> SimpleNamespace:
    def ones(n, device):
        if not works: raise RuntimeError('no kernel image\nis available')
        import torch
        return torch.ones(n)
    facts = SimpleNamespace(name='Accelerator', total_memory=80 * 2**30)
    return SimpleNamespace(ones=ones, cuda=SimpleNamespace(is_available=lambda: cuda > 0, device_count=lambda: cuda, get_device_properties=lambda name: facts),
                           backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)))

def test_devices():
    assert [str(c) for c in contribute._devices(fake_torch(2))] == [f'ok       cuda:{i}       Accelerator, 80 GiB' for i in (0, 1)]
    broken, = contribute._devices(fake_torch(1, works=False))
    assert broken.status == 'problem' and broken.said.startswith('RuntimeError: no kernel image is available')
    none, = contribute._devices(fake_torch(0))
    assert none.name == 'accelerator' and none.status == ('problem' if Path('/dev/nvidia0').exists() else 'note')

@pytest.mark.parametrize(('cores', 'ram', 'free', 'said'), [
    (2, 24, 50, ['ok', 'ok', 'ok']), (1, 24, 50, ['note', 'ok', 'ok']), (2, 4, 50, ['ok', 'note', 'ok']), (2, 24, 3, ['ok', 'ok', 'note']), (2, 24, .1, ['ok', 'ok', 'problem'])])
def test_machine(monkeypatch, tmp_path, cores, ram, free, said):
    monkeypatch.setattr(contribute, 'cores', lambda: cores)
    monkeypatch.setattr(contribute, 'memory', lambda: ram * 2**30)
    monkeypatch.setattr(contribute.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free * 2**30))
    assert [c.status for c in contribute._machine(tmp_path)] == said

def test_machine_is_measured():
    assert 1 <= contribute.cores() <= os.cpu_count() and 2**28 < contribute.memory() < 2**48
