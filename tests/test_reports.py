"""Running pages: what is refused, what a run leaves, what a failed or stopped one leaves, and that nothing is repeated."""
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat import v4

from lowrank_distill.core.errors import InputError, Interrupted, RunFailed
from lowrank_distill.reports.run import read_parameters, run

PARAMETERS = 'scale: str = "cpu"  # smoke | cpu | gpu\nsize: int = 3  # 0 < size <= 9'


def page(folder, *cells, parameters=PARAMETERS):
    "A notebook with a parameters cell (None: without one) and these code cells."
    nb = v4.new_notebook(metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')})
    nb.cells = [v4.new_markdown_cell('# Page\n\n> Small.')]
    if parameters: nb.cells.append(v4.new_code_cell(parameters, metadata={'tags': ['parameters', 'hide-input']}))
    nb.cells += [v4.new_code_cell(c) for c in cells]
    nbformat.write(nb, folder/'page.ipynb')
    return folder/'page.ipynb'


EMIT = 'from lowrank_distill.core.recording import emit\nemit(value=2. * size, at=scale)'
MARKUP = '<b>kept</b><script>alert(1)</script><img src=x onerror=alert(2)>'  # encoded below: a page also shows its code
HTML = (f'import base64\nfrom IPython.display import HTML, display\n'
        f'display(HTML(base64.b64decode({base64.b64encode(MARKUP.encode())!r}).decode()))')


def test_a_run_and_the_same_run_again(tmp_path):
    path = page(tmp_path, EMIT, HTML)
    first = run(path, dict(size='4'), tmp_path/'runs', progress=False)
    assert first.status == 'done' and first.metrics == dict(value=8., at='cpu')
    assert {p.name for p in first.folder.iterdir()} == {'page.ipynb', 'page.html', 'metrics.json', 'provenance.json', 'events.jsonl', 'status.json'}
    assert json.loads((first.folder/'status.json').read_text())['status'] == 'done'
    text = '\n'.join((first.folder/n).read_text() for n in ('provenance.json', 'page.ipynb', 'status.json'))
    assert str(tmp_path) not in text and os.path.expanduser('~') not in text
    again = run(path, dict(size=4), tmp_path/'runs', progress=False)
    assert again.status == 'cached' and again.folder == first.folder
    assert run(path, dict(size=4), tmp_path/'runs', resume=False, progress=False).status == 'done'
    html = first.html.read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*"(?=[^>]*(?:script|stylesheet))', html) and 'alert(1)' not in html
    assert 'onerror' not in html and '<b>kept</b>' in html and not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)


@pytest.mark.parametrize('given', [dict(scael='cpu'), dict(scale='huge'), dict(size='two'), dict(size='0'), dict(size='3.5')])
def test_wrong_parameters_are_refused_before_anything(tmp_path, given):
    with pytest.raises(InputError) as caught: run(page(tmp_path, EMIT), given, tmp_path/'runs', progress=False)
    assert '\n' not in str(caught.value) and not (tmp_path/'runs').exists()


def test_a_notebook_without_parameters_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match='page.ipynb has no cell tagged'): run(page(tmp_path, '1', parameters=None), out=tmp_path/'runs')
    with pytest.raises(InputError, match='cannot be checked'): read_parameters(page(tmp_path, '1', parameters='scale = "cpu"'))
    assert not (tmp_path/'runs').exists()


def test_an_unwritable_folder_is_refused_before_anything(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot write'): run(page(tmp_path, EMIT), out=tmp_path/'file'/'runs', progress=False)


def test_a_failed_run_leaves_a_report_that_says_so(tmp_path):
    path = page(tmp_path, EMIT, '1 / 0', 'print("never")')
    with pytest.raises(RunFailed, match='ZeroDivisionError'): run(path, out=tmp_path/'runs', progress=False)
    folder, = (p for p in (tmp_path/'runs').iterdir() if p.name.startswith('page-'))
    nb = nbformat.read(folder/'page.ipynb', 4)
    nbformat.validate(nb)
    status = json.loads((folder/'status.json').read_text())
    assert status['status'] == 'failed' and 'ZeroDivisionError' in status['error'] and 'FAILED' in nb.cells[0].source
    assert json.loads((folder/'metrics.json').read_text())['metrics'] == dict(value=6., at='cpu') and 'FAILED' in (folder/'page.html').read_text()
    with pytest.raises(RunFailed): run(path, out=tmp_path/'runs', progress=False)


@pytest.mark.parametrize('how', ['interrupt', 'kernel killed'])
def test_a_stopped_run_keeps_what_was_done(tmp_path, how):
    if how == 'kernel killed':
        with pytest.raises(RunFailed, match='kernel died'): run(page(tmp_path, EMIT, 'import os; os.kill(os.getpid(), 9)'), out=tmp_path/'runs', progress=False)
        expected = 'failed'
    else:
        script = 'import sys; from lowrank_distill.cli import main; sys.exit(main(sys.argv[1:]))'
        path = page(tmp_path, EMIT, f'import pathlib, time; pathlib.Path({str(tmp_path/"here")!r}).touch(); time.sleep(60)')
        child = subprocess.Popen([sys.executable, '-c', script, 'run', str(path), '--out', str(tmp_path/'runs')], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not (tmp_path/'here').exists() and time.monotonic() < end: time.sleep(.1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 130 and err.strip().splitlines()[-1].startswith('lowrank-distill: ')
        expected = 'interrupted'
    folder, = (p for p in (tmp_path/'runs').iterdir() if p.name.startswith('page-'))
    assert json.loads((folder/'status.json').read_text())['status'] == expected
    nb = nbformat.read(folder/'page.ipynb', 4)
    assert any('lowrank.metrics' in str(c.get('outputs')) for c in nb.cells)


def test_interrupted_is_no_exception_that_a_page_could_swallow():
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
