"""The app, worked by hand: two tabs, the rank explorer's own controls, paths that lead out of the folder; and its command."""
import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser_fixtures import needs_browser, opened
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.cli import main
from lowrank_distill.core.files import asset
from lowrank_distill.core.recording import Recorder
from lowrank_distill.explorers.app import page as app_page
from lowrank_distill.explorers.app import serving
from lowrank_distill.models.teachers import embedded
from lowrank_distill.shapes.adapter import adapt


@pytest.fixture
def folder(tmp_path) -> Path:
    "A folder of runs: the two samples and a damaged run; beside it, outside, a run that is nobody's business."
    for name in ('cka', 'ranks'): shutil.copytree(asset(f'recordings/{name}'), tmp_path/'runs'/name)
    for place in (tmp_path/'runs'/'broken', tmp_path/'outside'):
        with Recorder(place, 'x', 0) as recorder: recorder.scalar('rank', 1, 0, layer='q')
    part = next((tmp_path/'runs'/'broken').glob('*.parquet'))
    part.write_bytes(part.read_bytes()[:-10])
    return tmp_path/'runs'

class Ranks:
    "What a person can do in the tab of the rank explorer, and see of it."

    def __init__(self, page): self.page, self.box = page, page.locator('.lrd-explorer:visible').first

    def caption(self) -> str: return self.box.locator('[role=status]').text_content()
    def said(self, pattern: str): self.box.locator('[role=status]', has_text=re.compile(pattern)).wait_for(timeout=30_000)

    def slide(self, label: str, *keys: str):
        "Keys on the handle of the slider with that label."
        handle = self.box.locator('.widget-slider', has_text=label).locator('.noUi-handle').first
        handle.focus()
        for key in keys: handle.press(key)

    def choose(self, label: str, value: str): self.box.get_by_label(label, exact=True).select_option(value)

    def write(self, label: str, text: str, press: str):
        self.box.get_by_label(label, exact=True).fill(text)
        self.box.get_by_label(label, exact=True).press('Tab')
        self.box.get_by_role('button', name=press, exact=True).click()

def number(pattern: str, text: str) -> float: return float(re.search(pattern, text)[1].replace(',', ''))

def work(ranks: Ranks, folder: Path):
    "Steps, budget, cut, allocator and file, each of which changes what is said; and two wrong paths, which do not."
    ranks.choose('run', 'sora')
    ranks.said('Run sora')
    ranks.choose('ranks of', 'run: sora')
    ranks.said("ranks of 'run: sora'")
    last = number(r'(\d+) in 24 layers', ranks.caption())
    ranks.slide('step', 'Home')
    ranks.said('step 0,')
    assert number(r'(\d+) in 24 layers', ranks.caption()) > last  # gates closed on the way
    ranks.slide('step', 'End')
    small = number(r'A budget of ([\d,]+)', ranks.caption())
    ranks.slide('budget', 'ArrowRight', 'ArrowRight')
    ranks.said(f'A budget of (?!{small:,.0f} )')
    assert number(r'A budget of ([\d,]+)', ranks.caption()) > small
    ranks.slide('cut', 'Home')
    ranks.said('cut at 0 keeps 0.0%')
    ranks.slide('cut', 'End')
    ranks.said(r'cut at \d+ keeps 100.0%')
    click(ranks, ranks.box.locator('.subplot.x2y2 .barlayer .point path').nth(2))
    ranks.said('cut at 3 keeps')
    ranks.choose('ranks of', 'energy')
    ranks.said("ranks of 'energy'")
    ranks.write('file', str(folder.parent/'pattern.json'), 'save')
    ranks.box.get_by_text('Saved pattern.json.').wait_for(timeout=20_000)
    wrong_paths(ranks)

def click(ranks: Ranks, part):
    "The mouse comes to the middle of a part of the figure, waits for the label, and clicks."
    part.scroll_into_view_if_needed()
    box = part.bounding_box()
    ranks.page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] - 2)
    ranks.box.locator('.hoverlayer .hovertext').first.wait_for(timeout=20_000)
    ranks.page.mouse.click(box['x'] + box['width'] / 2, box['y'] + box['height'] - 2)

def wrong_paths(ranks: Ranks):
    before = ranks.caption()
    for path, message in (('../outside', 'outside the folder'), ('nowhere', 'no run'), ('broken', 'truncated or altered')):
        ranks.write('recording', path, 'open')
        ranks.box.locator('[role=alert]', has_text=message).wait_for(timeout=20_000)
        assert ranks.caption() == before

def test_by_hand(folder):
    chromium = needs_browser()
    with serving(folder) as (address, _), opened(chromium) as page:
        page.goto(address, wait_until='commit', timeout=120_000)
        page.get_by_role('tab', name='Ranks').click(timeout=120_000)
        assert page.get_by_text('broken is left out').count() == 1
        work(Ranks(page), folder)
        page.get_by_role('tab', name='CKA').click()
        page.locator('.lrd-explorer:visible [role=status]', has_text='CKA').wait_for(timeout=20_000)
        assert not page.errors and not page.external
    pattern = json.loads((folder.parent/'pattern.json').read_text())
    ranks = adapt(embedded('vit'), LoRA(), 'blocks.*', rank_pattern=pattern).ranks()
    assert len(ranks) == 24 and len(set(ranks.values())) > 1

def test_no_token_no_page(folder):
    needs_browser()
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_): return None
    with serving(folder) as (address, _):
        for place in ('/', '/api/kernels', '/voila/files/explorers.ipynb'):
            with pytest.raises(urllib.error.HTTPError) as caught: urllib.request.build_opener(Stay).open(address.split('/?')[0] + place, timeout=30)
            assert caught.value.code in (302, 403, 404), place
            caught.value.close()

def test_sample_runs():
    "Without a folder the page shows what comes with the package."
    page = app_page()
    assert [type(child).__name__ for child in page.children[1].children] == ['VBox', 'VBox']

def test_command(tmp_path, capsys):
    for line, said in (('app --runs no/such', "no folder 'no/such'"), ('app --theme blue', "'light' or 'dark'")):
        assert main(line.split()) == 2 and said in capsys.readouterr().err
