"""Every notebook runs, in a copy with `scale="smoke"`, and has the form that the site, Papermill and readers rely on.

It is run by nbdev's own runner in this process; what it changes for the next one is put back, and fails it.
The rules of form are functions from a notebook to complaints; each is shown a notebook that breaks it as well.
"""
import ast
import copy
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbdev.test
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from execnb.shell import CaptureShell
from lowrank_distill.reports.contribute import reading_minutes
from nbdev.clean import _nbdev_clean
from nbdev.config import get_config
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

NBS = sorted(p for top in ('nbs', 'tutorials') for p in (ROOT/top).rglob('*.ipynb')
             if not any(part.startswith(('_', '.')) for part in p.relative_to(ROOT).parts))
each = pytest.mark.parametrize('path', NBS, ids=lambda p: str(p.relative_to(ROOT)))
FAMILIES = {'adapters', 'allocation', 'optimizers', 'merging', 'compression', 'distillation', 'language',
            'vision_language', 'diffusion', 'dataset_distillation'}


# Running

def state() -> dict[str, object]:
    "What a notebook may not leave changed for the next one (generators apart, which are put back)."
    from matplotlib import pyplot
    libraries = 'KMP_', 'TORCHINDUCTOR_', 'PYTEST_'  # scikit-learn, torch and pytest set these themselves
    env = {f'env {k}': v for k, v in os.environ.items() if not k.startswith(libraries)}
    return env | {'dtype': torch.get_default_dtype(), 'device': str(torch.get_default_device()),
                  'grad': torch.is_grad_enabled(), 'deterministic': torch.are_deterministic_algorithms_enabled(),
                  'threads': torch.get_num_threads(), 'figures': len(pyplot.get_fignums()), 'cwd': os.getcwd(),
                  'printing': str(np.get_printoptions())}

@contextmanager
def restored(cwd: Path) -> Iterator[list[str]]:
    "Yield a list that names, after the block, what the block left changed; all of it is put back."
    from matplotlib import pyplot
    before, environ, changed = state(), dict(os.environ), []
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield changed
        after = state()
        changed += sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))  # names, no values
    finally:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(cwd)
        torch.set_default_dtype(before['dtype'])
        torch.set_default_device(before['device'])
        torch.set_grad_enabled(before['grad'])
        torch.use_deterministic_algorithms(before['deterministic'])
        torch.set_num_threads(before['threads'])
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        random.setstate(generators[2])
        pyplot.close('all')

def smoke_copy(path: Path, folder: Path) -> Path:
    "A copy of the notebook in `folder` with `scale='smoke'` injected where it has that parameter."
    nb = load_notebook_node(str(path))  # nbformat.read lacks the empty tags that parameterize_notebook wants
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    if tagged and re.search(r'^scale\b', tagged[0].source, re.M): nb = parameterize_notebook(nb, {'scale': 'smoke'})
    nbformat.write(nb, folder/path.name)
    return folder/path.name

@contextmanager
def closed_shells() -> Iterator[None]:
    "End the shells that nbdev starts in the block: it leaves their threads running, and every variable alive."
    shells = []
    class Shell(CaptureShell):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            shells.append(self)
    main, path = sys.modules['__main__'], list(sys.path)  # the shell changes both
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbdev.test, 'CaptureShell', Shell)
        try: yield
        finally:
            for shell in shells:
                shell.close()
                shell.user_ns.clear()
            sys.modules['__main__'], sys.path[:] = main, path

def run(path: Path, folder: Path) -> tuple[bool, list[str]]:
    "Run the notebook at `path` in `folder` (errors go to stderr); did it succeed, and what did it leave changed?"
    with restored(folder) as changed, closed_shells():
        ok, _ = nbdev.test.test_nb(path, skip_flags=list(get_config(ROOT).tst_flags), cell_timeout=300, profile=False,
                                   force_flags=os.environ.get('NB_FLAGS', '').split())
    return ok, changed

@each
def test_notebook(path, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    ok, changed = run(smoke_copy(path, tmp_path), tmp_path)
    assert ok, capfd.readouterr().err[-4000:]
    assert not changed, f'{path.name} leaves changed: {changed}'


# Form

Notebook, Rule = dict, Callable[[dict], list[str]]

def source(cell: dict) -> str: return ''.join(cell['source'])
def tags(cell: dict) -> list[str]: return cell['metadata'].get('tags', [])
def code_cells(nb: Notebook) -> list[dict]: return [c for c in nb['cells'] if c['cell_type'] == 'code']
def outputs(nb: Notebook) -> list[dict]: return [o for c in code_cells(nb) for o in c['outputs']]
def head(cell: dict) -> str: return repr(source(cell)[:60])

def unfinished(nb: Notebook) -> list[str]:
    "Errors in outputs, and exported notebooks that show no result at all."
    errors = [f'an output is an error: {o["ename"]}' for o in outputs(nb) if o['output_type'] == 'error']
    exported = any(re.match(r'#\| *export', source(c)) for c in code_cells(nb))
    return errors + (['no outputs: readers see no result'] if exported and not outputs(nb) else [])

def wrong_ids(nb: Notebook) -> list[str]:
    ids = [c.get('id') for c in nb['cells']]
    twice = {i for i in ids if ids.count(i) > 1}
    return [f'a cell has no id: {head(c)}' for c in nb['cells'] if not c.get('id')] + [f'id {i!r} twice' for i in twice]

def wrong_title(nb: Notebook) -> list[str]:
    "nbdev keeps only the title and one `> description` of the first cell; other text in it vanishes from the site."
    first = nb['cells'][0]
    right = first['cell_type'] == 'markdown' and re.fullmatch(r'# [^\n]+\n\n> [^\n]+\n?', source(first))
    return [] if right else [f'the first cell is not a title and one `> description` line: {head(first)}']

def wrong_parameters(nb: Notebook) -> list[str]:
    "The parameters cell comes first, or after default_exp; Papermill finds it by its tag, readers see it folded."
    code = code_cells(nb)
    found = [i for i, c in enumerate(code) if 'parameters' in tags(c)]
    if not found: return []
    said = [] if len(found) == 1 else [f'{len(found)} cells are tagged parameters']
    before = [source(c).strip() for c in code[:found[0]]]
    if not all(re.fullmatch(r'#\| *default_exp [\w.]+', s) for s in before) or len(before) > 1:
        said.append('the parameters cell is not the first code cell after default_exp')
    if 'hide-input' not in tags(code[found[0]]): said.append('the parameters cell is not tagged hide-input')
    return said

def wrong_folds(nb: Notebook) -> list[str]:
    "What is folded on the site (tags) is folded in Lab (metadata.jupyter) too."
    wanted = {'hide-input': {'source_hidden'}, 'hide-output': {'outputs_hidden'},
              'hide-cell': {'source_hidden', 'outputs_hidden'}}
    return [f'tagged {tag}, but not {key} in Lab: {head(c)}' for c in code_cells(nb) for tag in tags(c)
            for key in sorted(wanted.get(tag, ())) if not c['metadata'].get('jupyter', {}).get(key)]

def mixed_imports(nb: Notebook) -> list[str]:
    "The site's build executes each cell that imports or exports, and no other: one that mixes them in fails there."
    said = []
    for c in code_cells(nb):
        if source(c).lstrip().startswith(('#| export', '#|export', '%', '!')): continue
        body, imports = ast.parse(source(c)).body, (ast.Import, ast.ImportFrom)
        inside = any(isinstance(n, imports) for b in body for n in ast.walk(b))
        if inside and not all(isinstance(b, imports) for b in body): said.append(f'import among other code: {head(c)}')
    return said

def long_cells(nb: Notebook) -> list[str]:
    return [f'{n} lines in a code cell: {head(c)}' for c in code_cells(nb) if (n := source(c).count('\n') + 1) > 60]

def widgets(nb: Notebook) -> list[str]:
    "Saved widget state and copies of plotly.js: 5 MB each, and of no use."
    said = ['widget state in metadata.widgets'] if nb['metadata'].get('widgets') else []
    libraries = re.compile(r'plotly\.js v\d|Plotly\.newPlot|cdn\.plot\.ly|require\.undef\(|<script[^>]+src=')
    pages = (''.join(o['data'].get('text/html', '')) for o in outputs(nb) if 'data' in o)
    return said + [f'an output holds or loads a script library: {m[0]}' for p in pages if (m := libraries.search(p))]

def machine_paths(nb: Notebook) -> list[str]:
    "Folders of the machine on which the notebook ran; pictures apart, whose base64 may look like anything."
    said = []
    for o in outputs(nb):
        parts = [v for k, v in o.get('data', {}).items() if not k.startswith('image/')] + [o.get('text', '')]
        text = json.dumps(parts)
        paths = re.findall(r'(?<![\w+/=.])/(?:work|root|home|tmp)\b[^\s"\']*', text)
        said += [f'path in an output: {p}' for p in paths]
    return said

def check_last(cell: dict) -> bool:
    "Does the cell end in an assertion, or in one followed by the value that it checked?"
    def asserts(node: ast.AST) -> bool:
        if isinstance(node, ast.Assert): return True
        called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        return re.match(r'assert|test_', getattr(called, 'attr', getattr(called, 'id', ''))) is not None
    return any(asserts(n) for n in ast.parse(source(cell)).body[-2:])

def thin_teaching(nb: Notebook) -> list[str]:
    "A method's page withholds two results after a question, and has two folded solutions that check themselves."
    if not any('parameters' in tags(c) for c in code_cells(nb)): return []
    asked, question = 0, ''
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': question = source(c)
        elif 'hide-output' in tags(c) and '?' in question: asked += 1
    solutions = [c for c in code_cells(nb) if 'solution' in tags(c)]
    said = [f'{asked} hidden outputs after a question, at least 2 are due'] if asked < 2 else []
    if len(solutions) < 2: said.append(f'{len(solutions)} solution cells, at least 2 are due')
    hidden = {'hide-cell', 'hide-input'}
    return said + [f'a solution is visible: {head(c)}' for c in solutions if not hidden & set(tags(c))] + [
        f'a solution does not end in an assertion: {head(c)}' for c in solutions if not check_last(c)]

def lost_by_cleaning(nb: Notebook) -> list[str]:
    "nbdev-clean removes tags unless pyproject.toml tells it not to; then Papermill runs the defaults and exits 0."
    clean = copy.deepcopy(nb)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _nbdev_clean(clean)
    kept = [(c['id'], c['cell_type'], tags(c), c['metadata'].get('jupyter')) for c in clean['cells']]
    had = [(c['id'], c['cell_type'], tags(c), c['metadata'].get('jupyter')) for c in nb['cells']]
    return [f'nbdev-clean turns {a} into {b}' for a, b in zip(had, kept, strict=True) if a != b]

RULES: list[Rule] = [unfinished, wrong_ids, wrong_title, wrong_parameters, wrong_folds, mixed_imports, long_cells,
                     widgets, machine_paths, lost_by_cleaning]

@each
def test_form(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where nbdev finds its settings
    nb = json.loads(path.read_text(encoding='utf-8'))
    rules = RULES + [thin_teaching] if path.parent.name in FAMILIES else RULES
    said = [f'{rule.__name__}: {complaint}' for rule in rules for complaint in rule(nb)]
    if (size := path.stat().st_size) > 250_000: said.append(f'{size // 1000} kB, at most 250')
    assert not said, '\n'.join(said)


# Each rule can fail

def markdown(text: str) -> dict: return {'cell_type': 'markdown', 'metadata': {}, 'source': text}

def stream(text: str) -> dict: return {'output_type': 'stream', 'name': 'stdout', 'text': text}

def code(text: str, *names: str) -> dict:
    "A code cell with tags, folded in Lab as they say, and an output."
    folds = {'source_hidden': 'hide-input', 'outputs_hidden': 'hide-output'}
    jupyter = {k: True for k, tag in folds.items() if tag in names or 'hide-cell' in names}
    metadata = {'tags': list(names)} | ({'jupyter': jupyter} if jupyter else {})
    return {'cell_type': 'code', 'metadata': metadata, 'source': text, 'outputs': [stream('1')], 'execution_count': 1}

def made_up() -> Notebook:
    "A small method page that breaks no rule."
    ask = [markdown('How many?'), code('1 + 1', 'hide-output')]
    solution = code('x = 1\nassert x\nx', 'hide-cell', 'solution')
    cells = [markdown('# Title\n\n> What it says.'), code('#| default_exp core.x', 'hide-input'),
             code('scale: str = "cpu"', 'parameters', 'hide-input'), code('#| export\nimport os'),
             *ask, *copy.deepcopy(ask), solution, copy.deepcopy(solution)]
    for i, c in enumerate(cells): c['id'] = f'cell{i}'
    kernel = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}
    return {'cells': cells, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}

def change(index: int, **new) -> Callable[[Notebook], None]:
    return lambda nb: nb['cells'][index].update(new)

def html(text: str) -> dict: return {'output_type': 'display_data', 'metadata': {}, 'data': {'text/html': text}}

BREAKS = [
    (unfinished, lambda nb: [c.update(outputs=[]) for c in code_cells(nb)]),
    (unfinished, change(3, outputs=[{'output_type': 'error', 'ename': 'ValueError', 'evalue': '', 'traceback': []}])),
    (wrong_ids, change(4, id='cell3')),
    (wrong_title, change(0, source='# Title\n\n> What it says.\n\nAnd more.')),
    (wrong_title, change(0, source='# Title')),
    (wrong_parameters, change(1, source='import os')),
    (wrong_parameters, lambda nb: nb['cells'].insert(2, nb['cells'].pop(3))),
    (wrong_parameters, lambda nb: tags(nb['cells'][2]).remove('hide-input')),
    (wrong_folds, lambda nb: nb['cells'][5]['metadata'].pop('jupyter')),
    (mixed_imports, change(5, source='import os\nx = 1')),
    (mixed_imports, change(5, source='def f():\n    import os')),
    (long_cells, change(5, source='x = 1\n' * 61)),
    (widgets, lambda nb: nb['metadata'].update(widgets={'state': {}})),
    (widgets, change(5, outputs=[html('<script>/* plotly.js v3 */</script>')])),
    (machine_paths, change(5, outputs=[html('written to /tmp/x.json')])),
    (machine_paths, change(5, outputs=[stream('in /ro' 'ot/project')])),
    (thin_teaching, change(4, source='No question.')),
    (thin_teaching, lambda nb: nb['cells'].pop()),
    (thin_teaching, change(8, source='x = 1')),
    (thin_teaching, lambda nb: tags(nb['cells'][8]).remove('hide-cell')),
]

@pytest.mark.parametrize('rule', [*RULES, thin_teaching], ids=lambda r: r.__name__)
def test_rule_accepts(rule):
    assert not rule(made_up())

@pytest.mark.parametrize(('rule', 'damage'), BREAKS, ids=[f'{r.__name__}{i}' for i, (r, _) in enumerate(BREAKS)])
def test_rule_can_fail(rule, damage):
    nb = made_up()
    damage(nb)
    assert rule(nb)

def test_cleaning_can_fail(monkeypatch, tmp_path):
    "In a project that does not keep tags, cleaning loses them."
    (tmp_path/'pyproject.toml').write_text('[project]\nname = "x"\n[tool.nbdev]\nlib_path = "x"\n')
    monkeypatch.chdir(tmp_path)
    assert lost_by_cleaning(made_up())

def test_run_can_fail(monkeypatch, capfd, tmp_path):
    "A failing assertion fails the notebook; a changed default is named, and put back; the injected scale is used."
    monkeypatch.chdir(tmp_path)
    nb, folder = made_up(), tmp_path/'copy'
    folder.mkdir()
    changes = code('torch.set_default_dtype(torch.float64)\nassert scale == "smoke"')
    nb['cells'] = [*nb['cells'][:3], code('import torch'), changes]
    for i, c in enumerate(nb['cells']): c['id'] = f'cell{i}'
    (tmp_path/'good.ipynb').write_text(json.dumps(nb))
    assert run(smoke_copy(tmp_path/'good.ipynb', folder), tmp_path) == (True, ['dtype'])
    assert torch.get_default_dtype() == torch.float32
    nb['cells'][-1]['source'] = 'assert scale == "cpu", "the scale is smoke"'
    (tmp_path/'bad.ipynb').write_text(json.dumps(nb))
    assert run(smoke_copy(tmp_path/'bad.ipynb', folder), tmp_path) == (False, [])
    assert 'the scale is smoke' in capfd.readouterr().err


def test_minutes_are_stated_and_measured():
    found = {}
    for path in NBS:
        notebook = json.loads(path.read_text())
        text = '\n'.join(''.join(c['source']) for c in notebook['cells'][:5])
        said = re.search(r'Read (\d+) min · run .+ on a laptop · exercises \d+ min', text)
        if path.parent.name in FAMILIES: assert said, f'{path}: section 0 states no minutes'
        if said: found[path.name] = int(said[1]), reading_minutes(notebook)
    assert len(found) >= 2
    for name, (stated, measured) in found.items(): assert abs(stated - measured) <= max(2, .2 * measured), (name, measured)
