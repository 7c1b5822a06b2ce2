"""Build the site: nbs/, tutorials/ -> nbdev's processors -> Sphinx (MyST-NB, Furo) -> docs/_html; nothing is fetched.

Run it from anywhere: `python tools/build_docs.py [FOLDER]`. It prints one line; a warning of any step makes it exit 1.
No notebook is run: pages show the committed outputs. Only cells that import or export are executed, for the signatures.
"""
import ast
import functools
import html
import io
import json
import multiprocessing
import os
import posixpath
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {  # folder of nbs/ -> caption in the side bar, in the order of reading
    '': 'Start', 'core': 'Core', 'data': 'Data', 'models': 'Models', 'shapes': 'Shapes', 'analysis': 'Analysis',
    'adapters': 'Adapters', 'allocation': 'Rank allocation', 'optimizers': 'Optimizers', 'merging': 'Merging',
    'compression': 'Compression', 'distillation': 'Distillation', 'language': 'Language models',
    'vision_language': 'Vision and language', 'diffusion': 'Diffusion', 'dataset_distillation': 'Dataset distillation',
    'explorers': 'Explorers', 'reports': 'Reports', 'cli': 'Command line', 'tutorials': 'Tutorials'}
PLOT, WIDGET = 'application/vnd.plotly.v1+json', 'application/vnd.jupyter.widget-view+json'
SHOWN = {'text/html', 'text/markdown', 'text/latex', 'text/plain',
         'image/png', 'image/jpeg', 'image/svg+xml', 'image/gif'}
LANGUAGE = {'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}}
# Commands for which the one-file MathJax would load a second file, which the site does not have.
NOT_OFFLINE = re.compile(r'\\(boldsymbol|cancel|bcancel|xcancel|textcolor|color|colorbox|bra|ket|braket|bbox|enclose|'
                         r'ce|href|cssId|newcommand|renewcommand|def|unicode|verb)(?![A-Za-z])')



@dataclass(frozen=True)
class Page:
    "One page of the site and the file it is made from."
    source: Path        # relative to the project: nbs/core/01_linalg.ipynb
    name: str           # of the page, without its number: core/linalg
    section: str        # key of SECTIONS
    title: str
    description: str
    date: str = ''      # of the commit that holds its outputs


@dataclass
class Site:
    "What the pages need to know of each other: where a file's page is, and which page documents which names."
    root: Path
    pages: list[Page]
    anchors: dict[str, set[str]] = field(default_factory=dict)  # page name -> names documented on it

    @functools.cached_property
    def by_source(self) -> dict[str, Page]:
        return {p.source.as_posix(): p for p in self.pages}


# Finding the pages

def first_cell(cells: list[dict]) -> tuple[str, str]:
    "Title and description of a notebook, from its first markdown cell; empty where it has none."
    text = next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), '')
    title, said = (re.search(p, text, re.M) for p in (r'^# +(.+)$', r'^> *(.+)$'))
    return title[1].strip() if title else '', said[1].strip() if said else ''

def commit_dates(root: Path) -> dict[str, str]:
    "Date of the last commit that touched each file (ISO); empty where there is no git history."
    done = subprocess.run(['git', '-c', 'safe.directory=*', 'log', '--format=%x00%cs', '--name-only'], cwd=root,
                          capture_output=True, text=True, check=False)
    dates: dict[str, str] = {}
    for commit in done.stdout.split('\0')[1:]:
        date, *files = commit.split('\n')
        for name in filter(None, files): dates.setdefault(name, date)
    return dates

def find_pages(root: Path) -> list[Page]:
    "Every notebook of nbs/ and tutorials/ in the order of its number, and CONTRIBUTING.md where there is one."
    from nbdev.config import nbpath2html
    dates, pages = commit_dates(root), []
    for path in sorted(p for top in ('nbs', 'tutorials') for p in (root/top).rglob('*.ipynb')):
        source = path.relative_to(root)
        if any(part.startswith(('.', '_')) for part in source.parts): continue
        inside = source.relative_to('nbs') if source.parts[0] == 'nbs' else source
        name = nbpath2html(inside).with_suffix('').as_posix()
        title, said = first_cell(json.loads(path.read_text(encoding='utf-8'))['cells'])
        section = name if name in SECTIONS else inside.parts[0] if len(inside.parts) > 1 else ''
        pages.append(Page(source, name, section, title or name, said, dates.get(source.as_posix(), '')))
    guide = Path('CONTRIBUTING.md')
    if (root/guide).is_file(): pages.append(Page(guide, 'contributing', '', 'Contributing', ''))
    names = [p.name for p in pages]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice: raise SystemExit(f'two notebooks make the same page: {", ".join(twice)}')
    if 'index' not in names: raise SystemExit('nbs/index.ipynb is missing: it is the landing page')
    return pages


# nbdev's part, in worker processes: signatures from exported cells, links from backticks

def prepare_worker(root: str, folder: str) -> None:
    "Let nbdev find its configuration in `folder` and the package in `root`; cells that import run in `folder`."
    os.chdir(folder)
    sys.path.insert(0, root)
    os.environ.update(IN_TEST='1', PLOTLY_RENDERER='plotly_mimetype', MPLBACKEND='agg')
    import inspect

    from fastcore import docments
    from nbdev import processors
    # An annotation in quotes may name what only type checkers import: then the signature shows the text of it.
    def signature(symbol: Callable, *, eval_str: bool = False, **kwargs) -> inspect.Signature:
        try: return inspect.signature(symbol, eval_str=eval_str, **kwargs)
        except NameError: return inspect.signature(symbol, **kwargs)
    docments.signature = signature  # ty: ignore[invalid-assignment]
    # Backticks link to our own names only, not to those of nbdev and its friends (`make` is one).
    processors.NbdevLookup = functools.partial(processors.NbdevLookup, incl_libs='lowrank-distill')

def process(path: Path) -> tuple[dict, list[str]]:
    "Notebook at `path` after nbdev's processors, and what they complained about; an error is a complaint too."
    from fastcore.nbio import nb2str, read_nb
    from nbdev.processors import FilterDefaults
    class Steps(FilterDefaults):  # all but two: `convert` puts signatures in their place
        def base_procs(self): return [p for p in super().base_procs() if p.__name__ not in ('add_fold', 'mv_exports')]
    own = sys.modules['__main__']
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            nb = read_nb(path)
            Steps()(nb)
        except Exception as e: return {'cells': []}, [f'{path.name}: {type(e).__name__}: {e}']
        finally: sys.modules['__main__'] = own  # the shell that runs the cells put its own there
    ours = [w for w in caught if {'nbdev', 'fastcore'} & set(Path(w.filename).parts) and w.category is UserWarning]
    return json.loads(nb2str(nb)), [f'{path.name}: {w.message}' for w in ours]

def process_all(root: Path, work: Path, pages: Iterable[Page]) -> tuple[list[dict], list[str]]:
    "`process` over all notebooks by two workers, in order."
    shutil.copy(root/'pyproject.toml', work)
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(2, context, prepare_worker, (str(root), str(work))) as pool:
        done = list(pool.map(process, [root/p.source for p in pages]))
    return [nb for nb, _ in done], [w for _, said in done for w in said]


# From nbdev's notebooks to MyST-NB's

def plot_html(figure: dict | list[str]) -> str:
    "A plotly figure as data for lazy.js; `figure` is the output's JSON, parsed or in lines."
    figure = figure if isinstance(figure, dict) else json.loads(''.join(figure))
    layout = figure.get('layout', {})
    data = json.dumps({'data': figure['data'], 'layout': layout, 'frames': figure.get('frames')}).replace('</', '<\\/')
    return (f'<div class="plotly-lazy" style="min-height:{layout.get("height", 450)}px">'
            f'<script type="application/json">{data}</script></div>')

def convert_output(output: dict) -> dict | None:
    "One output with only what the site can show, None if nothing is left; a widget keeps its static twin."
    if 'data' not in output: return output
    data = dict(output['data'])
    if PLOT in data: data = {'text/html': plot_html(data[PLOT])}
    elif 'image/webp' in data:
        data = {'text/html': f'<img alt="" src="data:image/webp;base64,{"".join(data["image/webp"]).strip()}">'}
    elif WIDGET in data and not data.keys() & (SHOWN - {'text/plain'}):
        data = {'text/markdown': '*A widget: open the notebook to use it.*'}
    data = {kind: value for kind, value in data.items() if kind in SHOWN}
    return output | {'data': data, 'metadata': {}} if data else None

def definitions(source: str) -> dict[str, bool]:
    "Functions and classes that a cell defines at its top level: name -> is it a class."
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {n.name: isinstance(n, ast.ClassDef) for n in ast.parse(source).body if isinstance(n, kinds)}

def markdown(text: str, cell_id: str) -> dict:
    return {'cell_type': 'markdown', 'id': cell_id, 'metadata': {}, 'source': text}

def anchors(names: Iterable[str]) -> str:
    return ''.join(f'<span class="api" id="api-{n}"></span>' for n in names)

def signature_text(cell: dict, name: str, is_class: bool) -> str:
    "What `show_doc` printed, without its heading, source link and rule; a class says class."
    data = next((o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})), {})
    text = ''.join(data.get('text/markdown', ''))
    text = re.sub(r'^(---|#+ .*|\[source\]\(.*)$\n?', '', text, flags=re.M).strip()
    if is_class: text = re.sub(r'^(```python\n)def ', r'\1class ', text)
    return f'{anchors([name])}\n\n::::{{container}} api-doc\n{text}\n::::' if text else anchors([name])

def fold_prompt(tags: list[str]) -> str:
    "The line that stands for a folded part of a cell."
    if 'parameters' in tags: return 'Parameters'
    if 'solution' in tags: return 'A solution'
    if 'hide-output' in tags: return 'Show the result'
    return 'Show the code'

def convert_code(cell: dict, exported: bool) -> list[dict]:
    "A code cell without directives; an exported one is preceded by the anchors of the names that it defines."
    source = re.sub(r'^#\|.*\n?', '', ''.join(cell['source']), flags=re.M).strip('\n')
    tags = cell['metadata'].get('tags', [])
    prompt = fold_prompt(tags)
    shown = {'cell_type': 'code', 'id': cell['id'], 'source': source, 'execution_count': cell.get('execution_count'),
             'metadata': {'tags': tags, 'mystnb': {'code_prompt_show': prompt, 'code_prompt_hide': prompt}},
             'outputs': [o for o in map(convert_output, cell.get('outputs', [])) if o]}
    names = definitions(source) if exported else {}
    return [markdown(anchors(names), f'{cell["id"]}-api'), shown] if names else [shown]

def convert(nb: dict, page: Page, raw: dict) -> tuple[list[dict], set[str]]:
    """Cells of `page` for MyST-NB from nbdev's processed `nb` and the notebook as it stands, and the names documented.

    Where the source of a definition is shown (`#| exports`) its signature is not shown a second time."""
    code = (''.join(c['source']) for c in raw['cells'] if c['cell_type'] == 'code')
    defined = {k: v for source in code if re.match(r'#\| *export', source) for k, v in definitions(source).items()}
    sources = [''.join(c['source']) for c in nb['cells']]
    shown = {n for s in sources if re.search(r'^#\| *exports\b', s, re.M) for n in definitions(s)}
    head = f'# {page.title}\n\n' + (f'> {page.description}\n' if page.description else '')
    if page.date: head += f'\n<p class="page-date">Outputs of {page.date}</p>\n'
    cells, names = [markdown(head, 'title')], set(shown)
    for cell, source in zip(nb['cells'], sources, strict=True):
        doc = re.search(r'^show_doc\(([\w.]+)', source, re.M)
        if cell['cell_type'] == 'raw' or 'AUTOGENERATED! DO NOT EDIT' in source: continue
        if cell['cell_type'] == 'markdown': cells.append(markdown(source, cell['id']))
        elif doc and doc[1].split('.')[0] in shown: continue
        elif doc:
            cells.append(markdown(signature_text(cell, doc[1], defined.get(doc[1], False)), cell['id']))
            names.add(doc[1])
        else: cells += convert_code(cell, bool(re.search(r'^#\| *exports\b', source, re.M)))
    return cells, names


# Links: from backticks, to notebooks, to files that have no page

SYMBOL = re.compile(r'\[`([^`]+)`\]\(/?([^)#\s]+\.html)#[^)\s]*\)')                        # as nbdev writes them
FILE = re.compile(r'(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?![a-z]+:|#)([^)\s]+)\)')  # neither a picture nor an address

def symbol_link(site: Site, page: Page, text: str, target: str) -> str:
    "nbdev's link to a documented name, made to work from file:// and to lead to the definition on its page."
    name, there = text.removesuffix('()'), target.removesuffix('.html')
    known = site.anchors.get(there, set())
    place = next((n for n in (name, name.split('.')[-1], name.split('.')[0]) if n in known), None)
    away = '' if there == page.name else posixpath.relpath(f'{there}.html', posixpath.dirname(page.name) or '.')
    if not away and place is None: return f'`{text}`'
    href = away + (f'#api-{place}' if place else '')
    return f'<a class="symbol" href="{href}"><code>{html.escape(text)}</code></a>'

def file_link(site: Site, page: Page, text: str, target: str) -> str:
    "A link to a file of the project leads to the file's page; where it has none only the text stays."
    path, hash_, anchor = target.partition('#')
    here = posixpath.dirname(page.name) or '.'
    for base in (page.source.parent.as_posix(), '.'):  # the landing page is also README: written to work from the root
        there = posixpath.normpath(posixpath.join(base, path))
        if there in site.by_source:
            other = site.by_source[there]
            return f'[{text}]({posixpath.relpath(other.name + other.source.suffix, here)}{hash_}{anchor})'
        if (site.root/there).exists(): return text
    return f'[{text}]({target})'  # unknown: Sphinx says so

def link(site: Site, page: Page, source: str) -> str:
    "Markdown `source` with links that work on the site; web addresses and links inside the page stay as they are."
    pieces = re.split(r'(^```.*?^```|^#+ [^\n]*)', source, flags=re.M | re.S)
    for i, piece in enumerate(pieces):
        if piece.startswith('```'): continue
        if i % 2: pieces[i] = SYMBOL.sub(r'`\1`', piece)
        else:
            piece = SYMBOL.sub(lambda m: symbol_link(site, page, m[1], m[2]), piece)
            pieces[i] = FILE.sub(lambda m: file_link(site, page, m[1], m[2]), piece)
    return ''.join(pieces)

def missing_math(page: Page, cells: list[dict]) -> list[str]:
    "TeX commands on the page that the one-file MathJax would have to fetch."
    prose = '\n'.join(c['source'] for c in cells if c['cell_type'] == 'markdown')
    maths = ' '.join(re.findall(r'\$\$.+?\$\$|\$[^$\n]+\$', prose, re.S))
    names = sorted(set(NOT_OFFLINE.findall(maths)))
    return [f'{page.source}: \\{name} is not in the offline MathJax' for name in names]


# Pages that no notebook holds

def tracks_page(site: Site) -> str:
    "The eight tracks as tables: each page with its link where it is built, its state and its verdict where it has one."
    from lowrank_distill.core.catalog import methods, page, tracks
    names, short, said = {p.name for p in site.pages}, {m.key: m.short for m in methods()}, verdicts()
    text = ['# Reading path', '', '> Eight questions, each with the pages that answer it in the order of reading.', '']
    for track in tracks():
        text += [f'## {track.number} {track.title}', '', f'**{track.question}**', '',
                 '| page | what it is about | state | verdict |', '|---|---|---|---|']
        for key in track.pages:
            record = page(key)
            name = record.module.replace('.', '/').lower()
            label = short.get(key, key)
            linked = f'[{label}]({name}.ipynb)' if name in names else label
            text.append(f'| {linked} | {record.title} | {record.state} | {said.get(key, "")} |')
        text.append('')
    return '\n'.join(text)

def verdicts() -> dict[str, str]:
    "The verdict of each stored study's primary claim, one a scale; the whole sentence shows under the pointer."
    from lowrank_distill.core.catalog import pages
    from lowrank_distill.core.runs import evidence_table
    said: dict[str, list[str]] = {}
    for row in evidence_table({p.key: p.module for p in pages()}).itertuples():
        remarks = ', '.join([row.scale, *([] if row.freshness == 'fresh' else [row.freshness])])
        sentence = html.escape(row.sentence).replace('|', '&#124;')
        said.setdefault(row.key, []).append(f'<abbr title="{sentence}">{row.verdict}</abbr> ({remarks})')
    return {key: '<br>'.join(lines) for key, lines in said.items()}

def contents(pages: list[Page]) -> str:
    "The side bar: sections in the order of reading, pages in the order of their numbers; unknown folders come last."
    sections: dict[str, list[Page]] = {key: [] for key in SECTIONS}
    for p in pages:
        if p.name != 'index': sections.setdefault(p.section, []).append(p)
    text = []
    for key, members in sections.items():
        names = (['tracks'] if key == '' else []) + [p.name for p in members]
        if names: text += ['```{toctree}', ':hidden:', f':caption: {SECTIONS.get(key, key)}', '', *names, '```', '']
    return '\n'.join(text)


# Sphinx

def write_sources(site: Site, notebooks: list[dict], folder: Path) -> list[str]:
    "Every page as a file below `folder`; returns warnings."
    converted = {}
    for p, nb in zip((p for p in site.pages if p.source.suffix == '.ipynb'), notebooks, strict=True):
        raw = json.loads((site.root/p.source).read_text(encoding='utf-8'))
        converted[p.name], site.anchors[p.name] = convert(nb, p, raw)
    warned = []
    for p in site.pages:
        path = folder/p.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if p.source.suffix == '.md':
            text = (site.root/p.source).read_text(encoding='utf-8')
            path.with_suffix('.md').write_text(link(site, p, text), encoding='utf-8')
            continue
        cells = converted[p.name]
        for c in cells:
            if c['cell_type'] == 'markdown': c['source'] = link(site, p, c['source'])
            for data in (o['data'] for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})):
                data['text/markdown'] = link(site, p, ''.join(data['text/markdown']))
        if p.name == 'index': cells.append(markdown(contents(site.pages), 'contents'))
        warned += missing_math(p, cells)
        nb = {'cells': cells, 'metadata': LANGUAGE, 'nbformat': 4, 'nbformat_minor': 5}
        path.with_name(path.name + '.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    (folder/'tracks.md').write_text(tracks_page(site), encoding='utf-8')
    return warned

def copy_companions(root: Path, folder: Path) -> None:
    "Pictures and other files that lie beside the notebooks."
    for top, to in (('nbs', folder), ('tutorials', folder/'tutorials')):
        for path in (root/top).rglob('*'):
            place = path.relative_to(root/top)
            hidden = any(part.startswith(('.', '_')) for part in place.parts)
            if hidden or not path.is_file() or path.suffix in ('.ipynb', '.py'): continue
            (to/place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to/place)

def write_static(root: Path, folder: Path, plots: bool) -> None:
    "Scripts and style; plotly.js, 4.8 MB, only where a page has a figure."
    folder.mkdir(parents=True)
    shutil.copy(root/'lowrank_distill'/'assets'/'js'/'tex-svg.js', folder)  # MathJax, one file
    shutil.copy(root/'tools'/'site.css', folder)
    if not plots: return
    import plotly
    shutil.copy(root/'tools'/'lazy.js', folder)
    shutil.copy(Path(plotly.__file__).parent/'package_data'/'plotly.min.js', folder)

def run_sphinx(source: Path, static: Path, out: Path) -> list[str]:
    "Build the HTML; returns Sphinx's warnings."
    from sphinx.application import Sphinx
    settings = {
        'project': 'lowrank-distill', 'extensions': ['myst_nb'], 'html_theme': 'furo', 'html_title': 'lowrank-distill',
        'nb_execution_mode': 'off', 'nb_ipywidgets_js': {}, 'nb_merge_streams': True,
        'nb_render_markdown_format': 'myst',
        'myst_enable_extensions': ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline'], 'myst_heading_anchors': 3,
        'mathjax_path': 'tex-svg.js', 'html_static_path': [str(static)], 'html_css_files': ['site.css'],
        'html_js_files': ['lazy.js'] if (static/'lazy.js').exists() else [], 'html_show_sourcelink': False,
        'html_copy_source': False, 'html_show_copyright': False, 'language': 'en'}
    said = io.StringIO()
    app = Sphinx(source, None, out, source.parent/'doctrees', 'html', confoverrides=settings, status=None, warning=said,
                 freshenv=True, parallel=2)
    app.build()
    plain = re.sub(r'\x1b\[[0-9;]*m', '', said.getvalue())
    return [line for line in plain.splitlines() if line.strip()]

def build(root: Path, out: Path) -> tuple[int, list[str]]:
    "Build the site of the project in `root` into the folder `out`; returns the number of pages and the warnings."
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    work = out.parent/'_work'
    for folder in (out, work): shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    config = get_config(root)
    _build_modidx(config.lib_path, config.nbs_path)  # the index of names that links are made from
    pages = find_pages(root)
    notebooks, warned = process_all(root, work, [p for p in pages if p.source.suffix == '.ipynb'])
    warned += write_sources(Site(root, pages), notebooks, work/'source')
    copy_companions(root, work/'source')
    outputs = (o for nb in notebooks for c in nb['cells'] for o in c.get('outputs', []))
    write_static(root, work/'static', any(PLOT in o.get('data', {}) for o in outputs))
    warned += run_sphinx(work/'source', work/'static', out)
    shutil.rmtree(work)
    return len(pages) + 1, warned  # and the reading path

def main(out: str | None = None) -> int:
    "Build, say how it went in one line after the warnings; returns the exit status."
    start = time.monotonic()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    pages, warned = build(ROOT, Path(out).resolve() if out else ROOT/'docs'/'_html')
    for line in warned: print(line, file=sys.stderr)
    print(f'site: {pages} pages, {len(warned)} warnings, {time.monotonic() - start:.0f} s')
    return 1 if warned else 0


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
