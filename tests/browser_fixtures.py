"""A browser, and Voila and JupyterLab serving a notebook of one cell: what a person needs, started for tests and ended by them."""
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from lowrank_distill.explorers.app import started

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
LOCAL = re.compile(r'(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|(data|blob|about):')
UNUSED = ['jupyterlab-jupytext', 'jupyterlab_pygments', '@voila-dashboards/jupyterlab-preview']  # extensions of the Lab that the page does without

def needs_browser() -> str:
    "The path of chromium; the test is skipped where it, playwright or one of the servers is missing."
    for package in ('playwright', 'voila', 'jupyterlab'):
        if find_spec(package) is None: pytest.skip(f'{package} is not installed')
    found = os.environ.get('CHROMIUM') or shutil.which('chromium')
    return found or pytest.skip('no chromium (set CHROMIUM, or install it)')

@contextmanager
def opened(chromium: str, **options: object) -> Iterator:
    "A page of a browser that ends with the block; `page.errors` and `page.external` are what went wrong in it and what it fetched from elsewhere."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=1000), **options)
        page.errors, page.external = [], []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        page.on('dialog', lambda d: (page.errors.append(f'dialog: {d.message}'), d.dismiss()))
        page.on('request', lambda r: None if LOCAL.match(r.url) else page.external.append(r.url))
        yield page
        browser.close()

def write_notebook(path: Path, source: str):
    cell = dict(cell_type='code', id='cell0', metadata={}, source=source, outputs=[], execution_count=None)
    kernel = dict(name='python3', language='python', display_name='python3')
    path.write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))

@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    "The address of a server of Jupyter (`python -m` with `arguments`) in `folder`, with its own settings; it is ended with the block."
    own = {f'JUPYTER_{name}_DIR': str(folder/f'.{name}') for name in ('CONFIG', 'RUNTIME')} | {f'JUPYTERLAB_{name}_DIR': str(folder/f'.{name}') for name in ('SETTINGS', 'WORKSPACES')}
    with started(folder, *arguments, environment=own | {'OMP_NUM_THREADS': '1'}, seconds=120) as (port, _): yield f'http://127.0.0.1:{port}'

@contextmanager
def voila(folder: Path, source: str, theme: str = 'light') -> Iterator[str]:
    "The address at which Voila shows what the cell `source` returns."
    write_notebook(folder/'page.ipynb', source)
    with served(folder, 'voila', 'page.ipynb', '--Voila.ip=127.0.0.1', '--template=lowrank', f'--theme={theme}', *(f'--VoilaConfiguration.extension_denylist={o}' for o in UNUSED)) as address: yield address

@contextmanager
def lab(folder: Path, source: str) -> Iterator[str]:
    "The address at which JupyterLab has opened a notebook of the cell `source`."
    write_notebook(folder/'page.ipynb', source)
    config = folder/'.CONFIG'/'labconfig'
    config.mkdir(parents=True)
    (config/'page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    with served(folder, 'jupyterlab', '--ip=127.0.0.1', '--allow-root', '--expose-app-in-browser', '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={folder}') as address:
        yield f'{address}/lab/tree/page.ipynb?reset'

RUN_ALL = """async () => { const app = window.jupyterapp, nb = app.shell.currentWidget; await app.restored; await nb.sessionContext.ready;
    await nb.sessionContext.session.kernel.info; await app.commands.execute('notebook:run-all-cells'); }"""

def run_all(page):
    "Run the notebook that JupyterLab has opened."
    page.wait_for_function('window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady', timeout=120_000)
    page.evaluate(RUN_ALL)
