"""The CKA explorer, worked by hand in JupyterLab and in Voila: keyboard, play, pin and difference, estimator, table, file, another recording."""
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from browser_fixtures import lab, needs_browser, opened, run_all, voila
from lowrank_distill.core.files import asset
from lowrank_distill.explorers.cka import CKAExplorer
from torch import nn

NASTY = '<img src=x onerror=alert(1)>'
CELL = "from lowrank_distill.explorers.cka import CKAExplorer\nCKAExplorer('sample').widget()"

@pytest.fixture
def folder(tmp_path) -> Path:
    "Where the server runs: the sample, and a recording of a network with names that were meant to do harm."
    shutil.copytree(asset('recordings/cka'), tmp_path/'sample')
    net = nn.Sequential()
    net.add_module(NASTY, nn.Linear(8, 6))
    net.add_module('head', nn.Linear(6, 3))
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    for step in (0, 5): CKAExplorer.record(tmp_path/'odd', net, rows, step=step, run=NASTY)
    return tmp_path

class Hands:
    "What a person can do to the explorer on a page, and see of it."

    def __init__(self, page): self.page, self.box = page, page.locator('.lrd-explorer').first

    def caption(self) -> str: return self.box.locator('[role=status]').text_content()
    def said(self, text: str | re.Pattern, seconds: float = 20): self.box.locator('[role=status]', has_text=text).wait_for(timeout=1000 * seconds)
    def picture(self) -> str: return self.box.locator('.heatmaplayer').first.inner_html()
    def press(self, name: str): self.box.get_by_role('button', name=name, exact=True).click()

    def keys(self, *keys: str):
        "Keys on the handle of the step's slider."
        handle = self.box.locator('.noUi-handle').nth(1)  # the first is the width of the RBF
        handle.focus()
        for key in keys: handle.press(key)

    def write(self, label: str, text: str, press: str):
        self.box.get_by_label(label, exact=True).fill(text)
        self.box.get_by_label(label, exact=True).press('Tab')
        self.press(press)

def drive(page, folder: Path):
    "All of it; every act must change what is shown, or say why not."
    hands = Hands(page)
    hands.said('student at step 400', 120)  # a kernel starts, and imports torch
    page.locator('.heatmaplayer image').first.wait_for(timeout=30_000)
    last, seen = hands.picture(), hands.caption()
    hands.keys('ArrowLeft')
    hands.said('student at step 150')
    assert hands.caption() != seen
    page.wait_for_function('old => document.querySelector(".heatmaplayer").innerHTML != old', arg=last, timeout=15_000)
    hands.keys('Home')
    hands.said('student at step 0')
    hands.press('pin as A')
    play_one_tick(hands)
    hands.keys('End')
    hands.said('student at step 400')
    hands.press('difference')
    hands.said('B minus A')
    hands.press('B')
    hands.box.get_by_label('estimator', exact=True).select_option('biased')
    hands.said(re.compile(r'\bBiased CKA'))
    table_and_files(hands, folder)
    other_recordings(hands)
    assert not page.errors and not page.external

def play_one_tick(hands: Hands):
    "Play moves on by itself, until it is stopped."
    before = hands.caption()
    hands.box.locator('.widget-play button').first.click()
    hands.page.wait_for_function('old => document.querySelector(".lrd-explorer [role=status]").textContent != old', arg=before, timeout=20_000)
    hands.box.locator('.widget-play button').first.click()
    assert 'student at step 0' not in hands.caption()

def table_and_files(hands: Hands, folder: Path):
    hands.box.get_by_label('table', exact=True).check()
    hands.box.locator('table').first.wait_for(timeout=15_000)
    shown = hands.box.locator('table').first.locator('tbody tr').count()
    hands.write('file', 'view.csv', 'save')
    hands.box.get_by_text('Saved view.csv.').wait_for(timeout=15_000)
    saved = pd.read_csv(folder/'view.csv')
    state = json.loads(hands.box.get_by_label('state', exact=True).input_value())
    explorer = CKAExplorer(folder/'sample', json.dumps(state))
    assert shown == len(saved) == 56 and state['estimator'] == 'biased' and saved.cka.round(6).equals(explorer.shown()[1].cka.round(6))

def other_recordings(hands: Hands):
    "A wrong path is one message beside a view that stays; names in another recording are text."
    before = hands.caption()
    hands.write('recording', 'nowhere', 'open')
    hands.box.locator('[role=alert]', has_text='nowhere').wait_for(timeout=15_000)
    assert hands.caption() == before
    hands.write('recording', 'odd', 'open')
    hands.said(NASTY)
    hands.box.locator('.js-plotly-plot .xtitle', has_text=NASTY).wait_for(timeout=15_000)
    assert not hands.box.locator('[role=alert], img[src=x]').count()

@pytest.fixture(scope='module')
def chromium() -> str: return needs_browser()

def test_voila(chromium, folder):
    with voila(folder, CELL) as address, opened(chromium) as page:
        page.goto(address, wait_until='commit', timeout=120_000)
        drive(page, folder)

def test_lab(chromium, folder):
    with lab(folder, CELL) as address, opened(chromium) as page:
        page.goto(address, wait_until='domcontentloaded', timeout=120_000)
        run_all(page)
        drive(page, folder)
