"""The documentation site, built once from a clean copy with one more notebook that uses everything a page may use."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, alone, copy_project
from filelock import FileLock

KERNEL = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}


# Building

def markdown(text: str) -> dict: return {'cell_type': 'markdown', 'metadata': {}, 'source': text}

def code(text: str, *tags: str, **data) -> dict:
    "A code cell with tags; `data` is its output, by MIME type."
    shown = [{'output_type': 'display_data', 'metadata': {}, 'data': data}] if data else []
    return {'cell_type': 'code', 'metadata': {'tags': [*tags]}, 'source': text, 'outputs': shown, 'execution_count': 1}

def write_notebook(path: Path, *cells: dict) -> None:
    for i, cell in enumerate(cells): cell['id'] = f'cell{i}'
    nb = {'cells': cells, 'metadata': {'kernelspec': KERNEL}, 'nbformat': 4, 'nbformat_minor': 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb), encoding='utf-8')

FIGURE = {'application/vnd.plotly.v1+json': {'data': [{'type': 'scatter', 'y': [1, 3, 2]}], 'layout': {'height': 300}},
          'text/plain': 'Figure()'}
WIDGET = {'application/vnd.jupyter.widget-view+json': {'model_id': 'abc'}, 'text/plain': 'IntSlider()'}

def write_probe(path: Path) -> None:
    "A page with each kind of cell, link and output."
    title = markdown('# A probe\n\n> Everything that a page may hold.')
    write_notebook(
        path, title, code('#| default_exp probe', 'hide-input'),
        code('scale: str = "cpu"', 'parameters', 'hide-input'),
        markdown('Names: `nearest`, `InputError`, `Streams.seed()`, `no_such_name`, `test_eq`. A formula: $\\hat x = \\sum x_i$. '
                 'Files: [errors](core/00_errors.ipynb), [the licence](../LICENSE).'),
        code('plain', **FIGURE), code('hidden', 'hide-output', **FIGURE), code('slider', **WIDGET),
        code('table', **{'text/markdown': '| page | n |\n|---|---|\n| [errors](core/00_errors.ipynb#one-line-a-mistake) | 1 |'}),
        code('picture', **{'image/webp': 'UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA=='}),
        code('answer = 1\nassert answer', 'hide-cell', 'solution'), markdown('## `nearest` in a heading'))

def build(project: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, project/'tools'/'build_docs.py'], cwd=project, env=alone(project), text=True,
                          capture_output=True, check=False, timeout=300)

@pytest.fixture(scope='module')
def project(tmp_path_factory) -> Path:
    "A copy of the project with the probe, in a folder that all workers share."
    base = tmp_path_factory.getbasetemp()
    return (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'site'

@pytest.fixture(scope='module')
def built(project) -> dict:
    "How the build went; the first worker that asks makes it, the others wait."
    said = project/'said.json'
    with FileLock(project.with_suffix('.lock')):
        if not said.exists():
            write_probe(copy_project(project)/'nbs'/'zz_probe.ipynb')
            done = build(project)
            said.write_text(json.dumps({'status': done.returncode, 'stdout': done.stdout, 'stderr': done.stderr}))
    return json.loads(said.read_text())

@pytest.fixture(scope='module')
def site(project, built) -> Path:
    "The folder of the HTML."
    assert (project/'docs'/'_html'/'index.html').exists(), built['stderr']
    return project/'docs'/'_html'


# Reading what was built

class Page(HTMLParser):
    "The tags of a page with their attributes, in order, and its ids."
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.ids = {a['id'] for _, a in self.tags if a.get('id')}

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def all(self, tag: str, of_class: str = '') -> list[dict]:
        "Attributes of all such tags, or of those of one class."
        return [a for t, a in self.tags if t == tag and (not of_class or of_class in (a.get('class') or '').split())]

@cache
def read(path: Path) -> Page: return Page(path.read_text(encoding='utf-8'))

def pages(site: Path) -> list[Path]: return sorted(site.rglob('*.html'))

def fetched(page: Page) -> Iterator[str]:
    "Addresses that a browser loads by itself when it shows the page."
    for tag, a in page.tags:
        if tag in {'script', 'img', 'source', 'iframe', 'video', 'audio', 'embed'} and a.get('src'): yield a['src']
        if tag == 'link' and a['rel'] not in {'next', 'prev', 'index', 'search'}: yield a['href']

def external(addresses: Iterator[str]) -> list[str]:
    return [a for a in addresses if urlsplit(a).netloc or urlsplit(a).scheme not in ('', 'data')]

def dead_links(path: Path) -> list[str]:
    "Links of the page at `path` to a file or a place inside a page that is not there."
    dead = []
    for a in read(path).all('a'):
        href = a.get('href') or ''
        address = urlsplit(href)
        if address.scheme or address.netloc: continue
        target = (path.parent/unquote(address.path)).resolve() if address.path else path
        place = unquote(address.fragment) if target.suffix == '.html' else ''
        if not target.is_file() or place and place not in read(target).ids: dead.append(href)
    return dead


# The whole site

def test_no_warnings(built):
    assert built['status'] == 0, built['stderr'][-4000:]
    assert re.fullmatch(r'site: \d+ pages, 0 warnings, \d+ s\n', built['stdout'])

def test_every_notebook_has_a_page(site, files):
    names = {re.sub(r'(^|/)\d+[a-z]?_', r'\1', p.relative_to('nbs').as_posix() if p.parts[0] == 'nbs' else p.as_posix())
             for p in files if p.suffix == '.ipynb' and p.parts[0] in ('nbs', 'tutorials')}
    assert names and all((site/n).with_suffix('.html').is_file() for n in names)

def test_nothing_is_fetched(site):
    assert not {str(p.relative_to(site)): e for p in pages(site) if (e := external(fetched(read(p))))}
    styles = '\n'.join(p.read_text(encoding='utf-8') for p in site.rglob('*.css'))
    assert styles and not re.findall(r'(?:url\(|@import)\s*["\']?(?:https?:)?//[^)"\']*', styles)

def test_every_link_leads_somewhere(site):
    assert not {str(p.relative_to(site)): d for p in pages(site) if (d := dead_links(p))}

def test_parameters_are_folded(site):
    "Wherever a page has a cell of parameters, the next thing in it is a closed fold."
    found = 0
    for path in pages(site):
        tags = read(path).tags
        for i, (tag, a) in enumerate(tags):
            if tag == 'div' and 'tag_parameters' in (a.get('class') or '').split():
                found += 1
                assert tags[i + 1][0] == 'details' and 'open' not in tags[i + 1][1], path
    assert found

def test_tracks(site):
    "Every track is there, and pages that are built are linked."
    text, page = (site/'tracks.html').read_text(encoding='utf-8'), read(site/'tracks.html')
    tracks = json.loads((ROOT/'lowrank_distill'/'assets'/'catalog.json').read_text(encoding='utf-8'))['tracks']
    assert len(tracks) == 8 and all(t['question'] in text.replace('’', "'") for t in tracks)
    assert any(a.get('href') == 'core/linalg.html' for a in page.all('a'))

def test_titles(site):
    page = (site/'core'/'errors.html').read_text(encoding='utf-8')
    assert '<h1>Errors that help' in page and '<blockquote>' in page

def test_exported_source_is_shown_once(site):
    "`#| exports` shows the lines; the signature that nbdev would print above them is left out."
    text = re.sub(r'<[^>]+>', '', (site/'core'/'errors.html').read_text(encoding='utf-8'))
    assert text.count('def nearest(') == 1


# The probe

@pytest.fixture
def probe(site) -> Page: return read(site/'zz_probe.html')

def test_symbols_link(site, probe):
    links = {a['href'] for a in probe.all('a', 'symbol')}
    assert links == {'core/errors.html#api-nearest', 'core/errors.html#api-InputError', 'core/streams.html#api-Streams'}
    assert not [a for a in probe.all('a') if 'test_eq' in (a.get('href') or '')]  # fastcore's

def test_files_link(probe):
    "A notebook leads to its page; a file without a page leaves its name only."
    links = {a.get('href') for a in probe.all('a')}
    assert 'core/errors.html' in links and not [h for h in links if h and 'LICENSE' in h]

def test_folds(site, probe):
    "Parameters, a hidden result and a solution: three closed folds."
    folds = probe.all('details', 'hide')
    assert len(folds) == 3 and not any('open' in a for a in folds)
    text = (site/'zz_probe.html').read_text(encoding='utf-8')
    for name in ('Parameters', 'Show the result', 'A solution'): assert f'collapsed admonition-title">{name}<' in text

def test_outputs(site, probe):
    "Figures are data until they are looked at, a picture is inside the page, a table a table, a widget says what it is."
    assert len(probe.all('div', 'plotly-lazy')) == 2
    assert [a for a in probe.all('img') if a['src'].startswith('data:image/webp')] and probe.all('td')
    assert 'core/errors.html#one-line-a-mistake' in {a.get('href') for a in probe.all('a')}
    assert 'A widget: open the notebook to use it.' in (site/'zz_probe.html').read_text(encoding='utf-8')

def test_in_a_browser(site):
    "From file://: mathematics is set, the figure in view is drawn, the folded one when it is unfolded; nothing fails."
    chromium = os.environ.get('CHROMIUM') or shutil.which('chromium')
    if not chromium: pytest.skip('no chromium')
    from playwright.sync_api import sync_playwright
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
    errors, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('requestfailed', lambda r: errors.append(r.url))
        page.on('request', lambda r: requests.append(r.url))
        page.goto((site/'zz_probe.html').as_uri())
        page.wait_for_selector('mjx-container svg')
        page.wait_for_selector('.plotly-lazy[data-drawn] .main-svg')
        assert page.locator('.plotly-lazy[data-drawn]').count() == 1
        page.locator('p.collapsed', has_text='Show the result').click()
        page.wait_for_function('document.querySelectorAll(".plotly-lazy[data-drawn]").length == 2')
        widths = page.evaluate('[...document.querySelectorAll(".plotly-lazy .main-svg")].map(o => o.clientWidth)')
        wider = []
        for width in (400, 800, 1024, 1100, 1250, 1440, 1700):  # between the points at which side bars appear
            page.set_viewport_size({'width': width, 'height': 800})
            if page.evaluate('document.documentElement.scrollWidth') > width: wider.append(width)
        browser.close()
    assert not wider, f'the page is wider than windows of {wider} pixels'
    assert min(widths) > 300 and not errors and all(r.startswith(('file:', 'data:', 'blob:')) for r in requests)


# What is wrong is found

def test_a_dead_link_is_found(tmp_path):
    (tmp_path/'a.html').write_text('<p id="here"><a href="#here"></a><a href="#gone"></a><a href="b.html"></a>')
    assert dead_links(tmp_path/'a.html') == ['#gone', 'b.html']

def test_an_external_address_is_found():
    page = Page('<script src="https://x.org/a.js"></script><img src="a.png"><link rel="icon" href="//x.org/a.css">')
    assert external(fetched(page)) == ['https://x.org/a.js', '//x.org/a.css']

def test_warnings_fail_the_build(tmp_path):
    "A small project with a dead link, a command that MathJax lacks, and an import that cannot be executed."
    project = copy_project(tmp_path/'copy')
    for path in [*(project/'nbs').rglob('*.ipynb'), *(project/'tutorials').rglob('*.ipynb')]: path.unlink()
    title = markdown('# A page\n\n> For one test.')
    write_notebook(project/'nbs'/'index.ipynb', title, markdown('[gone](gone.ipynb) and $\\boldsymbol{x}$'))
    write_notebook(project/'nbs'/'core'/'00_bad.ipynb', title, code('#| export\nfrom no_such_module import f'))
    done = build(project)
    assert done.returncode == 1 and '3 warnings' in done.stdout
    assert all(word in done.stderr for word in ('gone.ipynb', 'boldsymbol', 'no_such_module'))
